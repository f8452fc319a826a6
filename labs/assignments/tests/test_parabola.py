"""Assignment 2. Vertices by hand, least squares, units, minima that were not measured, seeds."""
import numpy as np

from labs.assignments.tests.expect import near_ratio, raises_value_error


def test_vertices_by_hand(student):
    """In steps of a factor of 2, x = -1, 0, 1: a = 0.15, b = -0.05, c = 2 give x = 1/6."""
    near_ratio(student.best_rate([0.005, 0.01, 0.02], [2.1, 2.0, 2.1]), (0.01, 2.0),
               "(rate, loss), losses 2.1, 2.0, 2.1 at 0.005, 0.01, 0.02", 1e-6,
               "symmetric in log(rate), so the middle")
    near_ratio(student.best_rate([0.02, 0.005, 0.01], [2.1, 2.2, 2.0]),
               (0.01 * 2 ** (1 / 6), 2 - 0.0025 / 0.6),
               "(rate, loss), losses 2.2, 2.0, 2.1 at 0.005, 0.01, 0.02", 1e-6,
               "1/6 of a step to the right of 0.01")


def test_all_points_count(student):
    """Least squares through five points that lie on no parabola."""
    rates = np.array([0.0025, 0.005, 0.01, 0.02, 0.04])
    losses = np.array([2.40, 2.13, 2.00, 2.07, 2.45])
    # x = -2 ... 2: b = sum(x y) / 10; a = (sum(x^2 y) - 2 sum(y)) / 14; c = (sum(y) - 10 a) / 5
    b = (-2 * 2.40 - 2.13 + 2.07 + 2 * 2.45) / 10
    a = (4 * 2.40 + 2.13 + 2.07 + 4 * 2.45 - 2 * losses.sum()) / 14
    c = (losses.sum() - 10 * a) / 5
    near_ratio(student.best_rate(rates, losses), (0.01 * 2 ** (-b / 2 / a), c - b * b / 4 / a),
               "(rate, loss) of five points", 1e-6, "least squares over all of them")


def test_units_only_shift_the_result(student):
    rates, losses = np.array([0.004, 0.01, 0.02, 0.05]), np.array([3.3, 3.0, 3.05, 3.6])
    rate, loss = student.best_rate(rates, losses)
    near_ratio(student.best_rate(1000 * rates, losses), (1000 * rate, loss),
               "(rate, loss) with rates x 1000", 1e-5, "the rate x 1000, the same loss")
    near_ratio(student.best_rate(rates, 2 * losses + 5), (rate, 2 * loss + 5),
               "(rate, loss) with losses x 2 + 5", 1e-5, "the same rate, the loss x 2 + 5")
    near_ratio(student.best_rate(1 / rates, losses)[0], 1 / rate,
               "rate with 1 / rates", 1e-5, "1 / rate: the axis is the logarithm")


def test_a_minimum_that_was_not_measured_is_refused(student):
    rates = [0.005, 0.01, 0.02]
    for losses, why in (([2.0, 2.1, 2.3], "losses 2.0, 2.1, 2.3: the vertex is left of 0.005"),
                        ([2.3, 2.1, 2.0], "losses 2.3, 2.1, 2.0: the vertex is right of 0.02"),
                        ([2.0, 2.1, 2.0], "losses 2.0, 2.1, 2.0: the parabola has a maximum"),
                        ([2.2, 2.1, 2.0], "losses 2.2, 2.1, 2.0: a line has no minimum")):
        raises_value_error(lambda: student.best_rate(rates, losses), why)
    # x = -1, 0, 1: a = 0.08, b = 0.1, c = 2.02 give x = -0.625
    near_ratio(student.best_rate(rates, [2.0, 2.02, 2.2]), (0.01 * 2 ** -0.625, 1.98875),
               "(rate, loss), losses 2.0, 2.02, 2.2 at 0.005, 0.01, 0.02", 1e-6,
               "the vertex lies between the rates, although the lowest loss is at their end")


def test_the_spread_over_seeds_is_a_factor(student):
    """Parabolas with vertices at 0.005, 0.01, 0.04: logarithms (base 2) -1, 0, 2 around 0.01. Their
    curvatures differ, so the vertex of the averaged losses is another one."""
    rates = np.array([0.0025, 0.005, 0.01, 0.02, 0.08])
    x = np.log2(rates / 0.01)
    losses = np.stack([2 + a * (x - v) ** 2 for a, v in ((0.1, -1), (0.2, 0), (0.4, 2))])
    near_ratio(student.over_seeds(rates, losses), (0.01 * 2 ** (1 / 3), 2 ** (7 / 3) ** 0.5),
               "(rate, factor) of three seeds with vertices at 0.005, 0.01, 0.04", 1e-5,
               "mean of the logarithms 1/3; their variance (16 + 1 + 25) / 9 / 2 = 7/3")
    near_ratio(student.over_seeds(rates, losses[[1, 1]]), (0.01, 1.0),
               "(rate, factor) of two equal seeds", 1e-5, "no spread is the factor 1")
