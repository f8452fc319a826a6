"""Lab: the batch that reaches a loss with the fewest tokens grows as the loss falls (paper section 3.2, figure 2).

Question    A small batch makes many updates out of few tokens, each of them noisy; a large one few updates with little noise. Which batch
            gets the most out of the tokens?
Claim       It depends on the loss L to be reached, and on the size of the model only through it: bs = 1.21e9 / L^6.24 tokens (C4, loss in
            nats per token of the paper's tokenizer). Kaplan et al. count time as well as tokens; here only tokens count.
Write down  before you run it: how far must the loss fall for the best batch to double, by the paper's exponent?
Command     python -m labs.batch_size           about 7 minutes on two cores; --quick=True: seconds, to see that it works
            python -m labs.batch_size --runs='out/sweep/*'      the same fit to runs of your own: folders of train.py, of several batch
                                                                sizes and model sizes, all with one schedule

Three sizes train with six batch sizes each, all on the same bytes in the same order. Where each curve of loss over tokens first comes down to
a level gives the tokens that it costs; a parabola through the cheapest batches, in logarithms, gives the best batch for that level; a line
through the best batches of all levels and sizes, in logarithms, gives a and b of bs = a / L^b. The rate stays constant after the warm-up: a
cosine's loss halfway is not what a run of half the length would reach (labs/wsd_vs_cosine.py), so its curve holds one honest point.
"""
# %%
import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from configurator import BadInput, exits_cleanly
from engine import metrics
from engine.run import NonFinite
from labs import runs
from labs.runs import Check

PAPER_A, PAPER_B = 1.21e9, 6.24
SPAN = 1.2                              # a curve's points are means over stretches of tokens that grow by this factor
EARLY = 0.05                            # share of a run's tokens, warm-up included, in which no level is looked for
LEVEL = 1.02                            # from one level of loss to the next
GROUPS = 3                              # curves with their batch sizes (a model size, a seed) that a fit and its interval need
RESAMPLES = 2000


@dataclass
class Settings:
    widths: tuple[int, ...] = (32, 64, 128)
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)    # sequences of 128 bytes an update
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 96 * 8192                             # bytes of a run
    runs: str | None = None                             # fit these run folders (or their metrics.jsonl) instead of training

    def problems(self):
        return [f"--batches={self.batches}: three or more, above 0"] if len(set(self.batches)) < 3 or min(self.batches) < 1 else []


# %% The experiment

