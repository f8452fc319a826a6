"""metrics.jsonl, the record of a run, one JSON object per line: written, read, cut back on a
resume, drawn as loss.png.

Training lines have step, loss, loss_max (the highest since the line before), lr, tokens, grad_norm,
tok_per_s, and on several ranks what rank_times returns; evaluation lines have step, val_loss,
val_bpb; further lines say what happened at a step.
"""
import hashlib
import json
import math
import os
import time
from pathlib import Path

from tqdm import tqdm

from configurator import BadInput
from engine.device import peak_flops
from engine.trace import Trace


class TrainingLog:
    """Writes a run's metrics.jsonl and boards, shows its progress bar, and measures its speed.

    tok_per_s covers the time between start_step() and end_step() only, without the first step,
    which compiles. batch_ready() ends what a rank does before it first waits for the others.
    """

    def __init__(self, config, state, model_config, world, writes_files):
        """writes_files: False shows a progress bar only (labs)."""
        self.config, self.state, self.world = config, state, world
        self.peak_flops = peak_flops(world.device, self.say)
        self.flops_per_token = model_config.flops_per_token(config.block_size)
        self.file, self.boards = None, []
        if writes_files and world.rank == 0:
            self.file = open(Path(config.out_dir) / "metrics.jsonl", "a", encoding="utf-8")
            self.boards = open_boards(config, Path(config.out_dir))
        self.bar = tqdm(total=state.max_steps, initial=state.step, unit="step",
                        disable=True if config.quiet else None)
        self.steps, self.tokens, self.seconds, self.loss_max = 0, 0, 0.0, -math.inf
        self.own_seconds = []           # before batch_ready(), of the updates since the last line
        self.trace = Trace(config, state, world, self.say)
        self.start = time.monotonic() - state.seconds
        self.first_step_end = None

    def run_seconds(self):
        """Return the wall time of the run so far, that of its earlier processes included."""
        return time.monotonic() - self.start

    def seconds_per_step(self):
        """Return the mean wall time per update, evaluation and saving included; None before two
        updates."""
        if self.steps < 2:
            return None
        return (time.monotonic() - self.first_step_end) / (self.steps - 1)

    def say(self, text):
        """Print above the progress bar."""
        if not self.config.quiet:
            tqdm.write(text)

    def write(self, **line):
        """Add a line to metrics.jsonl and the boards."""
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        for board in self.boards:
            board(line)

    def start_step(self):
        self.trace.start_step()
        self.step_start = time.monotonic()

    def batch_ready(self):
        self.own_seconds.append(time.monotonic() - self.step_start)

    def end_step(self, tokens, lr, loss, grad_norm, aux):
        """Record an update and return its line; every log_interval updates it goes to
        metrics.jsonl."""
        self.steps += 1
        if self.steps == 1:
            self.first_step_end = time.monotonic()
        else:
            self.tokens += tokens
            self.seconds += time.monotonic() - self.step_start
        self.loss_max = max(self.loss_max, loss)
        speed = round(self.tokens / self.seconds) if self.seconds else None
        state = self.state
        line = {"step": state.step, "loss": loss, "loss_max": self.loss_max, "lr": lr,
                "tokens": state.tokens_seen, "grad_norm": grad_norm, "tok_per_s": speed,
                **{name: value.tolist() for name, value in aux.items()}}
        if self.peak_flops and speed:  # model FLOPs utilization (PaLM, appendix B)
            mfu = self.flops_per_token * speed / (self.world.size * self.peak_flops)
            line["mfu"] = round(mfu, 4)
        if state.step % self.config.log_interval == 0 or state.step == state.max_steps:
            line |= rank_times(self.world, self.own_seconds)
            self.write(**line)
            self.bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.2g} {speed or 0:,} tok/s"
                                     + self.time_left(), refresh=False)
            self.tokens, self.seconds, self.loss_max, self.own_seconds = 0, 0.0, -math.inf, []
        self.trace.end_step()
        self.bar.total = state.max_steps
        self.bar.update()
        return line

    def time_left(self):
        """Return " 120s left" if the horizon is not known yet, else ""."""
        if self.config.minutes is None or self.state.max_steps:
            return ""
        return f" {max(0, self.config.minutes * 60 - self.run_seconds()):.0f}s left"

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
        self.trace.close()


