"""Lab: what preferences do to a model, and what they cost (paper section 7.1).

Question    A model that has learned to answer is trained on pairs of answers, one of them
            preferred. How far does it move from where it started, and what is lost?
Claim       DPO makes the model answer as preferred, and it costs a little of what the model knew:
            the alignment tax. The paper's MT-Bench rises from 6.89 to 7.25 while the mean of its
            knowledge benchmarks falls from 52.33 to 51.60 (tables 3 and 4). beta keeps the model
            close to the reference: the larger beta, the smaller the KL divergence.
Write down  before you run it: both answers of each pair are correct, and the short one is preferred
            ("7", not "The answer is 7."), but a fifth of the pairs is labelled the wrong way round.
            The loss is then lowest at one margin, the same for every beta: which one? How many of
            the model's answers are short after training with beta 0.1, and with 3? Which beta costs
            more right answers? What does an SFT term on the preferred answers change, and how many
            answers are short after training with that term alone?
Command     python -m labs.preferences      about 22 minutes on two cores; --quick=True: a few
                                            seconds, to see that it works
            python -m labs.preferences --ckpt=PATH      the same from your own SFT run; results are
                                            stored under the hash of its weights

The lab trains the model that DPO starts from: a short laptop run with instructions in its decay,
then SFT. All DPO runs start from it and see 3,200 pairs once, of questions that SFT did not ask.
The seed sets the order of the pairs and which labels are wrong.
"""
# %%
import itertools
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, exits_cleanly
from data import packing
from data.instruct import prepare as instruct
from data.pytorch.prepare import documents
from data.tokenizer import chat_ids, load_tokenizer
from engine import checkpoint, metrics
from family import dpo
from labs import runs
from labs.runs import Check
from tools import evaluate

QUESTIONS, HELD_OUT_PAIRS, TRAIN = (
    ROOT / "data" / "instruct" / f"{name}.jsonl" for name in ("test", "pairs_test", "train"))
LONG_ANSWER = "The answer"      # how the form that is not preferred begins
COMMON = dict(compile=False, eval_interval=0, save_interval=0)
PAPER_TAX = 52.33 - 51.60       # points; mean of the benchmarks in tables 3 and 4
ALONE = "SFT term alone"        # the control, an arm with one beta:
BETA_ALONE = 1e-6               # the gradient of the preferences is proportional to it


@dataclass
class Settings:
    betas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    wrong: float = 0.2                          # share of the pairs with a wrong label
    sft_coef: float = 1.0                       # weight of the SFT term
    seeds: tuple[int, ...] = (0, 1, 2)          # of the order of the pairs and of the wrong labels
    pairs: int = 3200                           # training pairs, each seen once
    batch_size: int = 16                        # pairs per update
    learning_rate: float = 2e-4                 # peak, see the end of the lab
    questions: int = 800                        # held-out questions
    ckpt: str | None = None                     # SFT run to start from; unset: the lab trains one
    trunk_steps: int = 1500                     # of the lab's own model; 40 % of them are decay
    sft_steps: int = 800
    width: int = 128

    def problems(self):
        out = [] if 0 < self.wrong < 0.5 else [f"--wrong={self.wrong}: must be between 0 and 0.5"]
        if list(self.betas) != sorted(set(self.betas)) or len(self.betas) < 2:
            out.append(f"--betas={self.betas}: needs two or more values, in rising order")
        if self.sft_coef <= 0:
            out.append(f"--sft_coef={self.sft_coef}: must be above 0; the other arms have no term")
        return out

    @property
    def arms(self):
        """{label: (share of wrong labels, weight of the SFT term)}"""
        return {"some labels wrong": (self.wrong, 0.0),
                "some wrong, SFT term": (self.wrong, self.sft_coef), "all labels right": (0.0, 0.0)}


# %% The model to start from

