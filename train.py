"""Train a MiniCPM.

    python train.py                                        the laptop run: config/laptop.py
    python train.py config/NAME.py ... --key=value ...     later wins; --help lists every option
    torchrun --nproc_per_node=8 train.py config/NAME.py    one process per GPU, one model

Repeating a command continues its run where it was. A command goes through

    main -> read_config -> launch -> run_training -> run_in_folder -> train

`train` is the one loop of the project: a generator that yields after every update. run_in_folder
iterates over it; DPO and the labs use it too.
"""
import dataclasses
import gc
import itertools
import math
import os
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # repeatable products on CUDA

import torch

from configurator import (
    BadInput,
    configure,
    exits_cleanly,
    must_be_positive,
    must_not_be_negative,
    no_output,
    print_differences,
)
from data.corpus import prepare_missing
from data.dataset import MAX_EPOCHS, Prefetch, count_epochs, open_data, parse_mixture
from data.tokenizer import has_tokenizer, load_tokenizer
from engine import checkpoint, device, distributed, metrics, trace
from engine.distributed import World
from engine.run import (
    fall_start,
    init_run_dir,
    is_finished,
    is_restart,
    is_spike,
    new_state,
    non_finite,
    note_corpora,
    requested_config,
    resolve_start,
    set_horizon_from_time,
    stop_on_signals,
)
from model import MiniCPM, MiniCPMConfig, init_weights, load_weights, optimizer_groups
from wsd import lr_at

MAX_OVERFLOWS = 20                      # float16: the run stops after so many in a row