def loss_curve(width, sequences, seed, tokens):
    """{"params": without the embedding, "batch": tokens an update, "curve": [[tokens seen before, loss], ...]}; ends where a run diverged."""
    steps = tokens // (sequences * 128)
    model, updates, _ = runs.begin(
        "config/lab.py", n_embd=width, n_head=max(1, width // 32), n_ff=width * 5 // 2, n_layer=2, seed=seed, batch_size=sequences,
        max_steps=steps, schedule="constant", warmup_steps=round(steps * EARLY / 2))
    lines = []
    try:
        for update in updates:
            lines.append(update.metrics)
    except NonFinite:
        pass
    return {"params": model.config.n_params_non_embedding, "batch": sequences * 128, "curve": curve_of(lines, sequences * 128)}


def curve_of(lines, batch):
    """[[tokens, mean training loss], ...] of training lines. A step's loss is that of the weights before it."""
    before = np.array([line["tokens"] - batch for line in lines], dtype=float)
    losses = np.array([line["loss"] for line in lines])[before > 0]
    place = np.log(before[before > 0]) / math.log(SPAN)
    return [[float(SPAN ** place[place // 1 == i].mean()), float(losses[place // 1 == i].mean())] for i in np.unique(place // 1)]


def own_runs(pattern):
    """{(params, seed): {batch: curve}} of run folders. raises BadInput: none there, or one that cannot be used"""
    groups = {}
    for folder, knobs, shape, lines in runs.of_pattern(pattern):
        if knobs["batch_schedule"]:
            raise BadInput(f"{folder}: its batch changes on the way (batch_schedule={knobs['batch_schedule']}); leave it out")
        params, batch = shape.n_params_non_embedding, knobs["batch_size"] * knobs["block_size"]
        curves = groups.setdefault((params, knobs["seed"]), {})
        if batch in curves:
            raise BadInput(f"{folder}: a second run of {batch} tokens an update, {params:,} parameters and seed {knobs['seed']}; leave one out")
        curves[batch] = curve_of(metrics.split(lines)[0], batch)
    return groups


def experiment(settings, config):
    """((groups {(params, seed): {batch: curve}}, points of best_batches, found by fit or None), stale)"""
    if settings.runs:
        groups = own_runs(settings.runs)
        points = best_batches(groups)
        return (groups, points, fit(points)), False
    runs.prepare(config)
    jobs = [dict(width=width, sequences=sequences, seed=seed, tokens=settings.tokens)
            for seed in settings.seeds for width in settings.widths for sequences in settings.batches]
    results, stale = runs.collect("batch_size", loss_curve, jobs, config)
    groups = {}
    for job, result in zip(jobs, results):
        groups.setdefault((result["params"], job["seed"]), {})[result["batch"]] = result["curve"]
    points = best_batches(groups)
    try:
        found = fit(points)
    except BadInput:                                                     # of a quick run; a check says so
        found = None
    return (groups, points, found), stale


# %% From curves to the best batch of every level

def tokens_to(curve, level):
    """Tokens after which a curve first is down to a level; None: never."""
    tokens, losses = np.array(curve).T
    lowest = np.minimum.accumulate(losses)
    if not lowest[0] > level >= lowest[-1]:
        return None
    i = int(np.argmax(lowest <= level))
    share = (lowest[i - 1] - level) / (lowest[i - 1] - lowest[i])
    return float(tokens[i - 1] * (tokens[i] / tokens[i - 1]) ** share)


def costs(curves):
    """{level: {batch: tokens to it}} of the batches of one size and seed. Levels that a run passed early are left out."""
    late = {batch: [point for point in curve if point[0] > EARLY * curve[-1][0]] for batch, curve in curves.items() if len(curve) > 1}
    if not late:
        return {}
    high, low = min(curve[0][1] for curve in late.values()), min(min(loss for _, loss in curve) for curve in late.values())
    levels = [LEVEL ** k for k in range(math.ceil(math.log(low, LEVEL)), math.ceil(math.log(high, LEVEL)))]
    return {level: {batch: cost for batch in sorted(late) if (cost := tokens_to(late[batch], level))} for level in levels}


def parabola(cost):
    """(best batch, tokens) by a parabola, in logarithms, through the cheapest batch and up to two neighbours on each side; None where
    the cheapest has no neighbour on one side, or the parabola no lowest point between them. cost: {batch: tokens}"""
    batches = sorted(cost)
    i = min(range(len(batches)), key=lambda i: cost[batches[i]], default=0)
    if not 0 < i < len(batches) - 1:
        return None
    near = batches[max(0, i - 2):i + 3]
    x = np.log(near)
    a, b, c = np.polyfit(x, np.log([cost[batch] for batch in near]), 2)
    if a <= 0 or not x[0] <= -b / (2 * a) <= x[-1]:
        return None
    return float(np.exp(-b / (2 * a))), float(np.exp(c - b * b / (4 * a)))


def best_batches(groups):
    """[(params, seed, level, best batch, tokens), ...]"""
    return [(*of, level, *found) for of, curves in groups.items() for level, cost in costs(curves).items() if (found := parabola(cost))]


# %% The fit

def power_law(points):
    """(a, b, R^2 in logarithms) of batch = a / level^b."""
    x, y = np.log([point[2] for point in points]), np.log([point[3] for point in points])
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.exp(intercept)), -float(slope), 1 - float(((y - intercept - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def by_size(points):
    """{params: points} of the sizes that have enough for a line of their own"""
    sizes = {params: [point for point in points if point[0] == params] for params in sorted({point[0] for point in points})}
    return {params: own for params, own in sizes.items() if len({point[2] for point in own}) > 2}


def fit(points):
    """{"a", "b", "r2", "a_interval", "b_interval"}: 95 %, by resampling whole (size, seed) groups, since the levels of one curve share
    its noise. raises BadInput: too few points"""
    groups = {}
    for point in points:
        groups.setdefault(point[:2], []).append(point)
    if len(groups) < GROUPS or len({point[2] for point in points}) < 3:
        raise BadInput(f"too few points for a fit: {len(groups)} of {GROUPS} pairs of model size and seed have a level whose cheapest batch lies "
                       "between two others, at too few levels; run longer, with more batch sizes, or more sizes or seeds")
    a, b, r2 = power_law(points)
    rng, several = np.random.default_rng(0), list(groups.values())
    drawn = [[point for i in rng.integers(len(several), size=len(several)) for point in several[i]] for _ in range(RESAMPLES)]
    fits = [power_law(sample) for sample in drawn if len({point[2] for point in sample}) > 1]
    a_interval, b_interval = (tuple(map(float, np.percentile([each[i] for each in fits], (2.5, 97.5)))) for i in (0, 1))
    return {"a": a, "b": b, "r2": r2, "a_interval": a_interval, "b_interval": b_interval}


# %% The figure

def draw(groups, points, found, path, stale):
    sizes = sorted({params for params, _ in groups})
    figure, axes = runs.figure(1, len(sizes) + 1, "which batch reaches a loss with the fewest tokens", stale, width=4, height=4.4)
    for ax, params in zip(axes.flat, sizes):
        levels = {}                                                      # {level: {batch: [tokens of each seed]}}
        for (size, _), curves in groups.items():
            for level, cost in costs(curves).items() if size == params else ():
                for batch, tokens in cost.items():
                    levels.setdefault(level, {}).setdefault(batch, []).append(tokens)
        chosen = sorted(levels)[::max(1, len(levels) // 6)]
        for style, level in zip(runs.STYLES, chosen):
            batches = sorted(levels[level])
            seeds = [np.log(levels[level][batch]) for batch in batches]
            middle = np.exp([each.mean() for each in seeds])
            ax.errorbar(batches, middle, [middle - np.exp([each.min() for each in seeds]), np.exp([each.max() for each in seeds]) - middle],
                        label=f"{level:.2f}", capsize=2, markersize=4, **style)
            lowest = [(batch, tokens) for size, _, at, batch, tokens in points if size == params and at == level]
            ax.plot(*zip(*lowest), "*", color="gold", markeredgecolor="black", markersize=11, zorder=5) if lowest else None
        ax.set(xscale="log", yscale="log", xlabel="batch (tokens)", ylabel="tokens to the loss", title=f"{params:,} parameters")
        tried = sorted({batch for (size, _), curves in groups.items() if size == params for batch in curves})
        ax.set_xticks([], minor=True)
        ax.set_xticks(tried, [f"{batch:,}" for batch in tried], rotation=30, fontsize=8)
        ax.legend(fontsize=7, ncols=4, title="loss; star: best, each seed", title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25)) \
            if chosen else None
    ax = axes.flat[-1]
    for style, params in zip(runs.STYLES, sizes):
        ax.plot([p[2] for p in points if p[0] == params], [p[3] for p in points if p[0] == params], label=f"{params:,} parameters",
                **{**style, "linestyle": ""})
    if found:
        x = np.array([min(p[2] for p in points), max(p[2] for p in points)])
        middle = math.sqrt(x[0] * x[1])
        for style, own in zip(runs.STYLES, by_size(points).values()):
            a, b, _ = power_law(own)
            ends = np.array([min(p[2] for p in own), max(p[2] for p in own)])
            ax.plot(ends, a / ends ** b, color=style["color"], linewidth=1)
        ax.plot(x, found["a"] / x ** found["b"], "k--", linewidth=2.5, label=f"fit: {found['a']:.3g} / L^{found['b']:.2f}")
        ax.plot(x, found["a"] / middle ** found["b"] * (middle / x) ** PAPER_B, "k:", label=f"the paper's exponent, {PAPER_B}")
    ax.set(xlabel="loss (nats per token)", ylabel="best batch (tokens)", title="best batch over loss")
    if points:
        ax.set(xscale="log", yscale="log")
        ax.minorticks_off()
        for axis, digits in ((ax.xaxis, 3), (ax.yaxis, 2)):
            ticks = [float(f"{tick:.{digits}g}") for tick in np.geomspace(*axis.get_view_interval(), 6)[1:-1]]
            axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)


# %% The checks

def checks(results, settings):
    _, points, found = results
    if not found:
        return [Check("the best batch grows as the loss falls", "too few points for a fit", f"a {PAPER_A:.3g}, b {PAPER_B}", False)]
    low, high = found["b_interval"]
    sizes = by_size(points)
    alone = {size: power_law(own) for size, own in sizes.items()}
    shared = [max(min(p[2] for p in own) for own in sizes.values()), min(max(p[2] for p in own) for own in sizes.values())] \
        if len(sizes) > 1 else [1, 0]
    middle = math.sqrt(shared[0] * shared[1])
    there = {}                                                           # {size: [best batch at that loss, of each seed]}
    for size, own in sizes.items() if shared[0] < shared[1] else ():
        for seed in {p[1] for p in own}:
            a, b, _ = power_law([p for p in own if p[1] == seed])
            there.setdefault(size, []).append(a / middle ** b)
    return [
        Check("the best batch grows as the loss falls: bs = a / L^b with b above 0",
              f"a {found['a']:.3g} ({found['a_interval'][0]:.2g} to {found['a_interval'][1]:.2g}), b {found['b']:.2f} ({low:.2f} to {high:.2f})",
              f"a {PAPER_A:.3g}, b {PAPER_B}", low > 0),
        Check("one power law describes it", f"R^2 {found['r2']:.2f} of {len(points)} points; each size alone: "
              + ", ".join(f"b {b:.2f} (R^2 {r2:.2f}) at {size:,}" for size, (_, b, r2) in alone.items()), "-", found["r2"] > 0.8),
        Check("the size of the model matters only through the loss: at one loss all sizes have the same best batch, within the seeds' spread",
              (", ".join(f"{np.mean(of):,.0f} ({min(of):,.0f} to {max(of):,.0f}) at {size:,}" for size, of in there.items())
               + f" (loss {middle:.2f})") if there else "no loss at which several sizes have one", "-",
              bool(there) and max(min(of) for of in there.values()) <= min(max(of) for of in there.values())),
    ]


# %% What it means: by the paper's line a loss of 2.5 wants 4M tokens an update, the batch that MiniCPM trained with. Its a belongs to its data
# and its tokenizer: counted per byte L is several times smaller, and a is with it, by that factor to the power of b. Merely scaling the loss
# would leave b as it is, but of two losses not the same share is what no model can learn.
#
# Here each size alone has its law, with some half of the paper's exponent; one law for all sizes explains a third of the variance. The larger
# model wants the smaller batch at the same loss: it comes there earlier, after fewer tokens. Across sizes that is a factor of less than two, but within a
# size the best batch no more than doubles or triples; so the line through all is flatter than any of its parts. The paper draws one line
# through three sizes from 9M to 170M; before you take such a line from a small model to a large one, make exercise 3.
#
# Exercises
# 1. `learning_rate` is config/lab.py's in loss_curve: halve it. Do small batches gain or large ones, and what does that do to b?
# 2. `schedule="constant"`: take "cosine". Which part of the curves do the levels come from now?
# 3. `point[2] for point in points` in power_law: take point[4], the tokens to the level. Does one line describe all
#    sizes better (R^2; the last panel still has the loss on its axis)?

@exits_cleanly
def main(argv):
    settings, config = runs.settings(argv, Settings, dict(widths=(16, 32), batches=(1, 2, 4), seeds=(0,), tokens=4096), __doc__)
    results, stale = experiment(settings, config)
    own = dataclasses.replace(config, quick=True)                        # a user's figure is none of the lab's
    draw(*results, runs.path("batch_size_own", "figures", own) if settings.runs else runs.path("batch_size", "figures", config), stale)
    runs.report(checks(results, settings), stale)


if __name__ == "__main__":
    main()
