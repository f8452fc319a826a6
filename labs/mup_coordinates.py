"""Lab: why muP has the rules that it has (paper section 3.1, table 7).

Question    A network gets wider. Which of its activations grow with the width, and which rules
            keep them at the same size?
Claim       Under the rules of table 7 every hidden activation has the same size at every width, at
            the start and after updates. (The logits start smaller the wider the model, and catch up
            in a few updates.) Therefore a learning rate found at a small width can be used at a
            large one (labs/lr_transfer.py).
Write down  before you run it: the entries of a matrix are drawn with the same standard deviation
            at every width n. With which power of n does its output grow? An update by Adam changes
            every entry by about the learning rate: with which power does that change grow?
            Then over depth: L layers add their updates to one residual stream. How must the
            branches, or the learning rate, shrink with L, so that the sum stays the same?
Command     python -m labs.mup_coordinates    ten minutes on two cores; --quick=True: seconds

This is a coordinate check. Models of several widths make a few updates, then the mean |activation|
on one fixed text is measured at several places. On logarithmic axes its slope over the width is the
power with which it grows: 0 under muP. The second part does the same over depth, with four rules.
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
# Rules for the scale of a branch and the learning rate of matrices in a model of L layers; the last
# three are the same at L = DEPTH.
DEPTH_RULES = {"no depth rule": "neither changes with L", "muP": "branches / √L (the paper)",
               "rate / sqrt(layers)": "branches / √L, rate / √L",
               "CompleteP": "branches / L (CompleteP)"}
FLAT = 0.25                     # a power below it counts as none
GROWS = 0.4                     # a power above it counts as growth


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
# and muP without one of its rules. For depth: the paper's rule; the same with the learning rate of
# matrices divided by sqrt(L) too (Tensor Programs VI, 2310.02244); and branches divided by L at the
# same learning rate (CompleteP, Dey et al. 2505.01618).

mup_table = model_file.mup_table


def table_without(rule, config):
    """Return mup_table of model.py with one rule switched off, or with one more."""
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
    if rule == "rate / sqrt(layers)":
        rate = matrix.lr * math.sqrt(DEPTH / config.n_layer)
        table["matrix"] = dataclasses.replace(matrix, lr=rate)
    return table


def branch_scale(rule, config):
    """Return the factor on the residual branches, by the rule of depth."""
    if rule == "no depth rule":
        return config.scale_depth
    if rule == "CompleteP":
        return config.scale_depth / math.sqrt(DEPTH) * DEPTH / config.n_layer
    return config.residual_scale


def activations(rule, width, depth, seed, steps):
    """Return {step: {probe: mean |activation|}} of one model."""
    standard = rule == "standard"
    model, updates, _ = runs.begin(
        "config/lab.py", **runs.shape(width), n_layer=depth, seed=seed, batch_size=8,
        max_steps=max(steps), schedule="constant", warmup_steps=0, mup=not standard,
        learning_rate=0.001 if standard else 0.01,
        num_experts=EXPERTS if rule.startswith("experts") else 0,
        dim_model_base=width if rule == "no logits rule" else BASE)
    for block in model.blocks:
        block.scale = branch_scale(rule, model.config)
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
    """Return {(kind, rule): {(size, seed): activations}}.

    kind  "width" or "depth": what the size is
    """
    runs.prepare(config)
    cells = [("width", rule, width, DEPTH, seed)
             for rule in RULES for width in settings.widths for seed in settings.seeds]
    cells += [("depth", rule, settings.widths[0], depth, seed)
              for rule in DEPTH_RULES for depth in settings.depths for seed in settings.seeds]
    jobs = [dict(rule=rule, width=width, depth=depth, seed=seed, steps=settings.steps)
            for _, rule, width, depth, seed in cells]
    results = runs.collect("mup_coordinates", activations, jobs, config)
    found = {}
    for (kind, rule, width, depth, seed), result in zip(cells, results):
        size = width if kind == "width" else depth
        found.setdefault((kind, rule), {})[size, seed] = result
    return found


def probes(results):
    """Return the PROBES that these models have."""
    measured = next(iter(results.values()))["0"]
    return [probe for probe in PROBES if probe in measured]


def by_size(results, probe, step):
    """Return (sizes, array (seeds, sizes)) of a probe. results: {(size, seed): activations}"""
    sizes, seeds = (sorted(set(values)) for values in zip(*results))
    return sizes, np.array([[results[size, seed][str(step)][probe] for size in sizes]
                            for seed in seeds])


def powers(results, probe, step):
    """Return the power of the size with which a probe grows, one per seed.

    NaN, of a run that diverged, counts as infinite.
    """
    sizes, values = by_size(results, probe, step)
    found = np.polyfit(np.log2(sizes), np.log2(values).T, 1)[0]
    return np.nan_to_num(found, nan=np.inf)


def steepest(results, settings):
    """Return (powers, probe, step) of the probe that changes most with the size.

    Without the logits: they are small at the start, and smaller the wider the model.
    """
    found = [(powers(results, probe, step), probe, step)
             for probe in probes(results) if probe != "logits" for step in settings.steps]
    return max(found, key=lambda each: abs(each[0].mean()))


# %% The figure

def plot(ax, results, probe, step, style, label=None):
    """Draw a probe over the size, relative to its value at the smallest size."""
    sizes, values = by_size(results, probe, step)
    runs.curve(ax, sizes, values / values[:, :1], style, label=label)
    ax.set(yscale="log", ylabel="relative to the smallest size")
    runs.log_x(ax, sizes)
    ax.axhline(1, color="0.5", linewidth=0.8)


def draw(found, settings):
    last = settings.steps[-1]
    figure, axes = runs.figure(3, 4, "mean |activation| of models of several sizes")
    styles = dict(zip(PROBES, runs.STYLES)) | {"experts": runs.STYLES[PROBES.index("gate and up")]}
    panels = [(rule, last) for rule in RULES] + [("standard", 0), ("no init rule", 0)]
    for ax, (rule, step) in zip(axes.flat, panels):
        for probe in probes(found["width", rule]):
            plot(ax, found["width", rule], probe, step, styles[probe],
                 probe if rule.endswith("muP") else None)
        ax.set(xlabel="width", title=f"{rule}: {after(step)}", ylim=(0.2, 1500))
    for ax, step in zip(axes[2, 2:], (0, last)):
        plot_depth(ax, found, step)
    return figure


def plot_depth(ax, found, step):
    for style, (rule, label) in zip(runs.STYLES, DEPTH_RULES.items()):
        plot(ax, found["depth", rule], "residual", step, style, label)
    ax.set(xlabel="layers L", title=f"residual stream: {after(step)}", ylim=(0.3, 50))


def after(step):
    return f"after {step} updates" if step else "at the start"


def slide(ax, found, settings):
    last = settings.steps[-1]
    for style, rule in zip(runs.STYLES, ("muP", "standard", "no init rule",
                                         "no learning-rate rule")):
        plot(ax, found["width", rule], "mlp", last, style,
             "standard (a tenth of the rate)" if rule == "standard" else rule)
    ax.set(xlabel="width", ylabel=f"output of an MLP after {last} updates\n(1: at width "
                                  f"{settings.widths[0]})")
    flat = abs(powers(found["width", "muP"], "mlp", last).mean()) < FLAT
    return ("With all rules of muP the output of an MLP keeps its size" if flat else
            "Even with all rules of muP the output of an MLP changes with the width")


# %% The checks

def flat(values):
    return bool(abs(values.mean()) < FLAT)


def grows(values):
    return bool(values.mean() > GROWS)


def text(*powers_of):
    """Return the powers, each as mean and range over seeds."""
    return " and ".join(runs.mean_and_range(values, ".2f") for values in powers_of)


def checks(found, settings):
    last = settings.steps[-1]
    width, depth = ({rule: results for (of, rule), results in found.items() if of == kind}
                    for kind in ("width", "depth"))
    worst, probe, step = steepest(width["muP"], settings)
    worst_expert, of_expert, step_expert = steepest(width["experts, muP"], settings)
    standard = [powers(width["standard"], name, 0) for name in ("qkv", "gate and up", "mlp")]
    init = powers(width["no init rule"], "mlp", 0)
    rate = powers(width["no learning-rate rule"], "mlp", last)
    logits, mup_logits = (powers(width[rule], "logits", last)
                          for rule in ("no logits rule", "muP"))
    router, mup_router = (powers(width[rule], "router", last)
                          for rule in ("experts, no router rules", "experts, muP"))
    embedding = powers(width["embedding as a matrix"], "embedding", last)
    start, later = ({rule: powers(results, "residual", step) for rule, results in depth.items()}
                    for step in (0, last))
    lower_rate, complete = later["rate / sqrt(layers)"], later["CompleteP"]
    return [
        Check("muP: no hidden activation grows or shrinks with the width",
              f"steepest power {text(worst)}: {probe}, {after(step)}", flat(worst), paper="0"),
        Check("standard: they grow from the start",
              f"qkv, gate and up, mlp: {text(*standard)}", all(map(grows, standard))),
        Check("without the init rule they grow from the start",
              f"mlp {text(init)} at the start", grows(init)),
        Check("without the learning-rate rule they grow with the updates",
              f"mlp {text(rate)} after {last}", grows(rate)),
        Check("without the logits rule the logits grow, with it they do not",
              f"{text(logits, mup_logits)} after {last}",
              grows(logits) and abs(mup_logits.mean()) < GROWS),
        Check("muP with experts: no hidden activation grows or shrinks with the width, the "
              "router's logits included",
              f"steepest power {text(worst_expert)}: {of_expert}, {after(step_expert)}",
              flat(worst_expert), paper="0"),
        Check("without the router's rules its logits grow, with them they do not",
              f"{text(router, mup_router)} after {last}",
              grows(router) and abs(mup_router.mean()) < GROWS),
        Check("a tied embedding scaled like a matrix shrinks",
              f"{text(embedding)} after {last}", grows(-embedding)),
        Check("the residual stream starts equally large at every depth, but not without "
              "scale_depth / sqrt(layers)",
              f"powers {text(start['muP'], start['no depth rule'])}",
              flat(start["muP"]) and start["no depth rule"].mean() > FLAT),
        Check("and it stays so after updates",
              f"powers {text(later['muP'], later['no depth rule'])} after {last}",
              flat(later["muP"]) and later["no depth rule"].mean() > FLAT),
        Check("with the learning rate of matrices divided by sqrt(layers) too, it stays equally "
              f"large after updates (power within {FLAT})",
              f"{text(lower_rate)} after {last}", flat(lower_rate)),
        Check("with branches divided by the layers and the learning rate unchanged (CompleteP), it "
              f"stays equally large after updates (power within {FLAT})",
              f"{text(complete)} after {last}", flat(complete)),
    ]


# %% What it means: from width 64 to the 2304 of the 2.4B model, a power of 1 means a factor of 36.
# No single learning rate can make up for that, because the activations of one network grow with
# different powers.
#
# One check does not hold: after updates the residual stream grows with depth. The paper's rule is
# half of a rule. At the start the branches are random and independent, their sum grows with
# sqrt(L), and dividing each by sqrt(L) cancels that. But the updates of all blocks push the stream
# in the same direction, so they add up with L. Two complete rules exist, and both keep the stream
# level here: divide the learning rate by sqrt(L) too, or divide the branches by L (CompleteP). Dey
# et al. prefer the second: with the first, a block of a deep model learns little that is not linear
# in its weights. The paper searches for its constants with 8 layers and uses them with 40 and 52.
# labs/lr_transfer.py shows what this does to the best learning rate.
#
# A router of experts is a matrix whose input grows with the width and whose output does not.
# Without its rules its logits grow with the width: a wide router is sure of its choice before it
# has learned anything.
#
# Exercises
# 1. `std=matrix.std * math.sqrt(m)`: use m ** 0.25. Which probe shows it first?
# 2. `--steps=0,10,100`: does the power of "mlp" stay below 0.25?
# 3. `learning_rate=... 0.01`: with 0.1, which probe is the first whose power leaves 0, and why is
#    it not the embedding?

@exits_cleanly
def main(argv):
    quick = dict(widths=(32, 64), depths=(2, 4), seeds=(0,), steps=(0, 2))
    runs.main("mup_coordinates", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