@dataclass
class TrainConfig:
    # ---- data
    data: str = "pytorch"               # corpus, or a mixture: 'pytorch:0.7,speeches:0.3'
    decay_data: str | None = None       # mixture from the first decay step on; unset: same as data
    data_dir: str = "data"              # where the corpora are; relative to the project
    tokenizer: str = "bpe4096"          # bpe4096, bytes, gpt2, cl100k_base, a folder or a hub name;
                                        # with init_from: the checkpoint's
    block_size: int = 256               # tokens per sequence
    batch_size: int = 8                 # sequences per update, over all processes
    batch_schedule: str | None = None   # batch_size from a step on: '0:480,50000:960'
    micro_batch_size: int = 0           # sequences per forward and process; 0: chosen
    doc_mask: bool = False              # True: attention stays within a document or conversation
    answers_only: bool = True           # conversations: loss on answers only; False: on all text
    skip_samples: int = 0               # samples to skip where the run stopped at a NaN or inf loss
    # ---- where the run starts
    out_dir: str = "out/run"            # the run's folder; relative to the current folder
    init_from: str | None = None        # start a new run (step 0) from these weights
    branch_from: str | None = None      # continue this stable checkpoint in a new out_dir
    overwrite: bool = False             # start again if out_dir holds a run
    seed: int = 1337                    # of the initial weights and of the order of the data
    # ---- schedule (wsd.py draws all of them)
    max_steps: int | None = None        # updates; wins over minutes
    minutes: float | None = None        # wall time of the run, compiling and evaluation included
    schedule: Literal['wsd', 'cosine', 'cosine_loop', 'constant'] = 'wsd'
                                        # of the learning rate: see wsd.py
    learning_rate: float = 0.01         # peak (paper section 3.3); matrices: divided by width_mult
    min_lr: float | None = None         # last learning rate; unset: a tenth of learning_rate
    cosine_period: int | None = None    # T of a cosine, in updates; unset: the whole run
    warmup_steps: int | None = None     # unset: 2.5 % of the run, with minutes at most 100
    decay: Literal['exponential', 'linear', 'cosine', '1-sqrt'] = 'exponential'  # shape
    decay_share: float | None = None    # share of the run in the decay; unset: 0.2 or decay_steps
    decay_steps: int | None = None      # updates of the decay, instead of its share; 0: no decay
    half_life: float | None = None      # updates that halve the rate; unset: ends at min_lr
    rewarm_steps: int = 0               # warm-up of a branch, before its decay; allows a branch
                                        # from a checkpoint that has decayed
    # ---- optimizer
    weight_decay: float = 0.1           # AdamW's, on matrices only
    beta1: float = 0.9                  # AdamW
    beta2: float = 0.95                 # AdamW
    grad_clip: float = 1.0              # largest gradient norm; 0: no clipping
    fused: bool = True                  # fused AdamW kernel
    skip_spikes: float = 0.0            # skip an update whose gradient norm exceeds so many times
                                        # its running mean; 0: never
    # ---- evaluation and logging
    eval_interval: int = 500            # updates between evaluations; 0: only at the end
    eval_tokens: int = 131072           # held-out tokens per evaluation
    log_interval: int = 10              # updates between lines of metrics.jsonl
    sample_tokens: int = 200            # length of the sample printed at the end; 0: none
    tensorboard: bool = False           # True: also to out_dir/tensorboard
    wandb: str | None = None            # also to this project of Weights & Biases
    profile_steps: str | None = None    # A:B traces updates A+1 to B to out_dir/trace-rank0.json
    quiet: bool = False                 # True: no progress bar and no messages
    # ---- checkpoints
    save_interval: int = 500            # updates between checkpoints; 0: decay start and end only
    keep_last: int = 2                  # newest checkpoints kept; the end of a stage is always kept
    keep_every: int = 0                 # also keep checkpoints at multiples of this step; 0: none
    async_save: bool = False            # True: write a copy while training continues
    # ---- machine
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
                                        # of computation; parameters are always float32
    compile: bool = True                # torch.compile; disabled with a message if it would not pay
    flash: bool = True                  # fused attention kernels; False: written-out softmax
    deterministic: bool | None = None   # bit-exact repeats; unset: True on a CPU, else False
    recompute: int = 0                  # activation checkpointing of every n-th block; 0: none
    # ---- several processes (torchrun)
    replicate: int = 0                  # copies of the model; 0: processes / shard
    shard: int = 0                      # processes per copy; 0: processes / replicate. Neither
                                        # given: all processes, on several nodes those of a node
    sync_micro_steps: bool = False      # True: reduce at every micro-step, which takes less memory
    reshard_after_forward: bool = True  # False: blocks stay gathered from forward to backward,
                                        # which takes more memory and fewer all-gathers
    timeout: float = 10.0               # minutes after which a silent process counts as dead

    def problems(self):
        """Return one line per impossible value or combination."""
        problems = must_be_positive(
            self, "max_steps minutes batch_size block_size learning_rate half_life cosine_period "
                  "eval_tokens log_interval keep_last timeout")
        problems += must_not_be_negative(
            self, "micro_batch_size min_lr warmup_steps decay_steps rewarm_steps weight_decay "
                  "grad_clip eval_interval save_interval keep_every sample_tokens skip_samples "
                  "replicate shard recompute")
        problems += [f"--{name}={getattr(self, name)}: must be at least 0 and below 1"
                     for name in ("beta1", "beta2", "decay_share")
                     if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1]
        if self.skip_spikes and not self.skip_spikes > 1:
            problems.append(f"--skip_spikes={self.skip_spikes}: is a factor above 1, or 0")
        try:
            trace.parse_steps(self.profile_steps or "0:1")
        except ValueError:
            problems.append(f"--profile_steps={self.profile_steps}: is A:B with 0 <= A < B, as in "
                            "10:12")
        return problems + self.start_problems() + self.schedule_problems() + self.data_problems()

    def start_problems(self):
        problems = []
        if self.init_from and self.branch_from:
            problems.append("--init_from and --branch_from: give one of them")
        if self.needs_horizon() and self.max_steps is None and self.minutes is None:
            problems.append("--max_steps or --minutes: give one of them")
        if self.branch_from and self.minutes is not None:
            problems.append("--minutes: a branch is measured in steps; give --decay_steps or "
                            "--max_steps")
        if self.rewarm_steps and not self.branch_from:
            problems.append("--rewarm_steps: only with --branch_from")
        one_gpu = self.device.removeprefix("cuda:").isdigit()
        if self.device not in ("auto", "cpu", "cuda", "mps") and not one_gpu:
            problems.append(f"--device={self.device}: is one of auto, cpu, cuda, cuda:N, mps")
        return problems

    def needs_horizon(self):
        """Return whether the command must say how long the run is."""
        return not self.branch_from

    def schedule_problems(self):
        problems = []
        if self.decay_share is not None and self.decay_steps is not None:
            problems.append("--decay_share and --decay_steps: give one of them")
        timed = self.max_steps is None and self.minutes is not None
        if timed and self.is_cosine:
            problems.append(f"--schedule={self.schedule}: needs its horizon from the start, so "
                            "--max_steps; wsd needs none")
        if self.schedule == "cosine_loop" and self.cosine_period is None:
            problems.append("--schedule=cosine_loop: rises again after --cosine_period; give it")
        if self.cosine_period is not None and not self.is_cosine:
            problems.append(f"--cosine_period={self.cosine_period}: only with --schedule=cosine or "
                            "cosine_loop")
        if self.schedule != "wsd":
            problems += [f"--{name}={getattr(self, name)}: only with --schedule=wsd" for name in
                         ("decay_steps", "decay_share", "half_life", "decay_data")
                         if getattr(self, name)]
        exponential = self.schedule == "wsd" and self.decay == "exponential"
        if self.half_life and self.schedule == "wsd" and not exponential:
            problems.append(f"--half_life={self.half_life}: only with --decay=exponential")
        if exponential and self.floor == 0 and self.half_life is None:
            problems.append("--min_lr=0: an exponential decay never reaches it; give --half_life "
                            "or another --decay")
        if self.floor > self.learning_rate:
            problems.append(f"--min_lr={self.min_lr}: above --learning_rate={self.learning_rate}")
        if not self.branch_from and (self.decay_steps or 0) > (self.max_steps or math.inf):
            problems.append(f"--decay_steps={self.decay_steps}: more than "
                            f"--max_steps={self.max_steps}")
        return problems

    def data_problems(self):
        problems = []
        for option in ("data", "decay_data"):
            try:
                if getattr(self, option) is not None:
                    parse_mixture(getattr(self, option), option)
            except BadInput as error:
                problems.append(str(error))
        try:
            batch_size_at(self, 0)
        except ValueError:
            problems.append(f"--batch_schedule={self.batch_schedule}: is STEP:SEQUENCES,... from "
                            "step 0 on, as in 0:480,50000:960")
        return problems

    @property
    def is_cosine(self):                # falls from the end of the warm-up on
        return self.schedule in ("cosine", "cosine_loop")

    @property
    def floor(self):                    # last learning rate
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def share(self):                    # of the run in the decay, if decay_steps is unset
        return 0.2 if self.decay_share is None else self.decay_share


