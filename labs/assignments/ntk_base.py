"""Assignment 7: the base of NTK-aware RoPE (paper section 7.2; YaRN 2309.00071, definition 1).

Question    A model was trained on 4,096 tokens. Which base of RoPE lets it read 16,384, so that the
            fastest pair tells neighbors apart as before, and the slowest is turned no further than
            in training?
Formula     RoPE turns pair i of a head by position * theta^(-2 i / D), i = 0 ... D / 2 - 1, in
            radians. To stretch it by a factor s (YaRN, section 3.1):
                theta' = theta * s^(D / (D - 2))
            With this the slowest pair turns s times more slowly, and the fastest as before.
            The dynamic form does nothing up to the trained length. Past it
                s = factor * length / max_position - (factor - 1)
Shapes,     theta: the base, above 1, without unit. head_dim: D, even, above 2. frequencies (D / 2,)
units       in radians per token, the fastest first. length and max_position in tokens.
Given       the formulas; numpy or torch, or neither.
Passes      when two bases worked out by hand come out (to 1e-4), the slowest frequency is divided
            by s and the fastest kept, the dynamic form starts at max_position and is continuous
            there, the 128K model's base is right, and model.py turns by the same angles.
Think       1. Derive the exponent D / (D - 2) from the demand that the slowest pair is stretched
               by s. Why is it not 1?
            2. Position interpolation divides every frequency by s. What does that do to two
               neighboring tokens, and to the fastest pair?
            3. ABF, a base of 1,000,000 in place of 10,000, stretches the slowest pair of D = 64 by
               which factor? Why does the paper train after it?
"""


def frequencies(theta, head_dim):
    """Return the D / 2 frequencies, the fastest first (a list, an array or a tensor)."""
    raise NotImplementedError("assignment 7: write frequencies")


def ntk_base(theta, head_dim, factor):
    """Return the base that stretches RoPE by `factor`, a float."""
    raise NotImplementedError("assignment 7: write ntk_base")


def dynamic_base(theta, head_dim, factor, length, max_position):
    """Return the base for an input of `length` tokens, a float: theta up to max_position."""
    raise NotImplementedError("assignment 7: write dynamic_base")
