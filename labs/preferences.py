"""Lab: what preferences do to a model, and what they cost (paper section 7.1).

Question    A model that has learned to answer is trained on pairs of answers, one of them
            preferred. What changes, and what is lost?
Claim       DPO makes the model answer as preferred, and it costs a little of what the model knew:
            the alignment tax. The paper's MT-Bench rises from 6.89 to 7.25 while the mean of its
            knowledge benchmarks falls from 52.33 to 51.60 (tables 3 and 4). beta keeps the model
            close to the reference: the larger beta, the smaller the KL divergence.
Write down  before you run it: both answers of each pair are correct, and the short one is preferred
            ("7", not "The answer is 7."). Will the model give fewer right answers afterwards? Which
            beta costs most: 0.05 or 1? What does an SFT term on the preferred answers change?
Command     python -m labs.preferences      about 6 minutes on two cores; --quick=True: a few
                                            seconds, to see that it works
            python -m labs.preferences --ckpt=PATH      the same from your own SFT run; results are
                                            stored under the hash of its weights

The lab trains the model that DPO starts from: a short laptop run with instructions in its decay,
then SFT. All DPO runs start from it and use the same pairs; the seed sets their order. The
preference can be measured (tokens per answer), and so can the tax: the share of held-out questions
that are answered exactly, in either form of the answer.
"""
# %%
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, exits_cleanly
from data import packing
from data.tokenizer import chat_ids
from engine import checkpoint, metrics
from family import dpo
from labs import runs
from labs.runs import Check
from tools import evaluate

QUESTIONS = ROOT / "data" / "instruct" / "test.jsonl"
COMMON = dict(compile=False, eval_interval=0, save_interval=0)
PAPER_TAX = 52.33 - 51.60       # points; mean of the benchmarks in tables 3 and 4


@dataclass
class Settings:
    betas: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
    sft_coefs: tuple[float, ...] = (0.0, 1.0)   # weights of the SFT term
    seeds: tuple[int, ...] = (0, 1, 2)          # of the order of the pairs
    pairs: int = 800                            # training pairs
    val_pairs: str | None = "data/instruct/pairs_test.jsonl"    # unset: 5 % of the prompts
    batch_size: int = 16                        # pairs per update
    questions: int = 800                        # held-out questions
    ckpt: str | None = None                     # SFT run to start from; unset: the lab trains one
    trunk_steps: int = 1500                     # of the lab's own model; 40 % of them are decay
    sft_steps: int = 800
    width: int = 128

    def problems(self):
        if len(set(self.betas)) < 2:
            return [f"--betas={self.betas}: needs two or more values to compare"]
        return []


# %% The model to start from

