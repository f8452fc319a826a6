"""Lab: the lower the loss to reach, the larger the best batch (paper section 3.2, figure 2).

Question    With a small batch, a number of tokens makes many noisy updates; with a large batch, few
            updates with little noise. Which batch size reaches a given loss with the fewest tokens?
Claim       It depends on the loss L, and on the size of the model only through L: the best batch
            has bs = 1.21e9 / L^6.24 tokens (C4, L in nats per token of the paper's tokenizer).
            Kaplan et al. count time as well as tokens; here only tokens count.
Write down  before you run it: by the paper's exponent, how far must the loss fall for the best
            batch to double?
Command     python -m labs.batch_size           7 minutes on two cores; --quick=True: seconds
            python -m labs.batch_size --runs='out/sweep/*'      fits your own runs: folders of
            train.py with several batch sizes and model sizes, all with the same schedule

Models of three sizes train with six batch sizes, all on the same bytes in the same order. Where a
curve of loss over tokens first falls to a level, it shows the cost of that level in tokens. On
logarithmic axes a parabola through the cheapest batches gives the best batch of a level, and a line
through the best batches of all levels and sizes gives a and b of bs = a / L^b. The learning rate
stays constant after the warm-up: the loss in the middle of a cosine schedule is not what a run of
half the length would reach (labs/wsd_vs_cosine.py).
"""
# %%
import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np

from configurator import BadInput, exits_cleanly
from engine import metrics
from engine.run import NonFinite
from labs import runs
from labs.runs import Check

PAPER_A, PAPER_B = 1.21e9, 6.24
BLOCK_SIZE = 128                        # config/lab.py's
SPAN = 1.2                              # growth of the spans over which a curve is averaged
EARLY = 0.05                            # first share of a run, in which no level is looked for
LEVEL = 1.02                            # ratio of one level of loss to the next
GROUPS = 3                              # least number of (model size, seed) pairs for a fit
RESAMPLES = 2000                        # of the bootstrap

# The best batch, in tokens, for a level of loss, of one model size and seed; the level's cost.
Point = namedtuple("Point", "params seed level batch tokens")


@dataclass
class Settings:
    widths: tuple[int, ...] = (32, 64, 128)
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)    # sequences of 128 bytes per update
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 96 * 8192                             # bytes per run
    runs: str | None = None                             # fit these run folders instead of training

    def problems(self):
        if len(set(self.batches)) < 3 or min(self.batches) < 1:
            return [f"--batches={self.batches}: give three or more, above 0"]
        return []


# %% The experiment

def loss_curve(width, sequences, seed, tokens):
    """Train a model and return its curve, which ends early if the run diverges.

    returns  {"params": parameters without the embedding, "batch": tokens per update,
              "curve": [[tokens seen before, loss], ...]}
    """
    batch, steps = sequences * BLOCK_SIZE, tokens // (sequences * BLOCK_SIZE)
    model, updates, _ = runs.begin(
        "config/lab.py", **runs.shape(width), n_layer=2, seed=seed, batch_size=sequences,
        max_steps=steps, schedule="constant", warmup_steps=round(steps * EARLY / 2))
    lines = []
    try:
        for update in updates:
            lines.append(update.metrics)
    except NonFinite:
        pass
    return {"params": model.config.n_params_non_embedding, "batch": batch,
            "curve": curve_of(lines, batch)}


