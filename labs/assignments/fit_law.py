"""Assignment 4: a scaling law and the best split of a budget (paper section 4.5, equations 2, 3).

Question    36 models have been trained: six sizes, six lengths each. What will a larger model
            reach, and how large should a model be that gets C FLOPs?
Formula     Equation 2, the form of Hoffmann et al. (2203.15556), in nats per token or per byte:
                L(N, D) = E + A / N^alpha + B / D^beta
            With the cost C = 6 N D, the loss is least at (equation 3)
                N / D = K^2 (C / 6)^eta,  K = (alpha A / (beta B))^(1 / (alpha + beta)),
                                        eta = (beta - alpha) / (alpha + beta)
Shapes,     n, d, loss: arrays (m,) of parameters (without the embedding), tokens and losses; m is
units       6 or more. A law is a tuple (E, A, alpha, B, beta). Count N and D in ones, not in
            billions: with another unit A and B are other numbers.
Given       the formula; numpy. scipy's curve_fit, which the paper uses, is allowed, but needs a
            good start and units near 1. Without it: for given exponents the law is linear in E, A
            and B, so np.linalg.lstsq gives these three, and only alpha and beta are searched for,
            on a grid that is refined around its best cell. Both lie between 0.05 and 1.
Passes      when the exponents of exact data come out to 0.01, a model of five times the compute of
            the largest run is predicted to 1 % from noisy data, and best_split is right in a case
            worked out by hand, has the lowest loss of its budget, and gives the paper's tokens per
            parameter.
Think       1. Derive equation 3: put D = C / (6 N) into equation 2 and set the derivative to 0.
               What does it say about the two terms A / N^alpha and B / D^beta at the best split?
            2. The six lengths are 10 N to 60 N. Why are alpha and beta harder to tell apart then
               than if every size had the same six lengths?
            3. Hoffmann et al. print A 406.4, alpha 0.34, B 410.7, beta 0.28; Besiroglu et al.
               (2404.10102) find A 482.01, alpha 0.3478, B 2085.43, beta 0.3658 in the same data.
               How many tokens per parameter does each give at Chinchilla's budget, 5.76e23 FLOPs?
               Which of them agrees with the advice of 20?
"""


def fit(n, d, loss):
    """Return the law (E, A, alpha, B, beta) that fits the losses best by least squares."""
    raise NotImplementedError("assignment 4: write fit")


def best_split(law, flops):
    """Return (N, D), the parameters and tokens with the lowest loss for C = 6 N D = flops."""
    raise NotImplementedError("assignment 4: write best_split")
