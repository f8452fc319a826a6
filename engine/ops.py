"""Kernels and memory tricks behind model.py: attention, the loss over a large vocabulary, experts,
float32 products on a CPU.

Each function computes a plain formula, given in its docstring; tests compare it with that formula.
Numbers that justify a trick are in LOG.md. Letters in shape comments are those of model.py.
"""
import functools
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# keys; on a CPU the fused kernel's backward is slower than a written-out softmax up to here
EXPLICIT_ATTENTION_UP_TO = 1024
# logits held at a time (128 MiB in float32); a larger product goes through in slices
MAX_LOGITS = 2 ** 25
# an expert's rows on a CPU are padded to a multiple: oneDNN builds a kernel per row count
ROW_MULTIPLE = 32
ONEDNN = torch.backends.mkldnn.is_available()


# ---- products

def use_onednn(x):
    """Return whether products with x go to oneDNN: for float32 on a CPU torch takes MKL, which is
    slower without gradients. (torch.compile can't lower the call.)"""
    return (ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
            and not torch.is_grad_enabled() and not torch.compiler.is_compiling())


def linear(x, weight):
    """Return x @ weight^T. x (..., C), weight (O, C), cast to the dtype of x -> (..., O)."""
    if use_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight.to(x.dtype), None, "none", [], "")
    return F.linear(x, weight.to(x.dtype))


# ---- attention

@functools.cache
def compiled_flex_attention():
    return torch.compile(flex_attention)


def attention_mask(doc_ids, T, S, device, flex):
    """Return which of S tokens each of the last T may attend to: itself and the ones before it, in
    its own document.

    doc_ids  (B, S), or None: one document
    returns  None (causal), a bool tensor (B or 1, 1, T, S), or with `flex` a BlockMask, which never
             holds T x S elements
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


def attention(q, k, v, mask, flash):
    """Return softmax(q k^T / sqrt(D) + mask) v. q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T,
    D).

    mask   see attention_mask
    flash  True: fused kernels, if faster; False: always the written-out softmax
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
    slow_backward = (q.device.type == "cpu" and k.shape[2] <= EXPLICIT_ATTENTION_UP_TO
                     and torch.is_grad_enabled())
    if not flash or slow_backward:
        return explicit_attention(q, k, v, mask)
    is_causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                          enable_gqa=grouped)


def explicit_attention(q, k, v, mask):
    """Compute `attention` without a fused kernel, softmax in float32."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, K, H // K * T, D)  # the G queries of a key head side by side
    scores = (q @ k.transpose(-1, -2)).float().view(B, K, H // K, T, S) * D ** -0.5
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))  # mask (B or 1, 1, 1, T, S)
    weights = scores.softmax(-1).to(v.dtype).view(B, K, H // K * T, S)
    return (weights @ v).view(B, H, T, D)


# ---- the loss

def cross_entropy(hidden, weight, targets):
    """Return -log softmax(hidden @ weight^T)[target] without ever holding all logits of a large
    vocabulary.

    hidden (N, C), weight (V, C), targets (N,) int64 -> (N,) float32 in nats, 0 if the target is
    -100. The logits are a product in the dtype of hidden; all that follows is float32.
    """
    if len(hidden) * len(weight) <= MAX_LOGITS:
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()         # (N, V)
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return chunked_cross_entropy(hidden, weight, targets)


class ChunkedCrossEntropy(torch.autograd.Function):
    """cross_entropy over slices of the vocabulary with a running log-sum-exp. Backward computes
    each slice's logits again.

    Slicing the vocabulary rather than the tokens touches each row of the weight, and of its
    gradient, once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        N = len(hidden)
        top = hidden.new_full((N,), float("-inf"), dtype=torch.float32)    # largest logit so far
        total = top.new_zeros(N)                                           # sum of exp(logit - top)
        target_logit = top.new_zeros(N)
        for first, last in vocabulary_slices(N, len(weight)):
            logits = F.linear(hidden, weight[first:last].to(hidden.dtype)).float()     # (N, slice)
            inside, column = targets_inside(targets, first, last)
            target_logit += logits.gather(1, column)[:, 0] * inside
            new_top = torch.maximum(top, logits.amax(1))
            total = total * (top - new_top).exp() + logits.sub_(new_top[:, None]).exp_().sum(1)
            top = new_top
        logsumexp = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return torch.where(targets >= 0, logsumexp - target_logit, 0)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad = torch.where(targets >= 0, grad, 0)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight)
        for first, last in vocabulary_slices(len(hidden), len(weight)):
            rows = weight[first:last].to(hidden.dtype)
            # softmax, (N, slice)
            d_logits = F.linear(hidden, rows).float().sub_(logsumexp[:, None]).exp_()
            inside, column = targets_inside(targets, first, last)
            d_logits.scatter_add_(1, column, -inside[:, None].float())
            d_logits = d_logits.mul_(grad[:, None]).to(hidden.dtype)
            d_hidden += d_logits @ rows
            d_weight[first:last] = d_logits.T @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None