def start_folder(start):
    """Return the run folder of the model that DPO starts from.

    start    {"weights": hash} of a checkpoint copied by keep_copy, or {"trunk_steps", "sft_steps",
             "width"} of a model that is trained here unless it is there
    """
    if "weights" in start:
        return runs.folder("preferences", start)
    trunk = runs.train_stage(
        "preferences", "config/laptop.py", minutes=None, max_steps=start["trunk_steps"],
        decay_share=0.4, decay_data="pytorch:0.7,instruct:0.3", sample_tokens=0, eval_tokens=16384,
        **runs.shape(start["width"], head=64), **COMMON)
    return runs.train_stage("preferences", "config/laptop_sft.py", init_from=trunk,
                            max_steps=start["sft_steps"], **COMMON)


def keep_copy(ckpt):
    """Copy a checkpoint to where start_folder looks for it; return {"weights": hash}."""
    source = checkpoint.resolve(ckpt)
    start = {"weights": dpo.weights_hash(source)}
    folder = Path(runs.folder("preferences", start))
    if not folder.exists():
        partial = folder.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        os.replace(partial, folder)
    return start


# %% The pairs

def fresh_pairs(number):
    """Return a file of so many pairs, made here unless it is there: no question is in the training
    data of SFT, none comes twice, and none has the content of a held-out question."""
    path = Path(runs.folder("preferences", {"pairs": number}) + ".jsonl")
    if not path.exists():
        asked = {messages[0]["content"] for messages in packing.read_conversations(TRAIN)}
        material, pairs = instruct.materials(documents())["train"], []
        for family, question, answer in instruct.examples("train", sys.maxsize, material):
            if question not in asked:
                asked.add(question)
                pairs.append({"family": family, "prompt": question, "chosen": answer,
                              "rejected": instruct.styled(answer, True)})
            if len(pairs) == number:
                break
        path.parent.mkdir(parents=True, exist_ok=True)
        instruct.write_jsonl(path, pairs)
    return path


def label_pairs(number, wrong, seed, path):
    """Write fresh pairs to a file, with chosen and rejected exchanged in a random share of them."""
    pairs = metrics.read_jsonl(fresh_pairs(number))
    for n in np.random.default_rng(seed).permutation(number)[:round(wrong * number)]:
        pairs[n]["chosen"], pairs[n]["rejected"] = pairs[n]["rejected"], pairs[n]["chosen"]
    instruct.write_jsonl(path, pairs)


# %% The measures

def right_answers(folder, questions):
    """Return the share of held-out questions that are answered exactly, in either form."""
    model, tokenizer = runs.load_model(folder)
    config = evaluate.EvaluateConfig(questions=questions)
    return evaluate.exact(model, tokenizer, config, QUESTIONS)["exact"]


@torch.no_grad()
def sample_answers(folder, start, questions):
    """Sample an answer of the policy to each question.

    Returns {"kl": KL(policy || reference) in nats per answer, "short": share of short answers}. The
    divergence at each sampled token, the stop token included, is exact.
    """
    (policy, tokenizer), (reference, _) = runs.load_model(folder), runs.load_model(start)
    asked = itertools.islice(packing.read_questions(QUESTIONS), questions)
    prompts = [chat_ids(tokenizer, messages, generate=True)[0] for messages, _, _ in asked]
    nats, short = [], []
    for at in range(0, len(prompts), 16):
        batch = prompts[at:at + 16]
        tokens = policy.generate(batch, 32, seed=at, stop_ids=tokenizer.stop_ids)
        for prompt, ids in zip(batch, torch.stack(list(tokens), dim=1).tolist()):
            stops = [n for n, token in enumerate(ids) if token in tokenizer.stop_ids]
            end = stops[0] if stops else len(ids) - 1
            idx = torch.tensor([[*prompt, *ids[:end]]])
            log_p, log_q = (model(idx)[0, len(prompt) - 1:].log_softmax(-1)
                            for model in (policy, reference))   # (end + 1, vocabulary) each
            nats.append((log_p.exp() * (log_p - log_q)).sum().item())
            short.append(not tokenizer.decode(ids[:end]).strip().startswith(LONG_ANSWER))
    return {"kl": float(np.mean(nats)), "short": float(np.mean(short))}


