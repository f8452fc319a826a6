"""What a run will cost before it starts, allocating nothing.

    python -m tools.plan config/minicpm_2b.py --gpus=64 --gpu=h100 [--recompute=1 ... any option of train.py]

Plans `torchrun ... train.py` with the same options on so many GPUs, one process each: parameters, memory, time, communication,
checkpoints, the paper's batch-size law, learning rates, schedule, and whether it fits. Memory is that of eager blocks with
fused attention: what a compiler keeps is not foreseen. --simulate=True runs one step of the real code on fake tensors and compares.
"""
import dataclasses
import difflib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import train
from configurator import BadInput, configure, exits_cleanly
from data.tokenizer import load_tokenizer
from engine import distributed, ops
from engine.device import PEAK_FLOPS
from engine.memory import USABLE, activations, block_size_in_parameters, divisors, peak_of
from engine.run import resolve_start
from model import MiniCPM, MiniCPMConfig, mup_table, optimizer_groups
from train import TrainConfig, batch_size_at

# Name: (memory in GiB, dense FLOP/s in bfloat16 with float32 sums, bytes/s a GPU sends to another of its node, bytes/s all of
# a node's GPUs together send out of it). NVIDIA's data sheets, from memory: A100, H100 SXM, H200 SXM, HGX B200, L40S, T4 and the Ada
# whitepaper (RTX 4090). Sheets quote FLOP/s with sparsity (twice these) and links in both directions (twice these). Out of a
# node: the network cards of DGX A100 (8 x 200 Gb/s) and DGX H100 to B200 (8 x 400 Gb/s); for the PCIe cards no sheet says it:
# one of 200 Gb/s is assumed. T4: float16, it has no bfloat16.
GPUS = {
    "a100-40": (40, PEAK_FLOPS["A100"], 300e9, 200e9),
    "a100-80": (80, PEAK_FLOPS["A100"], 300e9, 200e9),
    "h100": (80, PEAK_FLOPS["H100"], 450e9, 400e9),
    "h200": (141, PEAK_FLOPS["H200"], 450e9, 400e9),
    "b200": (180, PEAK_FLOPS["B200"], 900e9, 400e9),
    "l40s": (48, PEAK_FLOPS["L40S"], 32e9, 25e9),
    "rtx4090": (24, PEAK_FLOPS["4090"], 32e9, 25e9),
    "t4": (16, PEAK_FLOPS["T4"], 16e9, 25e9),
}
GPUS_A_NODE = 8
AGREES = 0.15                           # estimate and simulation may differ by this share
GIB = 2 ** 30


@dataclass
class PlanConfig:
    gpus: int = 8                       # processes, one GPU each
    gpu: str = "h100"                   # one of a100-40, a100-80, h100, h200, b200, l40s, rtx4090, t4
    mfu: float = 0.4                    # assumed: FLOPs of the model (recomputed ones not counted) / the GPUs' peak
    expected_loss: float = 2.5          # C4 loss (nats, the paper's tokenizer) at which the law asks for about the paper's 4M tokens
    simulate: bool = False              # True: run one step on fake tensors over as many fake ranks, and compare the peak
    json: bool = False                  # True: one JSON object instead of text, sizes in bytes

    def problems(self):
        out = [f"--{name}={getattr(self, name)}: must be above 0" for name in ("gpus", "expected_loss") if getattr(self, name) <= 0]
        if not 0 < self.mfu <= 1:
            out.append(f"--mfu={self.mfu}: must be above 0 and at most 1")
        if self.gpu not in GPUS:
            near = difflib.get_close_matches(self.gpu.lower(), GPUS, n=1, cutoff=0.3)
            out.append(f"--gpu={self.gpu}: unknown" + (f"; did you mean {near[0]}?" if near else "") + f" (known: {', '.join(GPUS)})")
        return out


def batch_law(loss):
    """Batch in tokens that reaches a C4 loss (nats) with the fewest tokens: 1.21e9 / L ** 6.24 (paper section 3.2)."""
    return 1.21e9 / loss ** 6.24