def start_folder(start):
    """Return the run folder of the model that DPO starts from.

    start    {"weights": hash} of a checkpoint copied by keep_copy, or {"trunk_steps", "sft_steps",
             "width"} of a model that is trained here unless it is there
    """
    if "weights" in start:
        return runs.folder("preferences", start)
    width = start["width"]
    trunk = runs.train_stage(
        "preferences", "config/laptop.py", minutes=None, max_steps=start["trunk_steps"],
        decay_share=0.4, decay_data="pytorch:0.7,instruct:0.3", n_embd=width,
        n_head=max(1, width // 64), n_ff=width * 5 // 2, sample_tokens=0, eval_tokens=16384,
        **COMMON)
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


# %% The measures

def answers(folder, questions):
    """Return {"exact": share of right answers to held-out questions, "tokens": mean per answer}."""
    model, tokenizer = runs.load_model(folder)
    config = evaluate.EvaluateConfig(questions=questions)
    found = evaluate.exact(model, tokenizer, config, QUESTIONS)
    return {"exact": found["exact"], "tokens": found["answer_tokens"]}


@torch.no_grad()
def divergence(folder, start, questions):
    """Return KL(policy || reference) in nats per answer.

    Answers are sampled from the policy; the divergence at each of their tokens, the stop token
    included, is exact.
    """
    (policy, tokenizer), (reference, _) = runs.load_model(folder), runs.load_model(start)
    asked = itertools.islice(packing.read_questions(QUESTIONS), questions)
    prompts = [chat_ids(tokenizer, messages, generate=True)[0] for messages, _, _ in asked]
    nats = []
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
    return float(np.mean(nats))


# %% The experiment

def tuned(start, questions):
    """Return the answers of the model before DPO."""
    return answers(start_folder(start), questions)


def aligned(start, beta, sft_coef, seed, pairs, val_pairs, batch_size, questions):
    """Run DPO once; return its training curve and all measures, or None if it diverges."""
    job = dict(start=start, beta=beta, sft_coef=sft_coef, seed=seed, pairs=pairs,
               val_pairs=val_pairs, batch_size=batch_size)
    folder, origin = runs.folder("preferences", job), start_folder(start)
    if not runs.finish(dpo.main, "config/laptop_dpo.py", init_from=origin, out_dir=folder,
                       beta=beta, sft_coef=sft_coef, seed=seed, max_pairs=pairs,
                       val_pairs=val_pairs, batch_size=batch_size, log_interval=5, **COMMON):
        return None
    training, held_out = metrics.read(folder)
    curve = {name: [line[name] for line in training] for name in ("step", "margin", "accuracy")}
    result = {"curve": curve, "kl": divergence(folder, origin, min(questions, 200)),
              **answers(folder, questions)}
    for name in ("margin", "accuracy", "chosen_reward", "rejected_reward"):
        result[name] = held_out[-1][f"val_{name}"]
    shutil.rmtree(folder)
    return result


def experiment(settings, config):
    """Return ((before, after), stale).

    before    result of tuned
    after     {(sft_coef, beta): [result of aligned for each seed]}
    """
    runs.prepare(config, data="pytorch", decay_data="instruct", tokenizer="bpe4096")
    if settings.ckpt:
        start = keep_copy(settings.ckpt)
    else:
        start = {name: getattr(settings, name) for name in ("trunk_steps", "sft_steps", "width")}
    common = dict(start=start, questions=settings.questions)
    (before,), before_stale = runs.collect("preferences", tuned, [common], config)
    jobs = [dict(beta=beta, sft_coef=sft_coef, seed=seed, pairs=settings.pairs,
                 val_pairs=settings.val_pairs, batch_size=settings.batch_size, **common)
            for sft_coef in settings.sft_coefs for beta in settings.betas
            for seed in settings.seeds]
    if not config.draw and runs.missing_jobs("preferences", aligned, jobs, config):
        start_folder(start)     # parallel jobs would otherwise train it at the same time
    results, after_stale = runs.collect("preferences", aligned, jobs, config)
    return (before, runs.group(jobs, results, "sft_coef", "beta")), before_stale or after_stale


def values(after, sft_coef, name):
    """Return (seeds, betas) of one measure, nan for a run that diverged."""
    return np.array([[result[name] if result else np.nan for result in results]
                     for (coef, beta), results in after.items() if coef == sft_coef]).T


# %% The figure

def draw(results, settings):
    before, after = results
    figure, axes = runs.figure(
        2, 3, f"DPO on {settings.pairs} pairs: of two right answers the short one is preferred")
    training, accuracy, divergences, tokens, exact, gains = axes.flat
    for style, beta in zip(runs.STYLES, settings.betas):
        curves = [result["curve"] for result in after[settings.sft_coefs[-1], beta] if result]
        if curves:
            margins = np.array([curve["margin"] for curve in curves])
            runs.curve(training, curves[0]["step"], margins, style, label=f"beta {beta:g}")
    training.set(xlabel="updates", ylabel="nats",
                 title=f"training margin, SFT term x {settings.sft_coefs[-1]:g}")

    betas = np.array(settings.betas)
    for style, coef in zip(runs.STYLES, settings.sft_coefs):
        label = f"SFT term x {coef:g}"
        for ax, name in ((accuracy, "accuracy"), (divergences, "kl"), (tokens, "tokens"),
                         (exact, "exact")):
            runs.curve(ax, betas, values(after, coef, name), style, label=label)
        for name, fill in (("chosen", "full"), ("rejected", "none")):
            nats = values(after, coef, f"{name}_reward") / betas
            runs.curve(gains, betas, nats, style, label=f"{name}, {label}", fillstyle=fill)
    tokens.axhline(before["tokens"], color="0.4", label="before")
    exact.axhline(before["exact"], color="0.4", label="before")
    taxed = before["exact"] - PAPER_TAX / 100
    exact.axhline(taxed, color="0.4", linestyle=":", label="paper's tax")
    for ax, title in ((accuracy, "accuracy on held-out pairs"),
                      (divergences, "KL(policy || reference), nats per answer"),
                      (tokens, "tokens per answer"), (exact, "share of exact answers"),
                      (gains, "gain in log-probability, held-out (nats)")):
        ax.set(title=title, xlabel="beta", xscale="log")
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.minorticks_off()
    accuracy.set_ylim(0.45, 1.02)
    return figure


# %% The checks

def checks(results, settings):
    before, after = results
    accuracy, tokens, exact, kl = (                     # means over the seeds: (sft_coefs, betas)
        np.array([values(after, coef, name).mean(0) for coef in settings.sft_coefs])
        for name in ("accuracy", "tokens", "exact", "kl"))
    tax = 100 * (before["exact"] - exact[-1])
    found = [
        Check("on held-out pairs the preferred answer gains more than the other, for every beta",
              f"in at least {100 * accuracy.min():.1f} %", "-", accuracy.min() >= 0.8),
        Check("the model adopts the preference: its answers get shorter by a token or more",
              f"from {before['tokens']:.1f} to between {tokens.min():.1f} and "
              f"{tokens.max():.1f} tokens", "-", tokens.max() <= before["tokens"] - 1),
        Check(f"with SFT term x {settings.sft_coefs[-1]:g} the alignment tax is 3 points at most",
              f"{tax.min():+.1f} to {tax.max():+.1f} points of {100 * before['exact']:.1f} %",
              f"{PAPER_TAX:+.1f} points of 52.3 %", tax.max() <= 3),
    ]
    for coef, divergences in zip(settings.sft_coefs, kl[:, np.argsort(settings.betas)]):
        found.append(Check(
            f"the larger beta, the smaller the KL divergence (SFT term x {coef:g})",
            f"{', '.join(f'{nats:.2f}' for nats in divergences)} nats per answer", "-",
            all(np.diff(divergences) < 0)))
    return found


# %% What it means: a preference between two answers that differ only in form is learned within tens
# of updates, far fewer than SFT took. The loss is another matter: the preference loss does not ask
# that the chosen answer stay likely, only that it gain more than the other (last panel). Without an
# SFT term almost a fifth of the right answers is lost, with it none. At the paper's scale the same
# loss runs for one epoch at a learning rate of 1e-5.
#
# Two checks do not hold: beta does not order the divergences. beta sets how far the minimum of the
# loss is from the reference, and in fifty updates no run reaches that minimum. On the way there the
# gradient of the preference loss is proportional to beta, but AdamW normalises the gradient: from
# 0.05 to 0.5 the runs make almost the same steps. With the SFT term, beta is the weight of the
# preference loss against it, so a larger beta goes further.
#
# Exercises
# 1. `--betas=0.005,0.1,1`: does the model stay close to the reference at 0.005? To talk to such a
#    model, use that beta in the README's commands for family/dpo.py and sample.py.
# 2. `--sft_coefs=0.1,10`: from which weight on is the chosen answer as likely as before?
# 3. `CHOSEN, REJECTED` in family/dpo.py: swap them, so that the long answer is preferred. Which
#    panels are mirrored, and which are not?

@exits_cleanly
def main(argv):
    quick = dict(betas=(0.1, 1.0), seeds=(0,), pairs=64, val_pairs=None, questions=16,
                 trunk_steps=10, sft_steps=5, width=32)
    runs.main("preferences", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
