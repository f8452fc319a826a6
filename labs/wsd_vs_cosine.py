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
Command     python -m labs.wsd_vs_cosine        fifteen minutes on two cores; --quick=True: seconds

The model has 47,392 parameters without the embedding, the N of the paper. As in its figure 4, runs
end after 20, 40, 60 and 80 tokens per parameter. Decays branch from the trunk with its weights,
optimizer state and position in the data. All runs of a seed start with the same weights and read
the same text in the same order.
"""
# %%
import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

import train
from configurator import exits_cleanly
from labs import runs
from labs.runs import Check
from model import MiniCPMConfig
from wsd import DECAYS

MARGIN = 0.01                   # nats per byte by which runs with the same settings may differ
DROP = 0.05                     # nats per byte: less is no sharp drop


@dataclass
class Settings:
    width: int = 32
    n_layer: int = 4
    horizons: tuple[int, ...] = (20, 40, 60, 80)        # tokens per parameter; S in the paper
    shares: tuple[float, ...] = (0.025, 0.1, 0.2)       # of a horizon, spent decaying
    forms: tuple[str, ...] = DECAYS                     # the others: one share, last horizon
    seeds: tuple[int, ...] = (0, 1, 2)
    every: int = 185                                    # updates between evaluations
    warmup: int = 48                                    # updates
    batch_size: int = 8
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

    @property
    def ratio(self):            # tokens per parameter that an update reads
        config = MiniCPMConfig(n_layer=self.n_layer, **runs.shape(self.width))
        return self.batch_size * self.block_size / config.n_params_non_embedding

    @property
    def ends(self):             # the horizons in updates
        return [round(horizon / self.ratio) for horizon in self.horizons]

    def common(self, seed):
        """Return the options of train.py that all runs of a seed share."""
        return dict(**runs.shape(self.width), n_layer=self.n_layer, seed=seed,
                    warmup_steps=self.warmup, batch_size=self.batch_size,
                    block_size=self.block_size, eval_tokens=self.eval_tokens)


# %% The experiment: the trunk of a seed with its branches

def trunk_and_decays(common, ends, decays, every):
    """Train the trunk of a seed and its decays, and average the trunk's weights.

    ends     updates after which results are wanted
    decays   [[start, end, form], ...] in updates
    returns  {"trunk": [[step, val_loss], ...], "decays": [val_loss, ...] in their order,
              "averaged": [[end, val_loss], ...]}
    """
    config, model, batches, validate = runs.build("config/lab.py", **common, decay_steps=0,
                                                  max_steps=ends[-1])
    trunk, losses, weights = [], {}, {}
    for update in train.train(config, batches, train.language_loss, model):
        branches = [decay for decay in decays if decay[0] == update.step]
        if branches or update.step in ends:
            weights[update.step] = {name: value.clone()
                                    for name, value in model.state_dict().items()}
        if update.step in weights or update.step % every == 0:
            trunk.append([update.step, validate(model.eval())["val_loss"]])
        for start, end, form in branches:
            decayed = runs.decayed_model(dataclasses.replace(config, decay=form), batches, update,
                                         end)
            losses[start, end, form] = validate(decayed.eval())["val_loss"]
    averaged = []
    for end in ends:                # over the starts of its decays, and the end itself
        kept = [weights[step] for step in {end, *(decay[0] for decay in decays if decay[1] == end)}]
        model.load_state_dict({name: torch.stack([each[name] for each in kept]).mean(0)
                               for name in kept[0]})
        averaged.append([end, validate(model)["val_loss"]])
    return {"trunk": trunk, "decays": [losses[tuple(decay)] for decay in decays],
            "averaged": averaged}


# %% Cosines that end at T, and how they go on at the floor or, as a loop, rise again

def cosine(common, T, loop, ends, every):
    """Return [[step, val_loss], ...] of a cosine up to the last of the ends."""
    _, updates, validate = runs.begin(
        "config/lab.py", **common, schedule="cosine_loop" if loop else "cosine", cosine_period=T,
        max_steps=ends[-1])
    return [[update.step, validate()["val_loss"]] for update in updates
            if update.step % every == 0 or update.step in ends]


def branch_point(end, share):
    """Return the update after which a decay begins."""
    return end - max(1, round(share * end))


def over_seeds(curves):
    """Return {step: losses (seeds,)} of one [[step, loss], ...] per seed."""
    return {step: np.array([dict(curve)[step] for curve in curves]) for step, _ in curves[0]}


def experiment(settings, config):
    """Return (found, stale). found holds losses, an array (seeds,) each:

    "trunk" and "averaged" {step: losses}, "decays" {(start, end, form): losses},
    "cosines" {(T, loop): {step: losses}}
    """
    runs.prepare(config)
    s, ends = settings, settings.ends
    decays = [[branch_point(end, share), end, s.forms[0]] for end in ends for share in s.shares]
    decays += [[branch_point(ends[-1], s.share), ends[-1], form] for form in s.forms[1:]]
    trunks, stale = runs.collect("wsd_vs_cosine", trunk_and_decays, [
        dict(common=s.common(seed), ends=ends, decays=decays, every=s.every) for seed in s.seeds],
        config)
    found = {name: over_seeds([trunk[name] for trunk in trunks]) for name in ("trunk", "averaged")}
    losses = np.array([trunk["decays"] for trunk in trunks]).T
    found["decays"] = dict(zip(map(tuple, decays), losses))
    jobs = [dict(common=s.common(seed), T=T, loop=False, ends=ends[:i + 2], every=s.every)
            for i, T in enumerate(ends) for seed in s.seeds]    # on to the next horizon
    jobs += [dict(common=s.common(seed), T=ends[0], loop=True, ends=ends[:3], every=s.every)
             for seed in s.seeds]
    results, old = runs.collect("wsd_vs_cosine", cosine, jobs, config)
    found["cosines"] = {name: over_seeds(curves)
                        for name, curves in runs.group(jobs, results, "T", "loop").items()}
    return found, stale or old


# %% What the figure and the checks compare

def decay_ends(found, settings, share):
    """Return {end: losses (seeds,)} after decays of a share of every horizon."""
    return {end: found["decays"][branch_point(end, share), end, settings.forms[0]]
            for end in settings.ends}


def cosine_ends(found):
    """Return {T: losses (seeds,)} of the cosines at T = S."""
    return {T: curve[T] for (T, loop), curve in found["cosines"].items() if not loop}


def differences(a, b):
    """Return {x: a - b} of two curves, where both are known."""
    return {x: a[x] - b[x] for x in a if x in b}


def closest(curve):
    """Return the losses (seeds,) with the lowest mean of a {x: losses}."""
    return min(curve.values(), key=np.mean)


def draw(found, settings):
    return None


def checks(found, settings):
    return []


@exits_cleanly
def main(argv):
    quick = dict()
    runs.main("wsd_vs_cosine", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
