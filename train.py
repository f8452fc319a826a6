"""Train a MiniCPM.

    python train.py                                        the laptop run: config/laptop.py
    python train.py config/NAME.py ... --key=value ...     later wins; --help lists every knob
    torchrun --nproc_per_node=8 train.py config/NAME.py    one process a GPU, one model over all of them: distributed.py

Repeating a command continues its run where it was. `train` is the one loop of the project: a generator that yields after
every update, which main() merely drains.
"""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# Must be set before CUDA starts: repeatable matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from tqdm import tqdm

from configurator import ROOT, BadInput, configure, exits_cleanly, print_differences
from data.dataset import check_block_size, held_out_loss, make_batches, open_corpus, parse_mixture
from data.tokenizer import has_tokenizer, load_tokenizer
from engine import checkpoint, metrics
from engine.device import decide_compile, peak_flops, pick_device, pick_dtype, tune_malloc
from engine.memory import MICRO_TOKENS_CPU, check_memory, choose_micro_batch
from engine.run import (
    NonFinite,
    asked,
    finished,
    init_run_dir,
    new_state,
    non_finite_message,
    resolve_start,
    set_horizon_from_time,
)
from model import MiniCPM, MiniCPMConfig, init_weights, load_weights, optimizer_groups
from wsd import lr_at

UNDER_TORCHRUN = "LOCAL_RANK" in os.environ
if UNDER_TORCHRUN:
    from engine import distributed

OVERFLOWS_IN_A_ROW = 20                     # float16: the scaler skips single overflows; this many mean divergence


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
    doc_mask: bool = False              # True: attention stays within a document, or a conversation
    answers_only: bool = True           # of conversations: loss on the answers alone; False: on all that is said
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
    sync_micro_steps: bool = False      # torchrun: True: reduce gradients at every micro-step, so that none is held unsharded
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


Update = namedtuple("Update", "step model optimizer metrics")


def language_loss(model, batch):
    """Sum of the next-token nll (nats) of a micro-batch, and what else the model reports: see MiniCPM.forward."""
    nll, aux = model(batch["idx"], batch["targets"], doc_ids=batch.get("doc_ids"))
    return nll.sum(), aux


# ---- the loop