# What train yields after every update; metrics is the line for metrics.jsonl.
Update = namedtuple("Update", "step model optimizer metrics")


def language_loss(forward, micro_batch):
    """Return the sum of the next-token nll (nats), and the aux of MiniCPM.forward."""
    nll, aux = forward(micro_batch["idx"], micro_batch["targets"],
                       doc_ids=micro_batch.get("doc_ids"))
    return nll.sum(), aux


def batch_size_at(config, step):
    """Return the sequences per update at a step. Raises ValueError for an impossible schedule."""
    if config.batch_schedule is None:
        return config.batch_size
    stages = [tuple(map(int, part.split(":"))) for part in config.batch_schedule.split(",")]
    if stages != sorted(stages) or stages[0][0] != 0 or any(size < 1 for _, size in stages):
        raise ValueError(config.batch_schedule)
    return [size for first, size in stages if first <= step][-1]


def batch_stages(config):
    """Return [(first step, sequences per update)]."""
    steps = [int(part.split(":")[0]) for part in (config.batch_schedule or "0:").split(",")]
    return [(step, batch_size_at(config, step)) for step in steps]


def samples_between(config, first, last):
    """Return the number of sequences of the updates from step `first` to before step `last`."""
    samples = 0
    stages = [*batch_stages(config), (math.inf, 0)]
    for (begin, sequences), (end, _) in itertools.pairwise(stages):
        samples += max(0, min(last, end) - max(first, begin)) * sequences
    return samples


