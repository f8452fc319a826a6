"""Solution 2: the best learning rate from a few runs.

Think       1. Half a step, a factor of sqrt(2) = 1.41, if the curve is a parabola. From 0.005 to
               0.02, a factor of 4, a grid in steps of 1.1 has 15 or 16 runs in place of 3.
            2. The difference is a factor of 1.2. The mean of three seeds is known to x 1.15^(1 /
               sqrt(3)) = 1.084, the ratio of two such means to x 1.084^sqrt(2) = 1.12: the
               difference is 1.6 standard errors. That is no evidence of a shift, nor that there
               is none: say "less than a factor of 1.5".
            3. A steep right side is fitted by a larger a and a vertex that is pulled to the left,
               away from the bad runs. Use only points near the lowest one (a factor of 2 to each
               side), say which, and look at what is left over.
"""
import numpy as np


def best_rate(rates, losses):
    x = np.log(rates)
    a, b, c = np.polyfit(x - x.mean(), losses, 2)
    if a < 1e-9 * np.ptp(losses):
        raise ValueError("the parabola has no minimum")
    vertex = x.mean() - b / (2 * a)
    if not x.min() <= vertex <= x.max():
        raise ValueError(f"the lowest point, {np.exp(vertex):.3g}, lies outside of the rates")
    return float(np.exp(vertex)), float(c - b * b / (4 * a))


def over_seeds(rates, losses):
    logs = np.log([best_rate(rates, row)[0] for row in losses])
    return float(np.exp(logs.mean())), float(np.exp(logs.std(ddof=1)))