def rank_times(world, own_seconds):
    """Return {"rank_s_max", "rank_s_min", "slowest_rank"}: the seconds per update that the slowest
    and the fastest rank worked before they first waited for another; {} on one rank.

    That is the time a rank takes to have its batch: a slow disk, a busy processor. A GPU that
    computes slowly does not show, because from there on all ranks wait for each other within the
    update, in every block; a trace (--profile_steps) shows it.
    """
    if world.size == 1:
        return {}
    times = world.all_gather(sum(own_seconds) / len(own_seconds))
    slowest = max(times)
    return {"rank_s_max": round(slowest, 4), "rank_s_min": round(min(times), 4),
            "slowest_rank": times.index(slowest)}


def open_boards(config, out_dir):
    """Return [log(line), ...] for TensorBoard and Weights & Biases, as requested.

    Raises BadInput if the package is missing.
    """
    boards = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput("--tensorboard: pip install tensorboard") from None
        events = SummaryWriter(out_dir / "tensorboard")

        def to_tensorboard(line):
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    events.add_scalar(name, value, line["step"])
            events.flush()
        boards.append(to_tensorboard)
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise BadInput("--wandb: pip install wandb") from None
        path = out_dir / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        run_id = hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:16]
        run = wandb.init(project=config.wandb, name=out_dir.name, id=run_id, resume="allow",
                         config=settings)
        boards.append(lambda line: run.log(line, step=line["step"]))
    return boards


# ---- reading

def read_jsonl(path):
    """Return the lines of a .jsonl file as dicts, without a last half line of a killed program.

    Raises BadInput if another line is not JSON.
    """
    raw = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = []
    for number, line in enumerate(raw, 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            if number < len(raw):
                raise BadInput(f"{path}:{number}: not JSON; correct or delete the line") from None
    return lines


def read(out_dir):
    """Return metrics.jsonl of a run as (training lines, evaluation lines)."""
    return split_lines(read_jsonl(Path(out_dir) / "metrics.jsonl"))


def split_lines(lines):
    """Return (training lines, evaluation lines)."""
    return [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]


def rewind(out_dir, step):
    """Drop the lines that a killed run wrote after the checkpoint it resumes from, at `step`."""
    path = Path(out_dir) / "metrics.jsonl"
    kept = []
    for line in read_jsonl(path):
        begins_decay = "decay_steps" in line               # written before the update, so again now
        if line["step"] < step or line["step"] == step and not begins_decay:
            kept.append(json.dumps(line) + "\n")
    path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def draw(out_dir):
    """Draw loss.png from metrics.jsonl: training and held-out loss, and the learning rate."""
    lines = read_jsonl(out_dir / "metrics.jsonl")
    training, held_out = split_lines(lines)
    if not training:
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    tokens = [x["tokens"] / 1e6 for x in training]
    tokens_at = dict(zip((x["step"] for x in training), tokens))
    window = max(1, len(training) // 100)
    losses = [x["loss"] for x in training]
    smooth = [sum(losses[max(0, i - window):i + 1]) / (min(i, window) + 1)
              for i in range(len(losses))]
    figure, left = plt.subplots(figsize=(8, 4.5))
    left.plot(tokens, smooth, color="tab:blue", label="training loss (smoothed)", zorder=3)
    left.plot(tokens, [x.get("loss_max", x["loss"]) for x in training], color="0.8", linewidth=0.7,
              label="highest loss since the point before")
    points = [(tokens_at[x["step"]], x["val_loss"]) for x in held_out if x["step"] in tokens_at]
    if points:
        left.plot(*zip(*points), "ko", markersize=4, label="held-out loss")
    for decay in (x for x in lines if "decay_steps" in x):
        x = next((n for step, n in tokens_at.items() if step > decay["step"]), tokens[-1])
        left.axvline(x, color="0.5", linewidth=0.8, linestyle=":")
        left.annotate(f"decay\n{decay['data']}", (x, 0.02), xycoords=("data", "axes fraction"),
                      fontsize=7, color="0.3")
    unit = "preference loss (nats per pair)" if "margin" in training[0] else "loss (nats per token)"
    left.set(xlabel="tokens (millions)", ylabel=unit)
    left.grid(alpha=0.3)
    right = left.twinx()
    rates = [x["lr"] for x in training]
    right.plot(tokens, rates, color="tab:red", linestyle="--", linewidth=1, label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(0, 1.35 * max(rates))                   # room for the legend
    curves = left.get_lines()[:3] + right.get_lines()
    left.legend(handles=[curve for curve in curves if not curve.get_label().startswith("_")],
                loc="upper center")
    figure.tight_layout()
    figure.savefig(out_dir / "loss.png", dpi=120)
    plt.close(figure)