def learning_rate_at(config, state):
    """Return the learning rate of the next update."""
    return lr_at(state.step, peak=config.learning_rate, floor=config.floor, warmup=state.warmup,
                 start=state.start, schedule=config.schedule, decay=config.decay,
                 max_steps=math.inf if state.max_steps is None else state.max_steps,
                 decay_steps=state.decay_steps, half_life=config.half_life,
                 period=config.cosine_period)


# ---- the loop

def train(config, batches, loss_fn, model, state=None, optimizer_tensors=None, validate=None,
          tokenizer=None, should_stop=lambda: False, world=None):
    """Train `model` as config says. Yields an Update after every step, gradients still in place.

    batches      batches(plan, first, count) -> (dict of (count, ...) tensors, number of targets):
                 see data.dataset.make_batches
    loss_fn      loss_fn(forward, micro_batch) -> (loss sum, aux); forward is the model, compiled or
                 not. A step minimizes the loss sum of the batch divided by its number of targets,
                 plus every aux whose name ends in _loss. aux goes to the metrics, averaged over
                 sequences
    state        engine.run.RunState; None: a new run
    optimizer_tensors  (name, StoredTensor or tensor) pairs of the checkpoint that the run continues
    validate     validate(model) -> dict for metrics.jsonl
    tokenizer    is saved in every checkpoint; None: no checkpoints and no files (labs)
    should_stop  called in every step before the forward pass; True saves and ends the generator
    world        engine.distributed.World; None: this process alone
    Raises NonFinite, BadInput, OSError.
    """
    world = world or World(device=device.pick_device(config.device))
    state = state or new_state(config)
    dtype = set_numerics(config, model, world)
    optimizer = make_optimizer(config, model, optimizer_tensors)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    log = metrics.TrainingLog(config, state, model.config, world, writes_files=bool(tokenizer))
    device.decide_compile(config, state, world.device, log.say)    # labs; else decided already
    model.numerics.compiled = state.compiled
    forward = torch.compile(model, dynamic=False) if state.compiled and world.alone else model
    decide_micro_batch(config, state, model, forward, loss_fn, batches, world, log.say)
    saver = checkpoint.CheckpointWriter(config, state, model, optimizer, scaler, tokenizer, world,
                                        log)
    describe(config, optimizer, model, state, dtype, world, log.say)
    try:
        while state.step != state.max_steps:
            # A run given minutes learns its horizon when the stable share of the time is spent.
            if state.max_steps is None:
                set_horizon_from_time(config, state, log, world)
                if state.step == state.max_steps:
                    break

            # First step of the decay: keep a checkpoint to branch from, and switch the data.
            if state.step == state.decay_start and state.decay_steps:
                saver.save(keep=True)
                begin_decay(config, state, log)

            # Learning rate: the schedule's, times the muP factor of each role.
            lr = learning_rate_at(config, state)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # Gradient of the mean loss per target of the whole batch. FSDP averages gradients over
            # ranks, so each rank divides by the mean number of targets per rank. (Packed rows may
            # have none at all: then the loss is 0.)
            log.start_step()
            batch_size = batch_size_at(config, state.step)
            count = batch_size // world.size
            batch, n_targets = batches(state.plan, state.position + world.rank * count, count)
            log.batch_ready()
            n_targets, stop = world.mean(n_targets, should_stop())     # > 0: a rank has to stop
            if stop:
                saver.save()
                break
            micro_batches = split_batch(batch, state.micro, world.device)
            results = {"loss": torch.zeros((), device=world.device)}
            for i, micro_batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                distributed.sync_gradients(model, last or config.sync_micro_steps)
                loss_sum, aux = loss_fn(forward, micro_batch)
                loss, size = loss_sum / (n_targets or 1), len(micro_batch["idx"])
                aux_loss = sum(value for name, value in aux.items() if name.endswith("_loss"))
                scaler.scale(loss + aux_loss * size / count).backward()
                results["loss"] += loss.detach()
                for name, value in aux.items():
                    results[name] = results.get(name, 0) + value.detach() * size / count

            # Clip the gradient, stop if it is not finite, update.
            scaler.unscale_(optimizer)
            grad_norm = distributed.clip_gradients(model, config.grad_clip)
            world.mean_tensors(results)
            loss, grad_norm = torch.stack((results.pop("loss"), grad_norm)).tolist()
            check_finite(config, state, scaler, loss, grad_norm, batch_size, tokenizer, world)
            if not is_spike(config, state, grad_norm, world, log):
                scaler.step(optimizer)
            scaler.update()

            # Count and log.
            tokens = world.size * batch["idx"].numel()
            state.step += 1
            state.samples_seen += batch_size
            state.tokens_seen += tokens
            line = log.end_step(tokens, lr=lr, loss=loss, grad_norm=grad_norm, aux=results)
            yield Update(state.step, model, optimizer, line)
            optimizer.zero_grad()

            # Evaluate and save; the last step does so after the loop.
            if state.step == state.max_steps:
                break
            if is_due(config.eval_interval, state.step):
                run_validation(model, validate, state, log)
            if is_due(config.save_interval, state.step):
                saver.save()

        # Save before evaluating: the last checkpoint is the costliest to lose. If the rate has not
        # fallen it is the end of the stable stage, from which runs branch.
        if state.step == state.max_steps:
            saver.save(keep=state.step <= fall_start(config.schedule, state))
            run_validation(model, validate, state, log)
        saver.finish()
    finally:
        saver.close()
        log.close()


