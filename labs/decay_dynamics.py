"""Lab: what happens in the decay (paper section 4.4, figures 7 and 8).

Question    The loss falls slowly while the learning rate stays at its peak, and faster once it
            decays. What do the weights do?
Claim       They move all the time, in proportion to the learning rate: the largest update of a
            weight follows it. In the decay the gradient norm falls, successive gradients begin to
            point in the same direction (cosine above 0), the slope along the update shrinks, and
            the curvature of the loss along it grows: the weights go down from the side of a valley
            to its bottom.
            A picture, not from the paper, is the river valley: steep sides, and a river that
            descends slowly. A high rate carries the weights far down the river while they bounce
            between the sides, so the loss shows only a part of the way. The decay lets them down to
            the water.
Write down  before you run it: take the loss on the straight line from the last stable weights to
            the decayed ones. Does it fall all the way, is there a hill in between, and what comes
            beyond the decayed end? And on the line between two stable checkpoints?
Command     python -m labs.decay_dynamics       8 minutes on two cores; --quick=True: seconds

The lab trains with batches of 16 and of 128 sequences. At regular steps t, with the weights x_t and
the gradient g_t on one large fixed batch of held-out text (in float32), it measures
    v = x_{t+1} - x_t                   D1 = g_{t+1}.v / |v|
    D2 = (g_{t+1} - g_t).v / |v|^2      curvature = |D2| / (1 + D1^2)^1.5
At ten steps it measures how sharp the steepest side of the valley is to this optimizer: the largest
eigenvalue of P^-1/2 H P^-1/2, where H is the Hessian of the loss on the fixed batch, and
P = diag(sqrt(v_hat) + eps) is what Adam divides by. If this sharpness exceeds
(2 + 2 beta1) / ((1 - beta1) rate), which is 38 / rate, Adam with the gradient of all data bounces
ever higher (Cohen et al. 2022, "Adaptive Gradient Methods at the Edge of Stability"). In muP each
role of weights has its own rate, the schedule's times a factor. The lab divides P by that factor,
so the rate in 38 / rate is the schedule's.
"""
# %%
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from configurator import exits_cleanly
from data.dataset import held_out_windows, open_corpus
from data.tokenizer import load_tokenizer
from labs import runs
from labs.runs import Check

LINE = tuple(round(0.1 * i, 1) for i in range(-5, 16))      # places: the line goes from 0 to 1
START, MIDDLE, END = (LINE.index(place) for place in (0.0, 0.5, 1.0))
LINES = "stable to decayed", "stable to stable"             # each is a straight line
PLACE, LOSS = "place on the line (0: start, 1: end)", "held-out loss (nats per byte)"
STABLE_BELOW = (2 + 2 * 0.9) / (1 - 0.9)                    # 38: largest stable rate * sharpness
GROWTH = 1.5                    # of the sharpness in the decay; the rate falls to a tenth
FLAT = 0.002                    # nats per byte: a smaller hill or bend is noise


@dataclass
class Settings:
    width: int = 32
    steps: int = 500
    decay_share: float = 0.2                # the paper's: 2,000 of 10,000 updates
    every: int = 10                         # updates between measurements
    probe_tokens: int = 8192                # size of the fixed batch
    batch_sizes: tuple[int, ...] = (16, 128)        # sequences
    seeds: tuple[int, ...] = (0, 1, 2)

    def problems(self):
        out = []
        if self.every < 2:
            out.append(f"--every={self.every}: must be at least 2, a measurement takes two updates")
        if not self.every * 4 <= self.decay_share * self.steps < self.steps / 2:
            out.append(f"--decay_share={self.decay_share}: the decay must be shorter than half of "
                       f"--steps={self.steps}, and at least 4 x --every={self.every} updates: its "
                       f"last quarter is compared with the updates before it")
        return out

    @property
    def decay_steps(self):
        return round(self.decay_share * self.steps)


# %% The experiment: train.py's loop, measured from outside

