"""Lab: experts from a dense model (paper section 7.3, sparse upcycling).

Question    There is a dense model, and more compute. Should one train it further, turn its
            feed-forwards into experts, or start a model with experts from scratch?
Claim       At step 0 upcycled experts compute what the dense model computes. With training they
            specialise, and the model passes the dense one. The balance loss keeps all experts in
            use. Komatsuzaki et al. (2212.05055) add: with half of the FLOPs that the dense model
            has cost, upcycled experts are better than experts from scratch with all of them.
Write down  before you run it: each token uses two of eight experts. How many times the FLOPs of a
            dense token is that? From how many further FLOPs on are the upcycled experts ahead of
            the dense model that trains on? And when do experts from scratch catch up with them?
Command     python -m labs.upcycling    ten minutes on two cores; --quick=True: seconds

Per seed there is one dense trunk. Three models follow it: the dense model trained on, experts
upcycled from it, and experts from scratch. Each is one stable run with WSD, and four decays branch
from it, each a fifth of its length. They end after 1/4, 1/2, 1 and 3/2 of the trunk's FLOPs, so
that all models are compared after a decay and on the same FLOPs.
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

NAMES = {"dense": "dense, trained on", "experts": "experts, upcycled",
         "scratch": "experts, from scratch"}
ENDS = (1, 2, 4, 6)             # of the decays, in quarters of the trunk's FLOPs
PARTS = 30                      # of a run, for the load of the experts
SAME_LOSS = 1e-4                # nats: rounding
LEAST_LOAD = 0.25               # of an equal share


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 32
    experts: int = 8            # as in the paper; two per token
    batch_size: int = 8         # sequences per update
    quarter: int = 400          # updates with experts that take a quarter of the trunk's FLOPs
    eval_tokens: int = 65536    # held-out bytes

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be a multiple of {unit}"
                for name, unit in (("width", 32), ("quarter", 5))
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


def flops_per_token(**options):
    config, model_config, _ = train.read_config(["config/lab.py", *runs.options(**options)])
    return model_config.flops_per_token(config.block_size)


def family(seed, width, experts, batch_size, quarter, eval_tokens):
    """Train one seed's trunk and the models of NAMES; return a dict, or None if a run diverges.

    equal     largest difference of a byte's loss between the trunk and the upcycled model, nats
    flops     per token: [dense, experts]
    losses    {model: held-out loss after the decay to each of ENDS, nats per byte}
    loads     {"experts", "scratch": (PARTS, layers, experts) share of the tokens in each part of
              the longest run, its decay included}
    """
    job = dict(seed=seed, width=width, experts=experts, batch_size=batch_size, quarter=quarter,
               eval_tokens=eval_tokens)
    folder = Path(runs.folder("upcycling", job))
    trunk, start = folder / "trunk", folder / "start"
    common = dict(**runs.shape(width), batch_size=batch_size, eval_tokens=eval_tokens,
                  decay_steps=0, log_interval=max(1, quarter // 40))
    flops = [flops_per_token(num_experts=number, **common) for number in (0, experts)]
    fifth = quarter // 5                        # of a quarter, in updates: the decay's share
    dense_fifth = round(fifth * flops[1] / flops[0])
    if not runs.finish(train.main, "config/lab.py", out_dir=trunk, seed=seed,
                       max_steps=4 * 5 * dense_fifth, **common):
        return None
    if not checkpoint.checkpoints(start):
        upcycle.upcycle(upcycle.UpcycleConfig(ckpt=str(trunk), out=str(start), num_experts=experts,
                                              seed=seed, overwrite=True))
    models = {"dense": (dense_fifth, dict(init_from=trunk)),
              "experts": (fifth, dict(init_from=start)),
              "scratch": (fifth, dict(num_experts=experts))}
    losses, loads = {}, {}
    for name, (decay, options) in models.items():
        stable = 4 * decay
        if not runs.finish(train.main, "config/lab.py", out_dir=folder / name, seed=seed + 100,
                           max_steps=stable * ENDS[-1], save_interval=stable, keep_every=stable,
                           **options, **common):
            return None
        training, losses[name] = metrics.read(folder / name)[0], []
        for end in ENDS:
            branch = folder / f"{name}-{end}"
            if not runs.finish(train.main, out_dir=branch, decay_steps=decay * end,
                               branch_from=folder / name / f"step-{stable * end:08d}"):
                return None
            in_decay, held_out = metrics.read(branch)
            losses[name].append(held_out[-1]["val_loss"])
        if "expert_load" in training[0]:
            lines = [line["expert_load"] for line in training + in_decay]
            loads[name] = [np.mean(part, 0).round(4).tolist()
                           for part in np.array_split(lines, PARTS)]
    result = {"equal": largest_difference(trunk, start), "flops": flops, "losses": losses,
              "loads": loads}
    shutil.rmtree(folder)
    return result


def experiment(settings, config):
    """Return [result of family for each seed]."""
    runs.prepare(config)
    fixed = {name: value for name, value in vars(settings).items() if name != "seeds"}
    jobs = [dict(seed=seed, **fixed) for seed in settings.seeds]
    return runs.collect("upcycling", family, jobs, config)


def lead(results, name, end, own_end=None):
    """Return by how much upcycled experts are ahead of a model, nats per byte, one per seed.

    end, own_end   of ENDS: where the other model and the upcycled experts stop; own_end None: end
    """
    return np.array([result["losses"][name][ENDS.index(end)]
                     - result["losses"]["experts"][ENDS.index(own_end or end)]
                     for result in results])


def crossing(results, name):
    """Return the share of the trunk's FLOPs at which the mean lead over a model passes zero for
    the last time, interpolated over the logarithm, or None if it does not."""
    shares, leads = np.array(ENDS) / 4, [lead(results, name, end).mean() for end in ENDS]
    for i in reversed(range(len(ENDS) - 1)):
        if leads[i] * leads[i + 1] <= 0:
            part = leads[i] / (leads[i] - leads[i + 1])
            return shares[i] * (shares[i + 1] / shares[i]) ** part
    return None


# %% The figure

def plot_losses(ax, results, trunk):
    """Draw the loss after each decay over FLOPs in units of the trunk's; trunk: what it counts."""
    for style, name in zip(runs.STYLES, NAMES):
        before = 0 if name == "scratch" else trunk
        runs.bars(ax, before + np.array(ENDS) / 4,
                  list(zip(*(result["losses"][name] for result in results))), style,
                  label=NAMES[name])
    ax.set(ylabel="held-out loss after the decay (nats per byte)")


