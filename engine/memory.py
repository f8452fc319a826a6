"""What a step holds in memory, moment by moment: the estimate behind plan.py and behind the choice of a micro-batch.

Read off model.py line by line, and compared with the tracked peak of the real step by `plan.py --simulate=True`.
"""
import math
import os

from configurator import BadInput
from engine.device import free_memory
from engine.ops import MAX_LOGITS

USABLE = 0.9                                # of a GPU's memory: the rest is the CUDA context, NCCL's buffers and fragmentation
MICRO_TOKENS_CPU = 8192                     # tokens per forward at most; larger is not faster on a CPU


def activations(model, width, cpu):
    """{item: bytes a token} that autograd keeps of one block until its backward pass, read off model.py line by line.

    width  bytes of the compute type
    cpu    as fake tensors on a CPU compute it: RMSNorm is not one kernel there, and keeps the normalised stream too
    """
    C, H, K, D, F = model.n_embd, model.n_head, model.kv_heads, model.head_size, model.n_ff
    k = model.num_experts_per_tok if model.num_experts else 1
    kept = {
        "residual stream": 2 * 4 * C,                                      # into both norms, float32
        "norms": 2 * 4 + 2 * 4 * C * cpu,                                  # 1 / root mean square, float32
        "inputs of matrices": width * C * (1 if model.num_experts else 2),
        "qkv": width * (H + 2 * K) * D,                                    # v is a view of it, and keeps all of it
        "rotated q and k": width * (H + K) * D,
        "attention's output": width * H * D + 4 * H,                       # and its log-sum-exp, float32
        "SwiGLU": width * 4 * F * k,                                       # gate, up, silu(gate) and the product
    }
    if model.num_experts:                                                  # rows in float32 for the router; every choice's row in,
        kept["experts' rows"] = 4 * C + (width + 4) * C * k                # and out in float32
        kept["routing"] = 8 * model.num_experts + 40 * k
    return kept


def block_size_in_parameters(model):
    """(attention, feed-forward) parameters of a block, a norm in each."""
    attention = 2 * model.n_embd * model.head_size * (model.n_head + model.kv_heads) + model.n_embd
    return attention, (model.n_params_non_embedding - model.n_embd) // model.n_layer - attention


