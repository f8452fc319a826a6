"""Lab: why muP has the rules that it has (paper section 3.1, table 7).

Question    A network gets wider. Which of its activations grow with the width, and which rules
            keep them at the same size?
Claim       Under the rules of table 7 every activation has the same size at every width, at the
            start and after updates. Therefore a learning rate found at a small width can be used
            at a large one (labs/lr_transfer.py).
Write down  before you run it: the entries of a matrix are drawn with the same standard deviation
            at every width n. With which power of n does its output grow? An update by Adam changes
            every entry by about the learning rate: with which power does that change grow?
Command     python -m labs.mup_coordinates          five minutes; --quick=True: a test of seconds

This is a coordinate check. Models of several widths make a few updates, then the mean |activation|
on one fixed text is measured at several places. On logarithmic axes its slope over the width is the
power with which it grows: 0 under muP.
"""
# %%
import dataclasses
import math
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

import model as model_file
from configurator import ROOT, exits_cleanly
from labs import runs
from labs.runs import Check

BASE = 64                       # dim_model_base of config/lab.py: there all factors are 1
DEPTH = 4                       # layers of the models of several widths
EXPERTS = 8                     # of the rules that begin with "experts"; two per token
# Probes of the last block. "router": its logits; with experts there is no "gate and up".
PROBES = ("embedding", "qkv", "attention", "gate and up", "mlp", "residual", "logits", "router",
          "experts")
RULES = ("muP", "standard", "no init rule", "no learning-rate rule", "no logits rule",
         "embedding as a matrix", "experts, muP", "experts, no router rules")


@dataclass
class Settings:
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 4, 8, 16)     # at the smallest width, for the rule of depth
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, ...] = (0, 1, 3, 10)      # activations are measured after these updates

    def problems(self):
        out = [f"--{name}={getattr(self, name)}: give two or more, to measure a power"
               for name in ("widths", "depths") if len(set(getattr(self, name))) < 2]
        if 0 not in self.steps or len(set(self.steps)) < 2:
            out.append(f"--steps={self.steps}: must hold 0 (the start) and a later step")
        return out


# %% The experiment: muP, the standard parametrization (one init std and one learning rate for all),
# and muP without one of its rules

mup_table = model_file.mup_table


def table_without(rule, config):
    """Return mup_table of model.py with one rule switched off."""
    table = mup_table(dataclasses.replace(config, dim_model_base=BASE))
    m, matrix, embedding = config.n_embd / BASE, table["matrix"], table["embedding"]
    if rule == "no init rule":
        table["matrix"] = dataclasses.replace(matrix, std=matrix.std * math.sqrt(m))
    if rule == "no learning-rate rule":
        table["matrix"] = dataclasses.replace(matrix, lr=1.0)
    if rule == "embedding as a matrix":
        std = embedding.std / math.sqrt(m)
        table["embedding"] = dataclasses.replace(embedding, std=std, lr=1 / m)
    if rule == "experts, no router rules":
        router = table["router"]
        table["router"] = dataclasses.replace(router, std=router.std * math.sqrt(m), lr=1.0)
    return table


def activations(rule, width, depth, seed, steps):
    """Return {step: {probe: mean |activation|}} of one model."""
    standard = rule == "standard"
    model, updates, _ = runs.begin(
        "config/lab.py", **runs.shape(width), n_layer=depth, seed=seed, batch_size=8,
        max_steps=max(steps), schedule="constant", warmup_steps=0, mup=not standard,
        learning_rate=0.001 if standard else 0.01,
        num_experts=EXPERTS if rule.startswith("experts") else 0,
        dim_model_base=width if rule == "no logits rule" else BASE)
    if rule == "no depth rule":
        for block in model.blocks:
            block.scale = model.config.scale_depth
    changed = mup_table if standard else lambda config: table_without(rule, config)
    with mock.patch.object(model_file, "mup_table", changed):
        model_file.init_weights(model, seed)
        out = {"0": measure(model)}
        for update in updates:
            if update.step in steps:
                out[str(update.step)] = measure(model)
    return out


