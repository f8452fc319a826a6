"""Lab: one stable run and short decays, or a cosine for every length (paper section 4, figures 4-6)

Question    A cosine schedule has to know its length before the run starts. Can one run at a
            constant learning rate replace cosine runs of all lengths?
Claim       A cosine is best if it ends where the run ends (T = S): shorter and longer ones are
            worse there, and so is one that rises again. A stable run (the trunk) that decays at its
            end is as good: the loss drops sharply in the decay, about 10 % of the tokens are
            enough, and 2.5 % are not. The trunk then continues, so m lengths cost about one run.
Write down  before you run it: for the lengths 1, 2, 3 and 4, what do four cosine runs cost, and
            what does one trunk with four decays of 10 %? If the weights of the trunk's last
            checkpoints are averaged instead, how much of the drop does that give?
Command     python -m labs.wsd_vs_cosine        ten minutes on two cores; --quick=True: seconds

The trunk is a run that train.py continues, each time with a larger --max_steps. From its
checkpoints decays branch (--branch_from) with its weights, optimizer state and position in the
data. All runs of a seed start with the same weights and read the same text in the same order.
"""
# %%
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from configurator import exits_cleanly
from engine import checkpoint, metrics
from engine.device import pick_dtype
from labs import runs
from labs.runs import Check
from wsd import DECAYS

MARGIN = 0.01                   # nats per byte by which runs with the same settings may differ


@dataclass
class Settings:
    width: int = 64
    horizons: tuple[int, ...] = (240, 480, 720, 960)        # updates; S in the paper
    shares: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)     # of a horizon, spent decaying
    forms: tuple[str, ...] = DECAYS                         # all only at the last horizon
    seeds: tuple[int, ...] = (0, 1, 2)
    every: int = 48                                         # updates between evaluations
    warmup: int = 24                                        # updates
    batch_size: int = 16
    block_size: int = 128
    eval_tokens: int = 65536

    def problems(self):
        out = []
        if len(self.horizons) < 2 or list(self.horizons) != sorted(set(self.horizons)):
            out.append(f"--horizons={self.horizons}: must be two or more, ascending")
        ascending = list(self.shares) == sorted(set(self.shares))
        if not ascending or not all(0 < share < 1 for share in self.shares):
            out.append(f"--shares={self.shares}: must be ascending, above 0 and below 1")
        if set(self.forms) - set(DECAYS):
            out.append(f"--forms={self.forms}: must be of {', '.join(DECAYS)}")
        return out

    @property
    def share(self):            # the paper's 10 %, if among the shares
        return 0.1 if 0.1 in self.shares else self.shares[-1]

    def common(self, seed):
        """Return the options of train.py that all runs of a seed share."""
        return dict(**runs.shape(self.width), seed=seed, warmup_steps=self.warmup,
                    batch_size=self.batch_size, block_size=self.block_size,
                    eval_tokens=self.eval_tokens)


# %% The experiment: the trunk of a seed with its branches