# %% The experiment

def tuned(start, questions, pairs):
    """Return the measures of the model before DPO, and of the answers "chosen" and "rejected" the
    mean of 1 / tokens."""
    origin = start_folder(start)
    tokenizer = load_tokenizer(str(checkpoint.resolve(origin)))
    asked = metrics.read_jsonl(fresh_pairs(pairs))
    weights = {name: np.mean([1 / (len(tokenizer.encode(pair[name])) + 1) for pair in asked])
               for name in ("chosen", "rejected")}              # + 1: the stop token
    return {"exact": right_answers(origin, questions), **weights,
            **sample_answers(origin, origin, min(questions, 400))}


def aligned(start, beta, wrong, sft_coef, seed, pairs, batch_size, learning_rate, questions):
    """Run DPO once; return its training curve and all measures, or None if it diverges."""
    job = dict(start=start, beta=beta, wrong=wrong, sft_coef=sft_coef, seed=seed, pairs=pairs,
               batch_size=batch_size, learning_rate=learning_rate)
    folder, origin = runs.folder("preferences", job), start_folder(start)
    label_pairs(pairs, wrong, seed, Path(f"{folder}.jsonl"))
    if not runs.finish(dpo.main, "config/laptop_dpo.py", init_from=origin, out_dir=folder,
                       beta=beta, sft_coef=sft_coef, seed=seed, pairs=f"{folder}.jsonl",
                       max_pairs=None, val_pairs=HELD_OUT_PAIRS, batch_size=batch_size,
                       learning_rate=learning_rate, log_interval=1, **COMMON):
        return None
    training, held_out = metrics.read(folder)
    # The labels that are wrong show the margin with the wrong sign.
    margins = np.array([line["margin"] for line in training]) / (1 - 2 * wrong)
    tens = margins[:len(margins) // 10 * 10].reshape(-1, 10).mean(1).round(4).tolist()
    result = {"curve": tens, "exact": right_answers(folder, questions),
              **sample_answers(folder, origin, min(questions, 400))}
    for name in ("margin", "accuracy", "chosen_reward", "rejected_reward"):
        result[name] = held_out[-1][f"val_{name}"]
    shutil.rmtree(folder)
    Path(f"{folder}.jsonl").unlink()
    return result


def experiment(settings, config):
    """Return (before, after).

    before    result of tuned
    after     {arm: {beta: [result of aligned for each seed]}}; the last arm is ALONE
    """
    runs.prepare(config, data="pytorch", decay_data="instruct", tokenizer="bpe4096")
    if settings.ckpt:
        start = keep_copy(settings.ckpt)
    else:
        start = {name: getattr(settings, name) for name in ("trunk_steps", "sft_steps", "width")}
    common = dict(start=start, questions=settings.questions, pairs=settings.pairs)
    (before,) = runs.collect("preferences", tuned, [common], config)
    places = {arm: [(wrong, sft_coef, beta) for beta in settings.betas]
              for arm, (wrong, sft_coef) in settings.arms.items()}
    places[ALONE] = [(settings.wrong, settings.sft_coef, BETA_ALONE)]
    jobs = [dict(beta=beta, wrong=wrong, sft_coef=sft_coef, seed=seed, **common,
                 batch_size=settings.batch_size, learning_rate=settings.learning_rate)
            for wrong, sft_coef, beta in sum(places.values(), []) for seed in settings.seeds]
    if not config.draw and runs.missing_jobs("preferences", aligned, jobs, config):
        start_folder(start)     # parallel jobs would otherwise make both at the same time
        fresh_pairs(settings.pairs)
    results = runs.collect("preferences", aligned, jobs, config)
    found = runs.group(jobs, results, "wrong", "sft_coef", "beta")
    after = {arm: {place[-1]: found[place] for place in of_arm} for arm, of_arm in places.items()}
    return before, after


def values(after, arm, name):
    """Return (seeds, betas) of one measure, nan for a run that diverged."""
    return np.array([[result[name] if result else np.nan for result in results]
                     for results in after[arm].values()]).T


def optimum(settings, before):
    """Return {measure: its value for each beta} at the lowest loss, if only the form changes.

    With a share w of wrong labels the loss of a pair is lowest at sigmoid(margin) = 1 - w, that is
    at a margin of log((1 - w) / w). The log-odds of the short form then rise by margin / beta.
    """
    q, betas = np.clip(before["short"], 0.001, 0.999), np.array(settings.betas)
    margin = math.log(1 / settings.wrong - 1)
    p = 1 / (1 + (1 / q - 1) * np.exp(-margin / betas))
    return {"margin": np.full(len(betas), margin), "short": p,
            "kl": p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))}


