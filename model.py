"""MiniCPM (arXiv 2404.06395): the architecture, and muP where it acts.

A pre-norm transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU) with three scalings that make its hyper-parameters
hold at every width and depth: scale_emb on the embedding, scale_depth / sqrt(n_layer) on each residual branch, and the
logits divided by width_mult = n_embd / dim_model_base. How each kind of parameter is drawn and how fast it learns is the
table in `mup_table`.

Numerics, one rule for one process and for many: parameters are float32 masters; matrices and their inputs are cast to
the compute dtype where they meet; the residual stream, norms, RoPE, softmax, logits and loss are float32.

Letters in shape comments: B samples, T tokens, S keys (cached ones included), C n_embd, H n_head, K n_kv_head, G = H / K,
D head_dim, F n_ff, E num_experts, k num_experts_per_tok, L n_layer, V vocab_size, N = B * T.
"""
import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from configurator import BadInput
from engine import checkpoint

EXPLICIT_ATTENTION_UP_TO = 1024   # keys; on CPU a written-out softmax beats the fused kernel's slow backward up to about here
ROUTER_STD = 0.1                   # paper section 7.3: a normal draw of variance 0.01
LOGITS_AT_ONCE = 2 ** 25          # logits held at a time (128 MiB in float32): a larger vocabulary goes through in chunks
ONEDNN = torch.backends.mkldnn.is_available()    # not every build of torch has it
ROW_MULTIPLE = 32                  # rows of an expert on CPU, filled up: oneDNN builds a kernel for every count that it meets