def trunk_and_decays(common, horizons, shares, forms, every):
    """Train the trunk of a seed and its decays, and average the trunk's checkpoints.

    returns  {"trunk": [[step, val_loss], ...], "averaged": [[horizon, val_loss], ...],
              "decays": [{"horizon", "share", "form", "curve": [[step, val_loss], ...]}, ...]}
    """
    folder = Path(runs.folder("wsd_vs_cosine", [common, horizons, shares, forms, every]))
    trunk = folder / "trunk"
    starts = {horizon: [branch_point(horizon, share) for share in shares] for horizon in horizons}
    for stop in sorted({*horizons, *sum(starts.values(), [])}):
        if not step_of(trunk, stop).exists():
            train_until(stop, trunk, "config/lab.py", *runs.options(
                decay_steps=0, max_steps=stop, eval_interval=every, **common))
    decays, averaged = [], []
    for horizon in horizons:
        for form in forms if horizon == horizons[-1] else forms[:1]:
            for share, start in zip(shares, starts[horizon]):
                length = horizon - start
                out_dir = folder / f"decay-{horizon}-{share}-{form}"
                curve = train_until(horizon, out_dir, *runs.options(
                    branch_from=step_of(trunk, start), decay=form, decay_steps=length,
                    eval_interval=max(1, length // 4)))
                decays.append({"horizon": horizon, "share": share, "form": form, "curve": curve})
        steps = sorted({*starts[horizon], horizon})
        averaged.append([horizon, loss_of_mean([step_of(trunk, step) for step in steps], common)])
    result = {"trunk": val_losses(trunk), "decays": decays, "averaged": averaged}
    shutil.rmtree(folder)
    return result


def branch_point(horizon, share):
    """Return the update after which a decay begins."""
    return horizon - max(1, round(share * horizon))


def step_of(trunk, step):
    return trunk / f"step-{step:08d}"


def val_losses(out_dir):
    """Return [[step, val_loss], ...] of a run folder."""
    return sorted({line["step"]: line["val_loss"] for line in metrics.read(out_dir)[1]}.items())


def train_until(end, out_dir, *arguments):
    """Train a run until step `end`, unless it is there already, and return its val_losses."""
    if end not in dict(val_losses(out_dir)):
        train.main([*arguments, f"--out_dir={out_dir}", "--quiet=True"])
    curve = val_losses(out_dir)
    if end not in dict(curve):                  # after Ctrl-C train.py saves and returns
        raise KeyboardInterrupt
    return curve


def loss_of_mean(folders, common):
    """Return the held-out loss of the mean of several checkpoints' weights."""
    model, _, validate = runs.begin("config/lab.py", **common)
    model.numerics.dtype = pick_dtype("auto", torch.device("cpu"))      # as train.py evaluates
    weights = [dict(checkpoint.read_weights(folder, torch.float32)) for folder in folders]
    model.load_state_dict({name: torch.stack([each[name] for each in weights]).mean(0)
                           for name in weights[0]})
    return validate()["val_loss"]


# %% Cosines that end at T, evaluated until the last horizon: T > S before T, and T < S after it

def cosine(common, T, loop, horizons, every):
    """Return [[step, val_loss], ...]; loop: the learning rate rises again after T."""
    model, updates, validate = runs.begin(
        "config/lab.py", **common, schedule="cosine_loop" if loop else "cosine", cosine_period=T,
        max_steps=horizons[-1])
    rows = []
    for update in updates:
        if update.step % every == 0 or update.step in horizons:
            rows.append([update.step, validate()["val_loss"]])
            model.train()
    return rows


def over_seeds(curves):
    """Return {step: losses (seeds,)} of one [[step, loss], ...] per seed."""
    return {step: np.array([dict(curve)[step] for curve in curves]) for step, _ in curves[0]}


def experiment(settings, config):
    """Return (found, stale). found holds curves, {step: losses (seeds,)}:

    "trunk" and "averaged" (over the horizons), "decays": {(horizon, share, form): curve},
    "cosines": {(T, loop): curve}
    """
    runs.prepare(config)
    s = settings
    trunks, stale = runs.collect("wsd_vs_cosine", trunk_and_decays, [
        dict(common=s.common(seed), horizons=s.horizons, shares=s.shares, forms=s.forms,
             every=s.every) for seed in s.seeds], config)
    found = {name: over_seeds([trunk[name] for trunk in trunks]) for name in ("trunk", "averaged")}
    found |= {"decays": {}, "cosines": {}}
    for same in zip(*(trunk["decays"] for trunk in trunks)):        # the same decay of each seed
        name = same[0]["horizon"], same[0]["share"], same[0]["form"]
        found["decays"][name] = over_seeds([decay["curve"] for decay in same])
    names = [*((T, False) for T in s.horizons), (s.horizons[0], True)]
    cosines, old = runs.collect("wsd_vs_cosine", cosine, [
        dict(common=s.common(seed), T=T, loop=loop, horizons=s.horizons, every=s.every)
        for T, loop in names for seed in s.seeds], config)
    for i, name in enumerate(names):
        found["cosines"][name] = over_seeds(cosines[i * len(s.seeds):(i + 1) * len(s.seeds)])
    return found, stale or old


# %% What the figure and the checks compare

def decay_ends(found, share, form):
    """Return {horizon: losses (seeds,)} at the ends of decays."""
    return {horizon: curve[horizon] for (horizon, *name), curve in found["decays"].items()
            if name == [share, form]}


def cosine_ends(found):
    """Return {T: losses (seeds,)} of the cosines at T = S."""
    return {T: curve[T] for (T, loop), curve in found["cosines"].items() if not loop}


def differences(a, b):
    """Return {x: a - b} of two curves, where both are known."""
    return {x: a[x] - b[x] for x in a if x in b}


def updates_spent(settings, share):
    """Return the updates for results at the first 1, 2, ... horizons: (of WSD, of cosines)."""
    starts = np.array([branch_point(horizon, share) for horizon in settings.horizons])
    return starts + np.cumsum(settings.horizons - starts), np.cumsum(settings.horizons)


# %% The figure

def draw(found, settings):
    horizons, share, form = settings.horizons, settings.share, settings.forms[0]
    last, million = horizons[-1], settings.batch_size * settings.block_size / 1e6
    trunk, cosines = found["trunk"], cosine_ends(found)
    first, second, third, *_ = runs.STYLES
    figure, axes = runs.figure(2, 3, f"WSD and cosine, width {settings.width}, mean and range of "
                                     f"{len(settings.seeds)} seeds")
    for ax in axes.flat[:5]:
        ax.set(xlabel="million tokens", ylabel="held-out loss (nats per byte)")

    ax = axes[0, 0]
    plot(ax, trunk, million, first, label="trunk", marker="")
    for horizon in horizons:
        start = branch_point(horizon, share)
        decay = {start: trunk[start], **found["decays"][horizon, share, form]}
        plot(ax, decay, million, second, markersize=3,
             label=f"decays of {share:.0%}" if horizon == last else None)
    plot(ax, cosines, million, third, label="cosines at T = S", linestyle="")
    ax.set(title="figure 5: the drop")

    ax = axes[0, 1]
    for style, ((T, loop), curve) in zip(runs.STYLES, found["cosines"].items()):
        label = f"{'loop' if loop else 'cosine'}, T = {T * million:.2g}M"
        plot(ax, curve, million, style, label=label, marker="")
        ax.plot(T * million, curve[T].mean(), "o", color=style["color"], fillstyle="none")
    ax.set(title="figure 4: cosines (ring: T = S)")
    for ax in axes[0, :2]:
        ax.set(ylim=(None, trunk[horizons[0]].max() + 0.1))

    ax = axes[0, 2]
    for style, each in zip(runs.STYLES, settings.shares):
        plot(ax, differences(decay_ends(found, each, form), cosines), million, style,
             label=f"decay of {each:.1%}")
    ax.axhspan(-MARGIN, MARGIN, color="0.85", zorder=0, label="noise, set beforehand")
    ax.set(title="WSD minus cosine at T = S", ylabel="loss difference (nats per byte)")

    ax = axes[1, 0]
    for style, each in zip(runs.STYLES, settings.forms):
        ends = {100 * part: decay_ends(found, part, each)[last] for part in settings.shares}
        plot(ax, ends, 1, style, label=each)
    ax.axhline(cosines[last].mean(), color="0.4", linestyle=":", label="cosine at T = S")
    ax.set(title=f"share and form, S = {last * million:.2g}M tokens",
           xlabel="decay, % of the run (paper: 10)")

    ax, longest = axes[1, 1], settings.shares[-1]
    curves = {"trunk": {horizon: trunk[horizon] for horizon in horizons},
              "trunk, weights averaged": found["averaged"],
              f"decay of {longest:.0%}": decay_ends(found, longest, form)}
    for style, (label, curve) in zip(runs.STYLES, curves.items()):
        plot(ax, curve, million, style, label=label)
    ax.set(title="averaging and decaying")

    ax, lengths = axes[1, 2], range(1, len(horizons) + 1)
    labels = f"trunk and decays of {share:.0%}", "a cosine for each"
    for style, label, spent in zip(runs.STYLES, labels, updates_spent(settings, share)):
        ax.plot(lengths, spent * million, **style, label=label)
    ax.set(title="cost", xlabel="number of lengths", ylabel="million tokens trained on",
           xticks=lengths)
    return figure


def plot(ax, curve, scale, style, **more):
    """Plot a curve {x: losses (seeds,)} over scale * x, with the range of the seeds."""
    x = [scale * each for each in curve]
    runs.curve(ax, x, np.array(list(curve.values())).T, style, **more)


# %% The checks. Their thresholds were set before the runs

def checks(found, settings):
    horizons, share, form = settings.horizons, settings.share, settings.forms[0]
    last, shortest, longest = horizons[-1], settings.shares[0], settings.shares[-1]
    trunk, cosines = found["trunk"], cosine_ends(found)
    decays = {each: decay_ends(found, each, form) for each in settings.shares}
    drop = max(differences(decays[share], trunk).values(), key=np.mean)
    against, worst = {}, {}                     # the cosine with T = S, of two shares
    for each in (share, longest):
        lost = differences(decays[each], cosines).values()
        worst[each] = max(lost, key=np.mean)
        against[each] = (", ".join(f"{x.mean():+.3f}" for x in lost)
                         + f" nats; worst {runs.mean_and_range(worst[each], '+.3f')}")
    million = settings.batch_size * settings.block_size / 1e6
    wsd, separate = (spent[-1] * million for spent in updates_spent(settings, longest))
    short = decays[shortest][last] - decays[share][last]
    rivals = {(T, end): found["cosines"][T, False][end] - cosines[end]
              for T in horizons for end in horizons if T != end}
    T, end = min(rivals, key=lambda name: rivals[name].mean())
    loop = differences(found["cosines"][horizons[0], True], cosines)
    loop = min((loop[T] for T in horizons[1:]), key=np.mean)
    by_form = [decay_ends(found, share, each)[last].mean() for each in settings.forms]
    forms_differ, dropped = max(by_form) - min(by_form), (trunk[last] - decays[share][last]).mean()
    averaged, decayed = ((trunk[last] - losses).mean()
                         for losses in (found["averaged"][last], decays[longest][last]))
    return [
        Check(f"the loss drops sharply in a decay of {share:.0%}",
              f"at least {-drop.mean():.3f} nats below the trunk at every horizon", "-",
              drop.mean() < -0.05),
        Check(f"a decay of {longest:.0%} is at no horizon worse than the cosine with T = S "
              f"(margin {MARGIN})",
              f"{against[longest]}; {len(horizons)} lengths for {wsd:.1f}M tokens, not "
              f"{separate:.1f}M", "-", worst[longest].mean() <= MARGIN),
        Check(f"a decay of {share:.0%} is enough for that", against[share], "10 %",
              worst[share].mean() <= MARGIN),
        Check(f"a decay of {shortest:.1%} falls short",
              f"{runs.mean_and_range(short, '+.3f')} nats from {share:.0%}, at the last horizon",
              "2.5 %", short.mean() > MARGIN),
        Check(f"a cosine is best at its own end (margin {MARGIN})",
              f"closest at S = {end}: T = {T} with "
              f"{runs.mean_and_range(rivals[T, end], '+.3f')} nats", "T = S",
              rivals[T, end].mean() >= -MARGIN),
        Check("a cosine that rises again is worse than the cosine with T = S",
              f"{runs.mean_and_range(loop, '+.3f')} nats where it is closest", "worse",
              loop.mean() > 0),
        Check("the form of the decay matters less than the decay",
              f"forms differ by {forms_differ:.3f} nats at {share:.0%}, the drop is {dropped:.3f}",
              "-", forms_differ < dropped / 2),
        Check("averaging the trunk's weights gives a part of what decaying gives",
              f"{averaged:.3f} of {decayed:.3f} nats", "-", 0 < averaged < decayed),
    ]


# %% What it means: the 2.4B model made 261,000 updates at its peak rate and decayed in 18,500 more,
# a share of 6.6 %. Each checkpoint of the 261,000 could have been the start of a decay, and still
# is the start of a longer run. So scaling laws are measured with one run per size
# (labs/scaling_law.py), and new data are tried in a decay (labs/annealing.py). A cosine run has one
# length, and its cost is spent. How long a decay must be is another question: this model has seen
# about ten tokens per parameter at its last horizon, the paper's models at least twenty. So look at
# the figure here before you adopt the 10 %.
#
# One check does not hold: at the first horizon, cosines of twice the length and more are ahead of
# the one that ends there. After 240 updates the model has hardly begun, and a rate that stays high
# is worth more than a falling one; from the second horizon on none is ahead by more than 0.007.
#
# Exercises
# 1. `steps = sorted(...)` in trunk_and_decays: average the last two checkpoints only, or all from
#    the first. When does averaging hurt?
# 2. `shares`: add 0.4 and 0.8. From which share on does a longer decay no longer help, and why must
#    there be one?
# 3. `decay=form`: add min_lr=0 for the forms that can reach it (not the exponential one). Is the
#    floor worth having?

@exits_cleanly
def main(argv):
    quick = dict(width=32, horizons=(8, 16), shares=(0.2,), forms=DECAYS[:2], seeds=(0,), every=8,
                 warmup=2, batch_size=4, block_size=32, eval_tokens=2048)
    runs.main("wsd_vs_cosine", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
