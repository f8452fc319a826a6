"""Assignment 4. Losses of known laws, a split by hand, every split of a budget, the paper's."""
import numpy as np

from labs.assignments.tests.expect import near_ratio

# The paper's average law (figure 10), which counts N and D in 1e9, here in ones.
PAPER = (0.31, 7.15e-2 * 1e9 ** 0.29, 0.29, 3.00e-1 * 1e9 ** 0.23, 0.23)
SIZES = np.array([0.031e9, 0.11e9, 0.25e9, 0.49e9, 0.85e9, 2.0e9])


def loss_of(law, n, d):
    e, a, alpha, b, beta = law
    return e + a / n ** alpha + b / d ** beta


def grid():
    """Return n and d of the paper's 36 runs: 10 N to 60 N tokens."""
    n = np.repeat(SIZES, 6)
    return n, n * np.tile(np.arange(10, 61, 10), 6)


def test_exact_losses_give_the_law_back(student):
    n, d = grid()
    for law in (PAPER, (1.7, 400.0, 0.34, 400.0, 0.28)):
        found = student.fit(n, d, loss_of(law, n, d))
        for name, got, expected in zip(("E", "A", "alpha", "B", "beta"), found, law):
            if name in ("alpha", "beta"):
                assert abs(got - expected) <= 0.01, (
                    f"{name} of exact losses: expected {expected} within 0.01, got {got:.4f}")
        worst = np.abs(loss_of(found, n, d) - loss_of(law, n, d)).max()
        assert worst < 1e-3, f"largest error of a fit to exact losses: expected 0, got {worst:.2g}"


def test_a_run_of_five_times_the_compute_is_predicted(student):
    n, d = grid()
    for seed in range(3):
        noise = 1 + 0.002 * np.random.default_rng(seed).standard_normal(len(n))
        found = student.fit(n, d, loss_of(PAPER, n, d) * noise)
        larger = 2.0e9 * 5 ** 0.5, 120e9 * 5 ** 0.5
        near_ratio(loss_of(found, *larger), loss_of(PAPER, *larger),
                   "loss of 4.5B parameters and 268B tokens by a fit to 36 smaller runs with 0.2 % "
                   "of noise", 0.01, "within 1 %")


def test_a_split_by_hand(student):
    """Both exponents 1/2. With A = B the terms are equal at N = D; with A = 4 B at N = 16 D."""
    for a, n, d in ((1.0, 1e9, 1e9), (4.0, 4e9, 0.25e9)):
        got = student.best_split((1.0, a, 0.5, 1.0, 0.5), 6e18)
        near_ratio(got, (n, d), f"(N, D) of A = {a:g}, B = 1, both exponents 1/2, 6e18 FLOPs", 1e-4,
                   "N D = 1e18, and A / N^0.5 = B / D^0.5 at the optimum")


def test_no_other_split_of_the_budget_is_better(student):
    for law in (PAPER, (1.69, 406.4, 0.34, 410.7, 0.28)):
        for flops in (1e17, 1e21, 1e24):
            n, d = student.best_split(law, flops)
            near_ratio(6 * n * d, flops, "FLOPs of the best split, 6 N D", 1e-4, "the whole budget")
            others = np.geomspace(1e5, 1e13, 2001)
            losses = loss_of(law, others, flops / 6 / others)
            near_ratio(n, others[losses.argmin()], f"N of the lowest loss at {flops:g} FLOPs",
                       0.02, f"of 2001 splits, N = {others[losses.argmin()]:.3g} is the best")


def test_the_paper_s_tokens_per_parameter(student):
    n, d = student.best_split(PAPER, 1e21)
    near_ratio(d / n, 184, "tokens per parameter of the paper's average law at 1e21 FLOPs", 0.01,
               "the paper says 192, with exponents that were not rounded")
    n, d = student.best_split(PAPER, 1e24)
    near_ratio(d / n, 184 * 1000 ** (0.06 / 0.52), "the same at 1e24 FLOPs", 0.01,
               "D / N grows with C^0.115, because beta < alpha")
