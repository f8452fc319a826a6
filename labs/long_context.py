"""Lab: reading further than the trained length (paper section 7.2, table 5).

Question    A model that was trained on 256 tokens is given 1,024. What do a larger RoPE base (ABF)
            and NTK-aware scaling do there, alone and together, and which of them needs training?
Claim       The paper extends 4K to 128K in two steps, first by a larger base and then by NTK-aware
            scaling, and trains on 44 % long and 56 % short data. Keys hidden in running text are
            then found at almost every length and depth. (Scores within 4K fall, says the release.)
Write down  before you run it: the share of keys found at 1,024 tokens with each change of RoPE,
            after training at 256 and after training at 1,024. Which of them work at 2,048? Does
            NTK-aware scaling need the larger base?
Command     python -m labs.long_context     45 minutes on two cores (29 are recorded: two of the
                                            base models were trained apart from the lab);
                                            --quick=True: a few seconds, to see that it works

Three base models learn code, each from its own initial weights, and then to find keys within 256
tokens. Each is trained on for the same number of tokens from the same mixture: at 1,024 tokens with
each of four RoPEs, and, as the control, at 256 tokens without change. The control gets the four
RoPEs only when it is measured. Measured are the keys found by length and depth, and the loss by
position in held-out speeches.

At any one length NTK-aware scaling is a larger base and nothing else: 141,000 at 1,024 tokens and
323,000 at 2,048 (ten times that if the base is larger too). So at 1,024 "base" and "NTK" compare a
base of 100,000 with one of 141,000. Only a change of length tells them apart. The control is
therefore measured with a fixed base of 141,000 too.
"""
# %%
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from configurator import ROOT, exits_cleanly
from data import passkeys
from data.dataset import open_corpus
from family import passkey
from labs import runs
from labs.runs import Check
from tools import evaluate

SHORT, LONG = 256, 1024                     # trained lengths
BASE = {"rope_theta": 100_000.0}            # instead of 10,000
# The base grows with the length of the input, from the length that the model was trained at.
NTK = {"rope_scaling": "dynamic", "rope_factor": 4.0}
VARIANTS = {"no change": {}, "base": BASE, "NTK": NTK, "base + NTK": {**BASE, **NTK}}
FIXED = "NTK's base, fixed"
UNTRAINED = {**VARIANTS, FIXED: {"rope_theta": 141_000.0}}      # that of NTK at LONG tokens
# Of the continuation, as in config/laptop_long_1024.py. Long documents are cut to the rows' length.
MIXTURE = "passkey_{length}:0.36,speeches_long:0.08,pytorch:0.56"


@dataclass
class Settings:
    code_steps: int = 5000      # of a base model, of code alone
    short_steps: int = 2000     # then with keys, at 256 tokens
    more_steps: int = 400       # of its continuation, at 256 or 1,024 tokens
    seeds: tuple[int, ...] = (0, 1, 2)          # of the base model, weights and data
    lengths: tuple[int, ...] = (SHORT, 512, LONG, 2 * LONG)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    questions: int = 15         # per length and depth
    windows: int = 40           # of 1,024 held-out tokens, for the loss by position
    data_dir: str = "data"      # folder of the corpora, relative to the project

    def problems(self):
        if not {SHORT, LONG, 2 * LONG} <= set(self.lengths):
            return [f"--lengths={self.lengths}: needs {SHORT}, {LONG} and {2 * LONG}"]
        return []


# %% The experiment

def prepare(data_dir):
    """Prepare the corpora of the mixture and the questions."""
    for name, *options in (
            ["pytorch"], ["speeches"], ["speeches", "--min_doc_tokens=2048", "--suffix=_long"],
            ["passkey", f"--block_size={SHORT}"], ["passkey", f"--block_size={LONG}"]):
        script = str(ROOT / "data" / name / "prepare.py")
        subprocess.run([sys.executable, script, f"--data_dir={data_dir}", *options], check=True)


