"""Measure what an update, or decoding, costs on this machine.

    python -m tools.bench [config/NAME.py ...] [--key=value ...]
                                            updates of train.py's loop, phase by phase
    python -m tools.bench --task=decode     tokens/s of generation
    python -m tools.bench --compare=True [--nanogpt=PATH] [--task=decode]
                                            the same next to transformers, and to a nanoGPT checkout
    torchrun --nproc_per_node=8 -m tools.bench config/NAME.py    updates of several processes

The config is config/laptop.py if none is given. Weights and tokens are random, so no corpus is
needed, and no files are written. With --compare each program (tools/peers.py, PROGRAMS below) runs
in a process of its own, because memory that one leaves behind in malloc's heap slows the next one;
they take turns for several rounds.
"""
import contextlib
import json
import operator
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from configurator import (
    ROOT,
    BadInput,
    exits_cleanly,
    must_be_positive,
    no_output,
    print_differences,
)
from data.dataset import Prefetch, make_batches
from engine import checkpoint, distributed
from engine.device import (
    check_memory,
    choose_micro_batch,
    decide_compile,
    out_of_memory,
    peak_flops,
    pick_device,
    pick_dtype,
)
from engine.run import Start, new_state
from model import MiniCPM, init_weights
from tools import peers
from train import batch_size_at, build_model, check_processes, language_loss, read_config, train

PHASES = {"data": "data", "forward": "forward", "backward": "backward",
          "rest": "rest (clipping, optimizer, the loop's own work)"}
WARM_UP = 4                             # updates before the timed ones; the first one compiles
PROMPT_TOKENS = 16
ATTENTION = ("attention", "flash", "fmha", "sdpa")      # a part of the name of every fused kernel
# by task; the dtype of each is the computation's, or the weights' in decoding
PROGRAMS = {"step": ("nanogpt-float32", "nanogpt-bfloat16", "transformers-bfloat16",
                     "ours-float32", "ours-bfloat16"),
            "decode": ("nanogpt-float32", "transformers-float32", "transformers-bfloat16",
                       "ours-float32", "ours-bfloat16", "ours-int8")}


@dataclass
class BenchConfig:
    task: Literal['step', 'decode'] = 'step'    # what to measure: updates, or generation
    updates: int = 10                   # timed updates, at least 2; the median is reported
    peak_flops: float | None = None     # peak FLOP/s of a chip in the compute dtype, for MFU;
                                        # unset: that of the GPU's data sheet, if known
    compare: bool = False               # True: next to other programs
    nanogpt: str | None = None          # with compare: folder of a nanoGPT checkout
    program: str = "ours"               # the one to measure: ours in --dtype, or one of PROGRAMS
    rounds: int = 3                     # turns of each program with compare; generations of decode
    new_tokens: int = 512               # decode: tokens to generate
    prompts: int = 1                    # decode: sequences at a time
    json: bool = False                  # True: print one line of JSON

    def problems(self):
        out = must_be_positive(self, "peak_flops rounds new_tokens prompts")
        if self.updates < 2:
            out.append(f"--updates={self.updates}: must be above 1")
        if self.program not in ("ours", *PROGRAMS[self.task]):
            out.append(f"--program={self.program}: must be ours, {', '.join(PROGRAMS[self.task])}")
        if self.nanogpt and not Path(self.nanogpt, "model.py").is_file():
            out.append(f"--nanogpt={self.nanogpt}: must be a folder with nanoGPT's model.py")
        if self.program.startswith("nanogpt") and not self.nanogpt:
            out.append(f"--program={self.program}: give --nanogpt=PATH")
        return out


def read_options(argv):
    """Return (BenchConfig, TrainConfig, MiniCPMConfig); raise BadInput if they do not fit."""
    config, shape, _, bench = read_config(argv, BenchConfig, usage=__doc__)
    if config.init_from or config.branch_from:
        raise BadInput("--init_from, --branch_from: bench measures a shape, not a checkpoint; give "
                       "the config that the checkpoint was trained with")
    comparing = bench.compare or bench.program != "ours"
    if comparing and (shape.num_experts or shape.n_head * shape.head_size != shape.n_embd):
        raise BadInput("--compare: nanoGPT and Granite have no experts, and their head size is "
                       "n_embd / n_head; give another shape")
    if distributed.UNDER_TORCHRUN and (bench.task != "step" or comparing):
        raise BadInput("--task=decode, --compare: only in one process, without torchrun")
    return bench, config, shape


