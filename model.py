"""MiniCPM (arXiv 2404.06395): the architecture and muP.

A pre-norm transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU) with three scales that let
its hyper-parameters transfer over width and depth: the embedding is multiplied by scale_emb, each
residual branch by scale_depth / sqrt(n_layer), and the logits are divided by width_mult = n_embd /
dim_model_base. How each kind of parameter is initialized and how fast it learns is one table:
`mup_table`.

Numerics, the same for one process and for many: parameters are float32 master weights, cast to the
compute dtype for each product; the residual stream, norms, RoPE, softmax and loss are float32. So
is everything computed from the logits; the logits themselves are a product in the compute dtype, so
in bfloat16 each is rounded to 8 significant bits, as in the released code.

Letters in shape comments: B samples, T tokens, S keys (cached ones included), C n_embd, H n_head, K
n_kv_head, G = H / K, D head_dim, F n_ff, E num_experts, k num_experts_per_tok, L n_layer, V
vocab_size, N = B * T.
"""
import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import BadInput, must_be_positive, must_not_be_negative
from engine import ops

PACKED_ROWS = 1024                      # logits of a packed model that are held at a time
ROUTER_STD = 0.1                        # at dim_model_base; paper section 7.3: variance 0.01


@dataclass(frozen=True)
class MiniCPMConfig:
    """The architecture. The defaults are MiniCPM-2.4B."""
    vocab_size: int = 122753            # rows of the embedding; train.py takes the tokenizer's
    n_layer: int = 40                   # blocks
    n_head: int = 36                    # query heads
    n_kv_head: int | None = None        # key/value heads, a divisor of n_head; unset: n_head
    n_embd: int = 2304                  # width of the residual stream
    head_dim: int | None = None         # even; unset: n_embd / n_head (in the paper always 64)
    n_ff: int = 5760                    # width inside the SwiGLU (in the paper always 2.5 n_embd)
    rms_norm_eps: float = 1e-5          # added to the mean square under the root
    tie_word_embeddings: bool = True    # True: the output head is the embedding
    # ---- mixture of experts (paper section 7.3)
    num_experts: int = 0                # experts in every feed-forward (paper: 8); 0: dense
    num_experts_per_tok: int = 2        # experts per token; 1: as Switch Transformer (see MoE)
    balance_coef: float = 0.01          # weight of the load-balance loss (paper: 0.01)
    router_z_coef: float = 0.0          # weight of the z-loss, which keeps router logits small
    # ---- positions (paper section 7.2)
    max_position: int = 4096            # length that RoPE is scaled for; longer inputs are accepted
    rope_theta: float = 10000.0         # RoPE's base
    rope_scaling: Literal['none', 'linear', 'dynamic', 'longrope'] = 'none'
                                        # dynamic: the 128K model; longrope: MiniCPM4
    rope_factor: float = 1.0            # linear: divides positions; dynamic: growth of the base
    rope_short_factor: tuple[float, ...] = ()   # longrope: head_dim / 2 frequency divisors
    rope_long_factor: tuple[float, ...] = ()    # longrope: the same past original_max_position
    original_max_position: int | None = None    # longrope: length before it; unset: max_position
    # ---- muP (paper table 7)
    mup: bool = True                    # False: all scales 1, one learning rate (the control)
    mup_lr: bool = True                 # False: one learning rate for all (DPO, fine-tuning)
    scale_emb: float = 12.0             # factor on the embedding's output
    scale_depth: float = 1.4            # each branch is scaled by scale_depth / sqrt(n_layer)
    dim_model_base: int = 256           # width at which the learning rate was tuned
    init_std: float | None = None       # of matrices at dim_model_base; unset: 0.1; no muP: 0.02
    embd_init_std: float | None = None  # of the embedding at every width; unset: init_std

    def problems(self):
        """Return one line per impossible value or combination."""
        problems = must_be_positive(
            self, "vocab_size n_layer n_head n_kv_head n_embd head_dim n_ff rms_norm_eps "
                  "max_position rope_theta rope_factor original_max_position "
                  "scale_emb scale_depth dim_model_base init_std embd_init_std")
        if problems:
            return problems
        problems = must_not_be_negative(self, "num_experts balance_coef router_z_coef")
        if self.n_head % self.kv_heads:
            problems.append(f"--n_kv_head={self.n_kv_head}: does not divide --n_head={self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            problems.append(f"--n_head={self.n_head}: does not divide --n_embd={self.n_embd}; "
                            "give --head_dim or another width")
        elif self.head_size % 2:
            problems.append(f"--head_dim={self.head_size}: must be even (RoPE rotates pairs)")
        if self.num_experts > 0:
            if not 0 < self.num_experts_per_tok <= self.num_experts:
                problems.append(f"--num_experts_per_tok={self.num_experts_per_tok}: must be from 1 "
                                f"to --num_experts={self.num_experts}")
            problems += [f"--{name}={getattr(self, name)}: must be a multiple of 8 with experts, "
                         "for the grouped matrix product"
                         for name in ("n_embd", "n_ff") if getattr(self, name) % 8]
        if self.rope_scaling == "dynamic" and self.head_size == 2:
            problems.append("--head_dim=2: dynamic RoPE needs 4 or more (its base grows with the "
                            "power D / (D - 2))")
        if self.rope_scaling == "longrope":
            for name in ("rope_short_factor", "rope_long_factor"):
                factors = getattr(self, name)
                if len(factors) != self.head_size // 2:
                    problems.append(f"--{name}: longrope takes head_dim / 2 = "
                                    f"{self.head_size // 2} numbers, not {len(factors)}")
                elif min(factors) <= 0:
                    problems.append(f"--{name}: all of its numbers must be above 0")
            if self.original_length == 1:
                problems.append("--original_max_position: longrope needs 2 or more (its attention "
                                "factor is divided by the logarithm)")
        elif self.rope_short_factor or self.rope_long_factor:
            problems.append("--rope_short_factor, --rope_long_factor: only with "
                            "--rope_scaling=longrope")
        if self.rope_factor != 1 and self.rope_scaling not in ("linear", "dynamic"):
            problems.append(f"--rope_factor={self.rope_factor}: only with "
                            "--rope_scaling=linear or dynamic")
        return problems

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_size(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def original_length(self):          # longrope's
        return self.original_max_position or self.max_position

    def rope_changes_within(self, length):
        """Return whether shorter inputs are rotated otherwise than those of `length` tokens."""
        if self.rope_scaling == "longrope":
            return self.max_position <= self.original_length < length
        return self.rope_scaling == "dynamic" and length > self.max_position

    @property
    def width_mult(self):  # 9 for the 2.4B: logits and matrix learning rates are divided by it
        return self.n_embd / self.dim_model_base if self.mup else 1.0

    @property
    def embedding_scale(self):
        return self.scale_emb if self.mup else 1.0

    @property
    # sqrt of the layers, not of the 2 n_layer branches (as in the released code)
    def residual_scale(self):
        return self.scale_depth / math.sqrt(self.n_layer) if self.mup else 1.0

    @property
    def n_params_non_embedding(self):   # the paper's N
        return self.count_non_embedding(self.num_experts)

    @property
    def n_params_active(self):          # the part of N that one token passes through
        return self.count_non_embedding(self.num_experts_per_tok)

    def count_non_embedding(self, experts):
        """Return the number of parameters without embedding and head, counting so many experts per
        layer."""
        return self.count_matrices(experts) + (2 * self.n_layer + 1) * self.n_embd  # and the norms

    def count_matrices(self, experts):
        """Return the number of weights that multiply vectors, without the head's."""
        attention = 2 * self.n_embd * self.head_size * (self.n_head + self.kv_heads)
        feed_forward = 3 * self.n_embd * self.n_ff
        if self.num_experts:
            feed_forward = experts * feed_forward + self.num_experts * self.n_embd  # and the router
        return self.n_layer * (attention + feed_forward)

    @property
    def n_params(self):                 # with the embedding, and the head if it is untied
        tables = 1 if self.tie_word_embeddings else 2
        return self.n_params_non_embedding + tables * self.vocab_size * self.n_embd

    def flops_per_token(self, block_size):
        """Return the FLOPs of forward and backward per token: 6 per active weight of a matrix, head
        included (norms and the lookup of the embedding are not counted), plus attention's 12
        n_layer n_head head_dim T (PaLM, appendix B: the causal mask is not discounted)."""
        weights = self.count_matrices(self.num_experts_per_tok) + self.vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_head * self.head_size * block_size


# ---- muP: the paper's table 7, one row per role

@dataclass(frozen=True)
class Role:
    std: float                          # of the normal init; 0: ones
    lr: float                           # factor on the learning rate
    decay: bool                         # whether weight decay applies


def mup_table(config):
    """Return {role: Role}. Forward scales act where the tensors are used, in MiniCPM and Block.

    | role      | forward scale           | init std                      | LR factor      | decay |
    |-----------|-------------------------|-------------------------------|----------------|-------|
    | embedding | output x scale_emb      | embd_init_std                 | 1              | no    |
    | head      | logits / width_mult     | init_std (tied: embedding)    | 1              | no    |
    | matrix    | branch x residual_scale | init_std / sqrt(width_mult)   | 1 / width_mult | yes   |
    | experts   | as matrix               | as matrix                     | 1 / width_mult | yes   |
    | router    | 1                       | ROUTER_STD / sqrt(width_mult) | 1 / width_mult | no    |
    | norm      | 1                       | ones                          | 1              | no    |

    The paper leaves open whether the tied embedding is one of its "2-D tensors". Here it is not:
    both rules transfer the learning rate, but only this one keeps activations equal across widths
    (tests/test_mup.py).

    The router is one: its input grows with the width, its output (one logit per expert) does not.
    With one std and one learning rate at all widths its logits would be proportional to width^0.45
    at the start and width^0.87 after ten updates, so wide routers would be sure of their choice
    before they have learned anything; with the LR factor alone width^0.45 and width^0.58; with both
    width^-0.05 and width^-0.03 (labs/mup_coordinates.py, widths 64 to 512). The paper states the
    variance 0.01 for its only width. It is init_std squared, and read here as init_std is, before
    the division: taken as the value at width 2304, the logits of a new router would have a std of
    4.8 instead of 1.6. The router does not decay: nothing should pull it to equal probabilities but
    the balance loss, which has a coefficient of its own.

    Decay is AdamW's: an update subtracts lr x LR factor x weight_decay of a weight, so the LR
    factor divides the decay of wide matrices too. To keep it the same at every width, multiply
    weight_decay by width_mult.
    """
    std = config.init_std or (0.1 if config.mup else 0.02)
    matrix_std = std / math.sqrt(config.width_mult)
    matrix_lr = 1 / config.width_mult if config.mup_lr else 1.0
    return {
        "embedding": Role(config.embd_init_std or std, 1.0, False),
        "head": Role(std, 1.0, False),
        "matrix": Role(matrix_std, matrix_lr, True),
        "experts": Role(matrix_std, matrix_lr, True),
        "router": Role(ROUTER_STD / math.sqrt(config.width_mult), matrix_lr, False),
        "norm": Role(0.0, 1.0, False),
    }


ROLE_OF_MODULE = {
    "wte": "embedding", "lm_head": "head",
    "wqkv": "matrix", "wo": "matrix", "w_in": "matrix", "w_out": "matrix",
    "experts": "experts", "router": "router",
    "attn_norm": "norm", "mlp_norm": "norm", "norm": "norm",
}


def role_of(name):
    """Return the role of a parameter by the module that holds it. Raises KeyError for an unknown
    name."""
    return ROLE_OF_MODULE[name.split(".")[-2]]


def seeded_normal(seed, name, shape):
    """Return standard normal values that depend on the seed and the parameter's name alone, float32
    on the CPU."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def init_weights(model, seed, copy=torch.Tensor.copy_):
    """Initialize every parameter from (seed, its own name): the same values however the model is
    built or sharded.

    copy  copy(parameter, values) fills a parameter, or the shard of it that is local
    """
    table = mup_table(model.config)
    for name, p in model.named_parameters():
        std = table[role_of(name)].std
        if std == 0:
            p.fill_(1)
        else:
            copy(p, seeded_normal(seed, name, p.shape) * std)


def optimizer_groups(model, weight_decay):
    """Return AdamW parameter groups, one per role: each has params, names, role, lr_scale and
    weight_decay.

    The loop sets group["lr"] = lr_at(step) * group["lr_scale"] at every step.
    """
    groups = []
    for role, row in mup_table(model.config).items():
        named = {name: p for name, p in model.named_parameters() if role_of(name) == role}
        if named:
            groups.append({"params": list(named.values()), "names": list(named), "role": role,
                           "lr_scale": row.lr, "weight_decay": weight_decay * row.decay})
    seen = [p for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen)) and set(seen) == set(model.parameters()), \
        "groups must cover the model exactly"
    return groups


# ---- modules, in the order in which data flows

@dataclass
class Numerics:
    """How to compute, shared by all modules; may change at any time."""
    dtype: torch.dtype = torch.float32  # of matrices and their inputs
    flash: bool = True                  # fused attention kernels, if faster (ops.attention)
    compiled: bool = False              # compile the slices of the loss (ops.cross_entropy)


class Linear(nn.Linear):
    """nn.Linear without bias; the float32 master weight is cast to the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return ops.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32. x (..., C) of any dtype -> (..., C) float32.

    The weight is rounded to the compute dtype like all weights of a block: FSDP gathers a block in
    that dtype, and one process computes by the same rule.
    """

    def __init__(self, width, eps, numerics):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.numerics = eps, numerics

    def forward(self, x):
        weight = self.weight.to(self.numerics.dtype).float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps)


# Compiled, every use would compute the cosines again: a tenth of a CPU step.
@torch.compiler.disable
def rope_tables(config, length, device):
    """Return cos, and sin with its first half negated, for positions 0 to length - 1.

    Both are (length, D) float32; see rotate. The forms of rope_scaling:

    dynamic   NTK-aware (paper section 7.2): past max_position the base grows with the current
              length. Some runtimes keep the larger base after a long input; this does not.
    longrope  as MiniCPM4's released code: the long factors if max_position exceeds
              original_max_position, however short the input is; else if the input does.
              transformers' LongRoPE chooses by the current length alone. The attention factor is
              1 if max_position does not exceed original_max_position (transformers' rule).

    If rope_changes_within(length), the tables depend on `length` at every position. It is the
    length of the whole batch, so what shares a forward pass is rotated alike: the documents of a
    packed row by the row's length, the rows of a batch by the longest one's. A document alone would
    then give other logits (up to the limit it would not).
    """
    D, theta, scale = config.head_size, config.rope_theta, 1.0
    if config.rope_scaling == "dynamic":
        ratio = max(length, config.max_position) / config.max_position
        theta *= (config.rope_factor * ratio - (config.rope_factor - 1)) ** (D / (D - 2))
    # (D/2,)
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    if config.rope_scaling == "longrope":
        original = config.original_length
        extended = max(length, config.max_position) > original
        factors = config.rope_long_factor if extended else config.rope_short_factor
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float32, device=device)
        growth = max(1, config.max_position / original)
        scale = math.sqrt(1 + math.log(growth) / math.log(original))
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)                           # (T, D/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Apply RoPE in the half-split layout. x (B, heads, T, D), cos and signed sin (T, D) -> shape
    and dtype of x."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with H query heads that share K key/value heads. x (B, T, C) -> (B, T,
    C)."""

    def __init__(self, config, layer, numerics):
        super().__init__()
        self.layer, self.numerics = layer, numerics
        self.H, self.K, self.D = config.n_head, config.kv_heads, config.head_size
        self.wqkv = Linear(config.n_embd, (self.H + 2 * self.K) * self.D)
        self.wo = Linear(self.H * self.D, config.n_embd)

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        # (B, H + 2K, T, D)
        qkv = self.wqkv(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)
        if cache is not None and cache.keeps_unrotated:                    # cos and sin (S, D)
            q, k, v = qkv.split((self.H, self.K, self.K), dim=1)
            k, v = cache.update(self.layer, k, v)
            q, k = rotate(q, cos[-T:], sin[-T:]), rotate(k, cos, sin)
        else:                                                              # cos and sin (T, D)
            qk, v = qkv.split((self.H + self.K, self.K), dim=1)
            q, k = rotate(qk, cos, sin).split((self.H, self.K), dim=1)
            if cache is not None:
                k, v = cache.update(self.layer, k, v)
        # softmax(q k^T / sqrt(D)) v, (B, H, T, D)
        y = ops.attention(q, k, v, mask, self.numerics.flash)
        return self.wo(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). x (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.w_in = Linear(config.n_embd, 2 * config.n_ff)                 # gate and up
        self.w_out = Linear(config.n_ff, config.n_embd)                    # down

    def forward(self, x):
        gate, up = self.w_in(x).chunk(2, dim=-1)                           # (B, T, F) each
        return self.w_out(F.silu(gate) * up)


class Experts(nn.Module):
    """The SwiGLUs of all experts, stacked. x (R, C) sorted by expert, ends (E,) -> (R, C): see
    ops.grouped_linear."""

    def __init__(self, config):
        super().__init__()
        # gate and up
        self.w_in = nn.Parameter(torch.empty(config.num_experts, 2 * config.n_ff, config.n_embd))
        # down
        self.w_out = nn.Parameter(torch.empty(config.num_experts, config.n_embd, config.n_ff))

    def forward(self, x, ends):
        gate, up = ops.grouped_linear(x, self.w_in, ends).chunk(2, dim=-1)             # (R, F) each
        return ops.grouped_linear(F.silu(gate) * up, self.w_out, ends)


class MoE(nn.Module):
    """y = sum of the k most probable experts' outputs, weighted by their renormalized probabilities
    (paper section 7.3). For k = 1 the weight is the probability itself, as in Switch Transformer:
    renormalized it would be 1 whatever the router says, which then learns nothing from the loss.

    No token is dropped. The router's weight is rounded to the compute dtype (see RMSNorm), its
    logits are computed in float32.
    """

    def __init__(self, config):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.router = nn.Linear(config.n_embd, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x):
        """x (B, T, C) -> y (B, T, C) float32, and (logits (B, T, E) float32, expert (B, T, k)) of
        the router."""
        logits = F.linear(x.float(), self.router.weight.to(x.dtype).float())
        weight, expert = logits.softmax(-1).topk(self.k)                   # (B, T, k) each
        if self.k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        y = ops.apply_experts(x, expert, len(self.router.weight), self.experts)  # (B, T, k, C)
        return (y.float() * weight[..., None]).sum(2), (logits, expert)


def routing_metrics(config, logits, expert):
    """Return the losses and metrics of the routers of all layers: logits (L, B, T, E), expert (L,
    B, T, k).

    balance_loss    balance_coef * sum over layers of E * sum_e f_e P_e (Switch Transformer,
                    equation 4; 1 per layer if balanced): f_e is the share of the (token, choice)
                    pairs that expert e received, P_e its mean probability. Here both are taken over
                    one sequence, and the sum is averaged over sequences, so micro-batches do not
                    change it. Switch takes both over the batch; this is stricter, because each
                    sequence must use all experts, not only the batch as a whole
    z_loss          router_z_coef * sum over layers of mean(logsumexp(logits)^2) (ST-MoE, equation
                    5); absent at 0
    expert_load     (L, E) share of the pairs, without gradient
    router_entropy  (L,) mean in nats, without gradient
    """
    E = config.num_experts
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    # (L, B, E)
    share = (expert[..., None] == torch.arange(E, device=expert.device)).float().mean((2, 3))
    aux = {"balance_loss": config.balance_coef * E * (share * p.mean(2)).sum(-1).mean(1).sum()}
    if config.router_z_coef:
        aux["z_loss"] = config.router_z_coef * logits.logsumexp(-1).square().mean((1, 2)).sum()
    aux["expert_load"] = share.mean(1)
    aux["router_entropy"] = -(p * log_p).detach().sum(-1).mean((1, 2))
    return aux


class Block(nn.Module):
    """One layer: x = x + scale * attention(norm(x)), then x = x + scale * feed_forward(norm(x))."""

    def __init__(self, config, layer, numerics):
        super().__init__()
        self.numerics, self.scale = numerics, config.residual_scale
        self.attn_norm = RMSNorm(config.n_embd, config.rms_norm_eps, numerics)
        self.attn = Attention(config, layer, numerics)
        self.mlp_norm = RMSNorm(config.n_embd, config.rms_norm_eps, numerics)
        self.mlp = MoE(config) if config.num_experts else SwiGLU(config)

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B, T, C) float32 -> x, and the router's (logits, expert), None if dense."""
        dtype = self.numerics.dtype
        y = self.attn(self.attn_norm(x).to(dtype), cos, sin, mask, cache)
        x = torch.add(x, y, alpha=self.scale)  # x + scale * y in one pass
        y = self.mlp(self.mlp_norm(x).to(dtype))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return torch.add(x, y, alpha=self.scale), routing


class MiniCPM(nn.Module):
    """model(idx) -> logits; model(idx, targets) -> (nll, aux). Parameters are uninitialized until
    init_weights or a load."""

    def __init__(self, config):
        super().__init__()
        if config.problems():
            raise BadInput(*config.problems())
        self.config, self.numerics = config, Numerics()
        table = torch.empty(config.vocab_size, config.n_embd)              # (V, C), not initialized
        self.wte = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(
            Block(config, layer, self.numerics) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.rms_norm_eps, self.numerics)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.packed_head = None         # see pack

    @property
    def head_weight(self):
        """(V, C)"""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, idx, targets=None, doc_ids=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V) float32, or with targets (B, T) -> (nll, aux).

        logits   a product in the compute dtype: in bfloat16 they are float32 numbers that were
                 rounded to bfloat16. The loss and generation use the same
        nll      (B, T) float32 in nats, 0 if the target is -100; the float32 logits of a large
                 vocabulary are never all held
        aux      routing_metrics of a model with experts while gradients are enabled, else empty
        doc_ids  (B, T): a token attends within its document only
        cache    KVCache: idx continues what it holds, and is added to it
        """
        hidden, routing = self.hidden(idx, doc_ids, cache)
        if targets is None:
            return self.logits(hidden)
        nll = self.nll(hidden.flatten(0, 1), targets.flatten())
        aux = {}
        if self.config.num_experts and torch.is_grad_enabled():
            logits, expert = zip(*routing)
            aux = routing_metrics(self.config, torch.stack(logits), torch.stack(expert))
        return nll.view_as(targets).clone(), aux  # a copy: FSDP's hooks cannot act on a view

    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32"""
        product = self.packed_head or functools.partial(ops.linear, weight=self.head_weight)
        return product(hidden).float()

    def nll(self, hidden, targets):
        """hidden (N, C), targets (N,) -> (N,) float32: see forward"""
        if self.packed_head is None:
            return ops.cross_entropy(hidden, self.head_weight, targets, self.numerics.compiled)
        parts = zip(hidden.split(PACKED_ROWS), targets.split(PACKED_ROWS))
        return torch.cat([F.cross_entropy(self.logits(rows), wanted, reduction="none")
                          for rows, wanted in parts])

    def hidden(self, idx, doc_ids=None, cache=None):
        """idx (B, T) -> what the head multiplies, (B, T, C) in the compute dtype, already divided
        by width_mult; and the routing of each block."""
        config, T = self.config, idx.shape[1]
        S = T + (cache.filled if cache else 0)
        if cache is not None and S > cache.k.shape[3]:
            raise BadInput(f"the cache holds {cache.k.shape[3]} tokens, but {S} are needed")
        if cache is None or cache.keeps_unrotated:
            cos, sin = rope_tables(config, S, idx.device)                  # (S, D)
        else:
            cos, sin = cache.cos[S - T:S], cache.sin[S - T:S]              # (T, D)
        if cache is not None:
            doc_ids = cache.add_doc_ids(doc_ids)                           # (B, S), or None
        flex = doc_ids is not None and self.numerics.flash and idx.device.type == "cuda"
        mask = ops.attention_mask(doc_ids, T, S, idx.device, flex)

        x = self.wte(idx).float() * config.embedding_scale                 # (B, T, C)
        routing = []
        for block in self.blocks:
            x, choices = block(x, cos, sin, mask, cache)
            routing.append(choices)
        if cache is not None:
            cache.filled = S
        return (self.norm(x) / config.width_mult).to(self.numerics.dtype), routing

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0,
                 stop_ids=(), never_ids=(), use_cache=True):
        """Continue prompts (a list of B non-empty lists of ids). Yields (B,) new ids per step, on
        the CPU.

        Each row draws from its own generator (seed + row) and is independent of the others: shorter
        prompts are padded on the left with a document of their own. (Not past the length at which
        RoPE changes: it goes by the longest row, see rope_tables.) A row that has produced one of
        stop_ids repeats it until all rows have. never_ids are never drawn (the token that opens a
        document), unless they are in stop_ids too. use_cache=False computes everything again for
        every token: the slow reference.
        """
        device, B = self.wte.weight.device, len(prompts)
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        # (B, T)
        idx = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts)],
                           device=device)
        doc_ids = cache = None
        if any(pads):
            doc_ids = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads],
                                   device=device)
        if use_cache:
            cache = KVCache(self.config, B, longest + max_new_tokens, self.numerics.dtype, device)
        generators = [torch.Generator().manual_seed(seed + row) for row in range(B)]
        stopped = torch.zeros(B, dtype=torch.bool)
        last = torch.zeros(B, dtype=torch.int64)
        never_ids = [i for i in never_ids if i not in stop_ids]
        stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64)
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx, doc_ids, cache)[0][:, -1]            # (B, C)
            logits = self.logits(hidden)                                   # (B, V)
            if never_ids:
                logits[:, never_ids] = float("-inf")
            uniform = torch.cat([torch.rand(1, generator=g) for g in generators])
            drawn = sample_next(logits, uniform, temperature, top_k, top_p).cpu()
            last = torch.where(stopped, last, drawn)
            stopped |= (last[:, None] == stop_ids).any(1)
            yield last
            if stopped.all():
                return
            token = last[:, None].to(device)
            idx = token if use_cache else torch.cat((idx, token), dim=1)
            if doc_ids is not None:
                own = torch.ones_like(token)
                doc_ids = own if use_cache else torch.cat((doc_ids, own), dim=1)

    @torch.no_grad()
    def pack(self, quant="none"):
        """Replace norms and matrices by functions that are fastest on a CPU; see ops.pack, which
        takes `quant`. Weights keep their dtype, all else is computed in float32. The model can then
        only generate or be measured, not be trained, saved or moved. Where ops.can_pack says no,
        as for a GPU, nothing is changed.

        Raises BadInput if there is no int8 here.
        """
        if not ops.can_pack(self.wte.weight, quant):
            if quant != "none":
                raise BadInput(f"--quant={quant}: needs --device=cpu and a PyTorch with oneDNN")
            return
        self.numerics.dtype = torch.float32
        # Our Linear only: a router is used as a weight. A list of all modules would hold every
        # weight to the end.
        for module in [m for m in self.modules() if not isinstance(m, Linear)]:
            for name, child in list(module.named_children()):
                if isinstance(child, RMSNorm):
                    replace(module, name, ops.pack_norm(child.weight, child.eps))
                elif isinstance(child, Linear):
                    replace(module, name, ops.pack(child.weight, quant))
            if isinstance(module, Experts):
                for name, weight in list(module.named_parameters()):
                    replace(module, name, [ops.pack(matrix, quant) for matrix in weight])
        self.packed_head = ops.pack(self.head_weight, quant)
        if not self.config.tie_word_embeddings:
            del self.lm_head

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """Return a model from a checkpoint, a run folder (its latest checkpoint) or a released
        folder, ready to run.

        dtype: of parameters and compute; None: as stored. Raises BadInput if the folder cannot be
        used.
        """
        from engine import checkpoint  # the model itself needs no files
        folder = checkpoint.resolve(path)
        config = checkpoint.model_config_of(MiniCPMConfig, checkpoint.read_meta(folder), folder)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, checkpoint.read_weights(folder, dtype), folder)
        model.to(device=device, dtype=dtype)
        model.numerics.dtype = model.wte.weight.dtype
        return model