@dataclass(frozen=True)
class MiniCPMConfig:
    """The architecture. The defaults are MiniCPM-2.4B."""
    vocab_size: int = 122753            # rows of the embedding; train.py takes the tokenizer's unless this is given
    n_layer: int = 40                   # blocks
    n_head: int = 36                    # query heads
    n_kv_head: int | None = None        # key/value heads, a divisor of n_head; unset: n_head
    n_embd: int = 2304                  # width of the residual stream
    head_dim: int | None = None         # even; unset: n_embd / n_head (64 in every model of the paper)
    n_ff: int = 5760                    # width inside the SwiGLU (2.5 n_embd in every model of the paper)
    num_experts: int = 0                # 0: dense; else every feed-forward is that many experts (paper section 7.3: 8)
    num_experts_per_tok: int = 2        # experts that a token goes through
    balance_coef: float = 0.01          # weight of the load-balance loss (paper section 7.3: 0.01)
    router_z_coef: float = 0.0          # weight of the router's z-loss, which keeps its logits small; 0: none (as in the paper)
    tie_word_embeddings: bool = True    # the head is the embedding
    rms_norm_eps: float = 1e-5          # added to the mean square under the root
    max_position: int = 4096            # RoPE's reference length in tokens; not a limit, and not block_size
    rope_theta: float = 10000.0         # RoPE's base
    rope_scaling: Literal['none', 'linear', 'dynamic', 'longrope'] = 'none'  # dynamic: 128K model; longrope: MiniCPM4
    rope_factor: float = 1.0            # linear: positions are divided by it; dynamic: NTK-aware growth of the base
    rope_short_factor: tuple[float, ...] = ()   # longrope: head_dim / 2 divisors of the frequencies, up to original_max_position
    rope_long_factor: tuple[float, ...] = ()    # longrope: the same when max_position is beyond it
    original_max_position: int | None = None    # longrope: length before the extension; unset: max_position
    mup: bool = True                    # False: all scalings 1, one init, one learning rate (the control)
    mup_lr: bool = True                 # False: one learning rate for all, the rest of muP stays (DPO, fine-tuning)
    scale_emb: float = 12.0             # the embedding's output is multiplied by it
    scale_depth: float = 1.4            # each residual branch is multiplied by scale_depth / sqrt(n_layer)
    dim_model_base: int = 256           # width at which the learning rate was tuned
    init_std: float | None = None       # std of a matrix at width dim_model_base; unset: 0.1 (paper), 0.02 without muP
    embd_init_std: float | None = None  # std of the embedding at every width; unset: init_std

    def problems(self):
        """What is impossible, one line each."""
        out = [f"--{name}={getattr(self, name)}: must be above 0" for name in
               ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_ff", "rms_norm_eps", "max_position",
                "rope_theta", "rope_factor", "original_max_position", "scale_emb", "scale_depth", "dim_model_base",
                "init_std", "embd_init_std") if (getattr(self, name) is not None and getattr(self, name) <= 0)]
        if out:
            return out
        if self.n_head % self.kv_heads:
            out.append(f"--n_kv_head={self.n_kv_head}: does not divide --n_head={self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            out.append(f"--n_head={self.n_head}: does not divide --n_embd={self.n_embd}; give --head_dim or another width")
        elif self.head_size % 2:
            out.append(f"--head_dim={self.head_size}: RoPE rotates pairs, so it must be even")
        if self.num_experts < 0 or self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            out.append(f"--num_experts_per_tok={self.num_experts_per_tok}: must be from 1 to --num_experts={self.num_experts}")
        if self.num_experts:
            out += [f"--{name}={getattr(self, name)}: with experts a multiple of 8, which the grouped matrix product asks for"
                    for name in ("n_embd", "n_ff") if getattr(self, name) % 8]
        out += [f"--{name}={getattr(self, name)}: must not be negative" for name in ("balance_coef", "router_z_coef")
                if getattr(self, name) < 0]
        if self.rope_scaling == "longrope":
            for name in ("rope_short_factor", "rope_long_factor"):
                if len(getattr(self, name)) != self.head_size // 2:
                    out.append(f"--{name}: longrope takes head_dim / 2 = {self.head_size // 2} numbers, not {len(getattr(self, name))}")
        elif self.rope_short_factor or self.rope_long_factor:
            out.append("--rope_short_factor, --rope_long_factor: only with --rope_scaling=longrope")
        if self.rope_factor != 1 and self.rope_scaling not in ("linear", "dynamic"):
            out.append(f"--rope_factor={self.rope_factor}: only with --rope_scaling=linear or dynamic")
        return out

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_size(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def width_mult(self):               # 9 for the 2.4B: logits and matrix learning rates are divided by it
        return self.n_embd / self.dim_model_base if self.mup else 1.0

    @property
    def embedding_scale(self):
        return self.scale_emb if self.mup else 1.0

    @property
    def residual_scale(self):           # the root is over layers, not over the 2 n_layer branches (as in the released code)
        return self.scale_depth / math.sqrt(self.n_layer) if self.mup else 1.0

    @property
    def n_params_non_embedding(self):   # the paper's N
        return self.count(self.num_experts)

    @property
    def n_params_active(self):          # of the paper's N, what one token goes through
        return self.count(self.num_experts_per_tok)

    def count(self, experts):
        """Parameters without embedding and head, of each layer's experts only so many."""
        attention = 2 * self.n_embd * self.head_size * (self.n_head + self.kv_heads)
        feed_forward = 3 * self.n_embd * self.n_ff
        if self.num_experts:
            feed_forward = experts * feed_forward + self.num_experts * self.n_embd         # and the router
        return self.n_layer * (attention + feed_forward + 2 * self.n_embd) + self.n_embd

    @property
    def n_params(self):                 # with the embedding, and the head where it is untied
        return self.n_params_non_embedding + self.vocab_size * self.n_embd * (1 if self.tie_word_embeddings else 2)

    def flops_per_token(self, block_size):
        """FLOPs of forward and backward per token: 6 per weight that multiplies, head included, plus attention's
        12 n_layer n_head head_dim T (PaLM, appendix B: causal masking not discounted)."""
        weights = self.n_params_active + self.vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_head * self.head_size * block_size


# ---- muP: the paper's table 7, one row per role

@dataclass(frozen=True)
class Role:
    """std: of the normal draw at init (0: ones). lr: factor on the learning rate. decay: whether weight decay applies."""
    std: float
    lr: float
    decay: bool


def mup_table(config):
    """{role: Role}. Forward scales act where the tensors are used, in MiniCPM and Block.

    | role      | forward                                | init std                    | LR factor      | decay |
    |-----------|----------------------------------------|-----------------------------|----------------|-------|
    | embedding | output x scale_emb                     | embd_init_std               | 1              | no    |
    | head      | tied or not: logits / width_mult       | init_std (tied: embedding)  | 1              | no    |
    | matrix    | branch x scale_depth / sqrt(n_layer)   | init_std / sqrt(width_mult) | 1 / width_mult | yes   |
    | experts   | as matrix: each is one, stacked        | init_std / sqrt(width_mult) | 1 / width_mult | yes   |
    | router    | -                                      | ROUTER_STD                  | 1              | no    |
    | norm      | -                                      | ones                        | 1              | no    |

    The paper leaves open whether the tied embedding is one of its "2-D tensors". Here it is not: both rules transfer
    the learning rate, but only this one keeps activations equal across widths (tests/test_mup.py).
    """
    std = config.init_std or (0.1 if config.mup else 0.02)
    matrix_lr = 1 / config.width_mult if config.mup_lr else 1.0
    return {
        "embedding": Role(config.embd_init_std or std, 1.0, False),
        "head": Role(std, 1.0, False),
        "matrix": Role(std / math.sqrt(config.width_mult), matrix_lr, True),
        "experts": Role(std / math.sqrt(config.width_mult), matrix_lr, True),
        "router": Role(ROUTER_STD, 1.0, False),
        "norm": Role(0.0, 1.0, False),
    }


ROLE_OF = {"wte": "embedding", "lm_head": "head", "wqkv": "matrix", "wo": "matrix", "w_in": "matrix", "w_out": "matrix",
           "experts": "experts", "router": "router",
           "attn_norm": "norm", "mlp_norm": "norm", "norm": "norm"}


def role_of(name):
    """Role of a parameter by the module that holds it; an unknown name raises KeyError."""
    return ROLE_OF[name.split(".")[-2]]


def draw(seed, name, shape):
    """Standard normal values that depend on the seed and the parameter's name alone, float32 on the CPU."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:8], "little")))


@torch.no_grad()
def init_weights(model, seed, put=torch.Tensor.copy_):
    """Draw every parameter from (seed, its own name): the same values however the model is built or sharded.

    put  put(parameter, values) copies into a parameter, or into the piece of it that is here
    """
    table = mup_table(model.config)
    for name, p in model.named_parameters():
        role = table[role_of(name)]
        if role.std == 0:
            p.fill_(1)
            continue
        put(p, draw(seed, name, p.shape) * role.std)


def optimizer_groups(model, weight_decay):
    """AdamW parameter groups, one per role: each has params, names, role, lr_scale and weight_decay.

    The loop sets group["lr"] = lr_at(step) * group["lr_scale"] at every step.
    """
    groups = {role: {"params": [], "names": [], "role": role, "lr_scale": row.lr, "weight_decay": weight_decay * row.decay}
              for role, row in mup_table(model.config).items()}
    for name, p in model.named_parameters():
        groups[role_of(name)]["params"].append(p)
        groups[role_of(name)]["names"].append(name)
    groups = [group for group in groups.values() if group["params"]]
    seen = [p for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen)) and set(seen) == set(model.parameters()), "optimizer groups must cover the model exactly"
    return groups


# ---- functions

def rms_norm(x, weight, eps):
    """x (..., C) of any dtype, weight (C,) -> (..., C) float32."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps)


@torch.compiler.disable             # compiled, every use would compute its cosines again: a tenth of a CPU step
def rope_tables(config, length, device):
    """cos and signed sin, (length, D) float32 each, of the positions of a sequence of `length` tokens.

    dynamic   NTK-aware: past max_position the base grows with the current length. The tables then depend on `length`
              for every position, so a cache must keep keys unrotated. Runtimes that keep the grown base for later,
              shorter inputs differ from this.
    longrope  as MiniCPM4's released code: the long factors whenever max_position exceeds original_max_position, however
              short the input; transformers' own LongRoPE chooses by the current length instead.
    """
    D, theta, scale = config.head_size, config.rope_theta, 1.0
    if config.rope_scaling == "dynamic":
        over = max(length, config.max_position) / config.max_position
        theta *= (config.rope_factor * over - (config.rope_factor - 1)) ** (D / (D - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)   # (D/2,)
    if config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    if config.rope_scaling == "longrope":
        original = config.original_max_position or config.max_position
        factors = config.rope_long_factor if max(length, config.max_position) > original else config.rope_short_factor
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float32, device=device)
        scale = math.sqrt(1 + math.log(config.max_position / original) / math.log(original))
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)                           # (T, D/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """RoPE in the half-split layout. x (B, heads, T, D), cos and signed sin (T, D) float32 -> x's shape and dtype."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention)


def attention_mask(doc_ids, T, S, device, flex):
    """What the last T of S tokens may see: None (all that came before), or a mask.

    doc_ids  None, or (B, S): a token sees its own document only
    returns  None, a bool tensor (B or 1, 1, T, S), or with `flex` a BlockMask, which never holds T x S numbers
    """
    if doc_ids is None and T in (1, S):
        return None
    if flex and T == S:
        def visible(b, h, q, k):
            return (q >= k) & (doc_ids[b, q] == doc_ids[b, k])
        return create_block_mask(visible, len(doc_ids), None, T, S, device=device)
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if doc_ids is None:
        return causal[None, None]
    return (causal & (doc_ids[:, -T:, None] == doc_ids[:, None, :]))[:, None]       # (B, 1, T, S)


def attend(q, k, v, mask, flash):
    """Softmax attention. q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). mask: see attention_mask."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if isinstance(mask, BlockMask):
        return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=H != K)
    slow_backward = q.device.type == "cpu" and S <= EXPLICIT_ATTENTION_UP_TO and torch.is_grad_enabled()
    if flash and not slow_backward:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=H != K)
    q = q.reshape(B, K, H // K * T, D)                                     # the G queries of a key head side by side
    scores = (q @ k.transpose(-1, -2)).float().view(B, K, H // K, T, S) * D ** -0.5
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))      # mask (B or 1, 1, 1, T, S)
    weights = scores.softmax(-1).to(v.dtype).view(B, K, H // K * T, S)
    return (weights @ v).view(B, H, T, D)


def plain_nll(hidden, weight, targets):
    """hidden (N, C), weight (V, C), targets (N,) -> nll (N,) float32, 0 where the target is -100. Holds all logits."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()             # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


class ChunkedNLL(torch.autograd.Function):
    """plain_nll over slices of the vocabulary, with a running log-sum-exp; backward computes each slice again.

    Going over the vocabulary rather than over tokens touches each row of the weight, and of its gradient, once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        N = len(hidden)
        top = hidden.new_full((N,), float("-inf"), dtype=torch.float32)    # largest logit so far
        total = top.new_zeros(N)                                           # sum of exp(logit - top)
        picked = top.new_zeros(N)                                          # logit of the target
        for first, last in slices(N, len(weight)):
            logits = F.linear(hidden, weight[first:last].to(hidden.dtype)).float()     # (N, slice)
            inside = (targets >= first) & (targets < last)
            picked += logits.gather(1, (targets - first).clamp(0, last - first - 1)[:, None])[:, 0] * inside
            new_top = torch.maximum(top, logits.amax(1))
            total = total * (top - new_top).exp() + logits.sub_(new_top[:, None]).exp_().sum(1)
            top = new_top
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        return torch.where(targets >= 0, lse - picked, 0)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad = torch.where(targets >= 0, grad, 0)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight)
        for first, last in slices(len(hidden), len(weight)):
            part = weight[first:last].to(hidden.dtype)
            p = F.linear(hidden, part).float().sub_(lse[:, None]).exp_()   # softmax, (N, slice)
            inside = (targets >= first) & (targets < last)
            p.scatter_add_(1, (targets - first).clamp(0, last - first - 1)[:, None], -inside[:, None].float())
            p = p.mul_(grad[:, None]).to(hidden.dtype)
            d_hidden += p @ part
            d_weight[first:last] = p.T @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None


# Traced by torch.compile, the slices would be scheduled at will and be held together: three times the memory.
chunked_nll = torch.compiler.disable(ChunkedNLL.apply)


def slices(n_rows, vocab_size):
    """[(first, last)] of the vocabulary, so that n_rows times a slice stays within LOGITS_AT_ONCE."""
    width = max(1, LOGITS_AT_ONCE // n_rows)
    return [(first, min(first + width, vocab_size)) for first in range(0, vocab_size, width)]


def sample_next(logits, uniform, temperature, top_k=None, top_p=None):
    """Draw one token a row. logits (B, V), uniform (B,) in [0, 1) -> (B,) ids. Temperature 0 takes the largest logit.

    top_k keeps the k likeliest tokens; then top_p the fewest whose probability reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))      # largest first
    p = (logits / temperature).softmax(-1)
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                    # the first token always stays
    cumulative = p.cumsum(-1)
    choice = (cumulative <= uniform.to(p.device)[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (p > 0).sum(-1, keepdim=True) - 1                               # rounding must not pick what was cut off
    return order.gather(-1, torch.minimum(choice, last))[:, 0]


# ---- modules, in the order in which data flows

@dataclass
class Numerics:
    """How to compute, not what: one object shared by all modules of a model, free to change at any time."""
    dtype: torch.dtype = torch.float32  # of matrices and their inputs
    flash: bool = True                  # fused attention kernels where they are the faster ones


def by_onednn(x):
    """Whether products with x are oneDNN's: in float32 on a CPU torch takes MKL's, half as fast on some, and on one core for a single row."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


def project(x, weight):
    """x (..., C), weight (N, C) -> (..., N): the matrix in x's dtype."""
    if by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight.to(x.dtype), None, "none", [], "")
    return F.linear(x, weight.to(x.dtype))


class Linear(nn.Linear):
    """No bias; the float32 master is cast to its input's dtype."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return project(x, self.weight)


class RMSNorm(nn.Module):
    """Float32 throughout, but for the weight, which like all of a block's is rounded to the compute dtype: sharded blocks
    are gathered in it, and one process computes as many do."""

    def __init__(self, width, eps, numerics):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.numerics = eps, numerics

    def forward(self, x):
        return rms_norm(x, self.weight.to(self.numerics.dtype), self.eps)


class KVCache:
    """Keys and values of all layers, allocated once for `length` tokens, and filled from the left.

    With dynamic RoPE the keys are kept unrotated, because their rotation depends on the current length. Past max_position
    it is then no longer exactly the plain forward: deeper layers saw the earlier tokens at the base of their own time.
    """

    def __init__(self, config, batch, length, dtype, device):
        shape = (config.n_layer, batch, config.kv_heads, length, config.head_size)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.doc_ids = None             # (B, filled) once given
        self.filled = 0
        self.keeps_unrotated = config.rope_scaling == "dynamic"
        self.cos, self.sin = rope_tables(config, length, device)

    def update(self, layer, k, v):
        """Add k and v (B, K, T, D) of one layer behind what is filled; returns all so far, (B, K, S, D)."""
        end = self.filled + k.shape[2]
        self.k[layer, :, :, self.filled:end] = k
        self.v[layer, :, :, self.filled:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config, layer, numerics):
        super().__init__()
        self.layer, self.numerics = layer, numerics
        self.H, self.K, self.D = config.n_head, config.kv_heads, config.head_size
        self.wqkv = Linear(config.n_embd, (self.H + 2 * self.K) * self.D)
        self.wo = Linear(self.H * self.D, config.n_embd)

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        qkv = self.wqkv(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)     # (B, H + 2K, T, D)
        if cache is not None and cache.keeps_unrotated:                    # cos and sin (S, D)
            q, k, v = qkv.split((self.H, self.K, self.K), dim=1)
            k, v = cache.update(self.layer, k, v)
            q, k = rotate(q, cos[-T:], sin[-T:]), rotate(k, cos, sin)
        else:                                                              # cos and sin (T, D)
            qk, v = qkv.split((self.H + self.K, self.K), dim=1)
            q, k = rotate(qk, cos, sin).split((self.H, self.K), dim=1)
            if cache is not None:
                k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, mask, self.numerics.flash)                     # (B, H, T, D)
        return self.wo(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_in = Linear(config.n_embd, 2 * config.n_ff)                 # gate and up
        self.w_out = Linear(config.n_ff, config.n_embd)                    # down

    def forward(self, x):
        gate, up = self.w_in(x).chunk(2, dim=-1)                           # (B, T, F) each
        return self.w_out(F.silu(gate) * up)


class Reorder(torch.autograd.Function):
    """Rows of x (M, C) in another order (R,), where M stands for a row of zeros; inverse (M,) says where each row of x went. The
    gradient is the same the other way: a read, where that of indexing is a sum by scattering, ten times slower on a CPU and in an
    order of its own on a GPU."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return F.pad(x, (0, 0, 0, 1)).index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return F.pad(grad, (0, 0, 0, 1)).index_select(0, *ctx.saved_tensors), None, None


def rows_by_expert(expert, E, multiple):
    """Lay out (token, choice) pairs by expert, each expert's rows filled up with zeros to a multiple. expert (P,) int64 in [0, E)
    -> row (P,): the row of each pair; pair (R,): the pair of each row, P where none; ends (E,) int32: behind the last row of each.
    R = P + E (multiple - 1) does not depend on the choices; rows behind the last end stand for nothing."""
    P, device = len(expert), expert.device
    by_expert, order = expert.sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(E, device=device), right=True)
    padding = -ends.diff(prepend=ends.new_zeros(1)) % multiple             # (E,) zeros behind each expert's rows
    ends = ends + padding.cumsum(0)
    sorted_row = torch.arange(P, device=device) + (padding.cumsum(0) - padding)[by_expert]
    row = torch.empty_like(order).scatter_(0, order, sorted_row)
    pair = order.new_full((P + E * (multiple - 1),), P).scatter_(0, sorted_row, order)
    return row, pair, ends.int()


