"""Lab: a learning rate found on a small model is the right one for a large model (paper sections 3.1 and 3.3, figures 3 and 14).

Question    The best learning rate of the 2.4B model can't be searched for: one run is the budget. Can a model of seconds tell it?
Claim       Under muP the best rate is the same at every size: about 0.01 from 0.04B to 2.1B parameters. So are the other constants
            (scale_emb, scale_depth, init_std), which the paper found once, on a model of 0.009B.
Write down  before you run it: with one rate for all parameters (no muP), does the best one go up or down as the model gets wider? By
            labs/mup_coordinates.py an update by Adam moves the output of a matrix with the first power of the width: how far then?
Command     python -m labs.lr_transfer          about 16 minutes on two cores; --quick=True: seconds, to see that it works

Loss over learning rate, in steps of a factor of 2, for four widths under muP, for the same widths without it, and for three depths. Where
a curve is lowest and beside that the runs are repeated with other seeds. Then a random search at the smallest width, and a test of what it
found at the largest.
"""
# %%
import math
from dataclasses import dataclass

import numpy as np

from configurator import exits_cleanly
from engine.run import NonFinite
from labs import runs
from labs.runs import Check

PAPER = {"learning_rate": 0.01, "scale_emb": 12.0, "scale_depth": 1.4, "init_std": 0.1}          # config/lab.py's too
DEPTH = 4                               # blocks, where the width is what changes
FINALISTS = 3                           # of the search: they run with the other seeds too


@dataclass
class Settings:
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (2, 4, 8)         # at the smallest width
    rates: tuple[float, ...] = (0.0025, 0.005, 0.01, 0.02, 0.04)
    control_rates: tuple[float, ...] = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
    seeds: tuple[int, ...] = (0, 1, 2)          # the first one everywhere, the others around the lowest point of a curve
    trials: int = 20                            # of the search
    steps: int = 200                            # updates of a run
    eval_tokens: int = 65536                    # held-out bytes

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be above 0" for name in ("trials", "steps", "eval_tokens") if getattr(self, name) < 1]


# %% The experiment: curves first, seeds where they are lowest, then the search

