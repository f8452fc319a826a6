"""Train a MiniCPM.

    python train.py                                        the laptop run: config/laptop.py
    python train.py config/NAME.py ... --key=value ...     later wins; --help lists every knob
    torchrun --nproc_per_node=8 train.py config/NAME.py    one process a GPU, one model over all of them: parallel.py

Repeating a command continues its run where it was. `train` is the one loop of the project: a generator that yields after
every update, which main() merely drains.
"""
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

# Must be set before CUDA starts: repeatable matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from tqdm import tqdm

import checkpoint
import tokenizer as tokenizers
from configurator import ROOT, BadInput, build, configure, exits_cleanly, print_differences
from dataset import check_block_size, held_out_loss, make_batches, open_corpus, parse_mixture
from model import (MiniCPM, MiniCPMConfig, init_weights, load_weights, model_config, optimizer_groups, pick_device,
                   pick_dtype)
from wsd import lr_at

UNDER_TORCHRUN = "LOCAL_RANK" in os.environ
if UNDER_TORCHRUN:
    import parallel

WARMUP_SHARE, WARMUP_TIMED = 0.025, 100     # default warm-up: share of max_steps; updates of a run that is given minutes
COMPILE_REPAYS = 300                        # updates that a run on a CPU must have ahead for compiling to pay
# bf16 FLOP/s of a GPU by a word of its name: dense tensor-core peaks of NVIDIA's data sheets, from memory (T4: float16).
PEAK_FLOPS = {"T4": 65e12, "A100": 312e12, "A10": 125e12, "L40S": 362e12, "4090": 165e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12,
              "B200": 2250e12}
OVERFLOWS_IN_A_ROW = 20                     # float16: the scaler skips single overflows; this many mean divergence
MICRO_TOKENS_CPU = 8192                     # tokens per forward at most; larger is not faster on a CPU


@dataclass
class TrainConfig:
    out_dir: str = "out/run"            # the run's folder: checkpoints, metrics.jsonl, loss.png; relative to where you are
    init_from: str | None = None        # take the weights of this checkpoint or run, and start a run of its own (step 0)
    branch_from: str | None = None      # go on from this stable checkpoint (weights, optimizer, step, data position) elsewhere
    overwrite: bool = False             # start again where a run is already
    data: str = "pytorch"               # corpus, or a mixture: 'pytorch:0.7,speeches:0.3'
    decay_data: str | None = None       # mixture from the first decay step on; unset: data
    data_dir: str = "data"              # where the corpora are; relative to the project
    tokenizer: str = "bpe4096"          # bpe4096, bytes, gpt2, cl100k_base, or a folder; with init_from: the checkpoint's
    doc_mask: bool = False              # True: attention stays within a document
    max_steps: int | None = None        # updates; wins over minutes
    minutes: float | None = None        # length of the run by the clock, compiling and evaluation included
    batch_size: int = 8                 # sequences per update
    batch_schedule: str | None = None   # 'STEP:SEQUENCES,...': batch_size from a step on, as in '0:480,50000:960'
    micro_batch_size: int = 0           # sequences per forward; 0: chosen
    block_size: int = 256               # tokens of a sequence
    learning_rate: float = 0.01         # peak, at width dim_model_base (paper section 3.3)
    min_lr: float | None = None         # floor; unset: a tenth of learning_rate
    schedule: Literal['wsd', 'cosine', 'cosine_loop', 'constant'] = 'wsd'   # see wsd.py, which draws them
    warmup_steps: int | None = None     # unset: 2.5 % of max_steps, or 100 in a run given minutes
    decay: Literal['exponential', 'linear', 'cosine', '1-sqrt'] = 'exponential'  # form of the WSD decay
    decay_share: float | None = None    # share of the run spent decaying, at its end; unset: 0.2 where decay_steps is too
    decay_steps: int | None = None      # the same in updates; 0: no decay
    half_life: float | None = None      # updates in which an exponential decay halves the rate; unset: ends at min_lr
    rewarm_steps: int = 0               # a branch from a decayed checkpoint warms up again over this many updates
    weight_decay: float = 0.1           # AdamW's, on matrices only
    beta1: float = 0.9                  # AdamW
    beta2: float = 0.95                 # AdamW
    grad_clip: float = 1.0              # largest gradient norm; 0: no clipping
    seed: int = 1337                    # of the initial weights and the order of the data
    eval_interval: int = 500            # updates between evaluations; 0: only at the end
    eval_tokens: int = 131072           # held-out tokens of an evaluation
    log_interval: int = 10              # updates between lines of metrics.jsonl
    save_interval: int = 500            # updates between checkpoints; 0: only where a stage ends
    keep_last: int = 2                  # newest checkpoints kept; the end of the stable stage is always kept
    keep_every: int = 0                 # and every checkpoint whose step this divides; 0: no others
    async_save: bool = False            # True: training goes on while a checkpoint is written (and its copy kept in memory)
    sample_tokens: int = 200            # length of the sample printed at the end; 0: none
    skip_samples: int = 0               # after a stop at a non-finite loss: samples to leave out at that place
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # compute; parameters are float32 throughout
    compile: bool = True                # torch.compile; off by itself where it cannot work or repay, with a line
    flash: bool = True                  # fused attention kernels; False: written-out softmax everywhere
    fused: bool = True                  # fused AdamW
    deterministic: bool | None = None   # bit-exact repeats; unset: on a CPU, where it costs nothing
    replicate: int = 0                  # torchrun: copies of the model, each over `shard` processes; 0: what is left, else 1
    shard: int = 0                      # torchrun: processes that one copy is spread over; 0: what is left, so all of them
    recompute: int = 0                  # activation checkpointing: every n-th block runs again in the backward pass; 0: none
    timeout: float = 10.0               # torchrun: minutes after which a silent process counts as dead
    tensorboard: bool = False           # True: also out_dir/tensorboard; needs pip install tensorboard
    wandb: str | None = None            # also to this project of Weights & Biases; needs pip install wandb
    quiet: bool = False                 # no progress bar and no lines

    def problems(self):
        out = [f"--{name}={getattr(self, name)}: must be above 0" for name in
               ("max_steps", "minutes", "batch_size", "block_size", "learning_rate", "half_life", "eval_tokens", "log_interval",
                "keep_last", "timeout") if getattr(self, name) is not None and getattr(self, name) <= 0]
        out += [f"--{name}={getattr(self, name)}: must not be negative" for name in
                ("micro_batch_size", "min_lr", "warmup_steps", "decay_steps", "rewarm_steps", "weight_decay", "grad_clip",
                 "eval_interval", "save_interval", "keep_every", "sample_tokens", "skip_samples", "replicate",
                 "shard", "recompute")
                if getattr(self, name) is not None and getattr(self, name) < 0]
        out += [f"--{name}={getattr(self, name)}: must be at least 0 and below 1" for name in ("beta1", "beta2", "decay_share")
                if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1]
        if self.decay_share is not None and self.decay_steps is not None:
            out.append("--decay_share and --decay_steps: give one of them")
        if self.init_from and self.branch_from:
            out.append("--init_from and --branch_from: give one of them")
        if not self.branch_from and self.max_steps is None and self.minutes is None:
            out.append("--max_steps or --minutes: give one of them")
        if self.branch_from and self.minutes is not None:
            out.append("--minutes: a branch is measured in steps; give --decay_steps or --max_steps")
        if self.rewarm_steps and not self.branch_from:
            out.append("--rewarm_steps: only with --branch_from")
        if self.max_steps is None and self.minutes is not None and self.schedule.startswith("cosine"):
            out.append(f"--schedule={self.schedule}: needs its horizon from the start, so --max_steps; wsd needs none")
        if self.schedule == "wsd" and self.decay == "exponential" and self.floor == 0 and self.half_life is None:
            out.append("--min_lr=0: an exponential decay never gets there; give --half_life or another --decay")
        if self.floor > self.learning_rate:
            out.append(f"--min_lr={self.min_lr}: above --learning_rate={self.learning_rate}")
        if self.max_steps and self.decay_steps and self.decay_steps > self.max_steps and not self.branch_from:
            out.append(f"--decay_steps={self.decay_steps}: more than --max_steps={self.max_steps}")
        if self.device not in ("auto", "cpu", "cuda", "mps") and not self.device.removeprefix("cuda:").isdigit():
            out.append(f"--device={self.device}: is one of auto, cpu, cuda, cuda:N, mps")
        for mixture in (self.data, self.decay_data):
            try:
                parse_mixture(mixture or "x")
            except BadInput as error:
                out.append(str(error))
        try:
            batch_size_at(self, 0)
        except ValueError:
            out.append(f"--batch_schedule={self.batch_schedule}: is STEP:SEQUENCES,... from step 0 on, as in 0:480,50000:960")
        return out

    @property
    def floor(self):
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def share(self):                    # of the run spent decaying, where decay_steps does not say it
        return 0.2 if self.decay_share is None else self.decay_share


