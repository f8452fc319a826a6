"""Where a run is and where it begins: from scratch, resumed, branched from a stable checkpoint, or
from other weights.

A config here is train.py's TrainConfig or a dataclass that adds to it. Only init_run_dir changes
files.
"""
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configurator import ROOT, BadInput, build
from engine import checkpoint, metrics
from wsd import falls_from

WARMUP_SHARE = 0.025                    # default warm-up, as a share of the run
WARMUP_STEPS_TIMED = 100                # most updates of it in a run that is given minutes
SPIKE_WINDOW = 50       # updates in the running mean of gradient norms: with fewer, the high norms
                        # of the first updates and chance decide
MAX_SPIKES = 20         # in a row; more are a new level of the norm (other data), not a spike
# Options that a command may change when it continues a run.
MAY_CHANGE = ("max_steps minutes micro_batch_size eval_interval eval_tokens log_interval "
              "save_interval keep_last keep_every sample_tokens skip_samples overwrite quiet "
              "tensorboard wandb async_save timeout replicate shard recompute "
              "sync_micro_steps reshard_after_forward profile_steps skip_spikes").split()
# Options that name files: two spellings of one path are one value.
PATHS = ("data_dir", "init_from", "branch_from", "tokenizer", "pairs", "val_pairs")
# Model options that may differ from the checkpoint a run starts from, besides rope_...
MAY_DIFFER = ("max_position", "original_max_position", "tie_word_embeddings")
# How fast the model learns comes from the command. A new run never takes it from a checkpoint.
LEARNING = ("mup_lr", "balance_coef", "router_z_coef")
# Options that a branch does not inherit from its trunk.
NOT_INHERITED = ("max_steps minutes decay_steps decay_share cosine_period overwrite skip_samples "
                 "init_from branch_from out_dir rewarm_steps").split()
# Why a continued run may differ from the interrupted one, by what changed.
CONSEQUENCES = {"code": "its rules may differ", "torch": "its kernels may differ",
                "threads": "sums may round differently"}


class NonFinite(RuntimeError):
    """The loss or the gradient is NaN or infinite; the update was not made."""
    exit_code = 3


@dataclass
class RunState:
    """Where a run is: all that changes besides weights and optimizer. Kept in a checkpoint's
    meta.json."""
    step: int = 0                       # updates done
    samples_seen: int = 0               # sequences trained on; position adds the skipped ones
    tokens_seen: int = 0
    seconds: float = 0.0                # wall time of the run, its earlier sessions included
    max_steps: int | None = None        # None until the horizon of a timed run is set
    decay_steps: int = 0                # updates of the decay, once max_steps is set
    warmup: int = 0                     # updates of the warm-up
    start: int = 0                      # step from which warm-up and cosine count
    plan: list = field(default_factory=list)     # data plan: [[first sample, mixture], ...]
    skips: list = field(default_factory=list)    # [[samples seen by then, samples skipped], ...]
    compiled: bool | None = None        # None: not yet decided; a resume must compute as before
    micro: int = 0                      # sequences per forward; 0: not yet decided
    micro_for: dict | None = None       # the setup it was decided for; None: early versions
    corpora: dict = field(default_factory=dict)  # {source: corpus_sha256}, see note_corpora
    scaler: dict | None = None          # of float16
    overflows: int = 0                  # of float16, in a row
    norm_mean: float = 0.0              # running mean of gradient norms, see is_spike
    norm_count: int = 0                 # updates that it has seen
    spikes: int = 0                     # updates skipped in a row

    @property
    def decay_start(self):
        return math.inf if self.max_steps is None else self.max_steps - self.decay_steps

    @property
    def position(self):                 # index of the next sample in the data plan
        return self.samples_seen + sum(n for first, n in self.skips if self.samples_seen >= first)


@dataclass
class Start:
    """What a command was resolved to: a run and where it begins."""
    config: object                      # TrainConfig
    model_config: object                # MiniCPMConfig
    state: RunState
    folder: Path | None                 # checkpoint to load; None: initialize
    kind: str                           # scratch, resume, branch, or init (weights only)
    requested: dict                     # every option as the command set it


