"""Assignment 5. Pairs by hand, the gradient in closed form, a loop over tokens, family/dpo.py."""
import math

import torch

from family import dpo
from labs.assignments.tests.expect import near


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pairs_by_hand(student):
    start = torch.tensor([[-20.0, -30.0], [-7.0, -3.0]])
    near(student.dpo_loss(start, start, 0.1), [math.log(2)] * 2, "loss if policy = reference", 1e-5,
         "the margin is 0: ln 2 for each pair")
    # log-ratios +2 and -2, so the margin is 0.5 * 4 = 2; then the same pair the other way round
    policy = torch.tensor([[-10.0, -14.0], [-14.0, -10.0]])
    reference = torch.tensor([[-12.0, -12.0], [-12.0, -12.0]])
    near(student.dpo_loss(policy, reference, 0.5), [0.126928, 2.126928],
         "loss of log-ratios (2, -2) and (-2, 2), beta 0.5", 1e-5, "log(1 + e^-2), log(1 + e^2)")


def test_the_gradient_is_that_of_the_closed_form(student):
    """d loss / d log policy(w) = -beta sigmoid(-margin), and its negative for the other answer."""
    policy, reference = random(6, 2, seed=1).requires_grad_(), random(6, 2, seed=2)
    (gradient,) = torch.autograd.grad(student.dpo_loss(policy, reference, 0.3).sum(), policy)
    ratio = (policy - reference).detach()
    push = 0.3 * torch.sigmoid(-0.3 * (ratio[:, 0] - ratio[:, 1]))
    near(gradient, torch.stack((-push, push), 1), "gradient with respect to the policy", 1e-5,
         "-beta sigmoid(-margin) for the chosen answer, + for the rejected one")


def test_large_margins_are_finite(student):
    policy = torch.tensor([[5000.0, -5000.0], [-5000.0, 5000.0]], requires_grad=True)
    loss = student.dpo_loss(policy, torch.zeros(2, 2), 1.0)
    near(loss, [0.0, 10_000.0], "loss at the margins 10,000 and -10,000", 1e-5,
         "0 and 10,000: use logsigmoid, log(sigmoid(x)) is log(0)")
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    near(gradient, [[0.0, 0.0], [-1.0, 1.0]], "gradient at the margins 10,000 and -10,000", 1e-5)


def test_the_log_probability_of_an_answer(student):
    """A loop over the tokens, each predicted by the logits one place before it."""
    logits = (100 * random(2, 6, 5, seed=3)).requires_grad_()
    tokens = torch.tensor([[1, 4, 2, 0, 3, 3], [2, 2, 1, 4, 0, 1]])
    is_answer = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    expected = []
    for b in range(2):
        total = 0.0
        for t in range(1, 6):
            if is_answer[b, t]:
                row = logits[b, t - 1].tolist()
                log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
                total += row[tokens[b, t]] - log_sum
        expected.append(total)
    found = student.answer_logp(logits, tokens, is_answer)
    near(found, expected, "log-probability of two answers of 2 and 5 tokens", 1e-5,
         "a sum over the tokens; logits[:, t] predict token t + 1")
    assert isinstance(found, torch.Tensor) and found.requires_grad, (
        "log-probability of two answers: expected a tensor with a gradient to the logits")


def test_family_dpo_has_the_same_loss(student):
    for seed, beta in ((4, 0.1), (5, 1.0)):
        policy, reference = 30 * random(9, 2, seed=seed), 30 * random(9, 2, seed=seed + 10)
        near(student.dpo_loss(policy, reference, beta), dpo.dpo_loss(policy, reference, beta),
             f"loss of nine random pairs, beta {beta}", 1e-4, "family.dpo.dpo_loss")