@dataclass
class RunState:
    """Where a run is: all that changes, beside weights and optimizer. Kept in a checkpoint's meta.json."""
    step: int = 0                       # updates done
    samples_seen: int = 0               # sequences, so also the position in the data (but for skips)
    tokens_seen: int = 0
    seconds: float = 0.0                # of the run so far, all its processes together
    max_steps: int | None = None        # None until a timed run settles it
    decay_steps: int = 0                # last updates spent decaying, meaningful once max_steps is
    warmup: int = 0
    start: int = 0                      # step from which warmup counts
    plan: list = field(default_factory=list)     # data plan: [[first sample, mixture], ...]
    skips: list = field(default_factory=list)    # [[from this many samples seen, samples left out], ...]
    compiled: bool | None = None        # None: not yet decided; a resume must compute as before
    micro: int = 0                      # sequences per forward; 0: not yet decided
    scaler: dict | None = None          # of float16
    overflows: int = 0                  # of float16, in a row

    @property
    def decay_start(self):
        return math.inf if self.max_steps is None else self.max_steps - self.decay_steps

    @property
    def position(self):                 # index of the next sample of the plan
        return self.samples_seen + sum(n for first, n in self.skips if self.samples_seen >= first)


class NonFinite(RuntimeError):
    """The loss or the gradient is no number; the update was not made."""


Update = namedtuple("Update", "step model optimizer metrics")


def language_loss(model, batch):
    """Sum of the next-token nll (nats) of a micro-batch, and the further losses that the model reports."""
    nll, aux = model(batch["idx"], batch["targets"], doc_ids=batch.get("doc_ids"))
    return nll.sum(), aux


# ---- the loop