# ---- what would make it fit

def remedies(model, config, micro, batches, gpus, shard, usable):
    """[{option: value, "peak": bytes}] of what would make it fit: the fewest knobs; other or more GPUs only where those do not do."""
    found, peak = {}, peak_of(model, config, micro, max(batches) // gpus, shard)[0]
    larger = sorted((memory, name) for name, (memory, *_) in GPUS.items() if peak <= USABLE * memory * GIB)
    other = [{"gpu": larger[0][1], "peak": peak}] if larger else []
    for g in (g for g in divisors(math.gcd(*batches)) if g >= gpus):
        batch = max(batches) // g
        shards = [s for s in divisors(g) if s >= shard] if g == gpus else [g]
        for recompute, sync, m, s in itertools.product({config.recompute, 1}, {config.sync_micro_steps, True}, reversed(divisors(batch)), shards):
            knobs = {"gpus": g} if g != gpus else {}
            knobs |= {"recompute": recompute} if recompute != config.recompute else {}
            knobs |= {"sync_micro_steps": sync} if sync != config.sync_micro_steps else {}
            knobs |= {"micro_batch_size": m} if m != min(micro, batch) else {}
            knobs |= {"shard": s} if s != shard and (g == gpus or config.shard) else {}
            knobs |= {"replicate": g // s} if s != shard and config.replicate else {}
            peak = peak_of(model, dataclasses.replace(config, recompute=recompute, sync_micro_steps=sync), m, batch, s)[0]
            if peak <= usable:
                found.setdefault(tuple(knobs), {**knobs, "peak": peak})    # the largest micro-batch, the fewest shards
        if found:
            fewest = [knobs for names, knobs in found.items() if len(names) == min(map(len, found))]
            return fewest if g == gpus else other + fewest
    return other


# ---- simulation

def simulate(model_config, config, micro, batch, gpus):
    """{category: bytes} at the tracked peak of one rank in one update of the real model, spread over fake ranks.

    FakeTensorMode holds shapes only. The update is not a run's first: AdamW's moments are there. Three micro-steps stand for
    any larger number. Attention is fused at every length, as on a GPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    try:
        mesh = init_device_mesh("cpu", distributed.mesh_shape(config, gpus), mesh_dim_names=("replicate", "shard"))
        with torch.device("meta"):
            model = MiniCPM(model_config)
        model.numerics.dtype, model.numerics.flash = dtype, True
        with mock.patch.object(ops, "EXPLICIT_ATTENTION_UP_TO", 0), FakeTensorMode(allow_non_fake_inputs=True):
            distributed.distribute(model, config, mesh, dtype, compiled=False)
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW(optimizer_groups(model, config.weight_decay), lr=config.learning_rate, fused=False)

            def update():
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
                optimizer.step()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            update()                      # also DTensor's derivation of shapes, which it does once and the tracker would count
            optimizer.zero_grad()
            idx = torch.zeros(micro, config.block_size, dtype=torch.int64)
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((idx,))
            micro_steps = min(3, math.ceil(batch / micro))
            with tracker:
                for i in range(micro_steps):
                    if i:
                        tracker.reset_mod_stats()
                    model.set_requires_gradient_sync(i == micro_steps - 1 or config.sync_micro_steps)
                    summed, aux = train.language_loss(model, {"idx": idx, "targets": idx})
                    (summed + sum(value for name, value in aux.items() if name.endswith("_loss"))).backward()
                    del summed, aux
                update()
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
    return {str(getattr(name, "value", name)): size for name, size in snapshot.items() if size}


# ---- the plan

def batches_of(config):
    """[(first step, sequences per update)]"""
    firsts = [int(part.split(":")[0]) for part in (config.batch_schedule or "0:").split(",")]
    return [(first, batch_size_at(config, first)) for first in firsts]


def tokens_between(config, first, last):
    """Tokens of the updates from step `first` to step `last`."""
    stages = batches_of(config)
    ends = [step for step, _ in stages[1:]] + [math.inf]
    return config.block_size * sum(max(0, min(last, end) - max(first, begin)) * n for (begin, n), end in zip(stages, ends))


def communicate(model, config, micro_steps, replicate, shard, gpus, link, network):
    """({collective: bytes that a GPU receives in a step}, seconds): a block's parameters are gathered before its forward and
    before its backward pass, the root group's once a micro-step; gradients travel once a step, or with every micro-step."""
    block = model.n_layer * sum(block_size_in_parameters(model))
    width = 4 if config.dtype == "float32" else 2
    gathered = micro_steps * (2 * width * block + 4 * (model.n_params - block)) * (shard - 1) / shard
    syncs = micro_steps if config.sync_micro_steps else 1
    reduced = syncs * 4 * model.n_params * (shard - 1) / shard
    between = syncs * 2 * 4 * model.n_params / shard * (replicate - 1) / replicate
    # What leaves a node leaves it once for all its GPUs, but the copies' pieces are each GPU's own.
    seconds = (gathered + reduced) / (link if shard <= GPUS_A_NODE else min(link, network))
    seconds += between / (link if gpus <= GPUS_A_NODE else min(link, network / min(shard, GPUS_A_NODE)))
    return {"all-gather": gathered, "reduce-scatter": reduced, "all-reduce": between}, seconds


def make_plan(options, start):
    """The plan as a dict, of PlanConfig and a train.Start; BadInput where GPUs, mesh and batch do not go together."""
    config, model, state, gpus = start.config, start.model_config, start.state, options.gpus
    replicate, shard = distributed.mesh_shape(config, gpus)
    batches = [size for _, size in batches_of(config)]
    uneven, even = [size for size in batches if size % gpus], divisors(math.gcd(*batches))
    if uneven:
        near = [f"{g}" for g in (max((g for g in even if g < gpus), default=None), min((g for g in even if g > gpus), default=None)) if g]
        raise BadInput(f"--gpus={gpus}: does not divide --batch_size={uneven[0]}; {' or '.join(near)} would")
    if config.dtype == "float16" or options.gpu == "t4" and config.dtype != "float32":
        raise BadInput(f"--dtype={config.dtype}, --gpu={options.gpu}: under torchrun it is float32, or bfloat16, which a t4 has not")
    if options.simulate and model.num_experts and config.dtype == "float32":
        raise BadInput("--simulate: of experts in bfloat16 only; PyTorch can't derive the shape of their product in float32")
    memory, flops, link, network = GPUS[options.gpu]
    usable, rank_batch = USABLE * memory * GIB, max(batches) // gpus
    micro = min(rank_batch, config.micro_batch_size) or max(
        [m for m in divisors(min(batches) // gpus) if peak_of(model, config, m, rank_batch, shard)[0] <= usable], default=1)
    peak, moment, items = peak_of(model, config, micro, rank_batch, shard)
    per_token, micro_steps = model.flops_per_token(config.block_size), math.ceil(batches[0] / gpus / micro)
    speed = gpus * flops * options.mfu / per_token
    traffic, seconds = communicate(model, config, micro_steps, replicate, shard, gpus, link, network)
    step_seconds = batches[0] * config.block_size / speed
    # A block's forward pass, a third of its FLOPs, comes again where it is recomputed.
    again = len(range(0, model.n_layer, config.recompute)) / model.n_layer / 3 if config.recompute else 0
    again *= 1 - 6 * model.vocab_size * model.n_embd / per_token
    tokens, stages = None, {}
    if state.max_steps is not None:
        tokens = tokens_between(config, state.step, state.max_steps)
        warm = state.start + state.warmup
        edges = {"warm-up": (state.start, warm), "stable": (warm, state.decay_start),
                 "decay": (max(warm, state.decay_start), state.max_steps)}
        for name, (first, last) in edges.items():
            first, last = max(first, state.step), min(last, state.max_steps)
            if first < last:
                stages[name] = {"steps": last - first, "to": last, "tokens": tokens_between(config, first, last),
                                "last_lr": train.rate(config, dataclasses.replace(state, step=last - 1))}
    absent = {"head"} if model.tie_word_embeddings else set()
    absent |= set() if model.num_experts else {"router", "experts"}
    plan = {
        "gpus": gpus, "gpu": options.gpu, "replicate": replicate, "shard": shard, "micro_batch_size": micro, "micro_steps": micro_steps,
        "micro_chosen": not config.micro_batch_size and peak <= usable,
        "block_size": config.block_size, "recompute": config.recompute, "sync_micro_steps": config.sync_micro_steps,
        "flops_per_token": per_token, "checkpoint": 12 * model.n_params,
        "parameters": {"total": model.n_params, "non_embedding": model.n_params_non_embedding, "active": model.n_params_active},
        "memory": {"gpu": memory * GIB, "usable": usable, "peak": peak, "moment": moment, "items": items,
                   "activations_per_token_and_block": activations(model, 4 if config.dtype == "float32" else 2, False),
                   "gradients_sharded": 4 * model.n_params // shard},
        "speed": {"mfu": options.mfu, "flops": flops, "hardware": options.mfu * (1 + again), "tokens_per_s": speed, "step_s": step_seconds,
                  "tokens": tokens, "days": config.minutes / 1440 if tokens is None else tokens / speed / 86400},
        "communication": {**traffic, "seconds": seconds, "share_of_step": seconds / step_seconds, "link": link, "network": network},
        "batch": {"tokens": [size * config.block_size for size in batches], "expected_loss": options.expected_loss,
                  "law": batch_law(options.expected_loss), "loss": [(1.21e9 / size / config.block_size) ** (1 / 6.24) for size in batches]},
        "learning_rates": {role: config.learning_rate * row.lr for role, row in mup_table(model).items() if role not in absent},
        "schedule": stages, "fits": peak <= usable,
        "remedies": [] if peak <= usable else remedies(model, config, micro, batches, gpus, shard, usable),
    }
    if options.simulate:
        tracked = simulate(model, config, micro, rank_batch, gpus)
        alike, at, _ = peak_of(model, config, micro, rank_batch, shard, cpu=True)
        plan["simulation"] = {"peak": tracked["Total"], "categories": tracked, "estimate": alike, "moment": at,
                              "ratio": alike / tracked["Total"], "agrees": abs(alike / tracked["Total"] - 1) <= AGREES}
    return plan


def size(n):
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2 ** 20:.2f} MiB"


def text(plan):
    """The plan as lines, the verdict last."""
    p, m, s, c, b = (plan[name] for name in ("parameters", "memory", "speed", "communication", "batch"))
    yield (f"{p['total']:,} parameters, {p['non_embedding']:,} without embedding and head, {p['active']:,} of these active; "
           f"{plan['flops_per_token'] / 1e9:.3g} GFLOPs a token (forward and backward)")
    yield (f"{plan['gpus']} x {plan['gpu']}, mesh {plan['replicate']} x {plan['shard']}; micro-batch {plan['micro_batch_size']} x "
           f"{plan['block_size']} tokens, {plan['micro_steps']} a step"
           + (", gradients reduced with each" if plan["sync_micro_steps"] else "") + f"; recompute {plan['recompute']}; fused attention, eager blocks")
    if plan["micro_chosen"]:
        yield "the micro-batch is the largest that fits, as train.py chooses it by the memory that it finds"
    yield f"\nmemory per GPU at its peak ({m['moment']}):"
    yield from (f"  {name:22}{size(n):>12}" for name, n in [*m["items"].items(), ("peak", m["peak"])] if n)
    yield f"  sharded gradients, once complete: {size(m['gradients_sharded'])}"
    yield "  activations of a block, bytes a token: " \
        + ", ".join(f"{name} {n:,}" for name, n in m["activations_per_token_and_block"].items())
    yield (f"\ntime at an assumed MFU of {s['mfu']:.0%} of {s['flops'] / 1e12:,.0f} TFLOP/s (bfloat16, dense"
           + (f"; recomputing, the chip is {s['hardware']:.0%} busy" if plan["recompute"] else "")
           + f"): {s['tokens_per_s']:,.0f} tokens/s, {s['step_s']:.3g} s a step, "
           + (f"{s['days']:.1f} days for {s['tokens'] / 1e9:,.4g}B tokens" if s["tokens"] else "length by the clock"))
    yield ("communication, received by a GPU in a step: "
           + ", ".join(f"{name} {c[name] / 1e9:.4g} GB" for name in ("all-gather", "reduce-scatter", "all-reduce"))
           + f": {c['seconds']:.3g} s at {c['link'] / 1e9:.0f} GB/s a GPU in a node and {c['network'] / 1e9:.0f} GB/s out of a node, "
           f"{c['share_of_step']:.0%} of a step"
           + (" (hidden where it overlaps with computing)" if c["share_of_step"] < 1 else
              ": longer than computing, so that MFU is out of reach"))
    yield f"checkpoint: {plan['checkpoint'] / 1e9:.3g} GB (parameters and two moments, float32)"
    yield ("\nbatch: " + ", then ".join(f"{n:,} tokens, best at a loss of {loss:.2f}" for n, loss in zip(b["tokens"], b["loss"]))
           + f"; the law 1.21e9 / L^6.24 (paper section 3.2) asks {b['law']:,.0f} at the expected C4 loss of {b['expected_loss']:g}")
    yield "learning rates: " + ", ".join(f"{role} {rate:.4g}" for role, rate in plan["learning_rates"].items())
    yield from (f"{name}: {stage['steps']:,} steps to step {stage['to']:,}, {stage['tokens'] / 1e9:,.4g}B tokens, learning rate at its end "
                f"{stage['last_lr']:.3g}" for name, stage in plan["schedule"].items())
    if not plan["schedule"]:
        yield "schedule: by the clock, settled in the run"
    if "simulation" in plan:
        sim = plan["simulation"]
        yield f"\nsimulated on {plan['gpus']} fake ranks: peak {size(sim['peak'])} (" + ", ".join(
            f"{name} {size(n)}" for name, n in sim["categories"].items() if name != "Total" and n > sim["peak"] / 200) + ")"
        yield ("  the estimate, with what fake tensors on a CPU hold and a GPU does not (RMSNorm in pieces, a tied gradient summed out of "
               f"place): {size(sim['estimate'])}, {sim['ratio'] - 1:+.1%}: "
               f"{'agrees' if sim['agrees'] else 'DOES NOT AGREE'} within {AGREES:.0%}")
    room = f"{m['peak'] / GIB:.1f} of {m['usable'] / GIB:.1f} GiB ({USABLE:.0%} of the GPU's {m['gpu'] / GIB:.0f})"
    ways = [" ".join(f"--{name}={value}" for name, value in way.items() if name != "peak") + f" ({size(way['peak'])})"
            for way in plan["remedies"]]
    yield "\n" + (f"fits: {room}" if plan["fits"] else f"does not fit: {room}; " + (
        "would fit with " + ", or ".join(ways) if ways else "nor does recompute, another micro-batch, more shards or another GPU make it fit"))


@exits_cleanly
def main(argv):
    if not any(word.endswith(".py") or word.startswith(("--init_from", "--branch_from")) for word in argv):
        argv = ["config/laptop.py", *argv]
    (options, config, model), given = configure(argv, PlanConfig, TrainConfig, MiniCPMConfig, usage=__doc__)
    if "vocab_size" not in given and not (config.init_from or config.branch_from):
        model = dataclasses.replace(model, vocab_size=load_tokenizer(config.tokenizer).n_vocab)
    if config.init_from and not Path(config.init_from).exists() and {"vocab_size", "n_layer", "n_embd"} <= given.keys():
        config = dataclasses.replace(config, init_from=None)              # not there yet: only its weights would come from it
    # Of a run that is there already under out_dir the whole is planned, not the rest.
    plan = make_plan(options, resolve_start(dataclasses.replace(config, overwrite=True), model, given))
    print(json.dumps(plan) if options.json else "\n".join(text(plan)))


if __name__ == "__main__":
    main()
