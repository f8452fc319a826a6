"""Tell what a run costs before it starts: memory, time, communication, schedule. Does it fit?

    python -m tools.plan config/minicpm_2b.py --gpus=64 --gpu=h100 [any option of train.py]

Plans `torchrun ... train.py` with the same options, one process per GPU. Needs no GPU and little
memory. If --micro_batch_size is not given, the plan takes the largest one that fits: hand it on
to train.py, which otherwise chooses its own.

Memory is simulated: one update of the real model under FSDP2, on fake tensors (shapes without
data) and fake ranks, with every allocation tracked. The simulation does not see
  - the CUDA context, NCCL's buffers and fragmentation: only 90% of a GPU counts as usable;
  - torch.compile: compiled blocks keep other activations than the eager ones simulated here;
  - the masks of --doc_mask=True.
It adds the two gradients of a tied embedding out of place, while a GPU adds them in place: if the
peak is there (small micro-batch, recomputed blocks), it is too high by one float32 embedding.

Everything else follows from formulas: parameters, FLOPs, communication, time, learning rates.
"""
import bisect
import functools
import json
import math
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from configurator import BadInput, exits_cleanly, must_be_positive
from engine import distributed, ops
from engine.device import PEAK_FLOPS, USABLE
from engine.run import resolve_start
from model import MiniCPM, MiniCPMConfig, optimizer_groups
from train import batch_stages, samples_between

GIB = 2 ** 30
GPUS_PER_NODE = 8
SHALLOW = (4, 8)            # depths from which estimate_peak extrapolates

# memory    GiB
# flops     dense FLOP/s in bfloat16 with float32 sums (T4: float16)
# link      bytes/s that a GPU sends to another one of its node
# network   bytes/s that all GPUs of a node together send out of it
# Sources: NVIDIA's data sheets, from memory, and the Ada whitepaper (RTX 4090). The sheets quote
# FLOP/s with sparsity and links in both directions: twice these numbers. Network: the cards of
# DGX A100 (8 x 200 Gb/s) and of DGX H100 and later (8 x 400 Gb/s); for PCIe GPUs one card of
# 200 Gb/s is assumed.
Gpu = namedtuple("Gpu", "memory flops link network")
GPUS = {
    "a100-40": Gpu(40, PEAK_FLOPS["A100"], 300e9, 200e9),
    "a100-80": Gpu(80, PEAK_FLOPS["A100"], 300e9, 200e9),
    "h100": Gpu(80, PEAK_FLOPS["H100"], 450e9, 400e9),
    "h200": Gpu(141, PEAK_FLOPS["H200"], 450e9, 400e9),
    "b200": Gpu(180, PEAK_FLOPS["B200"], 900e9, 400e9),
    "l40s": Gpu(48, PEAK_FLOPS["L40S"], 32e9, 25e9),
    "rtx4090": Gpu(24, PEAK_FLOPS["4090"], 32e9, 25e9),
    "t4": Gpu(16, PEAK_FLOPS["T4"], 16e9, 25e9),
}


@dataclass
class PlanConfig:
    gpus: int = 8                       # number of processes, one GPU each
    gpu: Literal[tuple(GPUS)] = "h100"  # type of the GPUs
    mfu: float = 0.4                    # assumed: FLOPs of the model / peak FLOPs of the GPUs
    expected_loss: float = 2.5          # C4 loss (nats per token) to which the batch law is applied
    json: bool = False                  # True: print one JSON object, sizes in bytes

    def problems(self):
        out = must_be_positive(self, "gpus expected_loss")
        if not 0 < self.mfu <= 1:
            out.append(f"--mfu={self.mfu}: must be above 0 and at most 1")
        return out


def batch_law(loss):
    """Return the batch size in tokens that reaches a C4 loss (nats per token) with the fewest
    tokens: 1.21e9 / L ** 6.24 (paper section 3.2)."""
    return 1.21e9 / loss ** 6.24


def best_loss(tokens):
    """Return the C4 loss for which a batch of so many tokens is best: the inverse of batch_law."""
    return (1.21e9 / tokens) ** (1 / 6.24)


# ---- memory, by simulation

