"""Lab: experts from a dense model (paper section 7.3, sparse upcycling).

Question    There is a dense model, and more compute. Should one train it further, turn its
            feed-forwards into experts, or start a model with experts from scratch?
Claim       At step 0 upcycled experts compute what the dense model computes. With training they
            specialise, and the model passes the dense one on the same tokens. The balance loss
            keeps all experts in use.
Write down  before you run it: will the experts at first be ahead of the dense model that trains on,
            level with it, or behind? Each token uses two of eight experts: how much more does a
            token cost, and is that worth it against a dense model that gets the same FLOPs? And
            against experts from scratch that also get the FLOPs of the dense model's training?
Command     python -m labs.upcycling    about 15 minutes on two cores; --quick=True: a few seconds,
                                        to see that it works

From one stable trunk per seed, with a new optimizer and a new order of the corpus, three models
are trained with WSD, the last fifth decaying: the dense model on as many tokens as the experts, the
dense model on as many FLOPs (these two are one run with two decays), and the upcycled model. A
fourth model starts with random experts, and gets the FLOPs of the trunk and of the upcycled model.
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

NAMES = {"trunk": "dense trunk", "dense": "dense, as many tokens", "longer": "dense, as many FLOPs",
         "experts": "experts, upcycled", "scratch": "experts, from scratch"}
PARTS = 15                      # of each run; a model is evaluated at the end of each


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64
    experts: int = 8            # as in the paper; two per token
    trunk_steps: int = 1000     # of the dense model
    steps: int = 1500           # after the trunk; a multiple of 15
    eval_tokens: int = 65536

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be a multiple of {unit}"
                for name, unit in (("width", 32), ("steps", PARTS))
                if getattr(self, name) < 1 or getattr(self, name) % unit]


# %% The experiment

@torch.no_grad()
def largest_difference(one, other):
    """Return the largest difference of two models' losses for a byte, in nats, on random bytes."""
    text = torch.randint(256, (8, 129), generator=torch.Generator().manual_seed(0))
    idx, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    nll, other_nll = (MiniCPM.from_pretrained(folder).eval()(idx, targets)[0]
                      for folder in (one, other))
    return (nll - other_nll).abs().max().item()