def copied_share(settings, before):
    """Return the share of short answers at the lowest loss of the SFT term alone.

    The term is a mean over the tokens of the preferred answer. So the first one, which decides the
    form, counts 1 / tokens, more in a short answer than in a long one.
    """
    short, long = (1 - settings.wrong) * before["chosen"], settings.wrong * before["rejected"]
    return short / (short + long)


# %% The figure

def draw_measure(ax, results, settings, name):
    """Draw a measure of each arm over beta, and where the loss is lowest."""
    before, after = results
    for style, arm in zip(runs.STYLES, settings.arms):
        runs.curve(ax, settings.betas, values(after, arm, name), style, label=arm)
    ax.plot(settings.betas, optimum(settings, before)[name], color="0.4", linestyle=(0, (1, 1)),
            label="lowest loss, only the form changes")
    ax.set(xlabel="beta")
    runs.log_x(ax, settings.betas)


def draw(results, settings):
    before, after = results
    figure, axes = runs.figure(2, 3, f"DPO on {settings.pairs:,} pairs: of two right answers the "
                               "short one is preferred")
    training, margins, short, divergences, taxes, gains = axes.flat
    for style, beta in zip(runs.STYLES, settings.betas):
        curves = [result["curve"] for result in after["some labels wrong"][beta] if result]
        if curves:
            updates = 10 * np.arange(1, len(curves[0]) + 1)
            runs.curve(training, updates, np.array(curves), style, label=f"beta {beta:g}",
                       markevery=4)
    training.axhline(optimum(settings, before)["margin"][0], color="0.4", linestyle=":")
    training.set(xlabel="updates", title="margin in training, some labels wrong (nats)")
    for ax, name, title in ((margins, "margin", "margin of held-out pairs (nats)"),
                            (short, "short", "share of short answers, sampled"),
                            (divergences, "kl", "KL(policy || reference), nats per answer")):
        draw_measure(ax, results, settings, name)
        ax.set(title=title, yscale="log" if name == "kl" else "linear")

    for style, (arm, (_, sft_coef)) in zip(runs.STYLES, settings.arms.items()):
        kl, exact = (values(after, arm, name).mean(0) for name in ("kl", "exact"))
        taxes.plot(kl, 100 * exact, **style, label=arm)
        for beta, x, y in [*zip(settings.betas, kl, 100 * exact)][::len(kl) - 1]:   # both ends
            taxes.annotate(f"{beta:g}", (x, y), xytext=(4, 5 if sft_coef else -9), fontsize=7,
                           textcoords="offset points", color=style["color"])
        for name, fill in (("chosen", "full"), ("rejected", "none")):
            nats = values(after, arm, f"{name}_reward") / settings.betas
            runs.curve(gains, settings.betas, nats, style, label=f"{name}, {arm}", fillstyle=fill)
    kl, exact, share = (values(after, ALONE, name).mean() for name in ("kl", "exact", "short"))
    control = {"color": runs.COLORS[3], "label": ALONE}
    for ax, level in ((short, share), (divergences, kl)):
        ax.axhline(level, linestyle="-.", **control)
    taxes.plot(kl, 100 * exact, "v", **control)
    taxes.axhline(100 * before["exact"], color="0.4", label="before")
    taxes.axhline(100 * before["exact"] - PAPER_TAX, color="0.4", linestyle=":",
                  label="paper's tax")
    taxes.margins(0.1, 0.1)
    taxes.set(title="right answers (%), numbers: beta", xscale="log",
              xlabel="KL(policy || reference), nats per answer")
    gains.set(title="gain in log-probability, held-out (nats)", xlabel="beta")
    runs.log_x(gains, settings.betas)
    return figure


