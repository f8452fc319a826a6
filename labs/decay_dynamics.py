"""Lab: what happens in the decay (paper section 4.4, figures 7 and 8).

Question    The loss hardly moves while the rate stays at its peak, and falls within a few updates once it decays. What do the weights do?
Claim       They move a lot all the time, with the learning rate: the largest update of a weight follows it. In the decay the gradient norm
            falls, successive gradients begin to point the same way (cosine above 0), the slope along the update shrinks, and the
            curvature of the loss along it grows, by about ten times: the weights come down to a minimum from the hillside.
            Beside the paper, a picture of it, the river valley: a steep valley with a river that falls slowly. A high rate is carried far down
            the river, bouncing between the sides, where no loss shows how far it got; the decay lets it down to the water.
Write down  before you run it: the loss on the straight line from the last stable weights to the decayed ones: does it fall all the way, is
            there a hill between them, and what comes beyond the decayed end? And between two stable checkpoints?
Command     python -m labs.decay_dynamics           about three minutes on two cores; --quick=True: seconds, to see that it works

At regular steps t, x_t being the weights and g_t the gradient there on one large fixed batch of held-out text (in float32):
    v = x_{t+1} - x_t       D1 = g_{t+1}.v / |v|       D2 = (g_{t+1} - g_t).v / |v|^2       curvature = |D2| / (1 + D1^2)^1.5
The paper's batches are large enough to be their own large batch. Those of the training here are not: their gradients are shown beside it.
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

SERIES = ("lr", "largest update", "gradient norm", "cosine", "D1", "D2", "curvature", "norm in training", "cosine in training")
LINE = tuple(round(0.1 * i, 1) for i in range(-5, 16))       # places on a line: 0 is where it begins, 1 where it ends


@dataclass
class Settings:
    width: int = 64
    steps: int = 1000
    decay_share: float = 0.2                # the paper's: 2,000 of 10,000 updates
    every: int = 10                         # updates between measurements
    probe_tokens: int = 8192                # of the fixed batch
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 16

    def problems(self):
        out = [f"--every={self.every}: must be at least 2, a measurement takes two updates"] if self.every < 2 else []
        if not self.every * 4 <= self.decay_share * self.steps < self.steps / 2:
            out.append(f"--decay_share={self.decay_share}: of --steps={self.steps} the decay must be less than a half, and 4 x --every={self.every} "
                       f"updates at least: its last quarter is compared with as much before it")
        return out


# %% The experiment: train.py's loop, looked into

def dynamics(width, steps, decay_steps, every, probe_tokens, batch_size, seed):
    """{"steps": [t, ...], SERIES: [...], "lines": {name: loss at the places of LINE}}"""
    model, updates, validate = runs.begin(
        "config/lab.py", n_embd=width, n_head=width // 32, n_ff=width * 5 // 2, seed=seed, batch_size=batch_size, max_steps=steps,
        decay_steps=decay_steps, eval_tokens=4 * probe_tokens)
    probe = list(held_out_windows(open_corpus("data", "pytorch", load_tokenizer("bytes"), "val"), 128, probe_tokens, 16))
    params = list(model.parameters())
    watched = (model.blocks[len(model.blocks) // 2].attn.wqkv.weight, model.blocks[len(model.blocks) // 2].mlp.w_in.weight)   # of figure 7
    out, kept, last_batch, before, x_then, g_then = {name: [] for name in ("steps", *SERIES)}, {}, None, None, None, None
    in_training = {"norm in training": [], "cosine in training": []}
    for update in updates:
        t, x, batch = update.step, parameters_to_vector(params).detach(), torch.cat([p.grad.flatten() for p in params])
        in_training["norm in training"].append(update.metrics["grad_norm"])              # before it was clipped
        if last_batch is not None:
            in_training["cosine in training"].append(cosine_similarity(batch, last_batch, 0).item())
        last_batch = batch
        if t % every == 0:
            x_then, g_then = x, gradient(model, params, probe)
        if t % every == 1 and x_then is not None:
            g, v, weights = gradient(model, params, probe), x - x_then, [w.detach().clone() for w in watched]
            d1, d2, curvature = directional(g_then, g, v)
            if before:
                largest = max((w - b).abs().max().item() for w, b in zip(weights, before))
                row = (update.metrics["lr"], largest, g.norm().item(), cosine_similarity(g, g_then, 0).item(), d1, d2, curvature,
                       *(float(np.mean(values)) for values in in_training.values()))
                for name, value in zip(("steps", *SERIES), (t, *row)):
                    out[name].append(value)
            before, in_training = weights, {name: [] for name in in_training}
        if t in (steps - 2 * decay_steps, steps - decay_steps, steps):
            kept[t] = x
    earlier, stable, decayed = kept.values()
    out["lines"] = {"stable to decayed": along(model, params, validate, stable, decayed),
                    "stable to stable": along(model, params, validate, earlier, stable)}
    return out


def gradient(model, params, probe):
    """The gradient (n_params,) of the mean loss on the fixed batches, in float32; what the loop has in .grad stays."""
    dtype, model.numerics.dtype = model.numerics.dtype, torch.float32
    total, count = 0, sum(int((batch["targets"] >= 0).sum()) for batch in probe)
    for batch in probe:
        nll, _ = model(batch["idx"].to(params[0].device), batch["targets"].to(params[0].device))
        total = total + torch.cat([g.flatten() for g in torch.autograd.grad(nll.sum() / count, params)])
    model.numerics.dtype = dtype
    return total


def directional(g_then, g, v):
    """(D1, D2, curvature) of section 4.4: slope and change of slope along the update v, in nats per unit of weight (and its square)."""
    length = v.norm()
    d1, d2 = (g @ v / length).item(), ((g - g_then) @ v / length ** 2).item()
    return d1, d2, abs(d2) / (1 + d1 ** 2) ** 1.5


@torch.no_grad()
def along(model, params, validate, start, end):
    """Held-out losses on the straight line through two weight vectors, at the places of LINE."""
    losses = []
    for place in LINE:
        vector_to_parameters(start + place * (end - start), params)
        losses.append(validate()["val_loss"])
    return losses


def experiment(settings, config):
    """(results by seed, stale)"""
    runs.prepare(config)
    return runs.collect("decay_dynamics", dynamics, [
        dict(width=settings.width, steps=settings.steps, decay_steps=round(settings.decay_share * settings.steps), every=settings.every,
             probe_tokens=settings.probe_tokens, batch_size=settings.batch_size, seed=seed) for seed in settings.seeds], config)


# %% What the checks are about

def stages(results, settings):
    """{series: (before, at the end)}, (seeds,) each: means over as many updates before the decay as it has, and over its last quarter"""
    decay = round(settings.decay_share * settings.steps)
    steps, begins = np.array(results[0]["steps"]), settings.steps - decay
    stable, end = (steps > begins - decay) & (steps <= begins), steps > settings.steps - decay / 4
    mean = lambda name, where: np.array([np.mean(np.abs(np.array(r[name])[where]) if name == "D1" else np.array(r[name])[where])      # noqa: E731
                                         for r in results])
    return {name: (mean(name, stable), mean(name, end)) for name in SERIES}


def line_facts(losses):
    """(place of the minimum, its depth under place 0, largest rise between neighbours from 0 to 1, smallest second difference from 0 to 1)"""
    inside = losses[LINE.index(0.0):LINE.index(1.0) + 1]
    return LINE[losses.index(min(losses))], inside[0] - min(losses), float(np.diff(inside).max()), float(np.diff(inside, 2).min())


# %% The figure

def draw(results, settings, path, stale):
    figure, axes = runs.figure(2, 4, f"Through the decay, width {settings.width}, mean and range of {len(results)} seeds", stale, width=3.9)
    steps, begins = np.array(results[0]["steps"]), settings.steps - round(settings.decay_share * settings.steps)

    def series(ax, name, style, **more):
        runs.curve(ax, steps, np.array([r[name] for r in results]), {**style, "marker": ""}, **more)
    panels = (("largest update", f"largest change of a weight in\n{settings.every} updates (q, k, v, gate, up)"),
              ("gradient norm", "gradient norm (nats)"), ("cosine", "cosine of successive gradients"), ("D1", "D1 (nats per unit of weight)"),
              ("D2", "D2 (nats per unit squared)"),
              ("curvature", "curvature"))
    for ax, (name, label) in zip(axes.flat, panels):
        series(ax, name, runs.STYLES[0], label="large batch" if name in ("gradient norm", "cosine") else None)
        beside = {"gradient norm": "norm in training", "cosine": "cosine in training"}.get(name)
        if beside:
            series(ax, beside, runs.STYLES[1], label="batches of training")
        if name == "largest update":
            rates = np.array(results[0]["lr"])
            scale = np.mean([np.array(r[name])[steps <= begins].mean() for r in results]) / rates.max()
            ax.plot(steps, rates * scale, color="0.4", linestyle=":", label="learning rate, scaled")
        if name == "cosine":
            ax.axhline(0, color="0.4", linewidth=0.8)
        ax.axvspan(begins, settings.steps, color="0.9", zorder=0)
        ax.set(xlabel="update (gray: decay)", ylabel=label, title=name, xlim=(begins - 2 * (settings.steps - begins), settings.steps))
        seen = np.array([r[name] for r in results] + [r[beside] for r in results if beside])[:, steps >= ax.get_xlim()[0]]
        if name == "curvature":
            ax.set(yscale="log")
            before = np.mean(stages(results, settings)[name][0])
            ax.hlines(10 * before, begins, settings.steps, color="0.4", linestyle=":", label="paper: x 10")
        else:
            ax.set(ylim=(min(0, seen.min() * 1.05), max(seen.max() * 1.05, 0.02)))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    for ax, name, style in zip(axes.flat[6:], results[0]["lines"], runs.STYLES):
        runs.curve(ax, LINE, np.array([r["lines"][name] for r in results]), style, markersize=4)
        for place in (0, 1):
            ax.axvline(place, color="0.6", linewidth=0.8)
        ax.set(xlabel=f"place on the line (0: {name.replace(' to ', ', 1: ')})", ylabel="held-out loss (nats a byte)",
               title=f"river valley: {name}")
    figure.savefig(path, dpi=110)


# %% The checks. What they ask was set before the runs

def checks(results, settings):
    found = stages(results, settings)
    ratio = {name: float(end.mean() / before.mean()) for name, (before, end) in found.items()}

    def change(name):
        before, end = found[name]
        return f"{before.mean():.3g} to {end.mean():.3g}, x {ratio[name]:.2g} ({min(end / before):.2g} to {max(end / before):.2g})"
    cosines = {name: "{:+.3f} to {:+.3f}".format(*(x.mean() for x in found[name])) for name in ("cosine", "cosine in training")}
    down = [line_facts(r["lines"]["stable to decayed"]) for r in results]
    across = [r["lines"]["stable to stable"] for r in results]
    dips = [min(losses[LINE.index(0.0)], losses[LINE.index(1.0)]) - losses[LINE.index(0.5)] for losses in across]
    return [
        Check("the largest update follows the learning rate (within a factor 2)", f"{change('largest update')}, the rate x {ratio['lr']:.2g}",
              "follows it", 0.5 < ratio["largest update"] / ratio["lr"] < 2),
        Check("the gradient norm falls in the decay", f"{change('gradient norm')}; of training batches {change('norm in training')}", "falls",
              ratio["gradient norm"] < 1),
        Check("successive gradients point the same way more than before", f"{cosines['cosine']}; of training batches {cosines['cosine in training']}",
              "mostly above 0", bool(found["cosine"][1].mean() > max(0, found["cosine"][0].mean()))),
        Check("the slope along the update shrinks, |D1| to below a half", change("D1"), "shrinks with the rate", ratio["D1"] < 0.5),
        Check("the curvature along the update grows", change("curvature"), "grows", ratio["curvature"] > 1),
        Check("and by about ten times (at least 3)", f"x {ratio['curvature']:.2g}", "about x 10", ratio["curvature"] > 3),
        Check("from the stable weights to the decayed the loss falls all the way, without a hill",
              f"by {np.mean([x[1] for x in down]):.3f} nats, lowest at {', '.join(f'{x[0]:.1f}' for x in down)}", "-",
              max(x[2] for x in down) < 0.002),
        Check("and the line is convex", f"smallest second difference {min(x[3] for x in down):+.4f} nats", "-", min(x[3] for x in down) > -0.002),
        Check("between two stable checkpoints lies lower ground", f"half way {', '.join(f'{x:.3f}' for x in dips)} nats under the lower end", "-",
              min(dips) > 0),
    ]


# %% What it means. Most of section 4.4 is there in a model a thousand times smaller: the weights move as far as the rate lets them while nothing
# shows in the loss, D1 is above 0 before the decay (an update ends uphill: it went across the valley, past the bottom) and about 0 after it, and
# the straight lines are those of a valley: lower ground between two stable checkpoints, which is why a mean of them is better than each
# (labs/wsd_vs_cosine.py), and one convex slope down to the decayed weights, which lie at its bottom.
# Two things are not as in the paper. Its cosines turn positive in the decay; here those of training batches are positive before and shrink,
# because the mean gradient falls faster than the noise that a batch of this size has, and on a large batch they are near 1 all along. And the
# curvature grows, but not tenfold: with a |D1| far below 1 it is |D2|, which rises slightly in the paper too. Tenfold takes
# the denominator, so slopes of the order of 1, which a network of this size does not have.
#
# Exercises
# 1. `v = x - x_then`: take the direction of a random vector of the same length instead. What is the curvature there, before and in the decay?
# 2. `schedule`: give runs.begin schedule="cosine". Where in the run does the curvature begin to grow?
# 3. `probe_tokens`: at 2048 (one training batch), which of the curves drown in noise, and which do not?

@exits_cleanly
def main(argv):
    settings, config = runs.settings(argv, Settings, dict(width=32, steps=40, every=2, probe_tokens=256, seeds=(0,), batch_size=4), __doc__)
    results, stale = experiment(settings, config)
    draw(results, settings, runs.path("decay_dynamics", "figures", config), stale)
    runs.report(checks(results, settings), stale)


if __name__ == "__main__":
    main()