def train(config, batches, loss, model, state=None, optimizer_tensors=None, validate=None, tokenizer=None, stop=lambda: False,
          world=None):
    """Train `model` as config says and yield an Update after every step, gradients still in place.

    batches    batches(plan, first, count) -> (dict of (count, ...) tensors, n): see dataset.make_batches
    loss       loss(forward, micro_batch) -> (sum, aux), forward being the model or its compiled form. A step minimises the
               sum over the batch / n, plus those of aux whose name ends in _loss; all of aux goes to the metrics. What is in
               aux is averaged over micro-batches and ranks, which are equal in size
    state      RunState; None: a new run. optimizer_tensors: (name, tensor) pairs of the checkpoint it comes from
    validate   validate(model) -> dict for metrics.jsonl, or None
    tokenizer  is saved in every checkpoint; None: no checkpoints and no files at all (labs)
    stop       asked after every update: True saves and ends the generator
    world      parallel.World where several processes train one model (that distributed.distribute has spread); None: alone
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
        tune_malloc()
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
    state.micro = config.micro_batch_size or state.micro or \
        choose_micro_batch(model.config, config, batch_size_at(config, 0) // ranks, device, world)
    decide_compile(config, state, device, say)
    forward = torch.compile(model, dynamic=False) if state.compiled and world is None else model      # else its blocks are
    for group in optimizer.param_groups:
        say(f"{group['role']:>10}: {len(group['params']):4} tensors, {sum(p.numel() for p in group['params']):13,} parameters, "
            f"learning rate x {group['lr_scale']:.4g}, weight decay {group['weight_decay']:g}")
    say(f"{model.config.n_params_non_embedding:,} parameters without the embedding, {model.config.n_params:,} with it; "
        f"{device}, {str(dtype)[6:]}, {'compiled' if state.compiled else 'eager'}, micro-batch {state.micro}"
        + (f", {ranks} processes: {world.mesh.size(0)} x {world.mesh.size(1)}" if world else ""))

    out_dir = Path(config.out_dir) if tokenizer else None
    log = open(out_dir / "metrics.jsonl", "a", encoding="utf-8") if out_dir and rank == 0 else None
    boards = metrics.open_boards(config, out_dir) if log else []
    peak = peak_flops(device, say)
    writer = ThreadPoolExecutor(1)                                       # of checkpoints, where async_save
    writing = None
    bar = tqdm(total=state.max_steps, initial=state.step, unit="step", disable=True if config.quiet else None)
    began, steps_here, steady_since = time.monotonic() - state.seconds, 0, None
    timed_tokens, timed_seconds, highest = 0, 0.0, -math.inf
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
                set_horizon_from_time(config, state, time.monotonic() - began, (time.monotonic() - steady_since) / (steps_here - 1))
                if world:
                    state.max_steps, state.decay_steps = distributed.broadcast_from_rank0((state.max_steps, state.decay_steps))
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
                write({"step": state.step, "decay_steps": state.decay_steps, "data": state.plan[-1][1]})

            # Learning rate.
            lr = rate(config, state)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # Gradients, micro-batch by micro-batch, of the mean over the whole batch.
            clock = time.monotonic()
            count = batch_size_at(config, state.step)                    # of all ranks; each takes its run of samples
            batch, n = batches(state.plan, state.position + rank * (count // ranks), count // ranks)
            if world:
                n, stops = distributed.total(n, stop())
            parts = [{name: t[i:i + state.micro].to(device, non_blocking=True) for name, t in batch.items()}
                     for i in range(0, len(batch["idx"]), state.micro)]
            total, reported = torch.zeros((), device=device), {}
            for i, part in enumerate(parts):
                if world:
                    model.set_requires_gradient_sync(i == len(parts) - 1 or config.sync_micro_steps)
                summed, aux = loss(forward, part)
                # Gradients are averaged over the ranks, and the sum of nll is to be their sum.
                further = sum(value for name, value in aux.items() if name.endswith("_loss"))
                scaler.scale(ranks * summed / n + further / len(parts)).backward()
                total += summed.detach() / n
                for name, value in aux.items():
                    reported[name] = reported.get(name, 0) + value.detach() / (len(parts) * ranks)

            # Clip, and make the update only if all is finite.
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            if world:
                norm = norm.full_tensor()
                for value in (total, *reported.values()):
                    torch.distributed.all_reduce(value)
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
            highest = max(highest, loss_value)                           # since the last line: no spike falls between two
            state.samples_seen += count
            tokens = ranks * batch["idx"].numel()
            state.tokens_seen += tokens
            if steps_here == 1:                                          # the first step compiles: not part of any speed
                steady_since = time.monotonic()
            else:
                timed_tokens += tokens
                timed_seconds += time.monotonic() - clock
            line = {"step": state.step, "loss": loss_value, "loss_max": highest, "lr": lr, "tokens": state.tokens_seen,
                    "grad_norm": norm_value, "tok_per_s": round(timed_tokens / timed_seconds) if timed_seconds else None,
                    **{name: value.tolist() for name, value in reported.items()}}
            if peak and line["tok_per_s"]:                            # model FLOPs utilisation (PaLM, appendix B)
                line["mfu"] = round(model.config.flops_per_token(config.block_size) * line["tok_per_s"] / (ranks * peak), 4)
            last = state.step == state.max_steps
            if state.step % config.log_interval == 0 or last:
                write(line)
                left = "" if config.minutes is None or state.max_steps else \
                    f" {max(0, config.minutes * 60 - (time.monotonic() - began)):.0f}s left"
                bar.set_postfix_str(f"loss {loss_value:.3f} lr {lr:.2g} {line['tok_per_s'] or 0:,} tok/s{left}", refresh=False)
                timed_tokens, timed_seconds, highest = 0, 0.0, -math.inf
            bar.update()
            yield Update(state.step, model, optimizer, line)
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


def write_checkpoint(config, out_dir, step, tensors, meta, tokenizer, world):
    """Take hold of what this rank has to write of a checkpoint; returns the function that writes it."""
    rank, ranks, places, attempt, writes = 0, 1, None, None, True
    if world:
        placed = {part: {name: distributed.place(t) for name, t in named.items()} for part, named in tensors.items()}
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
        distributed.put(tensor, whole)
    else:
        tensor.copy_(whole)


# ---- a run, from the command to its last sample

def read_config(argv):
    """(TrainConfig, MiniCPMConfig, given); config/laptop.py where neither a config nor a checkpoint to start from is named."""
    if not any(word.endswith(".py") or word.startswith(("--init_from", "--branch_from")) for word in argv):
        argv = ["config/laptop.py", *argv]
    (config, model), given = configure(argv, TrainConfig, MiniCPMConfig, usage=__doc__)
    return config, model, given


def prepare_missing(config, tokenizer):
    """Run data/NAME/prepare.py for each corpus that is not there yet and needs nothing but its name."""
    for name in {**parse_mixture(config.data), **parse_mixture(config.decay_data or config.data)}:
        script = ROOT / "data" / name / "prepare.py"
        if not Path(ROOT, config.data_dir, name, tokenizer.name).exists() and name in ("pytorch", "plays", "speeches", "instruct"):
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
    return make_batches(open_train, config.seed, config.block_size, bos, config.answers_only), validate


def build_model(start, config, world=None):
    """The model of a Start: drawn anew, or with the checkpoint's weights (a head untied just now starts as the embedding).

    With a world it is spread over the ranks while it is still without memory, and each fills its own pieces.
    """
    with torch.device("meta"):
        model = MiniCPM(start.model_config)
    device = world.device if world else torch.device("cpu")
    if world:
        distributed.distribute(model, config, world.mesh, pick_dtype(config.dtype, device), start.state.compiled)
    elif config.recompute:
        from engine.distributed import recompute
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


def run_training(start, loss=language_loss, make_source=None, world=None):
    """Drain the loop for a Start, with everything around it: the folder's lock, data, signals, curves, the last sample.

    make_source  (config, tokenizer) -> (batches, validate); None: language modelling on config.data
    world        parallel.World under torchrun. What is done to the run's folder, rank 0 does; what may fail, all do together
    """
    first = world is None or world.rank == 0
    together = distributed.on_all_ranks if world else (lambda work: work())
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
            decide_compile(config, state, world.device, say)
        model = together(lambda: build_model(start, config, world))
        optimizer_tensors = checkpoint.read_tensors(start.folder, "optimizer", (world.rank, world.size) if world else (0, 1)) \
            if start.kind in ("resume", "branch") else None
        together(lambda: init_run_dir(start, say) if first else None)
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
            metrics.draw(out_dir)
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
    tokenizer = load_tokenizer(str(start.folder) if start.kind in ("resume", "branch") else config.tokenizer)
    if start.kind == "init" and has_tokenizer(start.folder):
        theirs = load_tokenizer(str(start.folder)).hash
        if theirs != tokenizer.hash:
            raise BadInput(f"--tokenizer={config.tokenizer}: {start.folder} was trained with another tokenizer "
                           f"(hash {theirs[:12]}, here {tokenizer.hash[:12]})")
    if start.model_config.vocab_size < tokenizer.n_vocab:
        raise BadInput(f"--vocab_size={start.model_config.vocab_size}: tokenizer {tokenizer.name!r} has {tokenizer.n_vocab} tokens")
    return tokenizer


def join_world(config, was_asked):
    """The World of a process that torchrun began; BadInput where the processes were not given the same."""
    world = distributed.join(config)
    distributed.check_same({**was_asked, "code": checkpoint.code_hash()}, "configuration")
    sizes = {batch_size_at(config, int(part.split(":")[0])) for part in (config.batch_schedule or "0:").split(",")}
    uneven = [size for size in sizes if size % world.size]
    if uneven:
        raise BadInput(f"--batch_size={uneven[0]}: is not a multiple of the {world.size} processes")
    if pick_dtype(config.dtype, world.device) == torch.float16:
        raise BadInput("--dtype=float16: its loss scaler works in one process; give bfloat16 or float32 under torchrun")
    return world


def launch(config, model, given, go=run_training):
    """Decide what a command does and do it: go(start, world=world), in one process or in each of torchrun's."""
    world = join_world(config, asked(config, model)) if UNDER_TORCHRUN else None
    try:
        start = distributed.on_all_ranks(lambda: resolve_start(config, model, given)) if world else resolve_start(config, model, given)
        check_memory(start.model_config, world.device if world else pick_device(config.device), world.mesh.size(1) if world else 1)
        if not config.quiet and (world is None or world.rank == 0):
            print_differences(start.config, start.model_config)
        go(start, world=world)
    except NonFinite as error:
        if world is None or world.rank == 0:
            print(error, file=sys.stderr)
        raise SystemExit(3) from None
    except BadInput as error:
        if world is None or world.rank == 0:
            raise
        raise BadInput(*[f"rank {world.rank}: {line}" for line in error.args]) from None
    except RuntimeError as error:
        if world is None or not distributed.lost_a_peer(error):
            raise
        print(f"rank {world.rank}: lost contact with the other processes ({str(error).splitlines()[0]})", file=sys.stderr)
        os._exit(4)                                                      # no clean-up that would wait for them


@exits_cleanly
def main(argv):
    config, model, given = read_config(argv)
    if "vocab_size" not in given and not (config.init_from or config.branch_from):
        model = dataclasses.replace(model, vocab_size=load_tokenizer(config.tokenizer).n_vocab)
    launch(config, model, given)


if __name__ == "__main__":
    main()