def curve_of(lines, batch):
    """Return [[tokens seen before, mean training loss], ...] over spans of training lines."""
    tokens = np.array([line["tokens"] - batch for line in lines], dtype=float)  # before the update,
    losses = np.array([line["loss"] for line in lines])                         # as the loss is
    place, losses = np.log(tokens[tokens > 0]) / math.log(SPAN), losses[tokens > 0]
    spans = [place // 1 == span for span in np.unique(place // 1)]
    return [[float(SPAN ** place[span].mean()), float(losses[span].mean())] for span in spans]


def read_runs(pattern):
    """Return {(params, seed): {batch: curve}} of run folders.

    raises  BadInput if there is none, or one that cannot be used
    """
    groups = {}
    for folder, knobs, model, lines in runs.read_run_folders(pattern):
        if knobs["batch_schedule"]:
            raise BadInput(f"{folder}: its batch changes (batch_schedule="
                           f"{knobs['batch_schedule']}); leave it out")
        params, batch = model.n_params_non_embedding, knobs["batch_size"] * knobs["block_size"]
        curves = groups.setdefault((params, knobs["seed"]), {})
        if batch in curves:
            raise BadInput(f"{folder}: a second run of {batch} tokens per update, {params:,} "
                           f"parameters and seed {knobs['seed']}; leave one out")
        curves[batch] = curve_of(metrics.split_lines(lines)[0], batch)
    return groups


def train_models(settings, config):
    """Return ({(params, seed): {batch: curve}}, stale)."""
    runs.prepare(config)
    jobs = [dict(width=width, sequences=sequences, seed=seed, tokens=settings.tokens)
            for seed in settings.seeds for width in settings.widths
            for sequences in settings.batches]
    results, stale = runs.collect("batch_size", loss_curve, jobs, config)
    groups = {}
    for job, result in zip(jobs, results):
        curves = groups.setdefault((result["params"], job["seed"]), {})
        curves[result["batch"]] = result["curve"]
    return groups, stale


def experiment(settings, config):
    """Return ((groups, points, law), stale): see train_models, best_batches and fit.

    law is None if the points are too few, which the checks report; own runs raise BadInput.
    """
    if settings.runs:
        groups, stale = read_runs(settings.runs), False
    else:
        groups, stale = train_models(settings, config)
    points = best_batches(groups)
    try:
        law = fit(points)
    except BadInput:
        if settings.runs:
            raise
        law = None
    return (groups, points, law), stale


# %% From curves to the best batch for each level

def tokens_to(curve, level):
    """Return the tokens after which a curve first falls to a level, None if it never does."""
    tokens, losses = np.array(curve).T
    lowest = np.minimum.accumulate(losses)
    if not lowest[0] > level >= lowest[-1]:
        return None
    i = int(np.argmax(lowest <= level))
    share = (lowest[i - 1] - level) / (lowest[i - 1] - lowest[i])
    return float(tokens[i - 1] * (tokens[i] / tokens[i - 1]) ** share)


def costs(curves):
    """Return {level: {batch: tokens to the level}} of the curves {batch: curve} of one group."""
    late = {}
    for batch, curve in sorted(curves.items()):
        if len(curve) > 1:
            late[batch] = [point for point in curve if point[0] > EARLY * curve[-1][0]]
    if not late:
        return {}
    high = min(curve[0][1] for curve in late.values())
    low = min(loss for curve in late.values() for _, loss in curve)
    powers = range(math.ceil(math.log(low, LEVEL)), math.ceil(math.log(high, LEVEL)))
    found = {}
    for level in [LEVEL ** k for k in powers]:
        tokens = {batch: tokens_to(curve, level) for batch, curve in late.items()}
        found[level] = {batch: cost for batch, cost in tokens.items() if cost}
    return found


def parabola(cost):
    """Return (best batch, tokens) of {batch: tokens}, None if the best lies outside of the batches.

    The parabola goes, on logarithmic axes, through the cheapest batch and up to two neighbors on
    each side.
    """
    batches = sorted(cost)
    i = batches.index(min(cost, key=cost.get)) if cost else 0
    if not 0 < i < len(batches) - 1:
        return None
    near = batches[max(0, i - 2):i + 3]
    x, y = np.log(near), np.log([cost[batch] for batch in near])
    a, b, c = np.polyfit(x, y, 2)
    if a <= 0 or not x[0] <= -b / (2 * a) <= x[-1]:
        return None
    return float(np.exp(-b / (2 * a))), float(np.exp(c - b * b / (4 * a)))


def best_batches(groups):
    """Return the list of Points of all groups and levels that have a best batch."""
    points = []
    for (params, seed), curves in groups.items():
        for level, cost in costs(curves).items():
            if best := parabola(cost):
                points.append(Point(params, seed, level, *best))
    return points


# %% The fit

def power_law(points):
    """Return (a, b, R^2 of the logarithms) of batch = a / level^b."""
    x = np.log([point.level for point in points])
    y = np.log([point.batch for point in points])
    slope, intercept = np.polyfit(x, y, 1)
    r2 = 1 - float(((y - intercept - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    return float(np.exp(intercept)), -float(slope), r2


def by_size(points):
    """Return {params: points} of the sizes with enough points for a line of their own."""
    sizes = {params: [point for point in points if point.params == params]
             for params in sorted({point.params for point in points})}
    return {params: own for params, own in sizes.items() if len({p.level for p in own}) > 2}


def fit(points):
    """Return {"a", "b", "r2", "a_interval", "b_interval"} of the power law through all points.

    The 95 % intervals resample whole (size, seed) groups, because the levels of one curve share its
    noise. Raises BadInput if the points are too few.
    """
    groups = {}
    for point in points:
        groups.setdefault((point.params, point.seed), []).append(point)
    if len(groups) < GROUPS or len({point.level for point in points}) < 3:
        raise BadInput(f"too few points for a fit: {len(groups)} of {GROUPS} pairs of model size "
                       "and seed have a level whose cheapest batch lies between two others, or "
                       "these are fewer than three levels; run longer, with more batch sizes, "
                       "model sizes or seeds")
    rng, several, laws = np.random.default_rng(0), list(groups.values()), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(several), size=len(several))
        sample = [point for i in drawn for point in several[i]]
        if len({point.level for point in sample}) > 1:
            laws.append(power_law(sample)[:2])
    a, b, r2 = power_law(points)
    a_interval, b_interval = np.percentile(laws, (2.5, 97.5), axis=0).T.tolist()
    return {"a": a, "b": b, "r2": r2, "a_interval": a_interval, "b_interval": b_interval}


# %% The figure

def draw(results, settings):
    groups, points, law = results
    sizes = sorted({params for params, _ in groups})
    title = "which batch reaches a loss with the fewest tokens"
    figure, axes = runs.figure(1, len(sizes) + 1, title, width=4, height=4.4)
    for ax, params in zip(axes.flat, sizes):
        draw_costs(ax, [curves for (size, _), curves in groups.items() if size == params],
                   [point for point in points if point.params == params])
        ax.set(title=f"{params:,} parameters")
    if points:
        draw_law(axes.flat[-1], points, law)
    return figure


def draw_costs(ax, seeds, points):
    """Draw tokens over batch for some levels of one size. seeds: [{batch: curve}, ...]"""
    samples = {}                                    # {level: {batch: [tokens of each seed]}}
    for curves in seeds:
        for level, cost in costs(curves).items():
            for batch, tokens in cost.items():
                samples.setdefault(level, {}).setdefault(batch, []).append(tokens)
    for style, level in zip(runs.STYLES, sorted(samples)[::max(1, len(samples) // 6)]):
        batches = sorted(samples[level])
        runs.bars(ax, batches, [samples[level][batch] for batch in batches], style,
                  label=f"{level:.2f}")
        best = [point for point in points if point.level == level]
        ax.plot([point.batch for point in best], [point.tokens for point in best], "*",
                color="gold", markeredgecolor="black", markersize=11, zorder=5)
    ax.set(yscale="log", xlabel="batch (tokens)", ylabel="tokens to the loss")
    runs.log_x(ax, sorted({batch for curves in seeds for batch in curves}))
    ax.tick_params("x", rotation=30)
    if samples:
        ax.legend(fontsize=7, ncols=4, title="loss; star: best batch of a seed", title_fontsize=7,
                  loc="upper center", bbox_to_anchor=(0.5, -0.25))


def draw_law(ax, points, law):
    """Draw best batch over loss: points, a line for each size, the fit and the paper's slope."""
    levels = np.array([point.level for point in points])
    ends = np.array([levels.min(), levels.max()])
    for style, params in zip(runs.STYLES, sorted({point.params for point in points})):
        own = [point for point in points if point.params == params]
        x = np.array([point.level for point in own])
        ax.plot(x, [point.batch for point in own], **{**style, "linestyle": ""},
                label=f"{params:,} parameters")
        if params in by_size(points):
            a, b, _ = power_law(own)
            ax.plot(np.sort(x), a / np.sort(x) ** b, color=style["color"], linewidth=1)
    if law:
        a, b, middle = law["a"], law["b"], math.sqrt(ends[0] * ends[1])
        ax.plot(ends, a / ends ** b, "k--", linewidth=2.5, label=f"fit: {a:.3g} / L^{b:.2f}")
        ax.plot(ends, a / middle ** b * (middle / ends) ** PAPER_B, "k:",
                label=f"the paper's exponent, {PAPER_B}")
    ax.set(yscale="log", xlabel="loss (nats per token)", ylabel="best batch (tokens)",
           title="best batch over loss")
    runs.log_x(ax, np.geomspace(*ends, 4).round(2))


# %% The checks

def at_one_loss(points):
    """Return (loss, {params: [best batch of each seed]}) at a loss that all sizes reach.

    That is the middle of the losses for which all sizes have a best batch; (None, {}) if none.
    """
    sizes = by_size(points)
    if len(sizes) < 2:
        return None, {}
    low = max(min(point.level for point in own) for own in sizes.values())
    high = min(max(point.level for point in own) for own in sizes.values())
    if low >= high:
        return None, {}
    loss, found = math.sqrt(low * high), {}
    for params, own in sizes.items():
        laws = [power_law([point for point in own if point.seed == seed])
                for seed in {point.seed for point in own}]
        found[params] = [a / loss ** b for a, b, _ in laws]
    return loss, found


def checks(results, settings):
    _, points, law = results
    paper = f"a {PAPER_A:.3g}, b {PAPER_B}"
    if not law:
        return [Check("the best batch grows as the loss falls", "too few points for a fit", paper,
                      False)]
    (a_low, a_high), (b_low, b_high) = law["a_interval"], law["b_interval"]
    alone = {params: power_law(own) for params, own in by_size(points).items()}
    by_itself = ", ".join(f"b {b:.2f} (R^2 {r2:.2f}) at {params:,}"
                          for params, (_, b, r2) in alone.items())
    loss, batches = at_one_loss(points)
    compared, agree = "no loss that several sizes reach", False
    if batches:
        compared = ", ".join(f"{runs.mean_and_range(seeds, ',.0f')} at {params:,}"
                             for params, seeds in batches.items()) + f" (loss {loss:.2f})"
        agree = max(map(min, batches.values())) <= min(map(max, batches.values()))
    return [
        Check("the best batch grows as the loss falls: bs = a / L^b with b above 0",
              f"a {law['a']:.3g} ({a_low:.2g} to {a_high:.2g}), "
              f"b {law['b']:.2f} ({b_low:.2f} to {b_high:.2f})", paper, b_low > 0),
        Check("one power law describes it",
              f"R^2 {law['r2']:.2f} of {len(points)} points; each size alone: {by_itself}", "-",
              law["r2"] > 0.8),
        Check("the size of the model matters only through the loss: at the same loss all sizes "
              "have the same best batch, within the seeds' spread", compared, "-", agree),
    ]


# %% What it means: by the paper's line a loss of 2.5 asks for 4M tokens per update, the batch that
# MiniCPM trained with. Its constant a belongs to its data and tokenizer. Counted per byte, L is
# several times smaller, and a is smaller by that factor to the power of b. Scaling the loss alone
# would leave b as it is, but what no model can learn is not the same share of the two losses.
#
# Here each size alone follows a law with about half of the paper's exponent. One law for all sizes
# explains a third of the variance. At the same loss the larger model wants the smaller batch: it
# gets there earlier, after fewer tokens. Across sizes that is a factor of less than two, but within
# a size the best batch only doubles or triples. So the line through all points is flatter than any
# of its parts. The paper draws one line through three sizes from 9M to 170M; before you extend such
# a line from a small model to a large one, do exercise 3.
#
# Exercises
# 1. `runs.begin` in loss_curve takes the learning rate of config/lab.py: halve it. Do small batches
#    gain or large ones, and what does that do to b?
# 2. `schedule="constant"`: use "cosine". From which part of the curves do the levels come now?
# 3. `point.level` in power_law: use point.tokens, the tokens to reach the level. Does one line
#    describe all sizes better (R^2; the last panel still shows the loss on its axis)?

@exits_cleanly
def main(argv):
    quick = dict(widths=(16, 32), batches=(1, 2, 4), seeds=(0,), tokens=4096)
    runs.main("batch_size", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
