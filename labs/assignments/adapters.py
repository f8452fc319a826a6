"""The tests call your functions through this file, and through no other.

As it stands it takes them from the stubs beside it. If you write your code in other files, change
the imports here, and the calls if your functions are made differently. An import names a file in
the folder of this one. Each import is inside its function: a file of yours that cannot be imported
then costs the points of its own assignment only.
"""


def mup_table(width, layers, base=256, init_std=0.1, lr=0.01, scale_emb=12.0, scale_depth=1.4):
    from mup_table import mup_table
    return mup_table(width, layers, base, init_std, lr, scale_emb, scale_depth)


def lr_at(step, peak, floor, warmup, decay_start, half_life):
    from lr_at import lr_at
    return lr_at(step, peak, floor, warmup, decay_start, half_life)


def fit(n, d, loss):
    from fit_law import fit
    return fit(n, d, loss)


def best_split(law, flops):
    from fit_law import best_split
    return best_split(law, flops)


def best_rate(rates, losses):
    from parabola import best_rate
    return best_rate(rates, losses)


def over_seeds(rates, losses):
    from parabola import over_seeds
    return over_seeds(rates, losses)


def answer_logp(logits, tokens, is_answer):
    from dpo_loss import answer_logp
    return answer_logp(logits, tokens, is_answer)


def dpo_loss(policy, reference, beta):
    from dpo_loss import dpo_loss
    return dpo_loss(policy, reference, beta)


def top2(logits):
    from routing import top2
    return top2(logits)


def balance_loss(logits, experts):
    from routing import balance_loss
    return balance_loss(logits, experts)


def frequencies(theta, head_dim):
    from ntk_base import frequencies
    return frequencies(theta, head_dim)


def ntk_base(theta, head_dim, factor):
    from ntk_base import ntk_base
    return ntk_base(theta, head_dim, factor)


def dynamic_base(theta, head_dim, factor, length, max_position):
    from ntk_base import dynamic_base
    return dynamic_base(theta, head_dim, factor, length, max_position)
