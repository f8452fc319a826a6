"""Solution 7: the base of NTK-aware RoPE.

Think       1. The slowest pair has i = D / 2 - 1, so its exponent is -(D - 2) / D. It must turn s
               times more slowly: theta'^(-(D - 2) / D) = theta^(-(D - 2) / D) / s, and so
               theta' = theta s^(D / (D - 2)). With the exponent 1 it would be stretched by
               s^((D - 2) / D) only, a little too little; the difference is large for small heads.
            2. Neighbors then differ by 1 / s of the angle, in every pair, the fastest included: the
               model has never seen so small an angle and must learn to tell them apart again.
            3. (1,000,000 / 10,000)^(62 / 64) = 87. That is far more than 4K to 32K needs (8), and
               the pairs in the middle turn at speeds that the model has not seen together: it must
               train to read them.
"""


def frequencies(theta, head_dim):
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def ntk_base(theta, head_dim, factor):
    return theta * factor ** (head_dim / (head_dim - 2))


def dynamic_base(theta, head_dim, factor, length, max_position):
    if length <= max_position:
        return theta
    return ntk_base(theta, head_dim, factor * length / max_position - (factor - 1))
