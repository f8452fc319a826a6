"""Lab: the longer a model trains, the larger its best batch (paper section 3.2, figures 1 and 2).

Question    With a small batch, a number of tokens makes many noisy updates; with a large batch, few
            updates with little noise. Which batch size gives the lowest loss for the tokens?
Claim       It depends on the loss L that is reached, and on the size of the model only through L:
            the best batch has bs = 1.21e9 / L^6.24 tokens (C4, L in nats per token of the paper's
            tokenizer). Zhang et al. (arXiv 2410.21676) ask for another batch, the critical one: it
            needs 20 % more updates than if every doubling of the batch halved them. They find
            that it depends on the number of tokens, and hardly on the size.
Write down  before you run it: by the paper's exponent, how far must the loss fall for the best
            batch to double? Two models of different size have seen the same number of tokens. Which
            has the larger best batch by the paper, and which if the best batch grows as the
            critical one does?
Command     python -m labs.batch_size           20 minutes on two cores; --quick=True: seconds
            python -m labs.batch_size --runs='out/sweep/*'      fits your own runs: folders of
            train.py, with several batch sizes for each model size and number of tokens. A run
            counts with the held-out loss at the end of its decay

Models of three sizes train with several batch sizes, all on the same bytes in the same order. Each
run has a trunk at a constant learning rate, from which decays branch, one for each number of
tokens: the loss in the middle of a run is not what a shorter run would reach. At each number of
tokens a parabola through the lowest loss and its neighbors, over the logarithm of the batch, gives
the best batch. As in the paper, one learning rate serves all: the best one at the smallest size.
"""
# %%
import math
from collections import namedtuple
from dataclasses import dataclass

import numpy as np

from configurator import BadInput, exits_cleanly
from labs import runs
from labs.runs import Check

PAPER_B = 6.24                          # of bs = a / L^b
BLOCK_SIZE = 128                        # config/lab.py's
DECAY_SHARE = 0.2                       # of a run's tokens
WARMUP_SHARE = 0.1                      # of the shortest run's tokens
MIN_R2 = 0.8

# The best batch, in tokens, of a size and seed after `tokens` million, and the loss with it.
Point = namedtuple("Point", "params seed tokens batch loss")


@dataclass
class Settings:
    widths: tuple[int, ...] = (32, 64, 128)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)         # sequences of 128 bytes per update
    rates: tuple[float, ...] = (0.005, 0.01, 0.02)      # all at the first width and seed only
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[int, ...] = (2 ** 18, 2 ** 19, 2 ** 20)      # bytes at which decays end
    eval_tokens: int = 65536                            # held-out bytes
    runs: str | None = None                             # fit these run folders instead of training

    def problems(self):
        if not 1 <= min(self.batches) <= max(self.batches) <= min(self.lengths) / BLOCK_SIZE / 4:
            return ["--batches: must be above 0, and each of --lengths must have four updates of "
                    "the largest of them or more"]
        return []


# %% The experiment: a trunk at the peak learning rate, and from it a decay for each length

