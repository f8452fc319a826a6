"""Lab: experts from a dense model (paper section 7.3, sparse upcycling).

Question    A dense model is there, and more compute. Train it on, turn its feed-forwards into experts, or start experts from nothing?
Claim       Upcycled experts compute what the dense model computed, at step 0. Trained on, they part ways, and the model passes the dense
            one on the same tokens. The balance loss keeps all experts at work.
Write down  before you run it: at first, will the experts be ahead of the dense model that goes on, level, or behind? Each token goes through
            two experts of eight: how much more does a token cost, and does that pay against a dense model that is given the same FLOPs?
            And against experts that start from nothing, with the FLOPs of the dense model's training for themselves?
Command     python -m labs.upcycling    about 15 minutes on two cores; --quick=True: seconds, to see that it works

From a stable trunk of each seed, with new optimizers and the corpus in a new order, WSD with the last fifth decaying: the dense model on as
many tokens as the experts and on as many FLOPs (one run, and a decay that leaves it earlier), and the upcycled model. Beside them experts
drawn at random, on as many FLOPs as the trunk and the upcycled model together.
"""
# %%
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from configurator import exits_cleanly
from engine import checkpoint, metrics
from family import upcycle
from labs import runs
from labs.runs import Check
from model import MiniCPM

NAMES = {"dense": "dense, as many tokens", "longer": "dense, as many FLOPs", "experts": "experts, upcycled", "scratch": "experts, from scratch"}


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64
    experts: int = 8            # the paper's; two a token
    trunk_steps: int = 1000     # of the dense model
    steps: int = 1500           # after it; a multiple of 15, at which it is evaluated
    eval_tokens: int = 65536

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be a multiple of {unit}" for name, unit in (("width", 32), ("steps", 15))
                if getattr(self, name) < 1 or getattr(self, name) % unit]


# %% The experiment

@torch.no_grad()
def largest_difference(one, other):
    """Between the losses that two models give to a byte, nats; on random bytes, which no model finds likely."""
    text = torch.randint(256, (8, 129), generator=torch.Generator().manual_seed(0))
    nll = [MiniCPM.from_pretrained(folder).eval()(text[:, :-1].contiguous(), text[:, 1:].contiguous())[0] for folder in (one, other)]
    return (nll[0] - nll[1]).abs().max().item()