# ---- horizon

def new_state(config):
    """Return the RunState at step 0, with the horizon if it is known. Raises BadInput if the
    warm-up does not fit."""
    state = RunState(plan=[[0, config.data]], warmup=WARMUP_STEPS_TIMED)
    if config.max_steps is not None:
        set_horizon(config, state, config.max_steps)
    set_warmup(config, state)
    return state


def set_horizon(config, state, max_steps):
    """Set the last step of the run and the length of its decay: as given, or its share of the run
    as far as there is room for it. Raises BadInput if the decay would have begun already."""
    earliest = max(state.step, state.start + state.warmup if state.start else 0)
    if config.schedule != "wsd":
        decay_steps = 0
    elif config.decay_steps is not None:
        decay_steps = config.decay_steps
    else:
        decay_steps = max(0, min(round(config.share * max_steps), max_steps - earliest))
    if max_steps - decay_steps < state.step:
        raise BadInput(f"--max_steps={max_steps}, --decay_steps={decay_steps}: the checkpoint is "
                       f"at step {state.step} already")
    state.max_steps, state.decay_steps = max_steps, decay_steps


def set_warmup(config, state):
    """Set the length of the warm-up of a new run: as given, or its share of the run. Raises
    BadInput if it does not fit."""
    if config.warmup_steps is not None:
        state.warmup = config.warmup_steps
    elif state.max_steps is not None:
        state.warmup = min(int(WARMUP_SHARE * state.max_steps), last_warmup_step(config, state))
    if state.max_steps is not None:
        check_warmup(config, state)


def last_warmup_step(config, state):
    """Return the step at which the warm-up must have ended: where the decay begins, or one update
    before the end of a cosine, which is its floor."""
    if not config.is_cosine:
        return state.decay_start
    return min(state.decay_start, state.start + (config.cosine_period or math.inf)) - 1


def check_warmup(config, state):
    """Raise BadInput if the warm-up goes on when the rate should fall."""
    end, last = state.start + state.warmup, last_warmup_step(config, state)
    if end > last:
        option = "rewarm_steps" if state.start else "warmup_steps"
        stage = "stable stage" if state.decay_steps else "run"
        remedy = "more --max_steps"
        if config.is_cosine:
            stage, last = "cosine", last + 1
            remedy = "a longer --cosine_period" if last < state.max_steps else remedy
        raise BadInput(f"--{option}={state.warmup}: the warm-up would end at step {end}, but the "
                       f"{stage} ends at step {last}; lower it, or give {remedy}")


def set_horizon_from_time(config, state, log, world):
    """Set the horizon of a timed run once the stable share of its time is spent: the decay gets the
    updates that fit in the rest. Until then the warm-up follows the measured speed. Rank 0's clock
    decides."""
    seconds, seconds_per_step = log.run_seconds(), log.seconds_per_step()
    if seconds_per_step is None:
        return
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
    if config.warmup_steps is None and state.step < state.warmup:
        updates = state.step + (budget - seconds) / seconds_per_step        # of the whole run
        state.warmup = max(1, min(WARMUP_STEPS_TIMED, round(WARMUP_SHARE * updates)))
    state.max_steps, state.decay_steps, state.warmup = world.from_rank0(
        (state.max_steps, state.decay_steps, state.warmup))
    if state.warmup > state.decay_start:
        log.say(f"step {state.step}: the stable share of --minutes={config.minutes:g} ends within "
                f"the warm-up of {state.warmup} updates, so the warm-up ends here")
        state.warmup = state.decay_start


# ---- where a command begins

def resolve_start(config, model_config, given, restarted=False):
    """Decide what a command does, from what out_dir holds and what the command names. Raises
    BadInput if it cannot.

    given: {name: value} of the options that the command set. restarted: torchrun or Slurm repeats
    the command after a failure, so --overwrite does not apply again. Returns a Start.
    """
    start_over = config.overwrite and not restarted
    done = [] if start_over else checkpoint.checkpoints(config.out_dir)
    if done:
        start = resume(config, model_config, done[-1])
    else:
        start = begin(config, model_config, given)
    if not start_over:
        skip_nonfinite(start.config, start.state)
    return start


