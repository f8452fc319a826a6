"""Solution 6: top-2 routing and the balance loss.

Think       1. The gradient with respect to P_e is E f_e: the more pairs an expert gets, the more
               its probability is pushed down, and with it, in the next steps, its count.
            2. No. Of four experts, let three quarters of the tokens be undecided (p nearly 1/4
               each, experts 0 and 1 a little ahead), and one quarter sure of experts 2 and 3 (1/2
               each). Then f = 3/8, 3/8, 1/8, 1/8 and P = 3/16, 3/16, 5/16, 5/16, and the loss is
               4 (2 * 9/128 + 2 * 5/128) = 0.875, although experts 0 and 1 get three times as much.
               It is at least 1 if f and P have the same order.
            3. Two equal outputs y with weights w1, w2 give (w1 + w2) y, which is y only if the two
               add up to 1. With one expert the weight divided by itself is 1, whatever the
               router says: the model's loss then has no gradient with respect to the router.
"""
import torch


def top2(logits):
    weights, experts = logits.softmax(-1).topk(2)
    return weights / weights.sum(-1, keepdim=True), experts


def balance_loss(logits, experts):
    n_experts = logits.shape[-1]
    f = torch.bincount(experts.flatten(), minlength=n_experts) / experts.numel()        # (E,)
    return n_experts * (f * logits.softmax(-1).mean(0)).sum()
