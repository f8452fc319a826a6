"""Where a run is and where it begins: from scratch, resumed, branched from a stable checkpoint, or from another's weights.

A config here is train.py's TrainConfig or one that adds to it; start.py changes neither files nor weights, but for init_run_dir.
"""
import dataclasses
import json
import math
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configurator import BadInput, build
from engine import checkpoint, metrics
from model import MiniCPMConfig, model_config_from

WARMUP_SHARE, WARMUP_TIMED = 0.025, 100     # default warm-up: share of max_steps; updates of a run that is given minutes
MAY_CHANGE = ("max_steps", "minutes", "eval_interval", "eval_tokens", "log_interval", "save_interval", "keep_last", "keep_every",
              "sample_tokens", "skip_samples", "overwrite", "quiet", "tensorboard", "wandb", "async_save", "timeout", "replicate", "shard",
              "recompute", "sync_micro_steps")                           # by a command that continues a run
# From the model of a checkpoint to start from; and rope_....
MAY_DIFFER = ("max_position", "original_max_position", "tie_word_embeddings", "mup_lr", "balance_coef", "router_z_coef")

Start = namedtuple("Start", "config model_config state folder kind asked")       # kind: scratch, resume, branch, init


class NonFinite(RuntimeError):
    """The loss or the gradient is no number; the update was not made."""


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


def set_horizon_from_time(config, state, seconds, seconds_per_step):
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


def resolve_start(config, model, given):
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
        theirs = model_config_from(checkpoint.read_meta(folder), folder)
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
    before = asked(type(config)(), MiniCPMConfig()) | checkpoint.read_json(Path(config.out_dir) / "config.json")["asked"]   # knobs are added
    changed = [name for name in now if now[name] != before.get(name)]
    refused = [name for name in changed if name not in MAY_CHANGE]
    if refused:
        raise BadInput(*[f"--{name}={now[name]}: the run in {config.out_dir} was begun with {before.get(name)}; repeat its command, "
                         f"or give --overwrite=True or another --out_dir" for name in refused])
    state = RunState(**meta["run"])
    saved = type(config)(**meta["train"])
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
    return Start(config, model_config_from(meta, folder), state, folder, "resume", now)


def in_decay(meta):
    """Whether a checkpoint has decay behind it."""
    return "run" in meta and meta["run"]["step"] > RunState(**meta["run"]).decay_start


def latest_stable(path):
    """The checkpoint meant by a path: of a run folder the latest before its decay, where there is one."""
    folder = checkpoint.resolve(path)
    stable = [f for f in checkpoint.checkpoints(path) if not in_decay(checkpoint.read_meta(f))] if folder != Path(path) else []
    return stable[-1] if stable else folder


def branch(config, given, was_asked):
    """Go on from a stable checkpoint in a folder of its own: the trunk's settings, but for what this command says."""
    folder = checkpoint.resolve(config.branch_from) if config.rewarm_steps else latest_stable(config.branch_from)
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
    names = {f.name for f in dataclasses.fields(config)}
    values = {**meta["train"], **{name: getattr(config, name) for name in own},
              **{name: value for name, value in given.items() if name in names}}
    if config.decay_share is None and config.decay_steps is None:
        values["decay_share"] = meta["train"]["decay_share"]
    (config,) = build([type(config)], values)
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
    model = compare_model(model_config_from(meta, folder), given, folder)
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


def init_run_dir(start, say):
    """Bring the run's folder to where this run begins: config.json, and nothing in it that it has not yet done."""
    config, out_dir, now = start.config, Path(start.config.out_dir), checkpoint.provenance()
    if start.kind == "resume":
        metrics.rewind(out_dir, start.state.step)
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
    return any(x["step"] == state.step for x in metrics.read(out_dir)[1])