def train(config, batches, loss, model, state=None, optimizer_tensors=None, validate=None, tokenizer=None, stop=lambda: False,
          world=None):
    """Train `model` as config says and yield an Update after every step, gradients still in place.

    batches    batches(plan, first, count) -> (dict of (count, ...) tensors, n): see dataset.make_batches
    loss       loss(forward, micro_batch) -> (sum, aux), forward being the model or its compiled form; a step minimises the
               sum over the batch / n, plus aux
    state      RunState; None: a new run. optimizer_tensors: (name, tensor) pairs of the checkpoint it comes from
    validate   validate(model) -> dict for metrics.jsonl, or None
    tokenizer  is saved in every checkpoint; None: no checkpoints and no files at all (labs)
    stop       asked after every update: True saves and ends the generator
    world      parallel.World where several processes train one model (that parallel.distribute has spread); None: alone
    raises     NonFinite, BadInput, OSError
    """
    say = (lambda text: None) if config.quiet else tqdm.write             # above the progress bar
    state = state or new_state(config)
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    device = world.device if world else pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    deterministic = device.type == "cpu" if config.deterministic is None else config.deterministic
    torch.use_deterministic_algorithms(deterministic)
    model.numerics.dtype, model.numerics.flash = dtype, config.flash
    if device.type == "cpu":
        keep_memory()
    if world is None:
        model.to(device)
    model.train()
    optimizer = torch.optim.AdamW(optimizer_groups(model, config.weight_decay), lr=config.learning_rate, fused=config.fused,
                                  betas=(config.beta1, config.beta2))
    if optimizer_tensors:
        restore_optimizer(optimizer, optimizer_tensors, config.fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    shard = world.mesh.size(1) if world else 1
    state.micro = config.micro_batch_size or state.micro or choose_micro_batch(config, model.config, device, ranks, shard)
    settle_compile(config, state, device, say)
    forward = torch.compile(model, dynamic=False) if state.compiled and world is None else model      # else its blocks are
    for group in optimizer.param_groups:
        say(f"{group['role']:>10}: {len(group['params']):4} tensors, {sum(p.numel() for p in group['params']):13,} parameters, "
            f"learning rate x {group['lr_scale']:.4g}, weight decay {group['weight_decay']:g}")
    say(f"{model.config.n_params_non_embedding:,} parameters without the embedding, {model.config.n_params:,} with it; "
        f"{device}, {str(dtype)[6:]}, {'compiled' if state.compiled else 'eager'}, micro-batch {state.micro}"
        + (f", {ranks} processes: {world.mesh.size(0)} x {world.mesh.size(1)}" if world else ""))

    out_dir = Path(config.out_dir) if tokenizer else None
    log = open(out_dir / "metrics.jsonl", "a", encoding="utf-8") if out_dir and rank == 0 else None
    boards = open_boards(config, out_dir) if log else []
    peak = peak_flops(device, say)
    writer = ThreadPoolExecutor(1)                                       # of checkpoints, where async_save
    writing = None
    bar = tqdm(total=state.max_steps, initial=state.step, unit="step", disable=True if config.quiet else None)
    began, steps_here, steady_since = time.monotonic() - state.seconds, 0, None
    timed_tokens, timed_seconds = 0, 0.0
    saved = state.step if out_dir and (out_dir / f"step-{state.step:08d}").exists() else None

    def write(line):
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()
        for board in boards:
            board(line)

    def evaluate():
        if validate:
            model.eval()
            values = validate(model)
            model.train()
            write({"step": state.step, **values})
            say(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def finish_saving():
        nonlocal writing
        if writing:
            writing, done = None, writing.result                         # raises what went wrong meanwhile
            done()

    def save(keep=False):
        nonlocal saved, writing
        if out_dir and saved == state.step and keep:                     # an interval fell on the end of a stage
            finish_saving()
            if rank == 0:
                checkpoint.amend(out_dir, state.step, run=asdict(state), keep=True)
        elif out_dir and saved != state.step:
            clock = time.monotonic()
            finish_saving()
            state.seconds = time.monotonic() - began
            state.scaler = scaler.state_dict() or None
            meta = {"run": asdict(state), "train": asdict(config), "model": asdict(model.config), "keep": keep,
                    "tokenizer_hash": tokenizer.hash, "provenance": checkpoint.provenance()}
            meta = json.loads(json.dumps(meta))                          # as it is now, not as it will be when it is written
            tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors_of(optimizer)}
            work = write_checkpoint(config, out_dir, state.step, tensors, meta, tokenizer, world)
            writing = writer.submit(work) if config.async_save else None
            if not config.async_save:
                work()
            saved = state.step
            write({"step": state.step, "save_pause_s": round(time.monotonic() - clock, 3)})

    try:
        while state.max_steps is None or state.step < state.max_steps:
            # A timed run settles its horizon when the stable share of the time is spent.
            if state.max_steps is None and steps_here > 1:
                settle_by_clock(config, state, time.monotonic() - began, (time.monotonic() - steady_since) / (steps_here - 1))
                if world:
                    state.max_steps, state.decay_steps = parallel.from_rank_0((state.max_steps, state.decay_steps))
                bar.total = state.max_steps
                if state.step == state.max_steps:
                    break

            # The end of the stable stage: from here decays and longer trunks branch.
            if state.step == state.decay_start and state.decay_steps:
                save(keep=True)
                if config.decay_data and state.plan[-1][1] != config.decay_data:
                    state.plan.append([state.position, config.decay_data])
                say(f"step {state.step}: the decay begins, {state.decay_steps} steps to go"
                    + (f", data from now on {config.decay_data}" if config.decay_data else ""))

            # Learning rate.
            lr = rate(config, state)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # Gradients, micro-batch by micro-batch, of the mean over the whole batch.
            clock = time.monotonic()
            count = batch_size_at(config, state.step)                    # of all ranks; each takes its run of samples
            batch, n = batches(state.plan, state.position + rank * (count // ranks), count // ranks)
            if world:
                n, stops = parallel.total(n, stop())
            parts = [{name: t[i:i + state.micro].to(device, non_blocking=True) for name, t in batch.items()}
                     for i in range(0, len(batch["idx"]), state.micro)]
            total = torch.zeros((), device=device)
            for i, part in enumerate(parts):
                if world:
                    model.set_requires_gradient_sync(i == len(parts) - 1)
                summed, aux = loss(forward, part)
                # Gradients are averaged over the ranks, and the sum of nll is to be their sum.
                scaler.scale(ranks * summed / n + sum(aux.values()) / len(parts)).backward()
                total += summed.detach() / n

            # Clip, and make the update only if all is finite.
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            if world:
                norm = norm.full_tensor()
                torch.distributed.all_reduce(total)
            loss_value, norm_value = torch.stack((total, norm)).tolist()
            finite = math.isfinite(loss_value) and math.isfinite(norm_value)
            state.overflows = 0 if finite else state.overflows + 1
            if not finite and (not scaler.is_enabled() or state.overflows >= OVERFLOWS_IN_A_ROW or not math.isfinite(loss_value)):
                raise NonFinite(non_finite_message(out_dir, state, count, loss_value, norm_value, rank))
            scaler.step(optimizer)
            scaler.update()

            # Count and log.
            state.step += 1
            steps_here += 1
            state.samples_seen += count
            tokens = ranks * batch["idx"].numel()
            state.tokens_seen += tokens
            if steps_here == 1:                                          # the first step compiles: not part of any speed
                steady_since = time.monotonic()
            else:
                timed_tokens += tokens
                timed_seconds += time.monotonic() - clock
            metrics = {"step": state.step, "loss": loss_value, "lr": lr, "tokens": state.tokens_seen, "grad_norm": norm_value,
                       "tok_per_s": round(timed_tokens / timed_seconds) if timed_seconds else None}
            if peak and metrics["tok_per_s"]:                            # model FLOPs utilisation (PaLM, appendix B)
                metrics["mfu"] = round(model.config.flops_per_token(config.block_size) * metrics["tok_per_s"] / (ranks * peak), 4)
            last = state.step == state.max_steps
            if state.step % config.log_interval == 0 or last:
                write(metrics)
                left = "" if config.minutes is None or state.max_steps else \
                    f" {max(0, config.minutes * 60 - (time.monotonic() - began)):.0f}s left"
                bar.set_postfix_str(f"loss {loss_value:.3f} lr {lr:.2g} {metrics['tok_per_s'] or 0:,} tok/s{left}", refresh=False)
                timed_tokens, timed_seconds = 0, 0.0
            bar.update()
            yield Update(state.step, model, optimizer, metrics)
            optimizer.zero_grad()

            # Evaluate and save; the end of the run is saved first, since it is the dearest.
            if last:
                break
            if config.eval_interval and state.step % config.eval_interval == 0:
                evaluate()
            if config.save_interval and state.step % config.save_interval == 0:
                save(keep=state.step == state.decay_start)
            if stops if world else stop():
                save()
                finish_saving()
                return
        save(keep=state.decay_steps == 0)
        evaluate()
        finish_saving()
    finally:
        bar.close()
        writer.shutdown(wait=False)                                      # a peer that died would be waited for in vain
        if log:
            log.close()


def open_boards(config, out_dir):
    """[log(line), ...] of TensorBoard and Weights & Biases, as asked; BadInput where the package is missing."""
    boards = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput("--tensorboard: pip install tensorboard") from None
        events = SummaryWriter(out_dir / "tensorboard")
        boards.append(lambda line: [events.add_scalar(name, value, line["step"]) for name, value in line.items() if value is not None])
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise BadInput("--wandb: pip install wandb") from None
        run = wandb.init(project=config.wandb, name=out_dir.name, id=hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:16],
                         resume="allow", config=checkpoint.read_json(out_dir / "config.json") if (out_dir / "config.json").exists() else None)
        boards.append(lambda line: run.log(line, step=line["step"]))
    return boards


def peak_flops(device, say):
    """FLOP/s that a GPU can do at best, for the utilisation in metrics.jsonl; None where its name is not known, which is said."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for word, flops in PEAK_FLOPS.items() if re.search(rf"\b{word}\b", name.replace("-", " "))), None)
    if peak is None:
        say(f"mfu: not reported, no peak is known here for {name!r}")
    return peak


def write_checkpoint(config, out_dir, step, tensors, meta, tokenizer, world):
    """Take hold of what this rank has to write of a checkpoint; returns the function that writes it."""
    rank, ranks, places, attempt, writes = 0, 1, None, None, True
    if world:
        placed = {part: {name: parallel.place(t) for name, t in named.items()} for part, named in tensors.items()}
        tensors = {part: {name: piece for name, (piece, _, _) in named.items()} for part, named in placed.items()}
        places = {part: {name: (offset, shape) for name, (_, offset, shape) in named.items()} for part, named in placed.items()}
        rank, ranks, attempt = world.mesh.get_local_rank("shard"), world.mesh.size(1), world.attempt
        writes = world.mesh.get_local_rank("replicate") == 0             # the copies are equal: one of them writes
    if config.async_save and writes:
        tensors = {part: {name: t.detach().to("cpu", copy=True) for name, t in named.items()} for part, named in tensors.items()}

    def work():
        if writes:
            checkpoint.save(out_dir, step, tensors, meta, tokenizer.save, places, rank, ranks, attempt, 60 * config.timeout)
        if writes and rank == 0:
            checkpoint.prune(out_dir, config.keep_last, config.keep_every)
            (out_dir / "nonfinite.json").unlink(missing_ok=True)
    return work


def batch_size_at(config, step):
    """Sequences per update at a step: a pure function, so that a resume needs no memory of it."""
    if config.batch_schedule is None:
        return config.batch_size
    pairs = [tuple(map(int, part.split(":"))) for part in config.batch_schedule.split(",")]
    if pairs != sorted(pairs) or pairs[0][0] != 0 or any(size < 1 for _, size in pairs):
        raise ValueError(config.batch_schedule)
    return [size for first, size in pairs if first <= step][-1]


def rate(config, state):
    """Learning rate of the next update."""
    return lr_at(state.step, peak=config.learning_rate, floor=config.floor, warmup=state.warmup, start=state.start,
                 max_steps=math.inf if state.max_steps is None else state.max_steps, decay_steps=state.decay_steps,
                 schedule=config.schedule, decay=config.decay, half_life=config.half_life)


def new_state(config):
    """RunState at step 0, with the horizon where it is known."""
    state = RunState(plan=[[0, config.data]], warmup=config.warmup_steps if config.warmup_steps is not None else WARMUP_TIMED)
    if config.max_steps is not None:
        set_horizon(config, state, config.max_steps)
        if config.warmup_steps is None:
            state.warmup = int(WARMUP_SHARE * config.max_steps)
    return state


def set_horizon(config, state, max_steps):
    """Fix where the run ends and where its decay begins."""
    state.max_steps = max_steps
    state.decay_steps = 0 if config.schedule != "wsd" else \
        config.decay_steps if config.decay_steps is not None else round(config.share * max_steps)
    state.decay_steps = min(state.decay_steps, max_steps - state.step)


def settle_by_clock(config, state, seconds, seconds_per_step):
    """Fix the horizon of a timed run once its stable share is spent: the decay gets the updates that the rest is worth."""
    budget = config.minutes * 60
    if config.schedule != "wsd" or config.decay_steps == 0 or config.share == 0:
        if seconds >= budget:
            state.max_steps = state.step
    elif config.decay_steps is not None:
        if seconds + config.decay_steps * seconds_per_step >= budget:
            state.max_steps, state.decay_steps = state.step + config.decay_steps, config.decay_steps
    elif seconds >= (1 - config.share) * budget:
        state.decay_steps = max(1, round((budget - seconds) / seconds_per_step))
        state.max_steps = state.step + state.decay_steps


def non_finite_message(out_dir, state, batch_size, loss, norm, rank):
    """What happened and what to do; also left in the run folder, so that a restarting agent does not run into it again."""
    text = (f"step {state.step + 1}: loss {loss}, gradient norm {norm}; the update was not made "
            f"(samples {state.position} to {state.position + batch_size - 1} of the data plan)")
    if out_dir:
        good = checkpoint.checkpoints(out_dir)
        text += f"; last good checkpoint: {good[-1] if good else 'none'}; lower --learning_rate in a new run, or repeat the " \
                f"command with --skip_samples={batch_size} to go round the place"
        if rank == 0:
            checkpoint.write_json(out_dir / "nonfinite.json", {"samples_seen": state.samples_seen, "message": text})
    return text


# ---- devices

def keep_memory():
    """Have glibc keep freed memory for the next step. By default it gives large buffers back to the system every time, and
    the page faults of getting them again cost a quarter of a CPU step (LOG.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), -1, -4            # names of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)


def settle_compile(config, state, device, say):
    """Decide, once in a run, whether it is compiled; say why not."""
    if state.compiled is None:
        why_not = why_not_compile(config, state, device)
        state.compiled = why_not is None
        if why_not:
            say(f"compile: off, {why_not}")


def why_not_compile(config, state, device):
    """None where torch.compile will do good, else the reason against it."""
    if not config.compile:
        return "as asked"
    if device.type == "mps":
        return "not used on mps"
    if device.type == "cuda":
        return None if torch.cuda.get_device_capability(device)[0] >= 7 else "this GPU is too old for Triton"
    ahead = None if state.max_steps is None else state.max_steps - state.step
    if ahead is not None and ahead < COMPILE_REPAYS:
        return f"{ahead} steps are too few to repay it"
    if ahead is None and config.minutes < 1:
        return f"{config.minutes} minutes are too few to repay it"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"])):
        return "no C++ compiler here"
    return None


def check_memory(model, device, shard=1):
    """Bytes free for activations; BadInput where the model, its gradients and AdamW's state do not even fit.

    shard: processes that the model is spread over, which on a CPU share the machine's memory (torchrun: LOCAL_WORLD_SIZE)
    """
    needed = 16 * model.n_params / shard                                # float32 parameter, gradient and two moments
    if device.type != "cuda":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = math.inf                                                 # Windows does not say
    if needed > free:
        raise BadInput(f"{model.n_params:,} parameters need {needed / 2**30:,.0f} GiB with their gradients and AdamW's state; "
                       f"{device} has {free / 2**30:,.0f} GiB: take a smaller model or a larger machine")
    return free - needed


def choose_micro_batch(config, model, device, ranks, shard):
    """Sequences per forward: the largest divisor of a rank's batch whose activations fit."""
    batch_size = batch_size_at(config, 0) // ranks
    # Kept for the backward pass in a layer: about 18 values of width C and 3 of width F, most of them in 2 bytes.
    per_token = model.n_layer * (18 * model.n_embd + 3 * model.n_ff) * 2.5
    tokens = MICRO_TOKENS_CPU if device.type == "cpu" else 0.6 * check_memory(model, device, shard) / per_token
    most = max(1, int(tokens / config.block_size))
    return max(d for d in range(1, min(most, batch_size) + 1) if batch_size % d == 0)


# ---- what a checkpoint holds

def optimizer_tensors_of(optimizer):
    """{"NAME/exp_avg": tensor, ...}: AdamW's state by parameter name, not by position."""
    return {f"{name}/{key}": value for group in optimizer.param_groups for name, p in zip(group["names"], group["params"])
            for key, value in optimizer.state[p].items()}


def restore_optimizer(optimizer, tensors, fused):
    """The reverse, from (name, tensor) pairs; BadInput where one is missing."""
    params = {name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"])}
    for name, tensor in tensors:
        name, _, key = name.rpartition("/")
        p = params[name]
        if key == "step":
            optimizer.state[p][key] = tensor.to(p.device if fused else "cpu")
        else:
            optimizer.state[p][key] = torch.zeros_like(p)
            put(optimizer.state[p][key], tensor)
    for name, p in params.items():
        lacking = {"step", "exp_avg", "exp_avg_sq"} - optimizer.state[p].keys()
        if lacking:
            raise BadInput(f"the checkpoint's optimizer state lacks {name}/{sorted(lacking)[0]}; use --init_from to take the weights only")


@torch.no_grad()
def put(tensor, whole):
    """Copy into a tensor the whole, or of a tensor that is spread over ranks its piece."""
    if hasattr(tensor, "to_local"):
        parallel.put(tensor, whole)
    else:
        tensor.copy_(whole)


# ---- starting, resuming, branching

Start = namedtuple("Start", "config model_config state folder kind asked")       # kind: scratch, resume, branch, init
MAY_CHANGE = ("max_steps", "minutes", "eval_interval", "eval_tokens", "log_interval", "save_interval", "keep_last", "keep_every",
              "sample_tokens", "skip_samples", "overwrite", "quiet", "tensorboard", "wandb", "async_save", "timeout", "replicate", "shard",
              "recompute")
MAY_DIFFER = ("max_position", "original_max_position", "tie_word_embeddings", "mup_lr")  # and rope_...: from the checkpoint's model


def read_config(argv):
    """(TrainConfig, MiniCPMConfig, given); config/laptop.py where neither a config nor a checkpoint to start from is named."""
    if not any(word.endswith(".py") or word.startswith(("--init_from", "--branch_from")) for word in argv):
        argv = ["config/laptop.py", *argv]
    (config, model), given = configure(argv, TrainConfig, MiniCPMConfig, usage=__doc__)
    return config, model, given


def choose_start(config, model, given):
    """Decide what this command does, from what is in out_dir and what it names. Returns a Start; BadInput where it cannot."""
    done = [] if config.overwrite else checkpoint.checkpoints(config.out_dir)
    if done:
        return resume(config, model, done[-1])
    if config.branch_from:
        return branch(config, given, asked(config, model))
    if checkpoint.is_released(config.out_dir):
        raise BadInput(f"--out_dir={config.out_dir}: holds a released model, which a run would overwrite; give another one")
    if config.init_from:
        folder = checkpoint.resolve(config.init_from)
        theirs = model_config(checkpoint.read_meta(folder), folder)
        was_asked = asked(config, model)
        if "tokenizer" not in given:
            config = dataclasses.replace(config, tokenizer=str(folder))
        return Start(config, compare_model(theirs, given, folder), new_state(config), folder, "init", was_asked)
    return Start(config, model, new_state(config), None, "scratch", asked(config, model))


def asked(config, model):
    """The knobs as the command set them, flat, as JSON gives them back."""
    return json.loads(json.dumps({**asdict(config), **asdict(model)}))


def resume(config, model, folder):
    """Continue the run in out_dir: the command must be the one that began it, but for MAY_CHANGE."""
    meta, now = checkpoint.read_meta(folder), asked(config, model)
    before = checkpoint.read_json(Path(config.out_dir) / "config.json")["asked"]
    changed = [name for name in now if now[name] != before.get(name)]
    refused = [name for name in changed if name not in MAY_CHANGE]
    if refused:
        raise BadInput(*[f"--{name}={now[name]}: the run in {config.out_dir} was begun with {before.get(name)}; repeat its command, "
                         f"or give --overwrite=True or another --out_dir" for name in refused])
    state = RunState(**meta["run"])
    saved = TrainConfig(**meta["train"])
    config = dataclasses.replace(saved, **{name: getattr(config, name) for name in MAY_CHANGE if name in changed})
    if "max_steps" in changed:
        if state.max_steps is not None and state.decay_steps and state.step > state.decay_start:
            raise BadInput(f"--max_steps={config.max_steps}: the run in {config.out_dir} is in its decay; "
                           f"branch from its stable checkpoint instead (--branch_from={config.out_dir})")
        if config.max_steps is not None and config.max_steps < state.step:
            raise BadInput(f"--max_steps={config.max_steps}: the run in {config.out_dir} has {state.step} steps already")
        if config.max_steps is not None:
            set_horizon(config, state, config.max_steps)
    marker = Path(config.out_dir) / "nonfinite.json"
    if marker.exists():
        note = checkpoint.read_json(marker)
        if not config.skip_samples:
            raise NonFinite(note["message"])
        state.skips.append([note["samples_seen"], config.skip_samples])
    return Start(config, model_config(meta, folder), state, folder, "resume", now)


def branch(config, given, was_asked):
    """Go on from a stable checkpoint in a folder of its own: the trunk's settings, but for what this command says."""
    folder = checkpoint.resolve(config.branch_from)
    in_decay = lambda meta: meta["run"]["step"] > RunState(**meta["run"]).decay_start       # noqa: E731
    if folder != Path(config.branch_from) and not config.rewarm_steps:   # a run folder: its latest stable checkpoint
        stable = [f for f in checkpoint.checkpoints(config.branch_from) if not in_decay(checkpoint.read_meta(f))]
        folder = stable[-1] if stable else folder
    meta = checkpoint.read_meta(folder)
    if "run" not in meta:
        raise BadInput(f"{folder}: weights alone, no optimizer or place in the data to go on from; use --init_from")
    state = RunState(**meta["run"])
    if in_decay(meta) and not config.rewarm_steps:
        raise BadInput(f"{folder}: is in its decay (stable until step {state.decay_start}); branch from a stable checkpoint, "
                       f"or give --rewarm_steps")
    if "out_dir" not in given or Path(config.out_dir).resolve() == folder.parent.resolve():
        raise BadInput("--out_dir: a branch needs a folder of its own")
    own = ("max_steps", "minutes", "decay_steps", "decay_share", "overwrite", "skip_samples", "init_from", "branch_from", "out_dir")
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    values = {**meta["train"], **{name: getattr(config, name) for name in own},
              **{name: value for name, value in given.items() if name in names}}
    if config.decay_share is None and config.decay_steps is None:
        values["decay_share"] = meta["train"]["decay_share"]
    (config,) = build([TrainConfig], values)
    end = config.max_steps
    if config.decay_steps is None and end is None:
        state.decay_steps = max(1, round(state.step * config.share / (1 - config.share)))
    elif config.decay_steps is None:
        state.decay_steps = min(end - state.step, round(config.share * end))
    else:
        state.decay_steps = config.decay_steps
    state.max_steps = state.step + state.decay_steps if end is None else end
    if config.schedule != "wsd":
        state.decay_steps = 0
    if state.max_steps <= state.step or state.decay_start < state.step:
        raise BadInput(f"--max_steps={state.max_steps}, --decay_steps={state.decay_steps}: the checkpoint is at step {state.step} already")
    if config.rewarm_steps:
        state.start, state.warmup = state.step, config.rewarm_steps
    if config.data != state.plan[-1][1]:
        state.plan.append([state.position, config.data])
    state.seconds, state.compiled, state.micro = 0.0, None, 0
    model = compare_model(model_config(meta, folder), given, folder)
    if model.tie_word_embeddings != meta["model"]["tie_word_embeddings"]:
        raise BadInput("--tie_word_embeddings: untying changes the optimizer's state; use --init_from")
    return Start(config, model, state, folder, "branch", was_asked)


def compare_model(model, given, folder):
    """The checkpoint's model config, with what may differ taken from the command; BadInput lists what may not."""
    fields = {f.name for f in dataclasses.fields(MiniCPMConfig)} & given.keys()
    changed = {name for name in fields if given[name] != getattr(model, name)}
    refused = sorted(name for name in changed if name not in MAY_DIFFER and not name.startswith("rope_"))
    if not model.tie_word_embeddings and "tie_word_embeddings" in changed:
        refused.append("tie_word_embeddings")
    if refused:
        raise BadInput(*[f"--{name}={given[name]}: {folder} has {getattr(model, name)}" for name in refused])
    (model,) = build([MiniCPMConfig], {**asdict(model), **{name: given[name] for name in changed}})
    return model


def prepare_missing(config, tokenizer):
    """Run data/NAME/prepare.py for each corpus that is not there yet and needs nothing but its name."""
    for name in {**parse_mixture(config.data), **parse_mixture(config.decay_data or config.data)}:
        script = ROOT / "data" / name / "prepare.py"
        if not Path(ROOT, config.data_dir, name, tokenizer.name).exists() and name in ("pytorch", "plays", "speeches"):
            command = [sys.executable, str(script), f"--tokenizer={config.tokenizer}", f"--data_dir={config.data_dir}"]
            if subprocess.run(command).returncode:
                raise BadInput(f"data={name}: could not be prepared (see above)")


def open_data(config, tokenizer):
    """(batches, validate) of a config; BadInput where a corpus is missing, too short, or of another tokenizer."""
    shares = parse_mixture(config.data)
    for name in {**shares, **parse_mixture(config.decay_data or config.data)}:
        for split in ("train", "val"):
            check_block_size(open_corpus(config.data_dir, name, tokenizer, split), config.block_size)
    bos = tokenizer.bos if config.doc_mask else None
    held_out = {name: open_corpus(config.data_dir, name, tokenizer, "val") for name in shares}
    token_bytes = tokenizer.token_bytes()

    def validate(model):
        size = config.micro_batch_size or min(config.batch_size, max(1, MICRO_TOKENS_CPU // config.block_size))
        sums = [held_out_loss(model, held_out[name], token_bytes, config.block_size, int(config.eval_tokens * share), size,
                              model.wte.weight.device, bos).sum(axis=1) for name, share in shares.items()]
        nats, targets, n_bytes = map(float, sum(sums))
        return {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / n_bytes}

    open_train = lambda name: open_corpus(config.data_dir, name, tokenizer, "train")        # noqa: E731
    return make_batches(open_train, config.seed, config.block_size, bos), validate


def build_model(start, config, world=None):
    """The model of a Start: drawn anew, or with the checkpoint's weights (a head untied just now starts as the embedding).

    With a world it is spread over the ranks while it is still without memory, and each fills its own pieces.
    """
    with torch.device("meta"):
        model = MiniCPM(start.model_config)
    device = world.device if world else torch.device("cpu")
    if world:
        parallel.distribute(model, config, world.mesh, pick_dtype(config.dtype, device), start.state.compiled)
    elif config.recompute:
        from parallel import recompute
        recompute(model, config.recompute)
    model.to_empty(device=device)
    if start.folder is None:
        init_weights(model, config.seed, put)
        return model
    share = (world.rank, world.size) if world else (0, 1)
    tensors = checkpoint.read_weights(start.folder, torch.float32, share)
    if not start.model_config.tie_word_embeddings and checkpoint.read_meta(start.folder)["model"]["tie_word_embeddings"]:
        tensors = untied(tensors)
    load_weights(model, tensors, start.folder, put)
    return model


def untied(tensors):
    """(name, tensor) pairs with a head that starts as the embedding."""
    for name, tensor in tensors:
        yield name, tensor
        if name == "wte.weight":
            yield "lm_head.weight", tensor


def draw_curves(out_dir):
    """loss.png from metrics.jsonl: training and held-out loss, and the learning rate, over tokens."""
    training, held_out = checkpoint.read_metrics(out_dir)
    if not training:
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    tokens = [x["tokens"] / 1e6 for x in training]
    at = dict(zip((x["step"] for x in training), tokens))
    window = max(1, len(training) // 100)
    smooth = [sum(x["loss"] for x in training[max(0, i - window):i + 1]) / (min(i, window) + 1) for i in range(len(training))]
    figure, left = plt.subplots(figsize=(8, 4.5))
    left.plot(tokens, [x["loss"] for x in training], color="0.8", linewidth=0.7)
    left.plot(tokens, smooth, color="tab:blue", label="training loss (smoothed)")
    points = [(at[x["step"]], x["val_loss"]) for x in held_out if x["step"] in at]
    left.plot(*zip(*points), "ko", markersize=4, label="held-out loss") if points else None
    left.set(xlabel="tokens (millions)", ylabel="loss (nats per token)")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(tokens, [x["lr"] for x in training], color="tab:red", linestyle="--", linewidth=1, label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(0, 1.35 * max(x["lr"] for x in training))             # room for the legend
    handles = [sum(pair, []) for pair in zip(left.get_legend_handles_labels(), right.get_legend_handles_labels())]
    left.legend(*handles, loc="upper center")
    figure.tight_layout()
    figure.savefig(out_dir / "loss.png", dpi=120)
    plt.close(figure)


def fly(start, loss=language_loss, make_source=None, world=None):
    """Drain the loop for a Start, with everything around it: the folder's lock, data, signals, curves, the last sample.

    make_source  (config, tokenizer) -> (batches, validate); None: language modelling on config.data
    world        parallel.World under torchrun. What is done to the run's folder, rank 0 does; what may fail, all do together
    """
    first = world is None or world.rank == 0
    together = parallel.all_or_none if world else (lambda work: work())
    config, state, out_dir = start.config, start.state, Path(start.config.out_dir)
    if not first:
        config = dataclasses.replace(config, quiet=True)
    say = (lambda *words: None) if config.quiet else print

    def take_folder():
        out_dir.mkdir(parents=True, exist_ok=True)
        return checkpoint.lock(out_dir) if first else None
    lock = together(take_folder)
    try:
        tokenizer = together(lambda: open_tokenizer(start, config))
        together(lambda: prepare_missing(config, tokenizer) if first else None)
        batches, validate = together(lambda: (make_source or open_data)(config, tokenizer))
        if world:
            settle_compile(config, state, world.device, say)
        model = together(lambda: build_model(start, config, world))
        optimizer_tensors = checkpoint.read_tensors(start.folder, "optimizer", (world.rank, world.size) if world else (0, 1)) \
            if start.kind in ("resume", "branch") else None
        together(lambda: write_down(start, say) if first else None)
        if together(lambda: finished(out_dir, state)):
            edited = checkpoint.read_meta(start.folder)["provenance"]["code"] != checkpoint.provenance()["code"]
            if first:
                print(f"{out_dir} is finished ({state.step} steps)" + (", and the code has changed since" if edited else "")
                      + ": --overwrite=True starts it again, --out_dir=FOLDER makes another run")
            return
        stopped = []

        def on_signal(number, frame):
            stopped.append(number)
            signal.signal(number, signal.SIG_DFL)                        # the second one does not wait for the step to end
        handlers = {name: signal.signal(name, on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            for _ in train(config, batches, loss, model, state, optimizer_tensors, validate, tokenizer, lambda: bool(stopped), world):
                pass
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
        if first:
            draw_curves(out_dir)
        if state.step != state.max_steps:
            say(f"stopped at step {state.step} and saved; the same command continues")
            return
        if config.sample_tokens and world is None:
            ids = [int(token) for token in model.eval().generate([[tokenizer.bos]], config.sample_tokens, temperature=0.7, top_k=50,
                                                                 seed=config.seed, stop_ids=[tokenizer.eos], never_ids=[tokenizer.bos])]
            say(f"--- a sample, temperature 0.7\n{tokenizer.decode(i for i in ids if i != tokenizer.eos)}\n---")
        say(f"finished: {state.step} steps, {state.tokens_seen / 1e6:.1f}M tokens, {state.seconds:.0f} s; curves in {out_dir / 'loss.png'}; "
            f"python sample.py --ckpt={out_dir} writes more")
    finally:
        if lock:
            lock.close()


def open_tokenizer(start, config):
    """The run's tokenizer; BadInput where checkpoint, model or machine do not go with it or with each other."""
    tokenizer = tokenizers.load(str(start.folder) if start.kind in ("resume", "branch") else config.tokenizer)
    if start.kind == "init" and tokenizers.held_by(start.folder):
        theirs = tokenizers.load(str(start.folder)).hash
        if theirs != tokenizer.hash:
            raise BadInput(f"--tokenizer={config.tokenizer}: {start.folder} was trained with another tokenizer "
                           f"(hash {theirs[:12]}, here {tokenizer.hash[:12]})")
    if start.model_config.num_experts:
        raise BadInput("--num_experts: a model with experts can be sampled, evaluated and converted; training one is not there yet")
    if start.model_config.vocab_size < tokenizer.n_vocab:
        raise BadInput(f"--vocab_size={start.model_config.vocab_size}: tokenizer {tokenizer.name!r} has {tokenizer.n_vocab} tokens")
    return tokenizer


def write_down(start, say):
    """Bring the run's folder to where this run begins: config.json, and nothing in it that it has not yet done."""
    config, out_dir, now = start.config, Path(start.config.out_dir), checkpoint.provenance()
    if start.kind == "resume":
        checkpoint.rewind_metrics(out_dir, start.state.step)
        say(f"continuing {out_dir} from step {start.state.step}")
        before = checkpoint.read_meta(start.folder)["provenance"]
        for name, why in (("code", "its rules may differ"), ("torch", "its kernels may differ"), ("threads", "sums may round otherwise")):
            if before[name] != now[name]:
                say(f"note: {name} was {before[name]} and is now {now[name]}: {why}, so the run is not the one that was interrupted")
    else:
        checkpoint.clear(out_dir)                                        # overwritten, or killed before its first checkpoint
        if start.folder:
            say(f"starting {out_dir} from {start.folder}")
    checkpoint.write_json(out_dir / "config.json", {"asked": start.asked, "command": sys.argv, "train": asdict(config),
                                                    "model": asdict(start.model_config), "provenance": now})


def finished(out_dir, state):
    """Whether a run has done all its updates, and measured what it got."""
    if state.step != state.max_steps:
        return False
    return any(x["step"] == state.step for x in checkpoint.read_metrics(out_dir)[1])


def join_world(config, was_asked):
    """The World of a process that torchrun began; BadInput where the processes were not given the same."""
    world = parallel.join(config)
    parallel.check_same({**was_asked, "code": checkpoint.code_hash()}, "configuration")
    sizes = {batch_size_at(config, int(part.split(":")[0])) for part in (config.batch_schedule or "0:").split(",")}
    uneven = [size for size in sizes if size % world.size]
    if uneven:
        raise BadInput(f"--batch_size={uneven[0]}: is not a multiple of the {world.size} processes")
    if pick_dtype(config.dtype, world.device) == torch.float16:
        raise BadInput("--dtype=float16: its loss scaler works in one process; give bfloat16 or float32 under torchrun")
    return world


@exits_cleanly
def main(argv):
    config, model, given = read_config(argv)
    if "vocab_size" not in given and not (config.init_from or config.branch_from):
        model = dataclasses.replace(model, vocab_size=tokenizers.load(config.tokenizer).n_vocab)
    world = join_world(config, asked(config, model)) if UNDER_TORCHRUN else None
    try:
        start = parallel.all_or_none(lambda: choose_start(config, model, given)) if world else choose_start(config, model, given)
        check_memory(start.model_config, world.device if world else pick_device(config.device), world.mesh.size(1) if world else 1)
        if not config.quiet and (world is None or world.rank == 0):
            print_differences(start.config, start.model_config)
        fly(start, world=world)
    except NonFinite as error:
        if world is None or world.rank == 0:
            print(error, file=sys.stderr)
        raise SystemExit(3) from None
    except RuntimeError as error:
        if world is None or not parallel.lost_a_peer(error):
            raise
        print(f"rank {world.rank}: lost contact with the other processes ({str(error).splitlines()[0]})", file=sys.stderr)
        os._exit(4)                                                      # no clean-up that would wait for them


if __name__ == "__main__":
    main()
