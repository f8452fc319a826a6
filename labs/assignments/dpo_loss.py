"""Assignment 5: the loss of DPO (paper section 7.1; Rafailov et al. 2305.18290, equation 7).

Question    Of two answers to a prompt, one is preferred. How does a model learn that without a
            reward model?
Formula     With the log-probability log p(w) of the chosen answer and log p(l) of the rejected one,
                loss = -log sigmoid(margin)
                margin = beta * ((log policy(w) - log reference(w))
                                 - (log policy(l) - log reference(l)))
            The log-probability of an answer is the sum over its tokens of the log-probability of
            each token, given all before it. Tokens of the prompt do not count.
Shapes,     policy, reference (P, 2): for each of P pairs the log-probabilities of (chosen,
units       rejected), in nats, whole answers. logits (B, T, V): logits[:, t] predict the token at
            t + 1. tokens (B, T) int64: the text itself. is_answer (B, T) bool: which of the tokens
            belong to the answer; never the first, which nothing predicts.
Given       torch. Margins may be large (some thousands), and so may logits: loss and
            log-probability must stay finite. Both need a gradient.
Passes      when the loss of pairs worked out by hand is right to 1e-5, its gradient is that of the
            closed form, large margins are finite, the log-probabilities of answers are those of a
            loop over the tokens, and family/dpo.py agrees.
Think       1. What is the loss, and its gradient, before the first update? What is wrong if your
               first logged loss is not 0.693?
            2. The loss falls, and the log-probability of the chosen answer falls as well. How can
               that be, and what in the formula allows it?
            3. If 20 % of the labels are flipped, which margin has the lowest expected loss? What
               then is the log-ratio at beta = 0.1 and at beta = 1? (And without flips?)
"""


def answer_logp(logits, tokens, is_answer):
    """Return (B,), the log-probability of each answer in nats."""
    raise NotImplementedError("assignment 5: write answer_logp")


def dpo_loss(policy, reference, beta):
    """Return (P,), the loss of each pair in nats (not its mean)."""
    raise NotImplementedError("assignment 5: write dpo_loss")
