"""Assignment 6. A token by hand, properties of the weights and the loss, and model.py."""
import torch

from labs.assignments.tests.expect import near
from model import MiniCPMConfig, MoE, routing_metrics


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_token_by_hand(student):
    """Probabilities 1/10, 4/10, 2/10, 3/10: experts 1 and 3, with 4/7 and 3/7."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.1, 0.25, 0.25001]]).log()
    weights, experts = student.top2(logits)
    near(experts, [[1, 3], [0, 3]], "experts of the probabilities .1 .4 .2 .3 and .4 .1 .25 .25001",
         hint="the two largest, the largest first")
    near(weights, [[4 / 7, 3 / 7], [0.4 / 0.65001, 0.25001 / 0.65001]], "their weights", 1e-5,
         "each probability divided by the sum of the two")


def test_equal_experts_give_what_one_expert_gives(student):
    """So an upcycled model computes what the dense model computes. And MoE of model.py agrees."""
    config = MiniCPMConfig(vocab_size=8, n_layer=1, n_head=2, n_embd=16, n_ff=24, num_experts=6)
    moe, x = MoE(config), random(1, 40, 16, seed=1)
    for i, parameter in enumerate(moe.parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=i)
    weights, experts = student.top2(x[0] @ moe.router.weight.T)
    near(weights.sum(1), torch.ones(40), "sum of the two weights of 40 tokens", 1e-5, "always 1")
    y, (_, chosen) = moe(x)
    near(experts, chosen[0], "experts of 40 tokens", hint="model.MoE")
    outputs = []                                    # of every expert, for every token: (E, T, C)
    for w_in, w_out in zip(moe.experts.w_in, moe.experts.w_out):
        gate, up = (x[0] @ w_in.T).chunk(2, -1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ w_out.T)
    picked = torch.stack(outputs)[experts, torch.arange(40)[:, None]]                   # (T, 2, C)
    near((weights[..., None] * picked).sum(1), y[0], "output of 40 tokens by your weights", 1e-4,
         "model.MoE")


def test_balanced_is_1_and_two_experts_for_everything_is_half_of_all(student):
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    even = torch.zeros(4, 8)
    near(student.balance_loss(even, pairs), 1.0, "balance loss, 8 experts, all used alike", 1e-5,
         "8 * 8 * (1/8 * 1/8) = 1: f_e is a share of the 2 T pairs")
    certain = torch.tensor([[30.0, 30, 0, 0, 0, 0, 0, 0]]).expand(4, 8)
    near(student.balance_loss(certain, torch.tensor([[0, 1]] * 4)), 4.0,
         "balance loss, two of 8 experts get every token", 1e-5, "8 * 2 * (1/2 * 1/2) = 4")
    # Three tokens to (0, 1), one to (1, 2), with P = 0.5, 0.25, 0.25: 3 (3/8/2 + 4/8/4 + 1/8/4)
    logits = torch.tensor([[0.5, 0.25, 0.25]] * 4).log()
    near(student.balance_loss(logits, torch.tensor([[0, 1], [0, 1], [0, 1], [1, 2]])), 1.03125,
         "balance loss, f = 3/8, 4/8, 1/8 and P = 1/2, 1/4, 1/4", 1e-5,
         "3 * (3/16 + 4/32 + 1/32)")


def test_the_gradient_reaches_the_router(student):
    """d loss / d logits = E p_e (f_e - sum f p) / T: it lowers the logits of crowded experts."""
    logits = random(12, 5, seed=3).requires_grad_()
    weights, _ = student.top2(logits)
    assert isinstance(weights, torch.Tensor) and weights.requires_grad, (
        "weights: expected a tensor with a gradient to the logits, through which the model's loss "
        "trains the router")
    experts = logits.detach().topk(2).indices
    loss = student.balance_loss(logits, experts)
    assert isinstance(loss, torch.Tensor) and loss.requires_grad, (
        "balance loss: expected a tensor with a gradient, through P_e")
    (gradient,) = torch.autograd.grad(loss, logits)
    p = logits.detach().softmax(-1)
    f = torch.stack([(experts == e).sum() / 24 for e in range(5)])
    near(gradient, 5 / 12 * p * (f - (p * f).sum(1, keepdim=True)),
         "gradient with respect to the logits", 1e-5, "through P_e alone, the mean over all tokens")


def test_model_py_has_the_same_loss(student):
    for experts_in_all, tokens, seed in ((4, 16, 5), (8, 64, 6)):
        config = MiniCPMConfig(num_experts=experts_in_all, balance_coef=1.0)
        logits = random(tokens, experts_in_all, seed=seed)
        _, experts = logits.topk(2)
        expected = routing_metrics(config, logits[None, None], experts[None, None])["balance_loss"]
        near(student.balance_loss(logits, experts), expected,
             f"balance loss of {tokens} random tokens, {experts_in_all} experts", 1e-5,
             "model.routing_metrics with one layer and one sequence")