def is_due(interval, step):
    return interval > 0 and step % interval == 0


def split_batch(batch, micro, to_device):
    """Return a batch {name: (count, ...)} as a list of batches of at most `micro` sequences."""
    return [{name: tensor[i:i + micro].to(to_device, non_blocking=True)
             for name, tensor in batch.items()} for i in range(0, len(batch["idx"]), micro)]


def set_numerics(config, model, world):
    """Move the model to its device; set determinism, attention kernel and dtype (returned)."""
    on_cpu = world.device.type == "cpu"
    deterministic = on_cpu if config.deterministic is None else config.deterministic
    torch.use_deterministic_algorithms(deterministic)
    if on_cpu:
        device.tune_malloc()
    if world.alone:
        model.to(world.device)
    model.train()
    model.numerics.dtype = device.pick_dtype(config.dtype, world.device)
    model.numerics.flash = config.flash
    return model.numerics.dtype


def make_optimizer(config, model, tensors):
    """Return AdamW over the muP groups, with the state of a checkpoint if tensors are given."""
    optimizer = torch.optim.AdamW(
        optimizer_groups(model, config.weight_decay), lr=config.learning_rate, fused=config.fused,
        betas=(config.beta1, config.beta2))
    if tensors:
        checkpoint.restore_optimizer(optimizer, tensors, config.fused)
    return optimizer


def set_micro_batch(config, state, model_config, world):
    """Set state.micro, the sequences per forward: as given, as before a resume, or what fits into
    the memory of every process. Returns whether it was chosen now.

    A run that continues with another number of processes, or with other options that decide what
    fits, chooses again.
    """
    setup = {"processes": world.size, "shards": world.shards, "recompute": config.recompute,
             "reshard_after_forward": config.reshard_after_forward}
    keep = config.micro_batch_size or state.micro and state.micro_for in (None, setup)
    state.micro_for = setup
    if keep:
        state.micro = config.micro_batch_size or state.micro
        return False
    batch = batch_size_at(config, state.step) // world.size
    shards = None if world.alone else world.shards
    state.micro = min(world.all_gather(
        device.choose_micro_batch(model_config, config, batch, world.device, shards)))
    return True


def decide_micro_batch(config, state, model, forward, loss_fn, batches, world, say):
    """Set state.micro. On a single GPU a trial follows the estimate."""
    chosen = set_micro_batch(config, state, model.config, world)
    if chosen and world.device.type == "cuda" and world.alone:
        attempt = partial(try_micro_batch, config, state, model, forward, loss_fn, batches, world)
        state.micro = device.halve_until_it_fits(state.micro, attempt, say)


def try_micro_batch(config, state, model, forward, loss_fn, batches, world, micro):
    """Run one forward and backward pass while the memory of AdamW's moments is taken."""
    moments = torch.empty(2 * model.config.n_params, dtype=torch.float32, device=world.device)
    try:
        batch, n_targets = batches(state.plan, state.position, micro)
        loss_sum, _ = loss_fn(forward, split_batch(batch, micro, world.device)[0])
        (loss_sum / n_targets).backward()
    finally:
        del moments
        model.zero_grad()