# ---- one measurement in this process: each function returns ([seconds], {facts})

def random_batches(config, vocab_size):
    """Return train.py's batch source over random tokens in memory."""
    rng = np.random.default_rng(config.seed)
    tokens = rng.integers(0, vocab_size, max(2 ** 20, 2 * config.block_size + 2), np.uint32)
    corpus = SimpleNamespace(n_tokens=len(tokens), row=None,
                             read=lambda offset, length: tokens[offset:offset + length])
    bos = 0 if config.doc_mask else None
    return make_batches(lambda name: corpus, config.seed, config.block_size, bos=bos)


def synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class PhaseClock:
    """Assigns the time that passes to the phases of updates.

    Only a synchronized device knows when a phase ends, and synchronizing costs time. So on a GPU
    every other update is timed phase by phase, and the ones between as a whole.
    """

    def __init__(self, device):
        self.device = device
        self.updates = [dict.fromkeys(PHASES, 0.0)]
        self.last = time.perf_counter()

    def end(self, phase, wait=False):
        """Add the time since the last call to `phase` of the current update."""
        if wait or len(self.updates) % 2:
            synchronize(self.device)
        now = time.perf_counter()
        self.updates[-1][phase] += now - self.last
        self.last = now

    def end_update(self):
        self.end("rest", wait=True)
        self.updates.append(dict.fromkeys(PHASES, 0.0))

    def result(self):
        """Return ([seconds of an update], {phase: median seconds}), without the warm-up."""
        by_phase = whole = self.updates[WARM_UP:-1]
        if self.device.type != "cpu":
            by_phase, whole = by_phase[::2], whole[1::2]
        phases = {phase: median(update[phase] for update in by_phase) for phase in PHASES}
        return [sum(update.values()) for update in whole], phases


def step(bench, config, shape):
    """Time updates of train.py's loop, as in a long run, through the functions that it calls.
    Under torchrun they are timed as a whole: FSDP calls no hook at the end of a backward pass."""
    # A distant end: no decay begins, and compiling pays off.
    config = replace(config, max_steps=10 ** 9, minutes=None, quiet=True)
    world = distributed.init_world(config)
    check_processes(config, world)
    check_memory(shape, world.device, world.shards)
    start = Start(config, shape, new_state(config), None, "scratch", {})
    decide_compile(config, start.state, world.device, say=no_output)
    model, clock = build_model(start, world), PhaseClock(world.device)

    def timed_batches(*where):
        clock.end("rest")                                                # freed the last gradients
        return batches(*where)

    def timed_loss(forward, micro_batch):
        clock.end("data")                                                # moved it to the device
        out = language_loss(forward, micro_batch)
        clock.end("forward")
        return out

    # The gradient of the embedding is the last one of every backward pass.
    model.wte.weight.register_post_accumulate_grad_hook(lambda p: clock.end("backward"))
    batches = Prefetch(random_batches(config, shape.vocab_size), world)
    updates = train(config, timed_batches, timed_loss, model, start.state, world=world)
    with batches, contextlib.closing(updates):
        for i in range(WARM_UP + bench.updates):
            if i == WARM_UP and world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            next(updates)
            clock.end_update()
    memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    seconds, phases = clock.result()
    facts = {"phases": phases} if world.alone else {"processes": world.size}
    return seconds, {**facts, "dtype": model.numerics.dtype, "compiled": start.state.compiled,
                     "micro": start.state.micro, "n_params": shape.n_params,
                     "peak_memory": memory, "attention": attention_kernels(config, model, world)}