def begin(config, model_config, given):
    """Return the Start of a run that has no checkpoint yet."""
    requested = requested_config(config, model_config)
    if config.branch_from:
        return branch(config, type(model_config), given, requested)
    if checkpoint.is_released(config.out_dir):
        raise BadInput(f"--out_dir={config.out_dir}: holds a released model, which a run would "
                       "overwrite; give another one")
    if config.init_from:
        folder = checkpoint.resolve(config.init_from)
        meta = checkpoint.read_meta(folder)
        theirs = checkpoint.model_config_of(type(model_config), meta, folder)
        if "tokenizer" not in given:
            config = dataclasses.replace(config, tokenizer=str(folder))
        own = {name: getattr(model_config, name) for name in LEARNING}
        model_config = merge_model_config(theirs, {**own, **given}, folder)
        return Start(config, model_config, new_state(config), folder, "init", requested)
    return Start(config, model_config, new_state(config), None, "scratch", requested)


def is_restart():
    """Return whether torchrun or Slurm has started this command again after a failure."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, 0)) > 0 for name in counts)


def requested_config(config, model_config):
    """Return every option as the command set it, flat, with JSON's types."""
    return json.loads(json.dumps({**asdict(config), **asdict(model_config)}))


def resume(config, model_config, folder):
    """Continue the run in out_dir. The command must be the one that began it, but for
    MAY_CHANGE."""
    about = Path(config.out_dir) / "config.json"
    if not about.is_file():
        raise BadInput(f"--out_dir={config.out_dir}: holds weights only, no run to continue; give "
                       f"another one with --init_from={config.out_dir}")
    meta, requested = checkpoint.read_meta(folder), requested_config(config, model_config)
    defaults = requested_config(type(config)(), type(model_config)())  # options newer than the run
    about = checkpoint.read_json(about)
    before = defaults | about.get("requested", about.get("asked", {}))    # early versions: asked
    before["out_dir"] = requested["out_dir"]            # a run is where it was found
    changed = [name for name in requested if requested[name] != before.get(name)]
    refused = [name for name in changed if name not in MAY_CHANGE and not same_path(
        name, requested[name], before.get(name), about.get("cwd", "."))]
    if refused:
        raise BadInput(*[f"--{name}={requested[name]}: the run in {config.out_dir} was begun with "
                         f"{before.get(name)}; repeat its command, or give --overwrite=True or "
                         "another --out_dir" for name in refused])
    state = checkpoint.from_meta(RunState, meta, "run", folder)
    # config.json has what an earlier repeat changed, even if it was killed before it saved.
    latest = checkpoint.from_meta(type(config), about, "train", config.out_dir)
    new_values = {name: getattr(config, name) for name in [*changed, "out_dir"]}
    config, saved = dataclasses.replace(latest, **new_values), meta["train"]
    horizon = "max_steps" if config.max_steps is not None else "minutes"
    if getattr(config, horizon) not in (None, saved[horizon]):
        change_horizon(config, state)
    model_config = checkpoint.model_config_of(type(model_config), meta, folder)
    return Start(config, model_config, state, folder, "resume", requested)


def same_path(name, now, before, cwd):
    """Return whether two values of an option name one file or folder.

    cwd: the current folder of the command that gave the value `before`
    """
    if name not in PATHS or not isinstance(now, str) or not isinstance(before, str):
        return False
    here, there = (ROOT, ROOT) if name == "data_dir" else (Path.cwd(), Path(cwd))
    return Path(here, now).resolve() == Path(there, before).resolve()