def slide(ax, results, settings):
    draw_measure(ax, results, settings, "kl")
    ax.set(ylabel="KL(policy || reference), nats per answer", yscale="log")
    falls = (np.diff(values(results[1], "some labels wrong", "kl")) < 0).all()      # every seed
    return f"A larger beta {'keeps' if falls else 'does not always keep'} DPO closer to its start"


# %% The checks

SURE, CLOSE, POINTS, TAX = 80, 20, 10, 3        # thresholds: %, %, points, points


def checks(results, settings):
    before, after = results
    noisy, with_sft, clean = settings.arms
    accuracy = 100 * np.array([values(after, arm, "accuracy").mean(0) for arm in settings.arms])
    margins, kl, exact, short = (values(after, noisy, name)             # (seeds, betas) each
                                 for name in ("margin", "kl", "exact", "short"))
    grown, sft_exact = values(after, clean, "margin"), values(after, with_sft, "exact")
    best, odds = optimum(settings, before), f"ln {1 / settings.wrong - 1:g}"
    misses = 100 * np.abs(short.mean(0) - best["short"])
    lost, saved = 100 * (exact[:, -1] - exact[:, 0]), 100 * (sft_exact[:, 0] - exact[:, 0])
    tax = 100 * (before["exact"] - sft_exact.mean(0))
    beside = 100 * (values(after, ALONE, "exact")[:, 0] - sft_exact[:, 0])
    copied, asked = 100 * values(after, ALONE, "short")[:, 0], 100 * copied_share(settings, before)
    return [
        Check(f"on {SURE} % of the held-out pairs or more the preferred answer gains more than the "
              "other, for every beta", f"in at least {accuracy.min():.1f} %",
              accuracy.min() >= SURE),
        Check(f"with wrong labels the margin of held-out pairs ends within {CLOSE} % of its "
              f"optimum, {odds}, for every beta",
              f"{listed(margins)} nats, the optimum is {best['margin'][0]:.2f}",
              (np.abs(margins.mean(0) / best["margin"] - 1) <= CLOSE / 100).all()),
        Check("without wrong labels the margin ends higher, for every beta and seed",
              f"{listed(grown)} nats", (grown > margins).all(),
              runs.p_value(grown - margins)),
        Check(f"the share of short answers is within {POINTS} points of what {odds} / beta "
              "predicts, for every beta",
              f"off by {', '.join(f'{miss:.0f}' for miss in misses)} points",
              misses.max() <= POINTS),
        Check("the larger beta, the smaller the KL divergence, for every seed",
              f"{listed(kl)} nats per answer", (np.diff(kl) < 0).all(),
              runs.p_value(-np.diff(kl))),
        Check("the smallest beta costs right answers: fewer than with the largest, for every seed",
              f"{runs.mean_and_range(lost)} points fewer", (lost > 0).all(),
              runs.p_value(lost)),
        Check("at the smallest beta an SFT term saves right answers, for every seed",
              f"{runs.mean_and_range(saved)} points", (saved > 0).all(), runs.p_value(saved)),
        Check(f"with SFT term x {settings.sft_coef:g} the alignment tax is {TAX} points at most",
              f"{tax.min():+.1f} to {tax.max():+.1f} points of {100 * before['exact']:.1f} %",
              tax.max() <= TAX, paper=f"{PAPER_TAX:+.1f} points of 52.3 %"),
        Check("beside the SFT term, preferences at the smallest beta cost right answers: fewer "
              "than with the SFT term alone, for every seed",
              f"{runs.mean_and_range(beside)} points fewer", (beside > 0).all(),
              runs.p_value(beside)),
        Check(f"the SFT term alone brings the share of short answers within {POINTS} points of "
              "where its loss is lowest",
              f"{runs.mean_and_range(copied)} %, the lowest loss is at {asked:.1f} %",
              abs(copied.mean() - asked) <= POINTS),
    ]