def stage(config_file, steps, seed, data_dir, **options):
    """Train a stage; every update has 2,048 tokens."""
    return runs.train_stage("long_context", config_file, max_steps=steps, seed=seed,
                            data_dir=data_dir, sample_tokens=0, eval_tokens=4096, **options)


def train_base(seed, code_steps, short_steps, data_dir):
    """Train a model on code, and then to find keys within 256 tokens."""
    code = stage("config/laptop.py", code_steps, seed, data_dir, minutes=None)
    return stage("config/laptop_long_256.py", short_steps, seed, data_dir, init_from=code)


def train_on(base, length, steps, seed, data_dir, **options):
    """Train a base model on, with rows of this length."""
    return stage("config/laptop_long_1024.py", steps, seed, data_dir, init_from=base,
                 data=MIXTURE.format(length=length), block_size=length,
                 batch_size=2 * LONG // length, max_position=SHORT,
                 **{"rope_theta": 10_000.0, **options})


def measure(ckpt, variant, lengths, depths, questions, windows, data_dir):
    """Return the measures of a checkpoint with a variant of RoPE.

    {"keys": {length: [share of keys found at each depth]},
     "positions": [(first, last, nats per token)]}
    """
    model, tokenizer = runs.load_model(ckpt)
    evaluate.change_rope(model, evaluate.EvaluateConfig(**UNTRAINED[variant]))
    filler = passkeys.open_filler(data_dir, "speeches", tokenizer, "val")
    speeches = open_corpus(data_dir, "speeches", tokenizer, "val")
    keys = passkey.retrieval(model, tokenizer, filler, lengths, depths, questions, 1337, 2 * LONG)
    positions = passkey.loss_by_position(model, speeches, tokenizer, LONG, windows * LONG)
    return {"keys": keys, "positions": positions}


def stay(seed, code_steps, short_steps, more_steps, data_dir, **measured):
    """Train a base model, train on at 256 tokens, and return {variant: measures}."""
    base = train_base(seed, code_steps, short_steps, data_dir)
    ckpt = train_on(base, SHORT, more_steps, seed, data_dir)
    return {variant: measure(ckpt, variant, data_dir=data_dir, **measured) for variant in UNTRAINED}


def extend(variant, seed, code_steps, short_steps, more_steps, data_dir, **measured):
    """Change the RoPE of a base model, train on at 1,024 tokens, and return its measures."""
    base = train_base(seed, code_steps, short_steps, data_dir)
    ckpt = train_on(base, LONG, more_steps, seed, data_dir, **VARIANTS[variant])
    return measure(ckpt, variant, data_dir=data_dir, **measured)


def experiment(settings, config):
    """Return {(variant, trained length): [measures of each seed]}."""
    fixed = {name: value for name, value in vars(settings).items() if name != "seeds"}
    stays = [dict(seed=seed, **fixed) for seed in settings.seeds]
    extensions = [dict(variant=variant, **job) for variant in VARIANTS for job in stays]
    if not config.draw and any(runs.missing_jobs("long_context", work, jobs, config)
                               for work, jobs in ((stay, stays), (extend, extensions))):
        prepare(settings.data_dir)      # parallel jobs would otherwise do it at the same time
    stayed = runs.collect("long_context", stay, stays, config)
    if not config.draw and runs.missing_jobs("long_context", extend, extensions, config):
        for seed in settings.seeds:     # stay has done it, unless its results were there already
            train_base(seed, settings.code_steps, settings.short_steps, settings.data_dir)
    extended = runs.collect("long_context", extend, extensions, config)
    by_variant = runs.group(extensions, extended, "variant")
    return {**{(variant, SHORT): [result[variant] for result in stayed] for variant in UNTRAINED},
            **{(variant, LONG): by_variant[variant] for variant in VARIANTS}}