def change_horizon(config, state):
    """Give a resumed run another --max_steps or --minutes. Raises BadInput if it is too late for
    that."""
    option = "minutes" if config.max_steps is None else "max_steps"
    what = f"--{option}={getattr(config, option)}: the run in {config.out_dir}"
    falls = fall_start(config.schedule, state)
    if state.step > falls and not config.cosine_period:
        remedy = "begin another run in a new --out_dir"
        if config.schedule == "wsd":
            remedy = f"branch from its stable checkpoint (--branch_from={config.out_dir})"
        raise BadInput(f"{what} is at step {state.step}, and its learning rate falls from step "
                       f"{falls} on; {remedy}")
    if config.max_steps is None:        # the clock sets the horizon anew
        if config.minutes * 60 <= state.seconds:
            raise BadInput(f"{what} has taken {state.seconds:.0f} s already")
        state.max_steps, state.decay_steps = None, 0
        return
    if config.max_steps < state.step:
        raise BadInput(f"{what} has {state.step} steps already")
    set_horizon(config, state, config.max_steps)
    if state.start:
        check_warmup(config, state)
    elif state.step < state.warmup:
        set_warmup(config, state)


def skip_nonfinite(config, state):
    """Skip the samples at which the run stopped, as requested. Raises NonFinite if nothing was
    requested.

    The marker also keeps the skips made since the last checkpoint, which would meet them again.
    """
    marker = Path(config.out_dir) / "nonfinite.json"
    if marker.exists():
        note = checkpoint.read_json(marker)
        if not config.skip_samples:
            raise NonFinite(note["message"])
        skips = note.get("skips", state.skips)              # early versions: none
        state.skips = [*skips, [note["samples_seen"], config.skip_samples]]


def fall_start(schedule, state):
    """Return the step from which the learning rate falls; math.inf: never, or not known yet."""
    max_steps = math.inf if state.max_steps is None else state.max_steps
    return falls_from(state.warmup, max_steps, state.decay_steps, schedule, state.start)


def why_not_stable(meta):
    """Return why runs should not branch from a checkpoint, None if it is a stable one: past the
    warm-up, and not yet on a falling rate. A checkpoint of weights only counts as stable."""
    if "run" not in meta:
        return None
    schedule, state = meta["train"]["schedule"], RunState(**meta["run"])
    if state.step < state.start + state.warmup:
        return f"in its warm-up (until step {state.start + state.warmup})"
    if state.step > fall_start(schedule, state):
        where = "its decay" if schedule == "wsd" else f"the fall of its {schedule}"
        return f"in {where} (stable until step {fall_start(schedule, state)})"
    return None


def latest_stable(path):
    """Return the checkpoint that a path means; for a run folder the latest stable one, if there is
    one."""
    folder = checkpoint.resolve(path)
    if folder == Path(path):
        return folder
    stable = [each for each in checkpoint.checkpoints(path)
              if why_not_stable(checkpoint.read_meta(each)) is None]
    return stable[-1] if stable else folder


def branch(config, model_class, given, requested):
    """Continue from a stable checkpoint in a folder of its own, with the trunk's settings but for
    what the command sets."""
    find = checkpoint.resolve if config.rewarm_steps else latest_stable
    folder = find(config.branch_from)
    meta = checkpoint.read_meta(folder)
    if "run" not in meta:
        raise BadInput(f"{folder}: holds weights only, no optimizer state or data position to "
                       "continue from; use --init_from")
    state = checkpoint.from_meta(RunState, meta, "run", folder)
    if why_not_stable(meta) and not config.rewarm_steps:
        raise BadInput(f"{folder}: is {why_not_stable(meta)}; branch from a stable checkpoint, or "
                       "give --rewarm_steps")
    if "out_dir" not in given or Path(config.out_dir).resolve() == folder.parent.resolve():
        raise BadInput("--out_dir: a branch needs a folder of its own")
    if given.get("warmup_steps", meta["train"]["warmup_steps"]) != meta["train"]["warmup_steps"]:
        raise BadInput(f"--warmup_steps={config.warmup_steps}: {folder} has done its warm-up; "
                       "--rewarm_steps warms up again")
    config = inherit_config(config, given, meta["train"])
    if config.rewarm_steps or config.is_cosine:         # the schedule begins again here
        state.start, state.warmup = state.step, config.rewarm_steps
    set_branch_horizon(config, state)
    if config.data != state.plan[-1][1]:
        state.plan.append([state.position, config.data])
    state.seconds, state.compiled, state.micro = 0.0, None, 0
    theirs = checkpoint.model_config_of(model_class, meta, folder)
    model_config = merge_model_config(theirs, given, folder)
    if model_config.tie_word_embeddings != theirs.tie_word_embeddings:
        raise BadInput("--tie_word_embeddings: untying changes the optimizer's state; "
                       "use --init_from")
    return Start(config, model_config, state, folder, "branch", requested)


