"""Solution 4: a scaling law and the best split of a budget.

Think       1. L(N) = E + A N^-alpha + B (6 N / C)^beta. Its derivative is 0 where
               alpha A N^-alpha = beta B D^-beta: the terms are as beta to alpha, so they are equal
               if the exponents are. Solving for N with D = C / (6 N) gives
               N = K (C / 6)^(beta / (alpha + beta)), and N / D = N^2 / (C / 6).
            2. D / N varies by 6 only, while N varies by 65: along most of the data D grows with
               N, and a term N^-alpha can stand in for a part of D^-beta. A wide range of D / N
               at each size would separate them, but costs more.
            3. Hoffmann's printed constants give 93 tokens per parameter (32B and 3.0T; 44 to 196
               within the rounding of the exponents), Besiroglu's 18 (72B and 1.3T): only the refit
               agrees with the advice of 20, and with Chinchilla itself, 70B parameters and 1.4T
               tokens.
"""
import numpy as np


def fit(n, d, loss):
    low, high = np.array([0.05, 0.05]), np.array([1.0, 1.0])        # of alpha and beta
    for _ in range(10):
        best = (np.inf,)
        for alpha in np.linspace(low[0], high[0], 7):
            for beta in np.linspace(low[1], high[1], 7):
                terms = np.stack([np.ones_like(loss), n ** -alpha, d ** -beta], 1)
                size = terms.mean(0)                # so that the three columns are alike in size
                constants = np.linalg.lstsq(terms / size, loss, rcond=None)[0] / size
                error = ((terms @ constants - loss) ** 2).sum()
                if error < best[0]:
                    best = error, alpha, beta, constants
        reach = (high - low) / 3                    # two cells to each side of the best
        low = np.maximum(best[1:3] - reach, 0.05)
        high = np.minimum(best[1:3] + reach, 1.0)
    _, alpha, beta, (e, a, b) = best
    return float(e), float(a), float(alpha), float(b), float(beta)


def best_split(law, flops):
    _, a, alpha, b, beta = law
    k = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = k * (flops / 6) ** (beta / (alpha + beta))
    return n, flops / 6 / n