@dataclass(frozen=True)
class Setup:
    """What decides the memory of an update on one rank: options of train.py by their names."""
    model: MiniCPMConfig
    dtype: str
    block_size: int
    batch_size: int                     # the largest of the run
    micro_batch_size: int
    replicate: int
    shard: int
    recompute: int
    sync_micro_steps: bool
    reshard_after_forward: bool

    @property
    def ranks(self):
        return self.replicate * self.shard

    @property
    def micro_steps(self):
        return math.ceil(self.batch_size / self.ranks / self.micro_batch_size)


class PeakTracker(FSDPMemTracker):
    """FSDPMemTracker without the peak of every module, which takes half of its time."""

    def _update_peak_stats(self, peak_state):
        for device, snapshot in self._curr_mem_snap.items():
            if snapshot["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = snapshot["Total"]
                self._peak_mem_snap[device] = dict(snapshot)

    def label_accumulated_gradients(self, model):
        """Count the unsharded gradients that FSDP holds between micro-steps as gradients."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                    gradient = parameter.unsharded_accumulated_grad
                    if gradient is not None:
                        self._update_and_maybe_create_winfos(gradient, _FSDPRefType.UNSHARDED_GRAD)


CATEGORIES = {
    "parameters": ("Sharded Param", "Unsharded Param", "All Gather"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "optimizer_state": ("OptState",),
    "activations": ("Activation",),
    "other": ("Temp", "Inputs", "Buffer"),
}


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm that keeps what a GPU's fused kernel keeps: the input and one number per row.

    On a CPU torch computes RMSNorm in several steps and keeps two more copies of the input. The
    simulation needs shapes only, so nothing is computed here.
    """

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


@functools.cache
def simulate(setup):
    """Return {category: bytes} at the memory peak of one rank in an update; "peak" is their sum."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setup.ranks)
    dtype = torch.float32 if setup.dtype == "float32" else torch.bfloat16
    try:
        mesh = distributed.make_mesh("cpu", setup.replicate, setup.shard)
        with torch.device("meta"):
            model = MiniCPM(setup.model)
        model.numerics.dtype, model.numerics.flash = dtype, True
        with (mock.patch.object(ops, "EXPLICIT_ATTENTION_UP_TO", 0),     # as on a GPU
              mock.patch.dict(ops.MAX_LOGITS, cpu=ops.MAX_LOGITS["cuda"]),
              mock.patch.dict(ops.KEPT_LOGITS, cpu=ops.KEPT_LOGITS["cuda"]),
              mock.patch("torch.nn.functional.rms_norm", FusedRMSNorm.apply),
              FakeTensorMode(allow_non_fake_inputs=True)):
            distributed.distribute(model, setup, mesh, dtype, compiled=False)
            model.to_empty(device="cpu")
            tracked = track_update(setup, model)
    finally:
        dist.destroy_process_group()
    memory = {name: sum(tracked[kind] for kind in kinds) for name, kinds in CATEGORIES.items()}
    return {**memory, "peak": tracked["Total"]}


def track_update(setup, model):
    """Make one update of a sharded model of fake tensors; return {kind: bytes} at its peak.

    The update is not the first one of a run: AdamW's moments exist. Three micro-steps stand for
    any larger number, because the gradients that they accumulate do not grow any further.
    """
    optimizer = torch.optim.AdamW(optimizer_groups(model, weight_decay=0.1), fused=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Creates the moments; also DTensor's derivation of shapes, made once, would be counted.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    idx = torch.zeros(setup.micro_batch_size, setup.block_size, dtype=torch.int64)
    tracker = PeakTracker(model, optimizer)
    tracker.track_inputs((idx,))
    micro_steps = min(3, setup.micro_steps)
    with tracker:
        for i in range(micro_steps):
            tracker.reset_mod_stats()
            model.set_requires_gradient_sync(i == micro_steps - 1 or setup.sync_micro_steps)
            loss_sum, aux = train.language_loss(model, {"idx": idx, "targets": idx})
            aux_loss = sum(value for name, value in aux.items() if name.endswith("_loss"))
            (loss_sum + aux_loss).backward()
            del loss_sum, aux, aux_loss
            tracker.label_accumulated_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(kind, "value", kind): size for kind, size in snapshot.items()}


def estimate_peak(setup):
    """Return the peak in bytes, extrapolated linearly in depth from two shallow models.

    A search needs many peaks, and this takes a third of the time of simulating all blocks. At a
    given moment of the update memory is affine in depth, but in shallow models the peak can be at
    another moment: then this is too low (seen: by up to 14%), so what fits is simulated in full.
    The depths are multiples of `recompute`, so that the same share of the blocks is recomputed.
    """
    if setup.micro_steps == 1:
        setup = replace(setup, sync_micro_steps=False)                   # makes no difference
    low, high = (depth * max(1, setup.recompute) for depth in SHALLOW)
    depth = setup.model.n_layer
    if depth <= high:
        return simulate(setup)["peak"]
    peaks = [simulate(replace(setup, model=replace(setup.model, n_layer=n)))["peak"]
             for n in (low, high)]
    return peaks[1] + (peaks[1] - peaks[0]) / (high - low) * (depth - high)


def largest_micro_batch(setup, rank_batch, usable):
    """Return the largest divisor of rank_batch whose peak is within `usable` bytes, else 1.

    All of rank_batch is tried by itself, because it can need less than a smaller micro-batch: in
    an update of one micro-step no gradients are accumulated.
    """
    sizes = divisors(rank_batch)[::-1]

    def fits(size):
        # Even a recomputed block keeps its float32 input: no need to simulate what exceeds this.
        inputs = 4 * setup.model.n_layer * setup.model.n_embd * setup.block_size * size
        trial = replace(setup, micro_batch_size=size)
        return inputs <= usable and estimate_peak(trial) <= usable
    if rank_batch == 1 or not fits(rank_batch) and not fits(1):
        return 1
    first = 0 if fits(rank_batch) else bisect.bisect_left(sizes, True, lo=1, key=fits)
    for size in sizes[first:]:
        if simulate(replace(setup, micro_batch_size=size))["peak"] <= usable:
            return size
    return 1


def find_remedies(setup, batches, usable):
    """Try what could make a run fit, mildest first, up to the first that does; then a larger GPU.

    batches  the sizes of the run's batches, in sequences
    returns  [{"options": {name: value}, "peak": bytes, "fits": bool}]; the peak is an estimate
             only if it does not fit
    """
    all_knobs = {"micro_batch_size": 1, "sync_micro_steps": True, "recompute": 1,
                 **({} if setup.reshard_after_forward else {"reshard_after_forward": True})}
    trials = [
        {"reshard_after_forward": True},
        {"micro_batch_size": largest_micro_batch(setup, min(batches) // setup.ranks, usable)},
        {"sync_micro_steps": True},
        {"recompute": 1},
        {"replicate": 1, "shard": setup.ranks},
        {"recompute": 1, "sync_micro_steps": True},
        all_knobs,
    ]
    shards = [setup.ranks * n for n in divisors(math.gcd(*batches) // setup.ranks)]
    trials += [{**all_knobs, "replicate": 1, "shard": n} for n in shards[:4]]
    tried, seen = [], {setup}
    for changes in trials:
        trial = replace(setup, **changes)
        if trial not in seen:
            seen.add(trial)
            peak = estimate_peak(trial)
            if peak <= usable:
                peak = simulate(trial)["peak"]
            tried.append({"options": {"gpus": trial.ranks, **changes}, "peak": peak,
                          "fits": peak <= usable})
            if peak <= usable:
                break
    peak = simulate(setup)["peak"]
    larger = [name for name in GPUS if peak <= usable_memory(name)]
    if larger:
        gpu = min(larger, key=usable_memory)
        tried.append({"options": {"gpu": gpu}, "peak": peak, "fits": True})
    return tried


def usable_memory(gpu):
    return USABLE * GPUS[gpu].memory * GIB


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


# ---- the rest, by formulas

def gathered_bytes(setup):
    """Return the bytes of (all blocks in the compute dtype; embedding, head and last norm, which
    are float32), as they are when they are gathered from all shards."""
    model = setup.model
    root = model.n_params - model.n_params_non_embedding + model.n_embd      # outside the blocks
    width = 4 if setup.dtype == "float32" else 2
    return width * (model.n_params - root), 4 * root


def communication(setup, micro_steps, gpu):
    """Return {collective: bytes that a GPU receives per update, "seconds": time for all of them}.

    Blocks are gathered before their forward pass, and with reshard_after_forward again before
    their backward pass; embedding, head and last norm once per micro-step. Gradients are reduced in
    float32, once per update, or with sync_micro_steps in every micro-step.
    """
    model, replicate, shard = setup.model, setup.replicate, setup.shard
    blocks, root = gathered_bytes(setup)
    gathered = (2 if setup.reshard_after_forward else 1) * blocks + root
    reductions = micro_steps if setup.sync_micro_steps else 1
    received = {
        "all-gather": micro_steps * gathered * (shard - 1) / shard,
        "reduce-scatter": reductions * 4 * model.n_params * (shard - 1) / shard,
        "all-reduce": reductions * 2 * 4 * model.n_params / shard * (replicate - 1) / replicate,
    }
    # Shards leave a node once for all its GPUs; in an all-reduce each GPU has pieces of its own.
    between_shards = between_replicas = gpu.link
    if shard > GPUS_PER_NODE:
        between_shards = min(gpu.link, gpu.network)
    if setup.ranks > GPUS_PER_NODE:
        between_replicas = min(gpu.link, gpu.network / min(shard, GPUS_PER_NODE))
    seconds = (received["all-gather"] + received["reduce-scatter"]) / between_shards
    return {**received, "seconds": seconds + received["all-reduce"] / between_replicas}


def schedule_stages(config, state):
    """Return {stage: {steps, to, tokens, last_lr}}; empty if the run has minutes, not steps."""
    if state.max_steps is None:
        return {}
    warm = state.start + state.warmup
    edges = {"warm-up": (state.start, warm), "stable": (warm, state.decay_start),
             "decay": (max(warm, state.decay_start), state.max_steps)}
    stages = {}
    for name, (first, last) in edges.items():
        first, last = max(first, state.step), min(last, state.max_steps)
        if first < last:
            stages[name] = {"steps": last - first, "to": last,
                            "tokens": config.block_size * samples_between(config, first, last),
                            "last_lr": train.learning_rate_at(
                                config, replace(state, step=last - 1))}
    return stages


def speed(setup, step_tokens, options):
    """Return tokens/s and seconds per update at the assumed MFU, and how busy the GPUs are then."""
    model, flops = setup.model, GPUS[options.gpu].flops
    flops_per_token = model.flops_per_token(setup.block_size)
    tokens_per_s = options.gpus * flops * options.mfu / flops_per_token
    # Recomputing a block adds its forward pass: a third of its FLOPs.
    recomputed = len(range(0, model.n_layer, setup.recompute)) if setup.recompute else 0
    share_of_blocks = 1 - 6 * model.vocab_size * model.n_embd / flops_per_token
    busy = options.mfu * (1 + recomputed / model.n_layer * share_of_blocks / 3)
    return {"mfu": options.mfu, "busy": busy, "flops": flops, "flops_per_token": flops_per_token,
            "tokens_per_s": tokens_per_s, "step_s": step_tokens / tokens_per_s}


def learning_rates(config, model):
    """Return {role: peak learning rate}."""
    with torch.device("meta"):
        groups = optimizer_groups(MiniCPM(model), config.weight_decay)
    return {group["role"]: config.learning_rate * group["lr_scale"] for group in groups}


# ---- the plan

def check(options, config, model, batches):
    """Raise BadInput if GPUs, batch and dtype do not go together."""
    uneven = [size for size in batches if size % options.gpus]
    if uneven:
        near = sorted(divisors(math.gcd(*batches)), key=lambda n: abs(n - options.gpus))[:2]
        raise BadInput(f"--gpus={options.gpus}: does not divide --batch_size={uneven[0]}; "
                       f"{' or '.join(map(str, near))} would")
    if config.dtype == "float16" or options.gpu == "t4" and config.dtype != "float32":
        raise BadInput(f"--dtype={config.dtype}, --gpu={options.gpu}: under torchrun the dtype is "
                       "float32, or bfloat16, which a t4 does not have")
    if model.num_experts and config.dtype == "float32":
        raise BadInput("--dtype=float32: experts can be simulated in bfloat16 only; PyTorch cannot "
                       "derive the shape of their matrix product in float32")


def make_plan(options, start):
    """Return the plan as a dict, for a PlanConfig and an engine.run.Start."""
    config, model, state = start.config, start.model_config, start.state
    batches = [sequences for _, sequences in batch_stages(config)]
    check(options, config, model, batches)
    gpu, usable = GPUS[options.gpu], usable_memory(options.gpu)
    rank_batch = min(batches) // options.gpus
    replicate, shard = distributed.mesh_shape(config, options.gpus, GPUS_PER_NODE)
    micro_batch_size = min(config.micro_batch_size or rank_batch, max(batches) // options.gpus)
    setup = Setup(model, config.dtype, config.block_size, max(batches), micro_batch_size, replicate,
                  shard, config.recompute, config.sync_micro_steps,
                  config.reshard_after_forward)
    if not config.micro_batch_size:
        chosen = largest_micro_batch(setup, rank_batch, usable)
        setup = replace(setup, micro_batch_size=chosen)
    memory = simulate(setup)
    fits = memory["peak"] <= usable
    tokens = [sequences * config.block_size for sequences in batches]
    micro_steps = math.ceil(batches[0] / options.gpus / setup.micro_batch_size)
    run_tokens, days = None, (config.minutes or 0) / 1440
    pace = speed(setup, tokens[0], options)
    if state.max_steps is not None:
        run_tokens = config.block_size * samples_between(config, state.step, state.max_steps)
        days = run_tokens / pace["tokens_per_s"] / 86400
    return {
        **asdict(setup), "gpus": options.gpus, "gpu": options.gpu, "micro_steps": micro_steps,
        "mesh_is_default": not (config.replicate or config.shard),
        "parameters": {"total": model.n_params, "non_embedding": model.n_params_non_embedding,
                       "active": model.n_params_active},
        "memory": {**memory, "usable": usable, "gpu": gpu.memory * GIB,
                   "always": 12 * model.n_params / shard,
                   "gathered_blocks": gathered_bytes(setup)[0]},
        "speed": {**pace, "tokens": run_tokens, "days": days},
        "communication": {**communication(setup, micro_steps, gpu), **gpu._asdict()},
        "checkpoint": 12 * model.n_params,
        "batch": {"tokens": tokens, "best_loss": [best_loss(n) for n in tokens],
                  "expected_loss": options.expected_loss, "law": batch_law(options.expected_loss)},
        "learning_rates": learning_rates(config, model),
        "schedule": schedule_stages(config, state),
        "fits": fits,
        "remedies": [] if fits else find_remedies(setup, batches, usable),
    }


def size(n_bytes):
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB / 10 else f"{n_bytes / 2 ** 20:.2f} MiB"


def as_options(values):
    return " ".join(f"--{name}={value}" for name, value in values.items())


def memory_lines(plan):
    """Return the lines on memory."""
    memory = plan["memory"]
    kept = "not included" if plan["reshard_after_forward"] else "included"
    lines = ["memory per GPU at the peak of a simulated update (eager blocks, fused attention)"]
    for name in (*CATEGORIES, "peak"):
        lines.append(f"  {name.replace('_', ' '):16}{size(memory[name]):>12}")
    return [
        *lines,
        f"  always there, by formula: {size(memory['always'])} (sharded parameters and moments)",
        f"  --reshard_after_forward=False keeps all blocks gathered until their backward pass: "
        f"{size(memory['gathered_blocks'])}, {kept}",
        "  not simulated: CUDA context, NCCL buffers and fragmentation, for which "
        f"{1 - USABLE:.0%} of the GPU stay free; torch.compile; document masks (see --help)",
    ]


def cost_lines(plan):
    """Return the lines on time, communication and checkpoints."""
    speed, traffic = plan["speed"], plan["communication"]
    share = traffic["seconds"] / speed["step_s"]
    effect = "hidden where it overlaps with computing" if share < 1 else \
        "more than the computing: the assumed MFU is out of reach"
    length = f"{speed['days']:.1f} days"
    if speed["tokens"]:
        length += f" for {speed['tokens'] / 1e9:,.4g}B tokens"
    received = [f"{name} {traffic[name] / 1e9:.4g} GB"
                for name in ("all-gather", "reduce-scatter", "all-reduce")]
    return [
        f"time: {speed['tokens_per_s']:,.0f} tokens/s, {speed['step_s']:.3g} s per update",
        f"  assumed: MFU {speed['mfu']:.0%} of {speed['flops'] / 1e12:,.0f} TFLOP/s (recomputation "
        f"included, the GPUs are {speed['busy']:.0%} busy)",
        f"  the run takes {length}",
        f"communication: each GPU receives {', '.join(received)} per update",
        f"  {traffic['seconds']:.3g} s at {traffic['link'] / 1e9:.0f} GB/s per GPU in a node and "
        f"{traffic['network'] / 1e9:.0f} GB/s per node between nodes: {share:.0%} of an update, "
        f"{effect}",
        f"checkpoint: {plan['checkpoint'] / 1e9:.3g} GB (parameters and two moments, float32)",
    ]


def recipe_lines(plan):
    """Return the lines on batch size, learning rates and schedule."""
    batch = plan["batch"]
    sizes = [f"{tokens:,} tokens (best at a C4 loss of {loss:.2f})"
             for tokens, loss in zip(batch["tokens"], batch["best_loss"])]
    rates = [f"{role} {rate:.4g}" for role, rate in plan["learning_rates"].items()]
    stages = [f"{name}: {stage['steps']:,} updates up to step {stage['to']:,}, "
              f"{stage['tokens'] / 1e9:,.4g}B tokens, last learning rate {stage['last_lr']:.3g}"
              for name, stage in plan["schedule"].items()]
    return [
        f"batch: {', then '.join(sizes)}",
        f"  the law 1.21e9 / L^6.24 (paper section 3.2) gives {batch['law']:,.0f} tokens at the "
        f"expected loss of {batch['expected_loss']:g}",
        f"peak learning rates: {', '.join(rates)}",
        *(stages or ["schedule: set during the run, which has minutes instead of steps"]),
    ]


def verdict_lines(plan):
    """Return the lines on remedies, and whether the run fits as the last line."""
    memory, remedies = plan["memory"], plan["remedies"]
    room = f"{size(memory['peak'])} of {size(memory['usable'])} usable ({size(memory['gpu'])} GPU)"
    if plan["fits"]:
        return [f"fits: {room}"]
    tried = [f"  {size(trial['peak']):>12}  {'fits' if trial['fits'] else 'no  '}  "
             f"{as_options(trial['options'])}" for trial in remedies]
    good = [as_options(trial["options"]) for trial in remedies if trial["fits"]]
    advice = f"would fit with {', or '.join(good)}" if good else "nothing tried makes it fit"
    return ["tried by simulation (what does not fit may be extrapolated from shallow models):",
            *tried, "", f"does not fit: {room}; {advice}"]


def as_text(plan):
    """Return the plan as text; the last line is the verdict."""
    parameters = plan["parameters"]
    names = ("replicate", "shard", "micro_batch_size", "sync_micro_steps", "recompute",
             "reshard_after_forward")
    mesh = f"mesh: {plan['replicate']} x {plan['shard']}, copies x GPUs per copy"
    if plan["mesh_is_default"] and plan["replicate"] > 1:
        mesh += (f": by default every node of {GPUS_PER_NODE} GPUs holds a copy and gathers "
                 f"inside of it; --shard={plan['gpus']} makes one copy of all GPUs, which takes "
                 "less memory and more of the network")
    head = [
        f"model: {parameters['total']:,} parameters, {parameters['non_embedding']:,} without "
        f"embedding and head, {parameters['active']:,} of these active per token; "
        f"{plan['speed']['flops_per_token'] / 1e9:.3g} GFLOPs per token (forward and backward)",
        f"run: {plan['gpus']} x {plan['gpu']}, sequences of {plan['block_size']:,} tokens, "
        f"micro-steps per update: {plan['micro_steps']}, with "
        + as_options({name: plan[name] for name in names}),
        mesh,
    ]
    parts = [head, memory_lines(plan), cost_lines(plan), recipe_lines(plan),
             verdict_lines(plan)]
    return "\n\n".join("\n".join(part) for part in parts)


@exits_cleanly
def main(argv):
    config, model, given, options = train.read_config(argv, PlanConfig, usage=__doc__)
    if config.init_from and not Path(config.init_from).exists() \
            and {"vocab_size", "n_layer", "n_embd"} <= given.keys():
        config = replace(config, init_from=None)        # not there yet, but only its shape counts
    config = replace(config, overwrite=True)            # plan the whole run, not what is left of it
    plan = make_plan(options, resolve_start(config, model, given))
    print(json.dumps(plan) if options.json else as_text(plan))


if __name__ == "__main__":
    main()