def attention_kernels(config, model, world):
    """Return the names of the attention kernels of a forward pass, for one sequence; empty if the
    softmax is written out."""
    batch, _ = random_batches(config, model.config.vocab_size)([[0, "random"]], 0, 1)
    on_device = {name: tensor.to(world.device) for name, tensor in batch.items()}
    with torch.profiler.profile() as profiler:
        language_loss(model, on_device)
        synchronize(world.device)
    kinds = [event for event in profiler.events() if event.device_type.name != "CPU"]
    names = {event.name for event in kinds or profiler.events()}
    return sorted(name for name in names if any(word in name.lower() for word in ATTENTION))


def step_of_peer(bench, config, shape):
    """Time the same updates of another program: float32 and eager, or bfloat16 autocast and
    compiled."""
    name, _, dtype = bench.program.partition("-")
    device, dtype = pick_device(config.device), getattr(torch, dtype)
    compiled, batches = dtype == torch.bfloat16, random_batches(config, shape.vocab_size)
    micro = config.micro_batch_size or choose_micro_batch(shape, config, config.batch_size, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True    # as nanoGPT
    model, optimizer, loss_of = peers.load_trainer(name, bench.nanogpt, config, shape, device)
    forward, seconds = torch.compile(model) if compiled else model, []
    for i in range(WARM_UP + bench.updates):
        start = time.perf_counter()
        batch, n = batches([[0, "random"]], i * config.batch_size, config.batch_size)
        for j in range(0, config.batch_size, micro):
            idx, targets = (batch[name][j:j + micro].to(device) for name in ("idx", "targets"))
            with torch.amp.autocast(device.type, dtype, enabled=compiled):
                loss = loss_of(forward, idx, targets)
            (loss * targets.numel() / n).backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:], {"dtype": dtype, "compiled": compiled, "micro": micro,
                               "n_params": sum(p.numel() for p in model.parameters())}


def load_decoder(config, shape, device, dtype, quant):
    """Return our model's number of parameters and generate(prompts (B, T), number of new
    tokens)."""
    model = MiniCPM(shape).eval()
    init_weights(model, config.seed)
    model.to(device=device, dtype=dtype)
    model.numerics.dtype, model.numerics.flash = dtype, config.flash
    model.pack(quant)
    return shape.n_params, lambda prompts, n: list(model.generate(prompts.tolist(), n, top_k=50))


def decode(bench, config, shape):
    """Time the generation of all sequences' tokens by one program."""
    name, _, wanted = bench.program.partition("-")
    device = pick_device(config.device)
    check_memory(shape, device)
    dtype, quant = pick_dtype(config.dtype, device), "none"
    if wanted == "int8":
        dtype, quant = torch.bfloat16, wanted
    elif wanted:
        dtype = getattr(torch, wanted)
    if name == "ours":
        n_params, generate = load_decoder(config, shape, device, dtype, quant)
    else:
        length = PROMPT_TOKENS + bench.new_tokens
        n_params, generate = peers.load_decoder(name, bench.nanogpt, shape, device, dtype, length)
    rng = np.random.default_rng(config.seed)
    prompts = rng.integers(0, shape.vocab_size, (bench.prompts, PROMPT_TOKENS))
    prompts, seconds = torch.from_numpy(prompts).to(device), []
    for n in (8, *[bench.new_tokens] * bench.rounds):                    # the first one warms up
        start = time.perf_counter()
        generate(prompts, n)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:], {"dtype": wanted or dtype, "compiled": False, "n_params": n_params}


