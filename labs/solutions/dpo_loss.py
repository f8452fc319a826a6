"""Solution 5: the loss of DPO.

Think       1. ln 2 = 0.693, because policy and reference are equal, and the gradient is beta / 2
               per log-probability. Any other first loss says that the two are not computed alike:
               another template, dropout, another dtype, or a mask that is off by one.
            2. The loss sees only the difference of the two log-ratios. If both fall, and the
               rejected one faster, the margin grows and the loss falls. The probability goes to
               other texts. An SFT term on the chosen answer holds it.
            3. The expected loss -0.8 log sigmoid(m) - 0.2 log sigmoid(-m) is lowest where
               sigmoid(m) = 0.8, m = ln(0.8 / 0.2) = ln 4 = 1.39. The difference of the log-ratios
               is ln 4 / beta: 13.9 nats at beta 0.1, 1.4 at beta 1. So beta sets how far the policy
               goes. Without flips the best margin is infinite for every beta, and only the number
               of updates limits it.
"""
import torch.nn.functional as F


def answer_logp(logits, tokens, is_answer):
    log_p = logits[:, :-1].log_softmax(-1)                                  # (B, T - 1, V)
    chosen = log_p.gather(-1, tokens[:, 1:, None])[..., 0]                  # (B, T - 1)
    return (chosen * is_answer[:, 1:]).sum(-1)


def dpo_loss(policy, reference, beta):
    ratio = policy - reference
    return -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))