@torch.no_grad()
def measure(model):
    """Return {probe: mean |activation|} on a fixed text."""
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()[:8 * 128])).view(8, 128)
    block, seen = model.blocks[-1], {}
    modules = {"embedding": model.wte, "qkv": block.attn.wqkv, "attention": block.attn,
               "mlp": block.mlp, "residual": block}
    experts = block.mlp.experts if model.config.num_experts else None
    if not experts:
        modules["gate and up"] = block.mlp.w_in
    hooks = [module.register_forward_hook(lambda *call, probe=probe: seen.update({probe: call[-1]}))
             for probe, module in modules.items()]
    if experts:                                 # rows past the last expert's are not set
        hooks.append(experts.register_forward_hook(
            lambda _, given, y: seen.update(experts=y[:given[1][-1]])))
    seen["logits"] = model(text)
    for hook in hooks:
        hook.remove()
    seen["residual"] = seen["residual"][0]      # a block returns (residual stream, routing)
    if experts:
        seen["mlp"], (seen["router"], _) = seen["mlp"]
    return {probe: y.float().abs().mean().item() for probe, y in seen.items()}


def experiment(settings, config):
    """Return ({(kind, rule): {(size, seed): activations}}, stale).

    kind  "width" or "depth": what the size is
    """
    runs.prepare(config)
    cells = [("width", rule, width, DEPTH, seed)
             for rule in RULES for width in settings.widths for seed in settings.seeds]
    cells += [("depth", rule, settings.widths[0], depth, seed)
              for rule in ("muP", "no depth rule")
              for depth in settings.depths for seed in settings.seeds]
    jobs = [dict(rule=rule, width=width, depth=depth, seed=seed, steps=settings.steps)
            for _, rule, width, depth, seed in cells]
    results, stale = runs.collect("mup_coordinates", activations, jobs, config)
    found = {}
    for (kind, rule, width, depth, seed), result in zip(cells, results):
        size = width if kind == "width" else depth
        found.setdefault((kind, rule), {})[size, seed] = result
    return found, stale


def probes(results):
    """Return the PROBES that these models have."""
    measured = next(iter(results.values()))["0"]
    return [probe for probe in PROBES if probe in measured]


def steepest(results, settings):
    """Return (|power|, probe, step) of the probe that changes most with the size.

    Without the logits: they are small at the start, and smaller the wider the model. A power that
    is NaN, of a run that diverged, counts as infinite.
    """
    powers = {(probe, step): abs(power(results, probe, step))
              for probe in probes(results) if probe != "logits" for step in settings.steps}
    return max((np.nan_to_num(value, nan=np.inf), *where) for where, value in powers.items())


def by_size(results, probe, step):
    """Return (sizes, array (seeds, sizes)) of a probe. results: {(size, seed): activations}"""
    sizes, seeds = (sorted(set(values)) for values in zip(*results))
    return sizes, np.array([[results[size, seed][str(step)][probe] for size in sizes]
                            for seed in seeds])


def power(results, probe, step):
    """Return the power of the size with which a probe grows, mean over seeds."""
    sizes, values = by_size(results, probe, step)
    return float(np.polyfit(np.log2(sizes), np.log2(values).T, 1)[0].mean())


# %% The figure

def draw(found, settings):
    step = settings.steps[-1]
    figure, axes = runs.figure(
        2, 5, f"mean |activation| after {step} updates, relative to the smallest size")
    styles = dict(zip(PROBES, runs.STYLES)) | {"experts": runs.STYLES[PROBES.index("gate and up")]}
    for ax, ((kind, rule), results) in zip(axes.flat, found.items()):
        for probe in probes(results) if kind == "width" else ["residual"]:
            sizes, values = by_size(results, probe, step)
            label = probe if rule.endswith("muP") else None
            runs.curve(ax, sizes, values / values[:, :1], styles[probe], label=label)
        if kind == "width":
            ax.set(xlabel="width", title=rule, ylim=(0.2, 1500))
        else:
            ax.set(xlabel="layers", title=f"{rule}, over depth", ylim=(0.5, 50))
        ax.set(yscale="log", ylabel="relative to the smallest size")
        runs.log_x(ax, sizes)
        ax.axhline(1, color="0.5", linewidth=0.8)
    return figure