def describe(config, optimizer, model, state, dtype, world, say):
    """Print the parameter groups and how the run computes."""
    for group in optimizer.param_groups:
        n_params = sum(p.numel() for p in group["params"])
        say(f"{group['role']:>10}: {len(group['params']):4} tensors, {n_params:13,} parameters, "
            f"learning rate x {group['lr_scale']:.4g}, weight decay {group['weight_decay']:g}")
    mesh = ""
    if world.mesh:
        mesh = f", {world.size} processes: {world.replicas} x {world.shards}"
    say(f"{model.config.n_params_non_embedding:,} parameters without the embedding, "
        f"{model.config.n_params:,} with it; {world.device}, {str(dtype).removeprefix('torch.')}, "
        f"{'compiled' if state.compiled else 'eager'}, micro-batch {state.micro}{mesh}")
    if state.compiled and config.recompute and model.config.num_experts \
            and dtype != torch.bfloat16:
        say("compile: not the blocks that --recompute names, because their experts' products are "
            "compiled in bfloat16 only")


def begin_decay(config, state, log):
    """Switch to the data of the decay, and record that it begins."""
    if config.decay_data and state.plan[-1][1] != config.decay_data:
        state.plan.append([state.position, config.decay_data])
    data = f", data from now on {config.decay_data}" if config.decay_data else ""
    log.say(f"step {state.step}: the decay begins, {state.decay_steps} steps to go{data}")
    log.write(step=state.step, decay_steps=state.decay_steps, data=state.plan[-1][1])


def check_finite(config, state, scaler, loss, grad_norm, batch_size, tokenizer, world):
    """Raise NonFinite if the loss or the gradient is NaN or infinite. (float16's scaler skips an
    update whose gradient overflowed; many in a row mean divergence.)"""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    state.overflows = 0 if finite else state.overflows + 1
    skipped = scaler.is_enabled() and math.isfinite(loss) and state.overflows < MAX_OVERFLOWS
    if not finite and not skipped:
        out_dir = config.out_dir if tokenizer else None
        raise non_finite(out_dir, state, batch_size, loss, grad_norm, world.rank)