def family(seed, width, experts, trunk_steps, steps, eval_tokens):
    """One seed's trunk and what is made of it: evaluations, the experts' load, FLOPs a token; None where a run diverged."""
    job = dict(seed=seed, width=width, experts=experts, trunk_steps=trunk_steps, steps=steps, eval_tokens=eval_tokens)
    folder = Path(runs.folder("upcycling", job))
    place = {name: folder / name for name in ("trunk", "start", *NAMES)}
    shape = dict(n_embd=width, n_head=width // 32, n_ff=width * 5 // 2)
    every = dict(eval_tokens=eval_tokens, eval_interval=steps // 15, log_interval=max(1, steps // 150))
    if not runs.finish(train.main, "config/lab.py", out_dir=place["trunk"], seed=seed, max_steps=trunk_steps, decay_steps=0, **shape, **every):
        return None
    if not checkpoint.checkpoints(place["start"]):
        upcycle.upcycle(upcycle.UpcycleConfig(ckpt=str(place["trunk"]), out=str(place["start"]), num_experts=experts, seed=seed,
                                              overwrite=True))          # what an interrupted one left
    dense, sparse = (MiniCPM.from_pretrained(place[name]).config for name in ("trunk", "start"))
    flops = [config.flops_per_token(128) for config in (dense, sparse)]
    longer, leave = round(steps * flops[1] / flops[0]), steps - steps // 5          # updates of the longer run; where the shorter decay leaves it
    new = dict(seed=seed + 100, **shape, **every)                        # and with the seed the order of the data
    if not (runs.finish(train.main, "config/lab.py", init_from=place["trunk"], out_dir=place["longer"], max_steps=longer, save_interval=leave,
                        keep_every=leave, **new)
            and runs.finish(train.main, branch_from=place["longer"] / f"step-{leave:08d}", out_dir=place["dense"], decay_steps=steps - leave)
            and runs.finish(train.main, "config/lab.py", init_from=place["start"], out_dir=place["experts"], max_steps=steps, **new)
            and runs.finish(train.main, "config/lab.py", out_dir=place["scratch"], max_steps=steps + round(trunk_steps * flops[0] / flops[1]),
                            num_experts=experts, **new)):
        return None
    lines = {name: metrics.read(place[name]) for name in ("trunk", *NAMES)}
    curves = {name: [[line["step"], line["val_loss"]] for line in held_out] for name, (_, held_out) in lines.items()}
    curves["dense"] = [point for point in curves["longer"] if point[0] <= leave] + curves["dense"]
    loads = {name: [np.mean(part, 0).round(4).tolist() for part in np.array_split([line["expert_load"] for line in lines[name][0]], 15)]
             for name in ("experts", "scratch")}                        # (15, layers, experts)
    result = {"equal": largest_difference(place["trunk"], place["start"]), "flops": flops, "curves": curves, "loads": loads,
              "tokens": lines["trunk"][0][-1]["tokens"] // trunk_steps}
    shutil.rmtree(folder)
    return result


def experiment(settings, config):
    """([result of each seed, None where one diverged], stale)"""
    runs.prepare(config)
    return runs.collect("upcycling", family, [dict(seed=seed, width=settings.width, experts=settings.experts, trunk_steps=settings.trunk_steps,
                                                   steps=settings.steps, eval_tokens=settings.eval_tokens) for seed in settings.seeds], config)


def losses(results, name):
    """(seeds, evaluations) nats a byte."""
    return np.array([[loss for _, loss in result["curves"][name]] for result in results])


def ahead_from(results):
    """Update from which on the experts are ahead of the dense model, in the mean over seeds; None where they end behind it."""
    behind = losses(results, "experts").mean(0) >= losses(results, "dense").mean(0)
    first = int(np.flatnonzero(behind)[-1]) + 1 if behind.any() else 0
    return results[0]["curves"]["experts"][first][0] if first < len(behind) else None


# %% The figure

def draw(results, settings, path, stale):
    results = [result for result in results if result]
    if not results:
        return
    figure, axes = runs.figure(2, 2, f"a dense model, and {settings.experts} experts made of it, two a token ({len(results)} seeds)", stale, width=5.5)
    axes, tokens, flops = axes.flat, results[0]["tokens"], dict(zip(("dense", "experts"), results[0]["flops"]))
    for style, name in zip(runs.STYLES, NAMES):
        steps = np.array([step for step, _ in results[0]["curves"][name]])
        before = 0 if name == "scratch" else settings.trunk_steps
        cost = flops["dense" if name in ("dense", "longer") else "experts"]
        for ax, x in ((axes[0], (before + steps) * tokens / 1e6), (axes[1], (before * flops["dense"] + steps * cost) * tokens / 1e12)):
            runs.curve(ax, x, losses(results, name), style, label=NAMES[name], markersize=4)
    steps = np.array([step for step, _ in results[0]["curves"]["trunk"]])
    for ax, x in ((axes[0], steps * tokens / 1e6), (axes[1], steps * tokens * flops["dense"] / 1e12)):
        ax.plot(x, losses(results, "trunk").mean(0), color="0.5", label="dense trunk")
        last = losses(results, "scratch").mean(0)
        ax.set(ylabel="held-out nats a byte", ylim=(None, last[len(last) // 5]))
        ax.legend(fontsize=7)
    axes[0].set(title="loss over tokens", xlabel="million tokens, the trunk's included")
    axes[1].set(title="loss over FLOPs", xlabel="TFLOPs, the trunk's included")
    ends = {name: results[0]["curves"][name][-1][0] * (np.arange(15) + 0.5) / 15 for name in ("experts", "scratch")}
    load = np.array(results[0]["loads"]["experts"])[:, -1] * settings.experts            # (15, experts)
    for style, line in zip(itertools.cycle(runs.STYLES), load.T):
        axes[2].plot(ends["experts"], line, markersize=4, **style)
    axes[2].set(title="upcycled: load of the last layer's experts, seed 0", xlabel="updates", ylabel="share of its fair share")
    for style, name in zip(runs.STYLES, ("experts", "scratch")):
        smallest, largest = (settings.experts * pick(np.array([result["loads"][name] for result in results]), (2, 3)) for pick in (np.min, np.max))
        for line, label in ((smallest, f"{NAMES[name]}: smallest"), (largest, f"{NAMES[name]}: largest")):      # (seeds, 15)
            runs.curve(axes[3], ends[name], line, style, label=label, markersize=4, markerfacecolor="white" if line is smallest else style["color"])
    axes[3].set(title="smallest and largest load in all layers", xlabel="updates", ylabel="share of its fair share")
    axes[3].legend(fontsize=7)
    for ax in axes[2:]:
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


# %% The checks

def checks(results, settings):
    if None in results:
        return [Check("every run ends", f"{results.count(None)} of {len(results)} seeds diverged", "-", False)]
    end = {name: losses(results, name)[:, -1] for name in NAMES}                         # (seeds,)
    gain = {name: end[name] - end["experts"] for name in NAMES}
    said = lambda name: f"{gain[name].mean():+.3f} nats a byte ({gain[name].min():+.3f} to {gain[name].max():+.3f})"            # noqa: E731
    equal, first = max(result["equal"] for result in results), ahead_from(results)
    idle = min(settings.experts * np.min(result["loads"]["experts"][-1]) for result in results)
    cost = results[0]["flops"][1] / results[0]["flops"][0]
    return [
        Check("upcycled experts compute what the dense model did", f"a byte's loss differs by {equal:.1e} nats at most", "0", equal < 1e-4),
        Check("on the same tokens the experts end ahead of the dense model, at every seed", f"by {said('dense')}; "
              + (f"ahead from update {first} on" if first is not None else "behind at the end"), "-", bool(gain["dense"].min() > 0)),
        Check(f"and ahead of the dense model on as many FLOPs (x {cost:.2f} a token)", f"by {said('longer')}", "-", bool(gain["longer"].min() > 0)),
        Check("experts from scratch get less far on the same FLOPs, the trunk's included, at every seed", f"by {said('scratch')}", "-", bool(gain["scratch"].min() > 0)),
        Check("no expert falls below a quarter of its fair share", f"{idle:.2f} in the last fifteenth", "-", bool(idle >= 0.25)),
    ]


# %% What it means: who has the dense model gets more out of the next FLOPs by making experts of it. The paper makes its 8x2B from the stable
# 2.4B and trains it on for 130 thousand steps; where experts overtake depends on how long the trunk was and how long they are given.
#
# One check does not hold: who has nothing yet should not train a dense model first. With the trunk's FLOPs for themselves, experts from
# scratch end a little ahead, and more evenly used: all eight learn from the first update, where upcycled ones begin as copies of each other.
# The trunk here is a third of all FLOPs; one that cost a trillion tokens is another matter, and it is there already (exercise 1).
#
# Exercises
# 1. `--trunk_steps=4000`, a trunk that was trained for long: how many updates do the experts take now to pass the dense model?
# 2. `std` of upcycle.py's router: make it 0. All experts are then as likely, and the same two win each tie: what does the load do?
# 3. `**new`: add balance_coef=0. How many experts are still at work at the end, and what does it cost in loss?

@exits_cleanly
def main(argv):
    quick = dict(seeds=(0,), width=32, experts=4, trunk_steps=15, steps=30, eval_tokens=1024)
    settings, config = runs.settings(argv, Settings, quick, __doc__)
    results, stale = experiment(settings, config)
    draw(results, settings, runs.path("upcycling", "figures", config), stale)
    runs.report(checks(results, settings), stale)


if __name__ == "__main__":
    main()