def final_loss(width, depth, seed, mup, steps, eval_tokens, **constants):
    """{"loss": held-out nats per byte of a run, None where it diverged}"""
    _, updates, validate = runs.begin(
        "config/lab.py", n_embd=width, n_head=max(1, width // 32), n_ff=width * 5 // 2, n_layer=depth, seed=seed, mup=mup,
        max_steps=steps, warmup_steps=steps // 10, eval_tokens=eval_tokens, **constants)
    try:
        for _ in updates:
            pass
    except NonFinite:
        return {"loss": None}
    return {"loss": validate()["val_loss"]}


def mean(losses):
    """Of {seed: loss}; a run that diverged is the worst there is."""
    return math.inf if None in losses.values() else float(np.mean(list(losses.values())))


def spread(losses):
    return math.inf if None in losses.values() else max(losses.values()) - min(losses.values())


def best_rate(curve):
    """The rate of the least mean loss among those that ran with the most seeds. curve: {rate: {seed: loss}}"""
    most = max(map(len, curve.values()))
    return min((rate for rate in sorted(curve) if len(curve[rate]) == most), key=lambda rate: mean(curve[rate]))


def beside(rate, rates):
    """The rate and its neighbours."""
    i = rates.index(rate)
    return rates[max(0, i - 1):i + 2]


def draws(trials):
    """Random constants, evenly in logarithms, up to a factor of 4 from the paper's."""
    rng = np.random.default_rng(0)
    return [{name: float(f"{value * 4 ** rng.uniform(-1, 1):.3g}") for name, value in PAPER.items()} for _ in range(trials)]


def experiment(settings, config):
    """((curves, trials), stale)

    curves  {(kind, size): {rate: {seed: loss}}}, kind "muP", "control" or "depth"
    trials  [(constants, {width: {seed: loss}})], the best first, which alone ran at the largest width, then the paper's constants last
    """
    runs.prepare(config)
    shape = {"muP": lambda size: (size, DEPTH, True), "control": lambda size: (size, DEPTH, False),
             "depth": lambda size: (settings.widths[0], size, True)}
    stale = []

    def losses(wanted):
        """Of [(width, depth, mup, seed, constants), ...]"""
        jobs = [dict(width=width, depth=depth, seed=seed, mup=mup, steps=settings.steps, eval_tokens=settings.eval_tokens, **constants)
                for width, depth, mup, seed, constants in wanted]
        results, old = runs.collect("lr_transfer", final_loss, jobs, config)
        stale.append(old)
        return [result["loss"] for result in results]

    rates = {"muP": settings.rates, "control": settings.control_rates, "depth": settings.rates}
    curves = {(kind, size): {rate: {} for rate in rates[kind]} for kind in rates
              for size in (settings.depths if kind == "depth" else settings.widths)}
    wanted = [(*of, rate, settings.seeds[0]) for of, curve in curves.items() for rate in curve]
    while wanted:                                                        # again where the mean over seeds is lowest elsewhere
        for (kind, size, rate, seed), loss in zip(wanted, losses([(*shape[kind](size), seed, {"learning_rate": rate})
                                                                  for kind, size, rate, seed in wanted])):
            curves[kind, size][rate][seed] = loss
        wanted = [(*of, rate, seed) for of, curve in curves.items() for rate in beside(best_rate(curve), rates[of[0]])
                  for seed in settings.seeds if seed not in curve[rate]]

    def over(seeds, width, several):
        """[{seed: loss}] of several sets of constants."""
        flat = iter(losses([(width, DEPTH, True, seed, constants) for constants in several for seed in seeds]))
        return [{seed: next(flat) for seed in seeds} for _ in several]

    small, large, found = settings.widths[0], settings.widths[-1], draws(settings.trials)
    trials = sorted(zip(found, over(settings.seeds[:1], small, found)), key=lambda trial: mean(trial[1]))
    finalists = [constants for constants, _ in trials[:FINALISTS]]
    trials[:FINALISTS] = sorted(zip(finalists, over(settings.seeds, small, finalists)), key=lambda trial: mean(trial[1]))
    trials = [(constants, {small: results}) for constants, results in trials]
    trials.append(({"learning_rate": PAPER["learning_rate"]}, {}))       # the rest of config/lab.py is the paper's
    for width in (small, large):
        for at, results in zip((0, -1), over(settings.seeds, width, (trials[0][0], trials[-1][0]))):
            trials[at][1][width] = results
    return (curves, trials), any(stale)


# %% The figure

def draw(results, settings, path, stale):
    curves, trials = results
    figure, axes = runs.figure(2, 2, f"held-out loss after {settings.steps} updates", stale, width=5, height=3.8)
    titles = {"muP": "muP: widths", "control": "one rate, one init, no scalings: widths", "depth": f"muP: layers, at width {settings.widths[0]}"}
    ticks = {}
    for ax, kind in zip(axes.flat, titles):
        for style, ((_, size), curve) in zip(runs.STYLES, ((of, curve) for of, curve in curves.items() if of[0] == kind)):
            shown = [rate for rate in curve if math.isfinite(mean(curve[rate]))]
            middle = np.array([mean(curve[rate]) for rate in shown])
            off = [middle - [min(curve[rate].values()) for rate in shown], [max(curve[rate].values()) for rate in shown] - middle]
            ax.errorbar(shown, middle, off, label=f"{size}", capsize=3, markersize=5, **style)
            ax.plot(best_rate(curve), mean(curve[best_rate(curve)]), "o", markersize=13, markerfacecolor="none", color=style["color"])
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per byte)", title=titles[kind])
        ticks[kind] = sorted(curve)
        ax.legend(fontsize=8, title="ring: lowest; bars: seeds", title_fontsize=7)

    ax, small, large = axes[1, 1], settings.widths[0], settings.widths[-1]
    tried = [(constants["learning_rate"], mean(results[small])) for constants, results in trials[:-1] if math.isfinite(mean(results[small]))]
    ax.plot(*zip(*tried), "o", color="0.6", label=f"random constants, width {small}")
    for marker, name, (constants, results) in (("*", "found", trials[0]), ("s", "paper's", trials[-1])):
        for width, face in ((small, "black"), (large, "white")):
            ax.plot(constants["learning_rate"], mean(results[width]), marker, color="black", markerfacecolor=face, markersize=10,
                    label=f"{name} constants, width {width}")
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per byte)", title="search over four constants")
    ax.legend(fontsize=7)
    for ax, marked in zip(axes.flat, (*ticks.values(), settings.rates)):
        ax.set_xticks([], minor=True)
        ax.set_xticks(marked, [f"{rate:g}" for rate in marked])
        ax.axvline(PAPER["learning_rate"], color="0.5", linewidth=1, linestyle=":")
        ax.annotate("paper", (PAPER["learning_rate"], 0.01), xycoords=("data", "axes fraction"), fontsize=7, color="0.3")
    figure.savefig(path, dpi=110)