def run_validation(model, validate, state, log):
    """Call validate(model), write its result to metrics.jsonl and print it."""
    if validate:
        model.eval()
        values = validate(model)
        model.train()
        log.write(step=state.step, **values)
        log.say(f"step {state.step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


# ---- what a run needs

def open_tokenizer(start):
    """Return the run's tokenizer. Raises BadInput if it does not fit checkpoint or model."""
    config, folder = start.config, start.folder
    continues = start.kind in ("resume", "branch")
    tokenizer = load_tokenizer(str(folder) if continues else config.tokenizer)
    if start.kind == "init" and has_tokenizer(folder):
        theirs = load_tokenizer(str(folder)).hash
        if theirs != tokenizer.hash:
            raise BadInput(f"--tokenizer={config.tokenizer}: {folder} was trained with another "
                           f"tokenizer (hash {theirs[:12]}, here {tokenizer.hash[:12]})")
    if start.model_config.vocab_size < tokenizer.n_vocab:
        raise BadInput(f"--vocab_size={start.model_config.vocab_size}: tokenizer "
                       f"{tokenizer.name!r} has {tokenizer.n_vocab} tokens")
    return tokenizer


def build_model(start, world):
    """Return the model of a Start: initialized, or with the checkpoint's weights.

    The model is built on the meta device, without memory. Under torchrun it is sharded next, and
    each rank fills its own shards; alone, train() moves it to its device.
    """
    config = start.config
    with torch.device("meta"):
        model = MiniCPM(start.model_config)
    if not world.alone:
        dtype = device.pick_dtype(config.dtype, world.device)
        distributed.distribute(model, config, world.mesh, dtype, start.state.compiled)
    elif config.recompute:
        distributed.recompute_blocks(model, config.recompute)
    model.to_empty(device="cpu" if world.alone else world.device)
    copy = distributed.copy_local_shard
    if start.folder is None:
        init_weights(model, config.seed, copy)
        return model
    tensors = checkpoint.open_weights(start.folder, (world.rank, world.size))
    was_tied = checkpoint.read_meta(start.folder)["model"]["tie_word_embeddings"]
    if was_tied and not start.model_config.tie_word_embeddings:
        tensors = untie(tensors)
    load_weights(model, tensors, start.folder, copy)
    return model


def untie(tensors):
    """Yield (name, tensor) pairs with a head that starts as the embedding."""
    for name, tensor in tensors:
        yield name, tensor
        if name == "wte.weight":
            yield "lm_head.weight", tensor


# ---- a run, from the command to its last sample

def read_config(argv, *tool_classes, usage=__doc__):
    """Return (TrainConfig, MiniCPMConfig, given, *instances of a tool's own dataclasses).

    given: {name: value} of the options that the command sets. Two defaults are filled in here:
    config/laptop.py if the command names neither a config file nor a checkpoint, and the
    tokenizer's vocabulary.
    """
    names_a_start = any(word.endswith(".py") or word.startswith(("--init_from", "--branch_from"))
                        for word in argv)
    if not names_a_start:
        argv = ["config/laptop.py", *argv]
    (*options, config, model_config), given = configure(
        argv, *tool_classes, TrainConfig, MiniCPMConfig, usage=usage, check_later=from_checkpoint)
    if "vocab_size" not in given and not (config.init_from or config.branch_from):
        vocab_size = load_tokenizer(config.tokenizer).n_vocab
        model_config = dataclasses.replace(model_config, vocab_size=vocab_size)
    return config, model_config, given, *options


def from_checkpoint(given):
    """Return the config classes that a checkpoint completes, so that options beside it are checked
    against the checkpoint's shape (engine.run.merge_model_config) and not against the defaults."""
    starts = given.get("init_from") or given.get("branch_from")
    return [MiniCPMConfig] if starts else []


def launch(config, model_config, given, run):
    """Join the processes, decide where the run starts, and call run(start, world)."""
    with distributed.failing_ranks_exit():
        world = distributed.init_world(config)
        requested = requested_config(config, model_config)
        dtype = device.pick_dtype(config.dtype, world.device)
        distributed.check_same_config(world, {
            **requested, "code": checkpoint.code_hash(), "device": world.device.type,
            "dtype": str(dtype).removeprefix("torch.")})
        restarted = any(world.all_gather(is_restart()))
        start = resolve_start(config, model_config, given, restarted)
        if world.alone:                 # a branch has the device of its trunk
            world = World(device=device.pick_device(start.config.device))
        check_processes(start.config, world)
        device.check_memory(start.model_config, world.device, world.shards)
        if world.rank > 0:
            start.config = dataclasses.replace(start.config, quiet=True)
        if not start.config.quiet:
            print_differences(start.config, start.model_config)
        try:
            run(start, world)
        except torch.OutOfMemoryError:
            raise device.out_of_memory() from None
        world.barrier()                 # torchrun of one node may end the other nodes when it ends


def check_processes(config, world):
    """Raise BadInput if the batch does not divide over the processes, or they can't do float16."""
    uneven = [size for _, size in batch_stages(config) if size % world.size]
    if uneven:
        option = "batch_schedule" if config.batch_schedule else "batch_size"
        raise BadInput(f"--{option}: {uneven[0]} is not a multiple of the {world.size} processes")
    if not world.alone and device.pick_dtype(config.dtype, world.device) == torch.float16:
        raise BadInput("--dtype=float16: its loss scaler does not work with shards; give bfloat16 "
                       "or float32, or start one process without torchrun")


def run_training(start, world, loss_fn=language_loss, make_source=open_data):
    """Lock the run's folder and do the whole run in it.

    make_source  (config, tokenizer, world) -> (batches, validate, sources): see
                 data.dataset.open_data
    """
    out_dir = Path(start.config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(out_dir) if world.rank == 0 else nullcontext():
        run_in_folder(start, world, loss_fn, make_source)


def run_in_folder(start, world, loss_fn, make_source):
    """Open the data, build the model, run the loop, draw the curves and print a sample."""
    config, state, out_dir = start.config, start.state, Path(start.config.out_dir)
    say = no_output if config.quiet else print
    if world.from_rank0(is_finished(out_dir, state)):
        return say_finished(start, world)
    tokenizer = open_tokenizer(start)
    if world.rank == 0:
        prepare_missing(config, tokenizer)
    world.barrier()
    batches, validate, sources = make_source(config, tokenizer, world)
    note_corpora(state, {name: source.sha256 for name, source in sources.items()}, say)
    timed = state.max_steps is None
    if not timed:
        say_epochs(config, state, sources, say)
    device.decide_compile(config, state, world.device, say)
    model = build_model(start, world)
    optimizer_tensors = None
    if start.kind in ("resume", "branch"):
        optimizer_tensors = checkpoint.open_tensors(start.folder, "optimizer",
                                                    (world.rank, world.size))
    world.barrier()                     # nothing is removed before every rank could start
    if world.rank == 0:
        init_run_dir(start, say)
    world.barrier()
    with stop_on_signals() as should_stop, Prefetch(batches, world) as batches:
        run_updates(train(config, batches, loss_fn, model, state, optimizer_tensors, validate,
                          tokenizer, should_stop, world))
    if world.rank == 0:
        metrics.draw(out_dir)
    if state.step != state.max_steps:
        say(f"stopped at step {state.step} and saved; the same command continues")
        return
    if timed:
        say_epochs(config, state, sources, say)
    if config.sample_tokens and world.alone:
        say(f"--- a sample, temperature 0.7\n{sample_text(config, model, tokenizer)}\n---")
    say(f"finished: {state.step} steps, {state.tokens_seen / 1e6:.1f}M tokens, "
        f"{state.seconds:.0f} s; curves in {out_dir / 'loss.png'}; "
        f"python sample.py --ckpt={out_dir} writes more")


def run_updates(updates):
    """Run the loop to its end. The garbage collector skips what exists after the first update.

    A full collection looks through every object: 400,000 after torch, the model and compiled code,
    0.7 s on a busy CPU, on each rank at another moment, and all ranks wait for each. What is
    created later is collected as ever. Labs call train() often in one process and do without.
    """
    try:
        for number, _ in enumerate(updates):
            if number == 0:
                gc.collect()
                gc.freeze()
    finally:
        gc.unfreeze()


def say_epochs(config, state, sources, say):
    """Print how many epochs of each source the whole run reads, its decay included, and a warning
    if one is read too often. The run's horizon must be known."""
    plan = list(state.plan)
    if config.decay_data and state.step <= state.decay_start < state.max_steps:    # see begin_decay
        plan.append([state.position + samples_between(config, state.step, state.decay_start),
                     config.decay_data])
    position = state.position + samples_between(config, state.step, state.max_steps)
    epochs = count_epochs(plan, config.seed, position, sources)
    say("epochs of the whole run: "
        + ", ".join(f"{name} {n:.2f}" for name, n in epochs.items()))
    often = [name for name, n in epochs.items() if n > MAX_EPOCHS]
    if often:
        say(f"note: {' and '.join(often)}: after about {MAX_EPOCHS} epochs, repeated data teaches "
            "ever less (Muennighoff et al. 2023); prepare more of it, or train for fewer steps")


def say_finished(start, world):
    """Say that there is nothing left to do, whatever --quiet."""
    saved = checkpoint.read_meta(start.folder)["provenance"]["code"]
    edited = ", and the code has changed since" if saved != checkpoint.provenance()["code"] else ""
    if world.rank == 0:
        print(f"{start.config.out_dir} is finished ({start.state.step} steps){edited}: "
              "--overwrite=True starts it again, --out_dir=FOLDER makes another run")


def sample_text(config, model, tokenizer):
    """Return text that the trained model generates from the start of a document."""
    tokens = model.eval().generate(
        [[tokenizer.bos]], config.sample_tokens, temperature=0.7, top_k=50, seed=config.seed,
        stop_ids=[tokenizer.eos], never_ids=[tokenizer.bos])
    return tokenizer.decode([int(token) for token in tokens if token != tokenizer.eos])


@exits_cleanly
def main(argv):
    launch(*read_config(argv), run_training)


if __name__ == "__main__":
    main()