def vocabulary_slices(n_rows, vocab_size):
    """Return [(first, last)] that cover the vocabulary, so that n_rows times a slice stays within
    MAX_LOGITS."""
    width = max(1, MAX_LOGITS // n_rows)
    return [(first, min(first + width, vocab_size)) for first in range(0, vocab_size, width)]


def targets_inside(targets, first, last):
    """Return which targets (N,) lie in a slice, and the column of each in it, (N, 1), clamped to
    the slice."""
    inside = (targets >= first) & (targets < last)
    return inside, (targets - first).clamp(0, last - first - 1)[:, None]


# torch.compile may reorder the slices and keep all of them, which takes three times the memory.
chunked_cross_entropy = torch.compiler.disable(ChunkedCrossEntropy.apply)


# ---- experts

def apply_experts(x, expert, n_experts, feed_forward):
    """Return feed_forward of the chosen experts for each token: y[b, t, i] = FFN_{expert[b, t,
    i]}(x[b, t]).

    The (token, choice) pairs are sorted by expert, so that each expert multiplies one block of
    rows; no token is dropped.

    x             (B, T, C)
    expert        (B, T, k) int64 in [0, n_experts)
    feed_forward  (rows (R, C) sorted by expert, ends (E,)) -> (R, C): see grouped_linear
    returns       (B, T, k, C)
    """
    B, T, C = x.shape
    k = expert.shape[-1]
    # Padding pays only if there are more rows than padding.
    pad = x.device.type == "cpu" and B * T * k >= n_experts * ROW_MULTIPLE
    row, pair, ends = rows_by_expert(expert.flatten(), n_experts, ROW_MULTIPLE if pad else 1)
    pairs = x.view(B * T, 1, C).expand(-1, k, -1).reshape(-1, C)           # (N k, C)
    y = feed_forward(Reorder.apply(pairs, pair, row), ends)
    return Reorder.apply(y, row, pair).view(B, T, k, C)


def rows_by_expert(expert, n_experts, multiple):
    """Lay out (token, choice) pairs by expert, each expert's rows padded with zeros to a multiple.

    expert   (P,) int64 in [0, E)
    returns  row (P,): the row of each pair; pair (R,): the pair of each row, P for padding; ends
             (E,) int32: exclusive end of each expert's rows. R = P + E (multiple - 1) does not
             depend on the choices; rows past ends[-1] are unused
    """
    P, device = len(expert), expert.device
    by_expert, order = expert.sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(n_experts, device=device), right=True)
    # (E,) zero rows after each expert's rows
    padding = -ends.diff(prepend=ends.new_zeros(1)) % multiple
    ends = ends + padding.cumsum(0)
    sorted_row = torch.arange(P, device=device) + (padding.cumsum(0) - padding)[by_expert]
    row = torch.empty_like(order).scatter_(0, order, sorted_row)
    pair = order.new_full((P + n_experts * (multiple - 1),), P).scatter_(0, sorted_row, order)
    return row, pair, ends.int()


class Reorder(torch.autograd.Function):
    """Return x[order] for x (M, C) and order (R,); the index M gives a row of zeros.

    inverse (M,) says where each row of x went, so the gradient is grad[inverse]. Plain indexing
    would scatter-add, which is ten times slower on a CPU and not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return F.pad(x, (0, 0, 0, 1)).index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return F.pad(grad, (0, 0, 0, 1)).index_select(0, *ctx.saved_tensors), None, None


# torch.compile supports grouped_mm in bfloat16 only; other dtypes call it uncompiled.
uncompiled_grouped_mm = torch.compiler.disable(F.grouped_mm)


def grouped_linear(x, weight, ends):
    """Multiply each expert's rows with its own matrix: x[i] @ weight[e]^T for ends[e - 1] <= i <
    ends[e].

    x (R, C) sorted by expert, weight (E, O, C), ends (E,) int32 exclusive end offsets -> (R, O) in
    the dtype of x.
    """
    if use_onednn(x):
        out = x.new_zeros(len(x), weight.shape[1])
        for e, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            if end > start:  # the weights of an unused expert are not read
                out[start:end] = linear(x[start:end], weight[e])
        return out
    grouped_mm = F.grouped_mm if x.dtype == torch.bfloat16 else uncompiled_grouped_mm
    return grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ends)