# %% The checks

def checks(found, settings):
    last = settings.steps[-1]
    worst, probe, step = steepest(found["width", "muP"], settings)
    of_experts = steepest(found["width", "experts, muP"], settings)
    router, router_outside = (power(found["width", rule], "router", last)
                              for rule in ("experts, muP", "experts, no router rules"))
    control = {probe: power(found["width", "standard"], probe, 0)
               for probe in ("qkv", "gate and up", "mlp")}
    init = power(found["width", "no init rule"], "mlp", 0)
    rate = power(found["width", "no learning-rate rule"], "mlp", last)
    logits, mup_logits = (power(found["width", rule], "logits", last)
                          for rule in ("no logits rule", "muP"))
    embedding = power(found["width", "embedding as a matrix"], "embedding", last)
    (deep, deep_later), (unscaled, unscaled_later) = (
        [power(found["depth", rule], "residual", step) for step in (0, last)]
        for rule in ("muP", "no depth rule"))
    return [
        Check("muP: no hidden activation grows or shrinks with the width",
              f"steepest power {worst:.2f} ({probe}, after {step})", "0", worst < 0.25),
        Check("standard: they grow from the start",
              ", ".join(f"{name} {value:.2f}" for name, value in control.items()), "-",
              min(control.values()) > 0.4),
        Check("without the init rule they grow from the start",
              f"mlp {init:.2f} at the start", "-", init > 0.4),
        Check("without the learning-rate rule they grow with the updates",
              f"mlp {rate:.2f} after {last}", "-", rate > 0.4),
        Check("without the logits rule the logits grow, with it they do not",
              f"{logits:.2f} and {mup_logits:.2f} after {last}", "-",
              logits > 0.4 > abs(mup_logits)),
        Check("muP with experts: no hidden activation grows or shrinks with the width, the "
              "router's logits included",
              "steepest power {:.2f} ({}, after {})".format(*of_experts), "0",
              of_experts[0] < 0.25),
        Check("without the router's rules its logits grow, with them they do not",
              f"{router_outside:.2f} and {router:.2f} after {last}", "-",
              router_outside > 0.4 > abs(router)),
        Check("a tied embedding scaled like a matrix shrinks",
              f"{embedding:.2f} after {last}", "-", embedding < -0.4),
        Check("the residual stream starts equally large at every depth, but not without "
              "scale_depth / sqrt(layers)",
              f"powers {deep:.2f} and {unscaled:.2f}", "-", abs(deep) < 0.25 < unscaled),
        Check("and it stays so after updates",
              f"powers {deep_later:.2f} and {unscaled_later:.2f} after {last}", "-",
              abs(deep_later) < 0.25 < unscaled_later),
    ]


# %% What it means: from width 64 to the 2304 of the 2.4B model, a power of 1 means a factor of 36.
# No single learning rate can make up for that, because the activations of one network grow with
# different powers. Over depth the paper's rule is half of a rule: table 7 divides each branch by
# the square root of the depth, but not its learning rate. The updates of all blocks push the
# residual stream in the same direction, so once training has begun it still grows a little with
# depth. The paper searches for its constants with 8 layers and uses them with 40 and 52.
#
# A router of experts is a matrix whose input grows and whose output does not. Outside of the rules
# its logits grow with the width: the wider the model, the surer its router is of its choice before
# it has learned anything.
#
# Exercises
# 1. `std=matrix.std * math.sqrt(m)`: use m ** 0.25. Which probe shows it first?
# 2. `--steps=0,10,100`: does the power of "mlp" stay below 0.25?
# 3. `learning_rate=... 0.01`: with 0.1, which probe is the first whose power leaves 0, and why is
#    it not the embedding?

@exits_cleanly
def main(argv):
    quick = dict(widths=(32, 64), depths=(2, 4), seeds=(0,), steps=(0, 2))
    runs.main("mup_coordinates", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
