"""Assignment 2: the best learning rate from a few runs (paper sections 3.2 and 3.3, figure 3).

Question    Runs at 0.005, 0.01 and 0.02 have been made. The best rate is probably none of the
            three: where is it, and how sure is that?
Formula     Near the best rate the loss is a parabola of the logarithm of the rate,
                loss = a x^2 + b x + c,  x = log(rate),  lowest at x = -b / (2 a), if a > 0,
                                                         where the loss is c - b^2 / (4 a)
            The paper draws loss over rate in figure 3, and fits parabolas over batch sizes to
            points of equal loss (section 3.2). Neither formula is printed there.
Shapes,     rates (R,), above 0, R >= 3, in any order. losses (R,), or (S, R) for S seeds, S >= 2,
units       in nats. A rate has no unit; a spread of rates is a factor (1.2: "times or divided by
            1.2"), because rates are compared by ratios.
Given       the formula; numpy.
Passes      when parabolas worked out by hand come out, all points count (least squares, not the
            lowest three), other units of rate and loss only shift the result, a minimum that was
            not measured is refused, and the spread over seeds is a factor.
Think       1. The grid is in steps of a factor of 2. How far can the lowest grid point be from the
               vertex? How many runs does the parabola save against a grid in steps of 1.1?
            2. Two widths have their vertices at 0.010 and 0.012, with a spread over three seeds of
               x 1.15 each. Has the best rate moved with the width?
            3. The real curve rises faster on the right, where training diverges. Into which
               direction does that pull the vertex, and what would you do about it?
"""


def best_rate(rates, losses):
    """Return (rate, loss), both floats, at the vertex of the least-squares parabola.

    raises  ValueError if there is no minimum (a <= 0), or if it lies outside of the rates: then it
            was not measured, and the next run belongs there
    """
    raise NotImplementedError("assignment 2: write best_rate")


def over_seeds(rates, losses):
    """Return (rate, factor) of the vertices of all seeds. losses (S, R).

    rate    their geometric mean
    factor  exp of the standard deviation of their logarithms (over seeds, so divide by S - 1);
            1.0 if all seeds agree
    """
    raise NotImplementedError("assignment 2: write over_seeds")