def trunk_and_decays(width, sequences, rate, seed, lengths, eval_tokens):
    """Return {"params": parameters without the embedding, "losses": [held-out loss per length]}.

    A loss is None if the run diverged before.
    """
    config, model, batches, validate = runs.build(
        "config/lab.py", **runs.shape(width), n_layer=2, seed=seed, batch_size=sequences,
        learning_rate=rate, eval_tokens=eval_tokens)
    ends = [length // (sequences * BLOCK_SIZE) for length in lengths]
    losses = runs.decay_losses(
        config, model, batches, validate, round(WARMUP_SHARE * ends[0]),
        [(end - max(1, round(DECAY_SHARE * end)), end) for end in ends])
    return {"params": model.config.n_params_non_embedding, "losses": losses}


def losses_of(width, rate, seed, settings, config):
    """Return (params, {length: {batch in tokens: loss}}), without runs that diverged."""
    jobs = [dict(width=width, sequences=sequences, rate=rate, seed=seed, lengths=settings.lengths,
                 eval_tokens=settings.eval_tokens) for sequences in settings.batches]
    results = runs.collect("batch_size", trunk_and_decays, jobs, config)
    curves = {length: {} for length in settings.lengths}
    for sequences, result in zip(settings.batches, results):
        for length, loss in zip(settings.lengths, result["losses"]):
            if loss is not None:
                curves[length][sequences * BLOCK_SIZE] = loss
    return results[0]["params"], curves


def train_models(settings, config):
    """Return (groups, by_rate).

    groups   {(params, seed): {length: {batch: loss}}} at the best learning rate: the one with the
             lowest sum over lengths of the best batch's loss, at the first width and seed
    by_rate  {rate: {length: {batch: loss}}} at the first width and seed
    """
    runs.prepare(config)
    groups, by_rate = {}, {}
    for rate in settings.rates:
        _, by_rate[rate] = losses_of(settings.widths[0], rate, settings.seeds[0], settings, config)
    best = min(by_rate, key=lambda rate: sum(min(curve.values(), default=math.inf)
                                             for curve in by_rate[rate].values()))
    for seed in settings.seeds:
        for width in settings.widths:
            params, curves = losses_of(width, best, seed, settings, config)
            groups[params, seed] = curves
    return groups, by_rate


def read_runs(pattern):
    """Return the groups, as train_models does, of run folders.

    Numbers of tokens count as the same if they agree to two digits. Raises BadInput if there is no
    folder, or one that cannot be used.
    """
    groups = {}
    for folder, knobs, model, lines in runs.read_run_folders(pattern):
        if knobs["batch_schedule"]:
            raise BadInput(f"{folder}: its batch changes (batch_schedule); leave it out")
        batch = knobs["batch_size"] * knobs["block_size"]
        curves = groups.setdefault((model.n_params_non_embedding, knobs["seed"]), {})
        ends = {line["step"] + line["decay_steps"] for line in lines if "decay_steps" in line}
        for line in lines:
            if "val_loss" in line and line["step"] in ends:
                curve = curves.setdefault(float(f"{batch * line['step']:.2g}"), {})
                if batch in curve:
                    raise BadInput(f"{folder}: a second run with this size, seed, batch and number "
                                   f"of tokens; leave one out")
                curve[batch] = line["val_loss"]
    return groups


def experiment(settings, config):
    """Return (groups, by_rate, points): see train_models and best_batches."""
    if settings.runs:
        groups, by_rate = read_runs(settings.runs), {}
    else:
        groups, by_rate = train_models(settings, config)
    points = best_batches(groups)
    if settings.runs and not enough(points):
        raise BadInput(f"--runs={settings.runs}: {TOO_FEW}")
    return groups, by_rate, points


# %% The best batch, and what explains it

TOO_FEW = ("too few points for a fit. It needs two model sizes or more, one of them with two "
           "numbers of tokens or more, at which a batch is better than a smaller and a larger one; "
           "train with more batch sizes. A run counts if its decay is finished")


def lowest(curve):
    """Return (best batch, its loss) of {batch: loss}, or None if it is the smallest or largest."""
    batches = sorted(curve)
    i = batches.index(min(curve, key=curve.get)) if curve else 0
    if not 0 < i < len(batches) - 1:
        return None
    near = batches[i - 1:i + 2]
    a, b, c = np.polyfit(np.log(near), [curve[batch] for batch in near], 2)
    return float(np.exp(-b / (2 * a))), float(c - b * b / (4 * a))


def best_batches(groups):
    """Return the list of Points of all groups and numbers of tokens that have a best batch."""
    return [Point(params, seed, tokens / 1e6, *lowest(curve))
            for (params, seed), curves in sorted(groups.items())
            for tokens, curve in sorted(curves.items()) if lowest(curve)]


def enough(points):
    """Return whether the points have two sizes, and one of them two numbers of tokens."""
    sizes = {point.params for point in points}
    return len({(point.params, point.tokens) for point in points}) > len(sizes) > 1


def logs(points, name):
    """Return (log x, log batch) of the points, two arrays; x is their "tokens" or "loss"."""
    return np.log([[getattr(point, name), point.batch] for point in points]).T


def fit(points, name, apart):
    """Return (exponent k, R^2, residual) of batch = a * x^k, by least squares of the logarithms.

    x as in logs. apart: each size has its own a, and R^2 is the share of the variance within sizes.
    residual: root mean square of what is left of the logarithm.
    """
    x, y = logs(points, name)
    sizes = np.array([point.params if apart else 0 for point in points])
    for own in (sizes == size for size in set(sizes)):
        x[own] -= x[own].mean()
        y[own] -= y[own].mean()
    k = x @ y / (x @ x)
    rest = y - k * x
    return k, 1 - rest @ rest / (y @ y), np.sqrt(np.mean(rest ** 2))


def by_seed(points):
    """Return [the points of a seed, ...] of the seeds with enough of them."""
    seeds = {seed: [point for point in points if point.seed == seed] for _, seed, *_ in points}
    return [own for own in seeds.values() if enough(own)]


def mean_points(points):
    """Return the points averaged over seeds, on logarithmic axes."""
    groups = {}
    for point in points:
        groups.setdefault((point.params, point.tokens), []).append(np.log(point[3:]))
    return [Point(params, None, tokens, *np.exp(np.mean(values, 0)))
            for (params, tokens), values in sorted(groups.items())]


def growth_with_size(points):
    """Return (measured, expected) log of the largest size's best batch over the smallest's, arrays.

    One value per seed at which both have a best batch, the mean over their numbers of tokens.
    expected: what the seed's fit over the loss says for their two losses, if the size matters only
    through the loss. (nan, nan) if there is none.
    """
    sizes, growth = [point.params for point in points], []
    for own in by_seed(points):
        ratios = [np.log(np.divide(large[3:], small[3:])) for small in own for large in own
                  if small.params == min(sizes) and large.params == max(sizes)
                  and small.tokens == large.tokens]
        if ratios:
            batch, loss = np.mean(ratios, 0)
            growth.append((batch, fit(own, "loss", True)[0] * loss))
    return np.transpose(growth or [(math.nan, math.nan)])


# %% The figure

def draw(results, settings):
    groups, by_rate, points = results
    sizes = sorted({params for params, _ in groups})
    figure, axes = runs.figure(2, max(3, len(sizes)), "which batch gives the lowest loss",
                               width=4.4, height=3.8)
    for ax, params in zip(axes[0], sizes):
        seeds = [curves for (size, _), curves in groups.items() if size == params]
        draw_curves(ax, {f"{tokens / 1e6:.2g}M tokens": [curves.get(tokens, {}) for curves in seeds]
                         for tokens in sorted(set().union(*seeds))})
        own = [point for point in points if point.params == params]
        ax.plot([point.batch for point in own], [point.loss for point in own], "*", color="gold",
                markeredgecolor="black", markersize=11, zorder=5)
        ax.set(title=f"{params:,} parameters (star: best of a seed)")
    for ax, name in zip(axes[1], ("loss", "tokens")):
        draw_best(ax, points, name)
    if by_rate:
        draw_curves(axes[1, 2], {f"rate {rate:g}": [curves[max(curves)]]
                                 for rate, curves in by_rate.items()})
        axes[1, 2].set(title=f"learning rates, {sizes[0]:,} parameters")
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    return figure


def draw_curves(ax, samples):
    """Draw loss over batch of {label: [{batch: loss} of each seed]}."""
    for style, (label, seeds) in zip(runs.STYLES, samples.items()):
        batches = sorted(set().union(*seeds))
        losses = [[curve[batch] for curve in seeds if batch in curve] for batch in batches]
        runs.bars(ax, batches, losses, style, label=label)
        runs.log_x(ax, batches)
    ax.set(xlabel="batch (tokens)", ylabel="held-out loss (nats per token)")


def draw_best(ax, points, name):
    """Draw best batch over "loss" or "tokens", a line for each size, and one for all."""
    if not enough(points):
        return
    for style, params in zip(runs.STYLES, sorted({point.params for point in points})):
        own = [point for point in points if point.params == params]
        ax.plot(*np.exp(logs(own, name)), **{**style, "linestyle": ""},
                label=f"{params:,} parameters")
        draw_line(ax, own, name, fit(points, name, True)[0], **{**style, "marker": ""})
    k, r2, _ = fit(points, name, False)
    draw_line(ax, points, name, k, color="0.5", linewidth=6, zorder=0, alpha=0.5,
              label=f"one line: exponent {k:.2f}, R$^2$ {r2:.2f}")
    x = logs(points, name)[0]
    runs.log_x(ax, [float(f"{tick:.3g}") for tick in np.exp(np.linspace(min(x), max(x), 3))])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_minor_formatter("{x:,.0f}")
    ax.set(title=f"best batch over {name}", ylabel="best batch (tokens)",
           xlabel="loss (nats per token)" if name == "loss" else "million tokens seen")


def draw_line(ax, points, name, k, **style):
    """Draw batch = a * x^k through the middle of the points."""
    x, y = logs(points, name)
    ends = np.array([x.min(), x.max()])
    ax.plot(np.exp(ends), np.exp(y.mean() + k * (ends - x.mean())), **style)


def slide(ax, results, settings):
    seeds = by_seed(results[2])
    draw_best(ax, results[2], "tokens")
    ax.set_title("")
    if seeds and all(fit(own, "tokens", True)[0] > 0 for own in seeds):
        return "The more tokens a run sees, the larger its best batch"
    return "More tokens do not ask for a larger batch here"


# %% The checks

def checks(results, settings):
    points = results[2]
    seeds = by_seed(points)
    if not seeds:
        print(TOO_FEW)
        return []
    b, power = ([sign * fit(own, name, True)[0] for own in seeds]
                for name, sign in (("loss", -1), ("tokens", 1)))
    r2, r2_tokens = (fit(mean_points(points), name, True)[1] for name in ("loss", "tokens"))
    rest, rest_tokens = (runs.mean_and_range([fit(own, name, False)[2] for own in seeds], ".2f")
                         for name in ("loss", "tokens"))
    gain = [np.log(fit(own, "loss", False)[2] / fit(own, "tokens", False)[2]) for own in seeds]
    measured, expected = growth_with_size(points)
    return [
        Check("the best batch grows as the loss falls: bs = a / L^b, with an a for each size, has "
              "b above 0 at every seed",
              f"b {runs.mean_and_range(b, '.2f')}; as tokens^{runs.mean_and_range(power, '.2f')}",
              min(b) > 0, runs.p_value(b), paper=f"b {PAPER_B}"),
        Check(f"within the sizes this law describes it: R^2 above {MIN_R2}, seeds averaged",
              f"{r2:.2f}, of a power of the tokens {r2_tokens:.2f} ({len(points)} best batches)",
              r2 > MIN_R2),
        Check("one line for all sizes explains it better by the number of tokens than by the loss: "
              "its residual is smaller at every seed",
              f"{rest_tokens} over tokens, {rest} over the loss",
              min(gain) > 0, runs.p_value(gain),
              paper="by the loss (Zhang et al., of the critical batch: by tokens)"),
        Check("at the same number of tokens the best batches of the largest and the smallest size "
              "differ by less than half (in the logarithm) of what the law of the loss says",
              f"x {runs.mean_and_range(np.exp(measured), '.2f')}; by the law of the loss x "
              f"{runs.mean_and_range(np.exp(expected), '.2f')}",
              abs(measured.mean()) < 0.5 * expected.mean()),
    ]


# %% What it means: by the paper's line a loss of 2.5 asks for 4M tokens per update, the batch that
# MiniCPM trained with. Its constant a belongs to its data and tokenizer.
#
# Here the best batch grows with the tokens: with four times as many it is 2.2 times as large at the
# smallest size and 1.5 times at the middle one (1.8 by one exponent for all). Of the largest size
# only one seed has two best batches, so nothing can be said. One line for all sizes over the loss
# is flat, with an R^2 of 0. After the same tokens a larger model has the lower loss. By the law of
# the loss it should want the larger batch. But the largest wants one less than half as large as the
# smallest (two seeds have both). A line that joins groups can contradict each of them (Simpson's
# paradox), so draw a line for each size before you draw one for all. The tokens do better than the
# loss at every seed (p = 0.09), but not well, because the size matters too. Zhang et al. find that
# it hardly does, but for the critical batch and with the learning rate tuned for each batch. Here
# one rate serves all batches.
#
# Two checks do not hold. Within the sizes R^2 is just short of the threshold, because one exponent
# does not fit all sizes: b is 5.0 at the smallest and 1.8 at the middle one. The noise of single
# seeds is not the reason: with the losses averaged first R^2 is 0.76 (exercise 3). The last check
# fails because the size matters, in the opposite direction. The figure even understates that: in
# six of nine cases the largest model is best with one sequence per update, the smallest batch there
# is, and such a case gives no point.
#
# The learning rate is a part of the answer. The best of the three rates is the lowest, so a still
# lower one may be better. With the higher rates the smallest model wants larger batches: 1,024
# tokens instead of 512 (last panel). The trials that sized this lab, with another seed, had the
# paper's rate, 0.01: after 0.3M tokens widths 32 and 128 both wanted about 450 tokens. So the
# batches began at 256. The first seed then was often best there, and 128 was added. The checks
# stayed as they were.
#
# Exercises
# 1. --rates=0.01 --batches=2,4,8,16 trains with the paper's rate (25 minutes on one core). Does the
#    size still matter? What does that say about a line over sizes that have one rate in common?
# 2. `DECAY_SHARE`: 0, which leaves one update of decay. Which batches lose most, and why?
# 3. `best_batches`: average the losses of the seeds before the parabola. How far does R^2 rise?

@exits_cleanly
def main(argv):
    quick = dict(widths=(16, 32), batches=(1, 2, 4), rates=(0.01, 0.02), seeds=(0,),
                 lengths=(2048, 4096), eval_tokens=2048)
    runs.main("batch_size", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