# Traced by torch.compile, this product takes bfloat16 only; left as it is, every dtype.
untraced_grouped_mm = torch.compiler.disable(F.grouped_mm)


def grouped_product(x, weight, ends):
    """x (M, C) sorted by expert, weight (E, N, C), ends (E,) int32: behind the last row of each expert -> (M, N) in x's dtype."""
    if by_onednn(x) and not torch.compiler.is_compiling():
        out = x.new_zeros(len(x), weight.shape[1])                         # an expert that no token chose is not read
        for e, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            if end > start:
                out[start:end] = project(x[start:end], weight[e])
        return out
    product = F.grouped_mm if x.dtype == torch.bfloat16 else untraced_grouped_mm
    return product(x, weight.to(x.dtype).transpose(1, 2), offs=ends)


class Experts(nn.Module):
    """The SwiGLUs of all experts, stacked."""

    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(config.num_experts, 2 * config.n_ff, config.n_embd))     # gate and up
        self.w_out = nn.Parameter(torch.empty(config.num_experts, config.n_embd, config.n_ff))        # down

    def forward(self, x, ends):
        """x (M, C), ends (E,): see grouped_product -> (M, C)."""
        gate, up = grouped_product(x, self.w_in, ends).chunk(2, dim=-1)    # (M, F) each
        return grouped_product(F.silu(gate) * up, self.w_out, ends)