def head_memory(model, N, width):
    """(kept until the backward pass, held besides during it) in bytes by the loss over N tokens, its weight gradient apart."""
    C, V = model.n_embd, model.vocab_size
    if N * V <= MAX_LOGITS:                                            # plain_nll: log-probabilities, the rounded weight; two gradients
        cast = width * V * C if width < 4 else 0
        return 4 * N * V + cast, 8 * N * V
    slice_ = max(1, MAX_LOGITS // N)
    # ChunkedNLL.backward: d_hidden; a slice's logits twice, softmax and the last slice's; rows of the weight, or the product.
    return 0, 4 * N * C + max(N * slice_ * (2 * width + 4) + width * slice_ * C, N * (C + 2 * slice_) * width)


def moments(model, config, micro, micro_steps, shard, cpu=False):
    """[(moment, {item: bytes})] of a step on one rank: where memory peaks, in the order of FSDP2's backward pass.

    micro        sequences per forward. micro_steps: how many of them there are in a step
    Blocks are gathered in the compute type, one ahead; the root group (embedding, head, last norm) stays gathered in float32
    from its forward to its backward; a block's gradient is reduced in float32. Over several micro-steps FSDP keeps the whole
    gradient, unsharded, in float32, until the last one reduces it; with config.sync_micro_steps each reduces its own.
    """
    N, width = micro * config.block_size, 4 if config.dtype == "float32" else 2
    C, H, K, D = model.n_embd, model.n_head, model.kv_heads, model.head_size
    F = model.n_ff * (model.num_experts_per_tok if model.num_experts else 1)
    rows = C * model.num_experts_per_tok if model.num_experts else 0
    attention, feed_forward = block_size_in_parameters(model)
    block, table = attention + feed_forward, 4 * model.vocab_size * C
    root = 4 * (model.n_params - model.n_layer * block)
    kept = sum(activations(model, width, cpu).values()) * N
    # Held besides, of a block in its backward pass: the gradients of the product, gate and up; those around RoPE in float32;
    # with experts, those of the rows in float32. Measured on the simulation's trace, op by op.
    w_out = width * feed_forward // 3
    extra = max(w_out + 2 * width * F * N - 8 * rows * N, 8 * rows * N, (4 + width) * C * N,
                width * (block + (rows and feed_forward // 3)) + (12 * (H + K) * D - width * (4 * H + 5 * K) * D) * N
                - (width * 4 * F + 4 * C + width * C + (8 + width) * rows) * N)
    # And in its forward pass, which comes again where it is recomputed: RoPE's float32, before the SwiGLU is there; measured too.
    forward = (4 * C * (1 + cpu) + width * (2 * C + (H + 2 * K) * D) + 16 * (H + K) * D) * N
    copies = width * feed_forward if model.num_experts else 0              # cut along dimension 1, experts are gathered, then put together
    again = [bool(config.recompute) and i % config.recompute == 0 for i in range(model.n_layer)]
    acts = [4 * C * N if a else kept for a in again]
    last_norm = (4 + 4 * cpu + width) * C * N
    loss_kept, loss_held = head_memory(model, N, width)
    always = {"parameters": 4 * model.n_params // shard, "AdamW moments": 8 * model.n_params // shard}
    unsharded, summed = micro_steps > 1 and not config.sync_micro_steps, micro_steps > 1 and config.sync_micro_steps
    whole = 4 * block * model.n_layer if unsharded else 0
    whole_root = root if unsharded and micro_steps > 2 else 0              # by the time of the second of three
    held = {**always, "gathered root": root, "unsharded gradients": whole + (root if unsharded else 0)}
    if summed:
        held["sharded gradients"] = 4 * model.n_params // shard            # of the micro-steps before
    out = [("loss", {**held, "activations": sum(acts) + last_norm + loss_kept, "root's gradient": table,
                     "gathered blocks": width * block, "logits": loss_held})]
    for i in reversed(range(model.n_layer)):
        below, above = sum(acts[:i]), model.n_layer - 1 - i
        done = 4 * block * above // shard if not unsharded else 0
        now = {**held, "sharded gradients": held.get("sharded gradients", done), "root's gradient": table}
        ahead, reducing = width * block * (i > 0), 4 * block * (above > 0)
        peak = max(kept + extra, forward) if again[i] else kept + extra
        out.append((f"gathering of block {i}", {**now, "activations": acts[i] + below + 4 * C * N, "reduction": reducing,
                                                "gathered blocks": 2 * width * block + copies}))
        out.append((f"backward pass of block {i}", {**now, "activations": below + peak + 4 * C * N,
                    "gathered blocks": width * block + ahead, "reduction": reducing}))
        out.append((f"reduction of block {i}", {**now, "activations": below + 4 * C * N, "gathered blocks": ahead,
                    "reduction": (4 + width) * block}))
    heads = 2 * table + (table if model.tie_word_embeddings and cpu else 0)      # fake tensors are added out of place, real ones in it
    blocks_done = {"sharded gradients": 4 * (model.n_params if summed else block * model.n_layer) // shard, "reduction": 4 * block}
    out.append(("backward pass of the embedding", {**always, **blocks_done, "gathered root": root, "root's gradient": heads,
                                                   "unsharded gradients": root if unsharded else 0}))
    if unsharded:                                                          # of an earlier micro-step, nothing being reduced yet
        out.append(("backward pass of the embedding, not the last", {**always, "gathered root": root, "root's gradient": heads,
                                                                     "unsharded gradients": whole + whole_root}))
    out.append(("update", {**always, "sharded gradients": 4 * model.n_params // shard}))
    return out


def peak_of(model, config, micro, batch, shard, cpu=False):
    """(bytes, moment, {item: bytes}) at the peak of a step; batch: sequences of a rank's step."""
    moment, items = max(moments(model, config, micro, math.ceil(batch / micro), shard, cpu), key=lambda m: sum(m[1].values()))
    return sum(items.values()), moment, items


def check_memory(model, device, shard=1):
    """BadInput where the model, its gradients and AdamW's state do not even fit.

    shard: processes that the model is spread over, which on a CPU share the machine's memory (torchrun: LOCAL_WORLD_SIZE)
    """
    needed = 16 * model.n_params / shard                                # float32 parameter, gradient and two moments
    if device.type != "cuda":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = free_memory(device)
    if needed > free:
        raise BadInput(f"{model.n_params:,} parameters need {needed / 2**30:,.0f} GiB with their gradients and AdamW's state; "
                       f"{device} has {free / 2**30:,.0f} GiB: take a smaller model or a larger machine")


def choose_micro_batch(model, config, batch, device, world=None):
    """Sequences per forward: the largest divisor of a rank's batch that a CPU is fast with, or whose peak fits a GPU."""
    if device.type != "cuda":
        return max(m for m in divisors(batch) if m == 1 or m * config.block_size <= MICRO_TOKENS_CPU)
    shard = world.mesh.size(1) if world else 1
    # Alone, autograd keeps each matrix rounded to the compute type; sharded blocks are gathered in it.
    rounded = 0 if world or config.dtype == "float32" else 2 * model.n_params_non_embedding
    usable = USABLE * free_memory(device) - rounded
    return max([m for m in divisors(batch) if peak_of(model, config, m, batch, shard)[0] <= usable], default=1)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]
