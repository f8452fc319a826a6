"""metrics.jsonl, the record of a run, one JSON object a line: read, cut back on a resume, drawn as loss.png, shown elsewhere.

Training lines have step, loss, loss_max (the highest since the line before), lr, tokens, grad_norm, tok_per_s; evaluation lines
step, val_loss, val_bpb; further lines say what happened at a step.
"""
import hashlib
import json
import os
from pathlib import Path

from configurator import BadInput


def rewind(out_dir, step):
    """Drop the lines of metrics.jsonl that a killed run wrote after the checkpoint it resumes from."""
    path = Path(out_dir) / "metrics.jsonl"
    kept = [line for line in read_jsonl(path) if line["step"] < step + ("decay_steps" not in line)]     # it is about to begin again
    path.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def read_jsonl(path):
    """Lines of a .jsonl file as dicts; the last one may be the half line of a killed program, and is left out then."""
    raw = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = []
    for number, line in enumerate(raw, 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            if number < len(raw):
                raise BadInput(f"{path}:{number}: not JSON; mend or delete the line") from None
    return lines


def read(out_dir):
    """metrics.jsonl of a run as (training lines, evaluation lines)."""
    return split(read_jsonl(Path(out_dir) / "metrics.jsonl"))


def split(lines):
    """(training lines, evaluation lines)"""
    return [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]


def open_boards(config, out_dir):
    """[log(line), ...] of TensorBoard and Weights & Biases, as asked; BadInput where the package is missing."""
    boards = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput("--tensorboard: pip install tensorboard") from None
        events = SummaryWriter(out_dir / "tensorboard")
        boards.append(lambda line: [events.add_scalar(name, value, line["step"]) for name, value in line.items()
                                    if isinstance(value, (int, float))])
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise BadInput("--wandb: pip install wandb") from None
        settings = json.loads((out_dir / "config.json").read_text(encoding="utf-8")) if (out_dir / "config.json").exists() else None
        run = wandb.init(project=config.wandb, name=out_dir.name, id=hashlib.sha256(str(out_dir.resolve()).encode()).hexdigest()[:16],
                         resume="allow", config=settings)
        boards.append(lambda line: run.log(line, step=line["step"]))
    return boards


def draw(out_dir):
    """loss.png from metrics.jsonl: training and held-out loss, and the learning rate, over tokens."""
    lines = read_jsonl(out_dir / "metrics.jsonl")
    training, held_out = split(lines)
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
    left.plot(tokens, smooth, color="tab:blue", label="training loss (smoothed)", zorder=3)
    left.plot(tokens, [x.get("loss_max", x["loss"]) for x in training], color="0.8", linewidth=0.7,
              label="its highest between two lines")                     # spikes are not missed
    points = [(at[x["step"]], x["val_loss"]) for x in held_out if x["step"] in at]
    left.plot(*zip(*points), "ko", markersize=4, label="held-out loss") if points else None
    for decay in (x for x in lines if "decay_steps" in x):
        x = next((n for step, n in at.items() if step > decay["step"]), tokens[-1])
        left.axvline(x, color="0.5", linewidth=0.8, linestyle=":")
        left.annotate(f"decay\n{decay['data']}", (x, 0.02), xycoords=("data", "axes fraction"), fontsize=7, color="0.3")
    left.set(xlabel="tokens (millions)", ylabel="preference loss (nats per pair)" if "margin" in training[0] else "loss (nats per token)")
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