# %% The checks

def checks(results, settings):
    curves, trials = results
    small, large = settings.widths[0], settings.widths[-1]
    best = {of: best_rate(curve) for of, curve in curves.items()}
    listed = lambda kind: ", ".join(f"{rate:g} at {size}" for (k, size), rate in best.items() if k == kind)          # noqa: E731

    def within_one_step(kind):
        """A lowest point at the end of its curve is none."""
        found = [rate for (k, _), rate in best.items() if k == kind]
        return max(found) <= 2.01 * min(found) and not {settings.rates[0], settings.rates[-1]}.intersection(found)

    def reuse(kind):
        """(What the smallest width's best rate costs at the largest, the spread over seeds there), in nats per byte."""
        curve = curves[kind, large]
        reused, own = curve[best[kind, small]], curve[best[kind, large]]
        both = sorted(reused.keys() & own.keys())
        return mean({s: reused[s] for s in both}) - mean({s: own[s] for s in both}), spread(own)

    cost, control_cost = reuse("muP"), reuse("control")
    (constants, found), (_, default) = trials[0], trials[-1]
    gain = {width: mean(default[width]) - mean(found[width]) for width in (small, large)}
    noise = max(spread(found[large]), spread(default[large]))
    return [
        Check("muP: the best learning rate stays within a factor of 2 over widths", listed("muP"), "0.01 at every size", within_one_step("muP")),
        Check("muP: and over depths", listed("depth"), "0.01 at every size", within_one_step("depth")),
        Check("without muP it falls as the width grows, by a factor of 4 or more", listed("control"), "-",
              best["control", small] >= 3.99 * best["control", large]),
        Check(f"the best rate of width {small} used at {large}: costs nothing under muP (within the seeds' spread), and something without",
              f"{cost[0]:.3f} (spread {cost[1]:.3f}) and {control_cost[0]:.3f} (spread {control_cost[1]:.3f}) nats", "-",
              cost[0] <= cost[1] and control_cost[0] > control_cost[1]),
        Check(f"constants found at width {small} hold at {large}: not worse than the paper's there, within the seeds' spread",
              ", ".join(f"{name} {value:g}" for name, value in constants.items())
              + f": better by {gain[small]:.3f} at {small}, by {gain[large]:.3f} (spread {noise:.3f}) at {large}",
              ", ".join(f"{name} {value:g}" for name, value in PAPER.items()), gain[large] >= -noise),
    ]


# %% What it means: figure 3's models are up to 10 times apart in parameters, and a test at 2.1B, far beyond, found 0.01 again. The 2.4B
# model's matrices then learn with 0.01 / 9. Without muP the search would have to be made at the full size, or its drift be fitted over sizes
# and trusted beyond them.
#
# The last check does not hold: a few random draws in four dimensions find nothing as good as the paper's constants, which come from a
# Bayesian search. But the small width says so as well: the best draw loses there by nearly as much as at the large one. So what the small width
# says does hold at the large; what fails is the search, and a longer one costs seconds a run.
#
# Exercises
# 1. `mup=mup`: add `mup_lr=False`, muP's init and scalings with one rate for all. Over which widths does the best rate still hold?
# 2. `warmup_steps=steps // 10`: none at all. Which end of the curves changes, and does the lowest point move?
# 3. `4 ** rng.uniform(-1, 1)`: draw up to a factor of 2 from the paper's, or take --trials=100. Does the last check hold then?

@exits_cleanly
def main(argv):
    quick = dict(widths=(32, 64), depths=(2,), rates=(0.005, 0.01), control_rates=(0.002,), seeds=(0, 1), trials=2, steps=2,
                 eval_tokens=2048)
    settings, config = runs.settings(argv, Settings, quick, __doc__)
    results, stale = experiment(settings, config)
    draw(results, settings, runs.path("lr_transfer", "figures", config), stale)
    runs.report(checks(results, settings), stale)


if __name__ == "__main__":
    main()
