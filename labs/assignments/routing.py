"""Assignment 6: top-2 routing and the balance loss (paper section 7.3; Switch, equation 4).

Question    Each token is sent to two of eight experts. With which weights do their outputs count,
            and how does training keep all experts in use?
Formula     p = softmax(logits) over all experts. The two with the largest p are chosen; their
            weights are their p divided by the sum of the two.
            Fedus et al. (Switch Transformer, 2101.03961), equation 4, without its coefficient
            (0.01 in the paper):
                balance loss = E * sum over experts e of f_e P_e
            f_e is the share of the (token, choice) pairs that went to expert e, so the f_e of all
            experts add up to 1. P_e is the mean of p_e over the tokens, chosen or not.
Shapes,     logits (T, E) of T tokens and E experts, E >= 2. experts (T, 2) int64, the more probable
units       one first. weights (T, 2), without unit. The balance loss is a number without unit.
Given       torch. Do not loop over tokens. The weights need a gradient.
Passes      when a token worked out by hand is right, weights and experts are those of all tokens
            (and two equal experts give what one gives), the loss is 1 if balanced and E / 2 if two
            experts get everything, its gradient reaches the router, and model.py agrees.
Think       1. f_e has no gradient: counting does not differentiate. How does the loss balance
               anything? Write down the gradient with respect to P_e.
            2. Is the loss always at least 1? Try four experts, many tokens that can hardly decide,
               and some that are sure.
            3. Upcycled experts start equal. Why does the model then compute what the dense one
               computes only if the two weights add up to 1? And why must the weight of top-1
               routing not be divided by the sum?
"""


def top2(logits):
    """Return (weights, experts), both (T, 2), the more probable expert first."""
    raise NotImplementedError("assignment 6: write top2")


def balance_loss(logits, experts):
    """Return the balance loss, a tensor without dimensions. experts (T, 2) as top2 returns them."""
    raise NotImplementedError("assignment 6: write balance_loss")