class MoE(nn.Module):
    """Every token through its num_experts_per_tok likeliest experts, weighted by their renormalised probabilities; none is
    dropped (paper section 7.3). The router's weight is rounded to the compute dtype (see RMSNorm), its logits are float32."""

    def __init__(self, config):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.router = Linear(config.n_embd, config.num_experts)
        self.experts = Experts(config)

    def forward(self, x):
        """x (B, T, C) -> y (B, T, C) float32, and (logits (B, T, E) float32, expert (B, T, k)) of the router."""
        B, T, C = x.shape
        E, k, device = len(self.router.weight), self.k, x.device
        logits = F.linear(x.float(), self.router.weight.to(x.dtype).float())
        weight, expert = logits.softmax(-1).topk(k)                        # (B, T, k)
        weight = weight / weight.sum(-1, keepdim=True)
        multiple = ROW_MULTIPLE if device.type == "cpu" and B * T * k >= E * ROW_MULTIPLE else 1
        row, pair, ends = rows_by_expert(expert.flatten(), E, multiple)
        choices = x.view(B * T, 1, C).expand(-1, k, -1).reshape(-1, C)     # (N k, C)
        y = self.experts(Reorder.apply(choices, pair, row), ends)
        y = Reorder.apply(y, row, pair).view(B, T, k, C)
        return (y.float() * weight[..., None]).sum(2), (logits, expert)