def inherit_config(config, given, trunk):
    """Return the config of a branch: the trunk's values, replaced by those that the command
    gave."""
    names = {f.name for f in dataclasses.fields(config)}
    values = {**trunk, **{name: getattr(config, name) for name in NOT_INHERITED},
              **{name: value for name, value in given.items() if name in names}}
    if config.decay_share is None and config.decay_steps is None:
        values["decay_share"] = trunk["decay_share"]
    if values["schedule"] != "wsd":     # these belong to the trunk's schedule
        values |= {name: given.get(name) for name in ("decay_share", "half_life", "decay_data")}
    elif values["decay"] != "exponential":
        values["half_life"] = given.get("half_life")
    return build([type(config)], values)[0]


def set_branch_horizon(config, state):
    """Set where a branch ends and its decay begins, from --max_steps, --decay_steps and
    --decay_share. The warm-up of --rewarm_steps comes before the decay."""
    if config.max_steps is not None:
        set_horizon(config, state, config.max_steps)
    else:
        first = state.step + config.rewarm_steps        # that may be one of the decay
        decay_steps = config.decay_steps
        if decay_steps is None and config.share:        # the decay has its share of the whole run
            decay_steps = max(1, round(first * config.share / (1 - config.share)))
        if config.schedule != "wsd" or not decay_steps:
            raise BadInput("--max_steps: a branch without a decay needs it")
        state.max_steps, state.decay_steps = first + decay_steps, decay_steps
    if state.max_steps <= state.step:
        raise BadInput(f"--max_steps={state.max_steps}: the checkpoint is at step {state.step} "
                       "already")
    check_warmup(config, state)


def merge_model_config(theirs, given, folder):
    """Return a checkpoint's model config with what may differ taken from the command. BadInput
    lists what may not."""
    values = asdict(theirs)
    explicit = {**values, "n_kv_head": theirs.kv_heads, "head_dim": theirs.head_size}
    changed = {name: value for name, value in given.items()
               if name in values and value not in (values[name], explicit[name])}
    refused = sorted(name for name in changed if name not in (*MAY_DIFFER, *LEARNING)
                     and not name.startswith("rope_"))
    if not theirs.tie_word_embeddings and "tie_word_embeddings" in changed:
        refused.append("tie_word_embeddings")
    if refused:
        raise BadInput(*[f"--{name}={given[name]}: {folder} has {explicit[name]}"
                         for name in refused])
    return build([type(theirs)], with_changed_rope(values, changed))[0]


def with_changed_rope(values, changed):
    """Return {field: value} of a model config with changed fields, without those that only the RoPE
    scaling before the change used."""
    scaling, unused = changed.get("rope_scaling", values["rope_scaling"]), []
    if scaling != "longrope":
        unused += ["rope_short_factor", "rope_long_factor", "original_max_position"]
    if scaling not in ("linear", "dynamic"):
        unused += ["rope_factor"]
    return {name: value for name, value in {**values, **changed}.items()
            if name in changed or name not in unused}


# ---- a run's folder, and how a run ends