def draw(results, settings):
    results = [result for result in results if result]
    if not results:
        return
    dense, experts = results[0]["flops"]
    figure, axes = runs.figure(
        2, 2, f"a dense model, and {settings.experts} experts, two per token (x "
        f"{experts / dense:.2f} FLOPs per token; {len(results)} seeds)", width=6, height=4)
    for ax, trunk, label in zip(axes[0], (0, 1), ("further FLOPs: the trunk exists",
                                                  "all FLOPs: nothing exists yet")):
        plot_losses(ax, results, trunk)
        ax.set(xlabel=f"{label} (1: what the trunk took)")
    for ax, name in zip(axes[1], ("experts", "scratch")):
        loads = settings.experts * np.array(results[0]["loads"][name])[:, -1]  # (parts, experts)
        updates = settings.quarter * ENDS[-1] * (np.arange(PARTS) + 0.5) / PARTS
        for number, (load, style) in enumerate(zip(loads.T, itertools.cycle(runs.STYLES)), 1):
            ax.plot(updates, load, markersize=4, label=f"expert {number}", **style)
        ax.legend(ncols=4, fontsize=7)
        ax.axhline(1, color="0.5")
        ax.axhline(LEAST_LOAD, color="0.5", linestyle=":")
        ax.set(xlabel="updates", ylabel="load of an expert (1: an equal share)",
               title=f"{NAMES[name]}: last layer, first seed", ylim=(0, None))
    return figure


def slide(ax, results, settings):
    results = [result for result in results if result]
    plot_losses(ax, results, trunk=0)
    ax.set(xlabel="further FLOPs (1: what the dense model has cost)")
    caught = crossing(results, "scratch")
    if caught:
        return f"Experts from scratch catch up after {caught:.1f} x the dense model's FLOPs"
    where = "behind" if lead(results, "scratch", ENDS[-1]).mean() > 0 else "ahead"
    return f"With a dense model at hand, experts from scratch stay {where}"