def found(results, variant, trained, length):
    """Return (seeds,) % of the keys that are found at a length, mean over the depths."""
    keys = [result["keys"][str(length)] for result in results[variant, trained]]
    return 100 * np.mean(keys, axis=1)


# %% The figure: heat maps above, loss by position below

def draw(results, settings):
    figure, axes = runs.figure(3, len(UNTRAINED), "Keys found (%), and loss by position in "
                               "held-out speeches, by the change of RoPE and the length of further "
                               "training", width=3.8, height=2.8)
    axes[1, -1].set_visible(False)              # FIXED is not trained on at LONG
    for column, variant in enumerate(UNTRAINED):
        losses = axes[2, column]
        for ax, length, style in zip(axes[:, column], (SHORT, LONG), runs.STYLES):
            if (variant, length) not in results:
                continue
            of_seeds, label = results[variant, length], f"trained on at {length:,}"
            shares = 100 * np.mean([[result["keys"][str(tokens)] for tokens in settings.lengths]
                                    for result in of_seeds], axis=0).T          # (depths, lengths)
            ax.imshow(shares, cmap="Greys", vmin=0, vmax=220, aspect="auto")
            for (y, x), share in np.ndenumerate(shares):
                ax.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
            ax.set_xticks(range(len(settings.lengths)), settings.lengths)
            ax.set_yticks(range(len(settings.depths)), settings.depths)
            ax.grid(False)
            ax.set(xlabel="tokens", ylabel="depth of the key", title=f"{variant}, {label}")
            positions = np.array([result["positions"] for result in of_seeds])  # (seeds, ranges, 3)
            runs.curve(losses, positions[0, :, 1], positions[:, :, 2], style, label=label)
        losses.set_xscale("log", base=2)
        losses.axvline(SHORT, color="0.5")
        losses.set(xlabel="position (up to)", ylabel="nats per token")
        losses.sharey(axes[2, 0])
    return figure


def slide(ax, results, settings):
    for style, variant in zip(runs.STYLES, VARIANTS):
        shares = [found(results, variant, LONG, length) for length in settings.lengths]
        runs.curve(ax, settings.lengths, np.array(shares).T, style, label=variant)
    ax.axvline(LONG, color="0.5")
    ax.set(xlabel=f"tokens (trained on at {LONG:,})", ylabel="keys found (%)", ylim=(-3, 103))
    runs.log_x(ax, settings.lengths)
    if only_ntk_goes_far(results)[0]:
        return "Only NTK-aware RoPE finds keys at twice the trained length"
    far = [name for name in VARIANTS if found(results, name, LONG, 2 * LONG).mean() > FAR]
    return f"At twice the trained length keys are found with {', '.join(far) or 'no RoPE'} only"


# %% The checks

MOST, FEW, FAR, NATS = 90, 5, 25, 0.05      # thresholds: % of the keys, and nats per token