def init_run_dir(start, say):
    """Bring the run's folder to where this run begins: config.json, and nothing that it has not
    done yet."""
    config, out_dir, now = start.config, Path(start.config.out_dir), checkpoint.provenance()
    if start.kind == "resume":
        metrics.rewind(out_dir, start.state.step)
        say(f"continuing {out_dir} from step {start.state.step}")
        before = checkpoint.read_meta(start.folder)["provenance"]
        for name, why in CONSEQUENCES.items():
            if before[name] != now[name]:
                say(f"note: {name} was {before[name]} and is now {now[name]}: {why}, so this is "
                    "not exactly the interrupted run")
    else:
        checkpoint.clear(out_dir)       # overwritten, or killed before its first checkpoint
        if start.folder:
            say(f"starting {out_dir} from {start.folder}")
    checkpoint.write_json(out_dir / "config.json", {
        "requested": start.requested, "command": sys.argv, "cwd": os.getcwd(),
        "train": asdict(config),
        "model": asdict(start.model_config), "provenance": now})


def note_corpora(state, hashes, say):
    """Say which corpora are not those that the run has read so far, and keep their hashes.

    hashes: {corpus: corpus_sha256}, None for a corpus that an early version prepared
    """
    for name, now in hashes.items():
        before = state.corpora.get(name)
        if before and before != now:
            say(f"note: {name} was prepared again since (sha256 {before[:12]}, now "
                f"{str(now)[:12]}): its order is another one, so samples of this epoch may come "
                "twice or never")
    state.corpora = {**state.corpora, **hashes}


def is_finished(out_dir, state):
    """Return whether a run has done all its updates and its last evaluation."""
    if state.step != state.max_steps:
        return False
    return any(line["step"] == state.step for line in metrics.read(out_dir)[1])


def non_finite(out_dir, state, batch_size, loss, grad_norm, rank):
    """Return the NonFinite that says what happened and what to do.

    Leaves a marker in the run's folder (None: no files), so that a restart does not meet the same
    batch again.
    """
    last = state.position + batch_size - 1
    message = (f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}; the update was not "
               f"made (samples {state.position} to {last} of the data plan)")
    if out_dir:
        saved = checkpoint.checkpoints(out_dir)
        message += (f"; last good checkpoint: {saved[-1] if saved else 'none'}; lower "
                    "--learning_rate in a new run, or repeat the command with "
                    f"--skip_samples={batch_size} to skip this batch")
        if rank == 0:
            marker = {"samples_seen": state.samples_seen, "message": message,
                      "skips": state.skips}
            checkpoint.write_json(Path(out_dir) / "nonfinite.json", marker)
    return NonFinite(message)


def is_spike(config, state, grad_norm, world, log):
    """Return whether --skip_spikes skips this update; if not, the running mean learns its norm.

    The norm tells before the update what the loss tells one update later, when the damage is done;
    and a batch of unusual text has a high loss though its gradient is harmless. Step, samples and
    schedule go on. All ranks decide alike: they compare the same mean over ranks.
    """
    if not config.skip_spikes or not math.isfinite(grad_norm):     # float16's scaler skips those
        return False
    (norm,) = world.mean(grad_norm)
    limit = config.skip_spikes * state.norm_mean
    if state.norm_count >= SPIKE_WINDOW and norm > limit and state.spikes < MAX_SPIKES:
        state.spikes += 1
        log.say(f"step {state.step + 1}: gradient norm {norm:.4g}, above {limit:.4g} "
                f"(--skip_spikes={config.skip_spikes:g}): the update is skipped")
        log.write(step=state.step + 1, skipped=True, grad_norm=norm, limit=limit)
        return True
    if state.spikes == MAX_SPIKES:
        log.say(f"step {state.step + 1}: {MAX_SPIKES} updates skipped in a row: the running mean "
                "of the gradient norm begins anew")
        state.norm_count = 0
    state.spikes, state.norm_count = 0, state.norm_count + 1
    state.norm_mean += (norm - state.norm_mean) / min(state.norm_count, SPIKE_WINDOW)
    return False


@contextlib.contextmanager
def stop_on_signals():
    """Yield a function that says whether SIGINT or SIGTERM has come.

    A second SIGINT (Ctrl-C) ends the process at once. A second SIGTERM does not: Slurm sends it to
    every process of a job step, and torchrun, which is one of them, sends it to its workers again.
    """
    received = []

    def on_signal(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