# %% The checks

def checks(results, settings):
    if None in results:
        diverged = f"{results.count(None)} of {len(results)} seeds diverged"
        return [Check("every run ends", diverged, False)]

    def by(ahead, level=None):
        return (f"by {runs.mean_and_range(ahead, '+.3f')} nats per byte"
                + (f"; level at {level:.2f} times the trunk's FLOPs" if level else ""))

    equal = max(result["equal"] for result in results)
    dense, half, late = (lead(results, "dense", 4), lead(results, "scratch", 4, own_end=2),
                         -lead(results, "scratch", 6))
    no_trunk = -lead(results, "scratch", 6, own_end=2)
    passes, caught = crossing(results, "dense"), crossing(results, "scratch")
    idle = min(settings.experts * np.min(result["loads"]["experts"]) for result in results)
    dense_flops, expert_flops = results[0]["flops"]
    return [
        Check("upcycled experts compute what the dense model computes",
              f"losses of a byte differ by at most {equal:.1e} nats (limit {SAME_LOSS:.0e})",
              equal < SAME_LOSS, paper="0"),
        Check("with as many further FLOPs as the trunk took, upcycled experts are ahead of the "
              "dense model trained on, for every seed",
              f"{by(dense, passes)}; a token takes {expert_flops / dense_flops:.2f} times the "
              "FLOPs", min(dense) > 0, runs.p_value(dense)),
        Check("with half of the trunk's FLOPs they are ahead of experts from scratch with all of "
              "them, for every seed", by(half), min(half) > 0, runs.p_value(half),
              paper="so (Komatsuzaki et al.)"),
        Check("experts from scratch catch up: with 1.5 times the trunk's FLOPs they are level or "
              "ahead, in the mean over seeds",
              f"ahead {by(late, caught)}", late.mean() >= 0, runs.p_value(late)),
        Check("if no dense model exists yet, experts from scratch are ahead on the same FLOPs, the "
              "trunk's included, for every seed", by(no_trunk), min(no_trunk) > 0,
              runs.p_value(no_trunk)),
        Check("no expert falls below a quarter of an equal share of the load",
              f"{idle:.2f} in the lowest of {PARTS} parts of the longest run", idle >= LEAST_LOAD),
    ]


# %% What it means: the answer depends on what exists already. The first panel is for someone who
# has the dense model: its FLOPs are spent, only further ones count. The second is for someone who
# has nothing yet: the same losses, with the trunk's FLOPs counted too. The paper is in the first
# case: it makes its 8x2B from the stable 2.4B and trains it for another 130 thousand steps.
#
# Upcycled experts are level with the dense model after a quarter of the trunk's FLOPs, and ahead of
# it from then on. For someone who has nothing yet, experts from scratch are the better use of the
# same FLOPs. The dense model reads more tokens here than the experts, as a token costs it less.
#
# One check does not hold: with 1.5 times the trunk's FLOPs experts from scratch have not caught up.
# They are 0.05 nats behind, 0.08 with as many FLOPs as the trunk, so they would need longer runs
# than these. The longer the trunk was trained, the further they have to go (exercise 1).
#
# In the last two panels all experts stay in use, upcycled or from scratch: in the last part of the
# run the least used has 0.7 and 0.5 of an equal share (all layers and seeds). That the balance loss
# does this is not shown, as no run is without it (exercise 3). Upcycled experts begin as copies of
# each other, and only the router, which is random at first, makes them different. How different
# they become is not measured.
#
# Exercises
# 1. `max_steps=4 * 5 * dense_fifth`: train the trunk twice as long. How many updates do the experts
#    now need to pass the dense model? (The x axis then counts in halves of the trunk's FLOPs, and
#    the second panel counts only half of the trunk.)
# 2. `--experts=4`, then 16: a token costs the same with both. Which of them is further ahead of the
#    dense model, and are all experts in use?
# 3. `common`: add balance_coef=0. How many experts are still in use at the end, and what does it
#    cost in loss?

@exits_cleanly
def main(argv):
    quick = dict(seeds=(0,), width=32, experts=4, quarter=5, eval_tokens=1024)
    runs.main("upcycling", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