def family(seed, width, experts, trunk_steps, steps, eval_tokens):
    """Train one seed's trunk and the models of NAMES; return a dict, or None if a run diverges.

    equal     largest difference of a byte's loss between the trunk and the upcycled model, nats
    flops     per token: [dense, experts]
    tokens    per update
    curves    {model: [[step, held-out loss in nats per byte], ...]}
    loads     {"experts", "scratch": (PARTS, layers, experts) share of the tokens in each part}
    """
    job = dict(seed=seed, width=width, experts=experts, trunk_steps=trunk_steps, steps=steps,
               eval_tokens=eval_tokens)
    folder = Path(runs.folder("upcycling", job))
    trunk, start = folder / "trunk", folder / "start"
    common = dict(n_embd=width, n_head=width // 32, n_ff=width * 5 // 2, eval_tokens=eval_tokens,
                  eval_interval=steps // PARTS, log_interval=max(1, steps // 150))
    if not runs.finish(train.main, "config/lab.py", out_dir=trunk, seed=seed, max_steps=trunk_steps,
                       decay_steps=0, **common):
        return None
    if not checkpoint.checkpoints(start):
        upcycle.upcycle(upcycle.UpcycleConfig(ckpt=str(trunk), out=str(start), num_experts=experts,
                                              seed=seed, overwrite=True))
    flops = [MiniCPM.from_pretrained(ckpt).config.flops_per_token(128) for ckpt in (trunk, start)]
    decay_steps = steps // 5
    branch_at = steps - decay_steps     # the decay of "dense" leaves "longer" at this update
    options = {
        "longer": dict(init_from=trunk, max_steps=round(steps * flops[1] / flops[0]),
                       save_interval=branch_at, keep_every=branch_at),
        "experts": dict(init_from=start, max_steps=steps),
        "scratch": dict(max_steps=steps + round(trunk_steps * flops[0] / flops[1]),
                        num_experts=experts),
    }
    for name in options:
        if not runs.finish(train.main, "config/lab.py", out_dir=folder / name, seed=seed + 100,
                           **options[name], **common):
            return None
    if not runs.finish(train.main, out_dir=folder / "dense", decay_steps=decay_steps,
                       branch_from=folder / "longer" / f"step-{branch_at:08d}"):
        return None
    curves, loads = {}, {}
    for name in NAMES:
        training, held_out = metrics.read(folder / name)
        curves[name] = [[line["step"], line["val_loss"]] for line in held_out]
        if name in ("experts", "scratch"):
            parts = np.array_split([line["expert_load"] for line in training], PARTS)
            loads[name] = [np.mean(part, 0).round(4).tolist() for part in parts]
    before_branch = [[step, loss] for step, loss in curves["longer"] if step <= branch_at]
    curves["dense"] = before_branch + curves["dense"]
    result = {"equal": largest_difference(trunk, start), "flops": flops, "curves": curves,
              "loads": loads, "tokens": metrics.read(trunk)[0][-1]["tokens"] // trunk_steps}
    shutil.rmtree(folder)
    return result


def experiment(settings, config):
    """Return ([result of family for each seed], stale)."""
    runs.prepare(config)
    fixed = {name: getattr(settings, name)
             for name in ("width", "experts", "trunk_steps", "steps", "eval_tokens")}
    jobs = [dict(seed=seed, **fixed) for seed in settings.seeds]
    return runs.collect("upcycling", family, jobs, config)


def losses(results, name):
    """Return (seeds, evaluations) of a model's held-out loss in nats per byte."""
    return np.array([[loss for _, loss in result["curves"][name]] for result in results])


def ahead_from(results):
    """Return the update from which the experts stay ahead of the dense model, None if they don't.

    Both are means over the seeds.
    """
    gap = losses(results, "dense").mean(0) - losses(results, "experts").mean(0)
    behind = np.flatnonzero(gap <= 0)
    first = behind[-1] + 1 if len(behind) else 0
    return results[0]["curves"]["experts"][first][0] if first < len(gap) else None


# %% The figure

def draw(results, settings):
    results = [result for result in results if result]
    if not results:
        return
    figure, axes = runs.figure(
        2, 2, f"a dense model, and {settings.experts} experts made from it, two per token "
        f"({len(results)} seeds)", width=6, height=4)
    over_tokens, over_flops, one_layer, load = axes.flat
    million_tokens = results[0]["tokens"] / 1e6
    tflops = np.array(results[0]["flops"]) * million_tokens / 1e6
    for ax, unit, (dense, experts) in (         # the last: per update of either model
            (over_tokens, "tokens (millions)", (million_tokens, million_tokens)),
            (over_flops, "TFLOPs", tflops)):
        for style, name in zip(({"color": "0.5"}, *runs.STYLES), NAMES):
            steps = np.array([step for step, _ in results[0]["curves"][name]])
            before = 0 if name in ("trunk", "scratch") else settings.trunk_steps
            cost = experts if name in ("experts", "scratch") else dense
            runs.curve(ax, before * dense + steps * cost, losses(results, name), style,
                       label=NAMES[name], markersize=4)
        from_scratch = losses(results, "scratch").mean(0)
        ax.set(xlabel=f"{unit}, the trunk's included", ylabel="held-out nats per byte",
               ylim=(None, from_scratch[len(from_scratch) // 5]))

    for style, name in zip(runs.STYLES[2:], ("experts", "scratch")):
        shares = settings.experts * np.array([result["loads"][name] for result in results])
        steps = results[0]["curves"][name][-1][0] * (np.arange(PARTS) + 0.5) / PARTS
        for extreme, pick, fill in (("largest", np.max, "full"), ("smallest", np.min, "none")):
            runs.curve(load, steps, pick(shares, axis=(2, 3)), style, fillstyle=fill,
                       label=f"{NAMES[name]}: {extreme}")
    loads = settings.experts * np.array(results[0]["loads"]["experts"])[:, -1]  # (parts, experts)
    steps = results[0]["curves"]["experts"][-1][0] * (np.arange(PARTS) + 0.5) / PARTS
    for number, (expert, style) in enumerate(zip(loads.T, itertools.cycle(runs.STYLES)), 1):
        one_layer.plot(steps, expert, label=f"expert {number}", markersize=4, **style)
    one_layer.set_title("upcycled: the experts of the last layer, first seed")
    load.set_title("largest and smallest load in all layers")
    for ax in (one_layer, load):
        ax.axhline(1, color="0.5")
        ax.set(xlabel="updates", ylabel="load of an expert, 1: an equal share", ylim=(0, None))
    return figure


# %% The checks

def checks(results, settings):
    if None in results:
        diverged = f"{results.count(None)} of {len(results)} seeds diverged"
        return [Check("every run ends", diverged, "-", False)]
    end = losses(results, "experts")[:, -1]
    gain = {name: losses(results, name)[:, -1] - end for name in ("dense", "longer", "scratch")}
    text = {name: f"by {runs.mean_and_range(gain[name], '+.3f')} nats per byte" for name in gain}
    equal, first = max(result["equal"] for result in results), ahead_from(results)
    idle = min(settings.experts * np.min(result["loads"]["experts"][-1]) for result in results)
    dense_flops, expert_flops = results[0]["flops"]
    ahead = "behind at the end" if first is None else f"ahead from update {first} on"
    return [
        Check("upcycled experts compute what the dense model computes",
              f"losses of a byte differ by at most {equal:.1e} nats", "0", equal < 1e-4),
        Check("on the same tokens the experts end ahead of the dense model, for every seed",
              f"{text['dense']}; {ahead}", "-", min(gain["dense"]) > 0),
        Check("and ahead of the dense model on the same FLOPs "
              f"(x {expert_flops / dense_flops:.2f} per token)",
              text["longer"], "-", min(gain["longer"]) > 0),
        Check("and ahead of experts from scratch on the same FLOPs, the trunk's included",
              text["scratch"], "-", min(gain["scratch"]) > 0),
        Check("no expert falls below a quarter of an equal share of the load",
              f"{idle:.2f} in the last fifteenth", "-", idle >= 0.25),
    ]


# %% What it means: for someone who has a dense model, experts are the better use of further FLOPs.
# The paper makes its 8x2B from the stable 2.4B and trains it for another 130 thousand steps. When
# the experts overtake depends on how long the trunk and the experts are trained.
#
# One check does not hold: someone who has no model yet should not train a dense one first. With the
# trunk's FLOPs in addition, experts from scratch end a little ahead, and their load is more even:
# all eight learn from the first update, while upcycled ones begin as copies of each other. Here the
# trunk takes a third of all FLOPs. It is different if a trunk of a trillion tokens already exists
# (exercise 1).
#
# The width is dim_model_base, so all factors of muP are 1 here; what its rules do for the router of
# a wider model is in labs/mup_coordinates.py.
#
# Exercises
# 1. `--trunk_steps=4000`, a trunk that was trained for long: how many updates do the experts now
#    need to pass the dense model?
# 2. `std` of the router in family/upcycle.py: set it to 0. All experts are then equally likely, and
#    the same two win each tie. What happens to the load?
# 3. `common`: add balance_coef=0. How many experts are still in use at the end, and what does it
#    cost in loss?

@exits_cleanly
def main(argv):
    quick = dict(seeds=(0,), width=32, experts=4, trunk_steps=15, steps=30, eval_tokens=1024)
    runs.main("upcycling", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