def peak_memory_of_process():
    """Return the largest resident memory of this process so far in bytes, None on Windows."""
    try:
        import resource
    except ImportError:                                     # Windows
        return None

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(bench, config, shape):
    """Make the measurement that the options name; return a dict for JSON, times in seconds."""
    name, _, dtype = bench.program.partition("-")
    tokens = batch_size_at(config, 0) * config.block_size
    if bench.task == "decode":
        tokens = bench.prompts * bench.new_tokens
        seconds, facts = decode(bench, config, shape)
    elif name == "ours":
        seconds, facts = step(bench, replace(config, dtype=dtype or config.dtype), shape)
    else:
        seconds, facts = step_of_peer(bench, config, shape)
    found = {"program": bench.program, "tokens": tokens, "seconds": median(seconds),
             "fastest": min(seconds), "slowest": max(seconds),
             "tokens_per_s": tokens / median(seconds), "device": str(pick_device(config.device)),
             "peak_rss": peak_memory_of_process(),
             **facts, "dtype": str(facts["dtype"]).removeprefix("torch.")}
    if bench.task == "step" and name == "ours":
        peak = bench.peak_flops or peak_flops(pick_device(config.device), no_output)
        found["flops_per_s"] = shape.flops_per_token(config.block_size) * found["tokens_per_s"]
        found["mfu"] = found["flops_per_s"] / (facts.get("processes", 1) * peak) if peak else None
    settings = {**asdict(bench), **asdict(config), **asdict(shape)}
    return {**found, "settings": settings, "provenance": checkpoint.provenance()}


def summary(found):
    """Return one line on what measure found."""
    mode = "compiled" if found["compiled"] else "eager"
    typical, fastest, slowest = (1000 * found[name] for name in ("seconds", "fastest", "slowest"))
    return (f"{found['program']}, {found['n_params']:,} parameters, {found['device']}, "
            f"{found['dtype']}, {mode}: {found['tokens']:,} tokens in {typical:,.1f} ms (median; "
            f"{fastest:,.1f} to {slowest:,.1f}), {found['tokens_per_s']:,.0f} tokens/s")


# ---- several programs, each in a process of its own

def measure_in_process(argv):
    """Return what measure finds in a new process. If that process fails, exit with its status."""
    command = [sys.executable, "-m", "tools.bench", *argv, "--json=True"]
    result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8",
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    if result.returncode:
        raise SystemExit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def compare(bench, argv):
    """Measure all programs in turn; print tokens/s, memory, and how many times as fast ours are,
    as medians over the rounds."""
    programs = [program for program in PROGRAMS[bench.task]
                if bench.nanogpt or not program.startswith("nanogpt")]
    ours = [program for program in programs if program.startswith("ours")]
    speeds, memory = {program: [] for program in programs}, {}
    for i in range(bench.rounds):
        for program in programs:
            found = measure_in_process([*argv, f"--program={program}"])
            print(f"round {i + 1}: {summary(found)}", flush=True)
            speeds[program].append(found["tokens_per_s"])
            memory[program] = max(found["peak_rss"] or 0, memory.get(program, 0))
    for program in programs:
        ratios = [f"{mine} x {median(map(operator.truediv, speeds[mine], speeds[program])):.2f}"
                  for mine in ours]
        print(f"{program:>21}: {median(speeds[program]):10,.1f} tokens/s, "
              f"{memory[program] / 2 ** 30:4.1f} GiB; {', '.join(ratios)}")


@exits_cleanly
def main(argv):
    bench, config, shape = read_options(argv)
    if bench.compare and not bench.json:
        return compare(bench, argv)
    with distributed.failing_ranks_exit():
        try:
            found = measure(bench, config, shape)
        except torch.OutOfMemoryError:
            raise out_of_memory() from None
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if bench.json:
        print(json.dumps(found))
        return
    print_differences(bench, config, shape)
    print(summary(found))
    if bench.task == "decode":
        return
    phases = found.get("phases", {})
    for phase, seconds in phases.items():
        share = seconds / sum(phases.values())
        print(f"{1000 * seconds:10.2f} ms  {share:6.1%}  {PHASES[phase]}")
    mfu = f"{found['mfu']:.1%}" if found["mfu"] else "n/a (give --peak_flops)"
    print(f"{found['flops_per_s'] / 1e9:10,.1f} GFLOP/s, MFU {mfu}")
    print(f"attention: {', '.join(found['attention']) or 'softmax written out'}")
    if found["peak_memory"]:
        print(f"memory: at most {found['peak_memory'] / 2 ** 30:.2f} GiB per GPU")


if __name__ == "__main__":
    main()