def dynamics(width, steps, decay_steps, every, probe_tokens, batch_size, seed):
    """Train a model and measure it every `every` steps.

    returns  {"steps": [t, ...], series: [value, ...], "sharpness": [[t, lr, value], ...],
              line: losses at LINE}, with a series for each other entry of `row` below
    """
    model, updates, validate = runs.begin(
        "config/lab.py", **runs.shape(width), seed=seed, batch_size=batch_size, max_steps=steps,
        decay_steps=decay_steps, eval_tokens=4 * probe_tokens)
    corpus = open_corpus("data", "pytorch", load_tokenizer("bytes"), "val")
    probe = list(held_out_windows(corpus, 128, probe_tokens, 16))
    params, block = list(model.parameters()), model.blocks[len(model.blocks) // 2]
    stable = steps - decay_steps
    ten = [part * i // 5 + first for first, part in ((0, stable), (stable, decay_steps))
           for i in range(1, 6)]
    out, sharp, kept, cosines = {}, [], [], []
    x_then = g_then = batch_then = weights_then = None
    for update in updates:
        t, x, lr = update.step, parameters_to_vector(params).detach(), update.metrics["lr"]
        batch = parameters_to_vector([p.grad for p in params])
        if batch_then is not None:
            cosines.append(cosine_similarity(batch, batch_then, 0).item())
        batch_then = batch
        if t % every == 0:
            x_then, g_then = x, gradient(model, params, probe)
        elif t % every == 1 and x_then is not None:
            g = gradient(model, params, probe)
            d1, curvature = directional(g_then, g, x - x_then)
            weights = parameters_to_vector([block.attn.wqkv.weight, block.mlp.w_in.weight]).detach()
            if weights_then is not None:
                row = {"steps": t, "lr": lr, "gradient norm": g.norm().item(),
                       "largest update": (weights - weights_then).abs().max().item(),
                       "cosine": float(np.mean(cosines)), "D1": d1, "curvature": curvature}
                for name, value in row.items():
                    out.setdefault(name, []).append(value)
            weights_then, cosines = weights, []
        if t in ten:
            sharp.append([t, lr, sharpness(model, probe, update.optimizer)])
        if t in (stable - decay_steps, stable, steps):
            kept.append(x)
    earlier, last, decayed = kept
    lines = [along(model, params, validate, *ends) for ends in ((last, decayed), (earlier, last))]
    return {**out, "sharpness": sharp, **dict(zip(LINES, lines))}


def gradient(model, params, probe, create_graph=False):
    """Return the gradient (n_params,) of the mean loss on fixed batches, in float32.

    The gradients of the training loop, in .grad, stay as they are.
    """
    dtype, model.numerics.dtype = model.numerics.dtype, torch.float32
    device, total = params[0].device, 0
    count = sum(int((batch["targets"] >= 0).sum()) for batch in probe)
    for batch in probe:
        nll, _ = model(batch["idx"].to(device), batch["targets"].to(device))
        total = total + parameters_to_vector(
            torch.autograd.grad(nll.sum() / count, params, create_graph=create_graph))
    model.numerics.dtype = dtype
    return total


def directional(g_then, g, v):
    """Return (D1, curvature) of section 4.4: the slope along the update v in nats per unit of
    weight, and the curvature."""
    length = v.norm()
    d1, d2 = (g @ v / length).item(), ((g - g_then) @ v / length ** 2).item()
    return d1, abs(d2) / (1 + d1 ** 2) ** 1.5


def sharpness(model, probe, optimizer, iterations=12):
    """Return the largest eigenvalue of S H S, with S = sqrt(muP factor / P).

    Power iteration that keeps its directions (Lanczos): the largest eigenvalue in the space that
    they span, even if a negative one is larger in size.
    """
    params, scales = [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
            params.append(p)
            scales.append((group["lr_scale"] / (v_hat.sqrt() + group["eps"])).sqrt())
    scale = parameters_to_vector(scales)
    slope = gradient(model, params, probe, create_graph=True)
    new = torch.randn(len(scale), generator=torch.Generator().manual_seed(0)).to(scale)
    space, images = scale.new_empty(0, len(scale)), []
    for _ in range(iterations):
        space = torch.cat([space, new[None] / new.norm()])
        product = torch.autograd.grad(slope @ (scale * space[-1]), params, retain_graph=True)
        images.append(scale * parameters_to_vector(product))
        new = images[-1] - space.T @ (space @ images[-1])       # orthogonal to the others
    return torch.linalg.eigvalsh(space @ torch.stack(images).T)[-1].item()


@torch.no_grad()
def along(model, params, validate, start, end):
    """Return the held-out losses at LINE, on the straight line through two weight vectors."""
    losses = []
    for place in LINE:
        vector_to_parameters(start + place * (end - start), params)
        losses.append(validate()["val_loss"])
    return losses


def experiment(settings, config):
    """Return {batch size: {series or line: array (seeds, ...)}}."""
    runs.prepare(config)
    jobs = [dict(width=settings.width, steps=settings.steps, decay_steps=settings.decay_steps,
                 every=settings.every, probe_tokens=settings.probe_tokens, batch_size=batch_size,
                 seed=seed) for batch_size in settings.batch_sizes for seed in settings.seeds]
    results = runs.collect("decay_dynamics", dynamics, jobs, config)
    return {batch_size: {name: np.array([result[name] for result in same]) for name in same[0]}
            for batch_size, same in runs.group(jobs, results, "batch_size").items()}


# %% The figure

def draw(found, settings):
    begins = settings.steps - settings.decay_steps
    figure, axes = runs.figure(2, 4, f"Through the decay, width {settings.width}, mean and range "
                                     f"of {len(settings.seeds)} seeds", width=3.9)
    panels = {"largest update": f"largest change of a weight in {settings.every} updates",
              "gradient norm": "nats per unit of weight", "cosine": "of successive batches",
              "D1": "nats per unit of weight", "curvature": "nats per unit squared",
              "sharpness": "largest eigenvalue (dotted: 38 / rate)", **dict.fromkeys(LINES, LOSS)}
    for style, (batch_size, series) in zip(runs.STYLES, found.items()):
        for ax, (name, ylabel) in zip(axes.flat, panels.items()):
            x, values = LINE if name in LINES else series["steps"][0], series[name]
            if name == "sharpness":
                x, rates, values = *values[0, :, :2].T, values[..., 2]
                ax.plot(x, STABLE_BELOW / rates, "k:")
                ax.set(yscale="log")
            runs.curve(ax, x, values, style, markersize=3, label=f"batches of {batch_size}")
            ax.set(xlabel="update (gray: decay)", ylabel=ylabel, title=name)
    for ax in axes.flat[:6]:
        ax.axvspan(begins, settings.steps, color="0.9", zorder=0)
    for ax in axes.flat[6:]:
        ax.set(xlabel=PLACE)
    return figure


def slide(ax, found, settings):
    series = found[settings.batch_sizes[0]]
    for style, name in zip(runs.STYLES, LINES):
        runs.curve(ax, LINE, series[name], style, label=name)
    ax.set(xlabel=PLACE, ylabel=LOSS)
    rise = np.diff(series[LINES[0]][:, START:END + 1]).max()
    downhill = "downhill" if rise < FLAT else "not downhill"
    return f"From stable to decayed weights: {downhill} all the way"


# %% The checks. Their thresholds were set before the runs

def stages(series, settings):
    """Return {name: (before, at the end)} of one batch size, arrays (seeds,) of means.

    before      over the updates before the decay, as many as it has; sharpness: the last of them
    at the end  over the last quarter of the decay; sharpness: the last update
    """
    steps, begins = series["steps"][0], settings.steps - settings.decay_steps
    before = (steps > begins - settings.decay_steps) & (steps <= begins)
    end = steps > settings.steps - settings.decay_steps / 4
    sharp = series["sharpness"][..., 2]
    values = {"D1": abs(series["D1"]), "update per rate": series["largest update"] / series["lr"],
              **{name: series[name] for name in ("gradient norm", "cosine", "curvature")}}
    return {"sharpness": (sharp[:, 4], sharp[:, 9]), **{
        name: (each[:, before].mean(1), each[:, end].mean(1)) for name, each in values.items()}}


def checks(found, settings):
    small, large = settings.batch_sizes[0], settings.batch_sizes[-1]
    both = {batch_size: stages(series, settings) for batch_size, series in found.items()}
    cosine, cosine_end = both[large]["cosine"]
    cosines = {size: " to ".join(f"{values.mean():+.3f}" for values in stage["cosine"])
               for size, stage in both.items()}
    sharp, rates = both[large]["sharpness"][0], found[large]["sharpness"][0, :, 1]
    sharper, part = sharp - both[small]["sharpness"][0], sharp * rates[4] / STABLE_BELOW
    down, across = (np.concatenate([series[line] for series in found.values()]) for line in LINES)
    rise, bend = (np.diff(down[:, START:END + 1], n) for n in (1, 2))
    dips = np.minimum(across[:, START], across[:, END]) - across[:, MIDDLE]
    return [
        changes("the largest update follows the learning rate (within a factor of 2)", both,
                "update per rate", 0.5, 2, "follows it"),
        changes("the gradient norm falls in the decay", both, "gradient norm", -np.inf, 1, "falls"),
        Check(f"on fresh batches of {large} sequences successive gradients point in the same "
              f"direction more than before",
              f"{cosines[large]}; of {small}: {cosines[small]}",
              cosine_end.mean() > max(0, cosine.mean()), runs.p_value(cosine_end - cosine),
              paper="mostly above 0"),
        changes("the slope along the update, D1, shrinks to less than half", both, "D1",
                -np.inf, 0.5, "shrinks with the rate"),
        changes("the curvature along the update grows", both, "curvature", 1, np.inf, "about x 10"),
        Check(f"before the decay the preconditioned sharpness is higher with batches of {large} "
              f"sequences than with {small}",
              f"by {runs.mean_and_range(sharper, '.0f')}", sharper.mean() > 0,
              runs.p_value(sharper)),
        Check(f"and with {large} it is within a factor of 2 of the threshold, 38 / rate",
              f"x {runs.mean_and_range(part, '.2f')}", 0.5 < part.mean() < 2),
        changes(f"in the decay it grows to at least {GROWTH} times what it was", both, "sharpness",
                GROWTH, np.inf),
        changes("but by less than the threshold does", both, "sharpness", -np.inf,
                rates[4] / rates[9]),
        Check(f"from the stable weights to the decayed ones the loss rises nowhere by more than "
              f"{FLAT} nats", f"falls by {runs.mean_and_range(-rise.sum(1), '.3f')} nats",
              rise.max() < FLAT),
        Check(f"and it is convex on this line, up to {FLAT} nats",
              f"smallest second difference {bend.min():+.4f} nats", bend.min() > -FLAT),
        Check("between two stable checkpoints the loss is lower",
              f"halfway {runs.mean_and_range(dips, '.3f')} nats below the lower end",
              dips.min() > 0),
    ]


def changes(claim, both, name, low, high, paper="-"):
    """Return the Check that a series' end / before is between low and high with all batch sizes."""
    ours, ratios = [], []
    for batch_size, stage in both.items():
        before, end = stage[name]
        ratios.append(end / before)
        ours.append(f"of {batch_size}: {before.mean():.3g} to {end.mean():.3g}, "
                    f"x {runs.mean_and_range(ratios[-1], '.2g')}")
    holds = all(low < ratio.mean() < high for ratio in ratios)
    p = runs.p_value(np.minimum(np.subtract(ratios, low), np.subtract(high, ratios)).T)
    return Check(claim, f"batches {'; '.join(ours)}", holds, p, paper=paper)


# %% What it means: much of section 4.4 is visible in a model four thousand times smaller than its
# 0.2B. The weights move as far as the rate lets them. D1 is above 0 before the decay (an update
# ends uphill: it crossed the valley, past the bottom) and near 0 after it. The straight lines are
# those of a valley. Between two stable checkpoints the loss is lower, which is why their mean is
# better than each of them (labs/wsd_vs_cosine.py). And one convex slope leads down to the decayed
# weights.
#
# Two things differ from the paper. The stable loss is not flat: in the 100 updates before the decay
# it falls by 0.08 nats with 16 sequences and 0.05 with 128, in the 100 of the decay by 0.15 and
# 0.11. And the curvature grows to 1.2 and 1.4 times (p = 0.07), not ten times. No run goes on
# without a decay, so a part of each change may be that of longer training.
#
# What else appears depends on the batch. With 128 sequences, successive gradients align more in the
# decay, as in the paper. While the rate is constant, the sharpness comes to 0.8 to 1.1 times the
# threshold with two seeds, as Cohen et al. find with the gradient of all data. With the third it
# jumps to 3.3 times. With 16 sequences it is below the threshold, 0.25 to 0.75 times, after the
# first updates, and successive gradients align less in the decay. A likely reason, not measured:
# the mean gradient shrinks there, the noise of a batch hardly does, and two batches share only the
# mean.
#
# One check does not hold: in the decay the sharpness grows to 1.2 times with 16 sequences, not 1.5.
# With 128 it is 1.7 times, but 0.9 to 2.2 over the seeds: a single checkpoint before the decay is a
# noisy reference, and one seed stood at 2.25 times the threshold there.
#
# Exercises
# 1. `x - x_then`: use a random direction of the same length instead. What is the curvature along
#    it, before and in the decay?
# 2. `decay_steps=decay_steps`: give runs.begin schedule="cosine" in its place. Where in the run
#    does the sharpness begin to grow?
# 3. `scale = `: leave Adam out (scale 1 for all weights). Which batch size has the sharper valley
#    now, and does it still grow in the decay?

@exits_cleanly
def main(argv):
    quick = dict(width=8, steps=40, every=2, probe_tokens=256, batch_sizes=(4, 8), seeds=(0,))
    runs.main("decay_dynamics", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