def checks(results, settings):
    only_ntk, far = only_ntk_goes_far(results)
    stayed, stayed_long, long, long_base, fixed, ntk = (found(results, *case) for case in (
        ("no change", SHORT, SHORT), ("no change", SHORT, LONG), ("no change", LONG, LONG),
        ("base", LONG, LONG), (FIXED, SHORT, SHORT), ("NTK", SHORT, SHORT)))
    first = [np.array([result["positions"][0][2] for result in results["no change", length]])
             for length in (SHORT, LONG)]
    return [
        Check(f"the model finds {MOST} % of the keys or more at {SHORT} tokens, its trained length",
              percent(stayed), stayed.mean() >= MOST),
        Check(f"unchanged, it finds {FEW} % or fewer at {LONG}", percent(stayed_long),
              stayed_long.mean() <= FEW),
        Check(f"training at {LONG} teaches it even without a change of RoPE: more keys there than "
              f"after the same tokens at {SHORT}, for every base model",
              compared(long, stayed_long), (long > stayed_long).all(),
              runs.p_value(long - stayed_long)),
        Check(f"with a larger base and training at {LONG} it finds {MOST} % or more there",
              percent(long_base), long_base.mean() >= MOST, paper="98 % at 128K (table 5)"),
        Check(f"after the same training a larger base beats no change at {LONG}, for every base "
              "model", compared(long_base, long), (long_base > long).all(),
              runs.p_value(long_base - long)),
        Check(f"never trained at {LONG}, a base fixed at what NTK-aware scaling takes there finds "
              f"fewer keys at {SHORT} than NTK-aware scaling, for every base model",
              compared(ntk, fixed), (ntk > fixed).all(), runs.p_value(ntk - fixed)),
        Check(f"at {2 * LONG}, after training at {LONG}, both RoPEs with NTK-aware scaling find "
              f"more than {FAR} % of the keys, and both without it fewer", far, only_ntk),
        Check(f"the first 32 positions are predicted at most {NATS} nats worse after training at "
              f"{LONG} than after the same tokens of the same mixture at {SHORT}",
              " against ".join(f"{runs.mean_and_range(nats, '.3f')}" for nats in first[::-1])
              + " nats", first[1].mean() <= first[0].mean() + NATS, paper="worse"),
    ]


def only_ntk_goes_far(results):
    """Return (whether the variants with NTK, and no others, find keys at 2,048, the shares)."""
    far = {variant: found(results, variant, LONG, 2 * LONG) for variant in VARIANTS}
    return (all((shares.mean() > FAR) == ("NTK" in variant) for variant, shares in far.items()),
            "; ".join(f"{variant} {percent(shares)}" for variant, shares in far.items()))


def percent(values):
    return f"{runs.mean_and_range(values, '.0f')} %"


def compared(higher, lower):
    return f"{percent(higher)} against {percent(lower)}"


# %% What it means: beyond the trained length the slow components of RoPE reach angles that the
# model has never seen. Unchanged, it finds no key there, and its loss rises by a nat. A larger base
# keeps more of the angles within what was seen. Without training at 1,024 a base of 100,000 finds
# 12 % of the keys there, the 141,000 of NTK-aware scaling 64 %, and base + NTK, with 1.4M, 42 %.
# The loss by position hardly shows it: between 512 and 1,024 it is 3.85 nats with 12 % of the keys
# and 3.78 with 64 %, and 3.71 after training there.
#
# Training at 1,024 matters more than the change of RoPE. After 400 updates the unchanged model
# finds 86 % there, the others 97 to 99 %. The shortest contexts lose nothing by it. At 2,048, twice
# that length, only base + NTK finds keys: 97 %. At 2.4B the paper goes from 4K to 32K by the base
# and on to 128K by NTK (config/minicpm_128k_32k.py, config/minicpm_128k.py).
#
# Two checks do not hold. At 2,048 NTK-aware scaling alone finds 8 %, no more than no change (14 %),
# so both changes are needed together; why was not tested. And the fixed base of 141,000 costs no
# keys at 256 tokens with two base models, 5 % of them with the third. That NTK's base grows only
# with the input is worth little here; a factor of 14 may be too small to show it.
#
# A first try trained the base models on keys from the first update, with speeches and code. After
# 3,000 updates none of the three found a key, not even at 256 tokens.
#
# Exercises
# 1. `"rope_theta": 100_000.0`: try 1_000_000. Which rows of the heat map get worse?
# 2. `rope_factor`: 8 instead of 4. Does it work at 4,096 tokens (add that to --lengths)?
# 3. `MIXTURE`: a quarter of the keys (0.09, and 0.83 of pytorch). Are keys still found at 1,024,
#    and does the loss by position change?

@exits_cleanly
def main(argv):
    quick = dict(code_steps=2, short_steps=2, more_steps=1, seeds=(0, 1), windows=1, questions=1,
                 lengths=(SHORT, LONG, 2 * LONG), depths=(0.5,))
    runs.main("long_context", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