def routing_report(config, logits, expert):
    """What a training step says of the routers, whose choices in all layers are logits (L, B, T, E) and expert (L, B, T, k).

    balance_loss    balance_coef * sum over layers of E * sum_e f_e P_e (Switch Transformer, equation 4; 1 a layer where even):
                    f_e is the share of the (token, choice) pairs that expert e got, P_e its mean probability, both of one
                    sequence. The mean over sequences, which does not depend on how they lie in micro-batches and ranks
    z_loss          router_z_coef * sum over layers of the mean of logsumexp(logits) ** 2 (ST-MoE, equation 5); absent at 0
    expert_load     (L, E) share of the pairs, no gradient; router_entropy (L,) mean in nats, no gradient
    """
    E = config.num_experts
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    share = (expert[..., None] == torch.arange(E, device=expert.device)).float().mean((2, 3))      # (L, B, E)
    aux = {"balance_loss": config.balance_coef * E * (share * p.mean(2)).sum(-1).mean(1).sum()}
    if config.router_z_coef:
        aux["z_loss"] = config.router_z_coef * logits.logsumexp(-1).square().mean((1, 2)).sum()
    return aux | {"expert_load": share.mean(1), "router_entropy": -(p * log_p).detach().sum(-1).mean((1, 2))}


class Block(nn.Module):
    """One layer -> x, and what the router of a feed-forward of experts chose (else None). The feed-forward is handed in."""

    def __init__(self, config, layer, numerics, feed_forward):
        super().__init__()
        self.numerics, self.scale = numerics, config.residual_scale
        self.attn_norm = RMSNorm(config.n_embd, config.rms_norm_eps, numerics)
        self.attn = Attention(config, layer, numerics)
        self.mlp_norm = RMSNorm(config.n_embd, config.rms_norm_eps, numerics)
        self.mlp = feed_forward

    def forward(self, x, cos, sin, mask=None, cache=None):
        dtype = self.numerics.dtype                                        # x (B, T, C) float32 throughout
        x = torch.add(x, self.attn(self.attn_norm(x).to(dtype), cos, sin, mask, cache), alpha=self.scale)
        y = self.mlp(self.mlp_norm(x).to(dtype))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return torch.add(x, y, alpha=self.scale), routing