def listed(measured):
    """Return the means over seeds, one per beta, as text."""
    return ", ".join(f"{mean:.2f}" for mean in measured.mean(0))


# %% What it means: if a fifth of the labels is wrong, the loss asks for a probability: that of a
# right label, 0.8. With a large beta a small change of the model gives this probability, with a
# small beta it takes a large one. The share of short answers follows this rule at every beta. But a
# change of the form alone would cost less than 0.8 nats of KL divergence. What is measured on top
# is drift that no label asks for: 2.8 nats at beta 0.1, 0.7 at 0.3, 0.2 at 1 and 0.1 at 3. At beta
# 0.1 almost a quarter of the right answers is lost as well. If no label is wrong, only the end of
# training stops the margin, and at beta 0.1 most right answers are lost. At the paper's scale DPO
# runs for one epoch at a learning rate of 1e-5.
#
# With the SFT term there is hardly any drift and no right answer is lost. The control shows why:
# the term alone, without preferences, trains on right answers to 3,200 new questions and ends 1.9
# points above its start. Preferences beside it take 0.5 points of that, less than the seeds differ.
# The term alone also makes 92 % of the answers short, although only 80 % of the answers it sees
# are: it is a mean over the tokens of an answer, so the first token, which decides the form, counts
# more in a short answer (copied_share). So at beta 0.1 the SFT term outweighs the pairs. Most of
# the change of form is what the term alone gives, and the margin ends at 0.52 nats instead of 1.24.
# What looks like protection is more SFT and a weaker preference.
#
# The learning rate was chosen in a pilot with another seed by the margin, which a check asks about
# too: at 1e-4 beta 0.1 did not reach ln 4 (0.92 nats). At 3e-4 beta 3 went past it (2.06 nats), but
# so it does at 2e-4 (2.04).
#
# Two other checks do not hold. For beta 1 and 3 the margin ends above ln 4. One reason is that the
# margin differs from pair to pair: the more it does, the higher the mean margin must be for a mean
# probability of 0.8. The accuracy at beta 3 suggests a spread of 1.3 nats, which explains about
# half of the excess. And with one of three seeds the model moved less far at beta 0.1 than at 0.3.
# At both, nearly all answers are short, so the difference is drift. It depends on the order of the
# pairs and on which labels are wrong; the seed sets both.
#
# Exercises
# 1. `--wrong=0.4`: where is the lowest loss now? Predict the margin and the share of short answers
#    at beta 1, then run it.
# 2. `--sft_coef=0.1` and `--sft_coef=10`: which gives more right answers at the same divergence?
# 3. `[:round(wrong * number)]`: with [round(wrong * number):] all other pairs are exchanged, so the
#    long answer is preferred. Which panels are mirrored, and which are not?

@exits_cleanly
def main(argv):
    quick = dict(betas=(0.1, 1.0), seeds=(0,), pairs=32, questions=8, trunk_steps=10, sft_steps=5,
                 width=32)
    runs.main("preferences", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