def replace(module, name, value):
    """Replace a child or parameter of a module, which frees it, by any other value."""
    delattr(module, name)
    setattr(module, name, value)


# ---- generation

class KVCache:
    """Keys and values of all layers, allocated once for `length` tokens and filled from the left.

    If RoPE changes within `length` (dynamic, or longrope without an extended max_position), the
    keys are kept unrotated, because their rotation depends on the current length. Past the length
    at which it changes, the cache is then no longer exactly the plain forward: deeper layers saw
    earlier tokens at an earlier base.
    """

    def __init__(self, config, batch, length, dtype, device):
        shape = (config.n_layer, batch, config.kv_heads, length, config.head_size)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.filled = 0
        self.doc_ids = None             # (B, filled), if the input has documents
        self.keeps_unrotated = config.rope_changes_within(length)
        self.cos, self.sin = rope_tables(config, length, device)

    def update(self, layer, k, v):
        """Append k and v (B, K, T, D) of one layer. Returns all keys and values so far, (B, K, S,
        D) each."""
        end = self.filled + k.shape[2]
        self.k[layer, :, :, self.filled:end] = k
        self.v[layer, :, :, self.filled:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def add_doc_ids(self, doc_ids):
        """Append doc_ids (B, T), or None if the input has no documents. Returns all so far, (B, S)
        or None."""
        if self.filled:
            if (doc_ids is None) != (self.doc_ids is None):
                raise BadInput("doc_ids: give them with every input to a cache, or with none")
            if doc_ids is not None:
                doc_ids = torch.cat((self.doc_ids, doc_ids), dim=1)
        self.doc_ids = doc_ids
        return self.doc_ids


def sample_next(logits, uniform, temperature, top_k=None, top_p=None):
    """Draw one token per row. logits (B, V), uniform (B,) in [0, 1) -> (B,) ids. Temperature 0
    takes the largest logit.

    top_k keeps the k likeliest tokens; then top_p (above 0) keeps the fewest tokens whose
    probability reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # largest first
    p = (logits / temperature).softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keeps at least one token
    cumulative = p.cumsum(-1)
    point = uniform.to(p.device)[:, None] * cumulative[:, -1:]             # (B, 1)
    choice = (cumulative <= point).sum(-1, keepdim=True)
    last = (p > 0).sum(-1, keepdim=True) - 1  # rounding must not pick a removed token
    return order.gather(-1, torch.minimum(choice, last))[:, 0]


# ---- weights from a checkpoint

def load_weights(model, tensors, where, copy=None):
    """Load (name, tensor) pairs into a model. Raises one BadInput that lists every name and shape
    that does not fit.

    copy  copy(parameter, tensor) fills parameters that have memory; None: the tensors become the
          parameters
    """
    expected, seen, problems = dict(model.named_parameters()), set(), []
    for name, tensor in tensors:
        seen.add(name)
        if name not in expected:
            problems.append(f"{where}: tensor {name} belongs to no parameter")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{where}: tensor {name} is {tuple(tensor.shape)}, "
                            f"the config needs {tuple(expected[name].shape)}")
        elif copy:
            copy(expected[name], tensor)
        else:
            model.load_state_dict({name: tensor}, strict=False, assign=True)
    problems += [f"{where}: tensor {name} is missing" for name in expected.keys() - seen]
    if problems:
        raise BadInput(*sorted(problems))
    for p in model.parameters():
        p.requires_grad_(True)