class MiniCPM(nn.Module):
    """model(idx) -> logits; model(idx, targets) -> (nll, aux). Parameters are uninitialised until init_weights or a load."""

    def __init__(self, config):
        super().__init__()
        if config.problems():
            raise BadInput(*config.problems())
        self.config, self.numerics = config, Numerics()
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.blocks = nn.ModuleList(Block(config, i, self.numerics, MoE(config) if config.num_experts else SwiGLU(config))
                                    for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.rms_norm_eps, self.numerics)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size)

    @property
    def head_weight(self):
        """(V, C)"""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, idx, targets=None, doc_ids=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V) float32, or with targets (B, T) -> (nll, aux).

        nll      (B, T) float32 in nats, 0 where the target is -100; the logits are never all held
        aux      of experts, where gradients are asked for: routing_report; else empty
        doc_ids  (B, T): a token attends within its document only
        cache    KVCache: idx continues what it holds, and is added to it
        """
        hidden, routing = self.hidden(idx, doc_ids, cache)
        if targets is None:
            return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()
        nll = self.nll(hidden.flatten(0, 1), self.head_weight, targets.flatten())
        aux = routing_report(self.config, *map(torch.stack, zip(*routing))) if self.config.num_experts and torch.is_grad_enabled() else {}
        return nll.view_as(targets).clone(), aux                           # no view: sharding hangs its hooks on what comes out

    def hidden(self, idx, doc_ids=None, cache=None):
        """idx (B, T) -> what the head multiplies, (B, T, C) in the compute dtype, already divided by width_mult; and what the
        router of each block chose."""
        config, T = self.config, idx.shape[1]
        S = T + (cache.filled if cache else 0)
        if cache is not None and S > cache.k.shape[3]:
            raise BadInput(f"the cache holds {cache.k.shape[3]} tokens, {S} are needed; make it longer")
        if cache is None or cache.keeps_unrotated:
            cos, sin = rope_tables(config, S, idx.device)                  # (S, D)
        else:
            cos, sin = cache.cos[S - T:S], cache.sin[S - T:S]              # (T, D)
        if doc_ids is not None and cache is not None:
            cache.doc_ids = doc_ids if cache.doc_ids is None else torch.cat((cache.doc_ids, doc_ids), dim=1)
            doc_ids = cache.doc_ids                                        # (B, S)
        flex = doc_ids is not None and self.numerics.flash and idx.device.type == "cuda"
        mask = attention_mask(doc_ids, T, S, idx.device, flex)
        x = self.wte(idx).float() * config.embedding_scale                 # (B, T, C)
        routing = []
        for block in self.blocks:
            x, chosen = block(x, cos, sin, mask, cache)
            routing.append(chosen)
        if cache is not None:
            cache.filled = S
        return (self.norm(x) / config.width_mult).to(self.numerics.dtype), routing

    def nll(self, hidden, weight, targets):
        """hidden (N, C), weight (V, C), targets (N,) -> (N,) float32."""
        if len(hidden) * len(weight) <= LOGITS_AT_ONCE:
            return plain_nll(hidden, weight, targets)
        return chunked_nll(hidden, weight, targets)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0, stop_ids=(), never_ids=(),
                 use_cache=True):
        """Continue prompts (a list of B non-empty lists of ids) and yield (B,) new ids a step, on the CPU.

        A row draws from its own generator (seed + row) and sees nothing of the others: shorter prompts are padded on the
        left as a document of their own. A row that has produced one of stop_ids yields it again until all rows have.
        never_ids are never drawn (the mark that opens a document).
        use_cache=False computes everything anew for every token: the slow reference.
        """
        device, B, longest = self.wte.weight.device, len(prompts), max(map(len, prompts))
        idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)           # (B, T)
        doc_ids = None
        if min(map(len, prompts)) < longest:
            doc_ids = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = KVCache(self.config, B, longest + max_new_tokens, self.numerics.dtype, device) if use_cache else None
        generators = [torch.Generator().manual_seed(seed + row) for row in range(B)]
        stopped = torch.zeros(B, dtype=torch.bool)
        last = torch.zeros(B, dtype=torch.int64)
        stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64)
        for _ in range(max_new_tokens):
            hidden = self.hidden(idx, doc_ids, cache)[0][:, -1]            # (B, C)
            logits = project(hidden, self.head_weight).float()             # (B, V)
            if never_ids:
                logits[:, list(never_ids)] = float("-inf")
            uniform = torch.cat([torch.rand(1, generator=g) for g in generators])
            last = torch.where(stopped, last, sample_next(logits, uniform, temperature, top_k, top_p).cpu())
            stopped |= (last[:, None] == stop_ids).any(1)
            yield last
            if stopped.all():
                return
            token = last[:, None].to(device)
            if doc_ids is not None:
                doc_ids = torch.ones_like(token) if use_cache else torch.cat((doc_ids, torch.ones_like(token)), dim=1)
            idx = token if use_cache else torch.cat((idx, token), dim=1)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """A model from a checkpoint, a run folder (its latest checkpoint) or a released folder, ready to run.

        dtype: of the parameters and the compute; unset: as stored. Raises BadInput where the folder cannot be used.
        """
        folder = checkpoint.resolve(path)
        config = model_config(checkpoint.read_meta(folder), folder)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, checkpoint.read_weights(folder, dtype), folder)
        model.to(device=device, dtype=dtype)
        model.numerics.dtype = model.wte.weight.dtype
        return model


def model_config(meta, where):
    """MiniCPMConfig from a checkpoint's meta; BadInput where it is not one."""
    try:
        return MiniCPMConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in meta["model"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{where}/meta.json: no usable model config ({error})") from None


def load_weights(model, tensors, where, put=None):
    """Put (name, tensor) pairs into a model; every name and shape that does not fit is listed in one BadInput.

    put  put(parameter, tensor) copies into parameters that have memory; None: the tensors become the parameters
    """
    expected, seen, problems = dict(model.named_parameters()), set(), []
    for name, tensor in tensors:
        seen.add(name)
        if name not in expected:
            problems.append(f"{where}: tensor {name} belongs to no parameter")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{where}: tensor {name} is {tuple(tensor.shape)}, the config needs {tuple(expected[name].shape)}")
        elif put:
            put(expected[name], tensor)
        else:
            model.load_state_dict({name: tensor}, strict=False, assign=True)
    problems += [f"{where}: tensor {name} is missing" for name in expected.keys() - seen]
    if problems:
        raise BadInput(*sorted(problems))
    for p in model.parameters():
        p.requires_grad_(True)
