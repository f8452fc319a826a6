"""Lab: when a model should see labelled data, and what its stable trunk is good for later (paper section 5, table 1; abstract).

Question    There is much text and few questions with answers. Show the answers only at the end (SFT), or also while the learning rate
            falls? And when text of another kind arrives: go on from the stable trunk, or start over?
Claim       SFT data belongs in the decay already: the same SFT afterwards then ends higher (A-2 over A-1), and twice the SFT does not
            make up for having left it out (B-2 against B-3). A stable trunk serves continuous training and domain adaptation.
Write down  before you run it: exact answers (%) of the three rows below, right after the decay and after SFT. And how many updates
            on speeches from nothing are worth the first 150 from a trunk that has read nothing but Python?
Command     python -m labs.annealing        about 17 minutes on two cores; --quick=True: seconds, to see that it works

Three trunks (seeds) of 1.3M parameters read Python source at a constant rate. From each: two decays, with and without instructions in
their data, and SFT of either, which begins at the rate where the decay ended, as the paper's does (1e-3 to 1e-4). Then held-out questions
of data/instruct are answered greedily: right is what is the same to the letter. Beside it the trunk goes on with State of the Union
addresses, and a new model starts over on the same ones.
"""
# %%
import os
from dataclasses import dataclass

import numpy as np

import train
from configurator import ROOT, BadInput, exits_cleanly
from data.dataset import open_corpus
from data.tokenizer import load_tokenizer
from labs import runs
from labs.runs import Check
from model import MiniCPM
from tools import evaluate

PLAIN, LABELLED = "pytorch", "pytorch:0.7,instruct:0.3"      # data of the decay
ROWS = {"A-1, B-1": (PLAIN, 1), "B-2": (PLAIN, 2), "A-2, B-3": (LABELLED, 1)}     # paper's rows: (decay, times the SFT)
PAPER = {"A-1": (40.0, 41.5, 44.6, 27.7, 5.1, 27.7, 24.4), "A-2": (52.6, 51.1, 50.9, 42.3, 5.4, 30.4, 30.3),     # table 1, seven benchmarks
         "B-1": (40.9, 41.5, 47.9, 34.2, 7.9, 43.9, 30.5), "B-2": (41.2, 42.0, 47.9, 34.4, 7.3, 43.9, 29.8),
         "B-3": (49.1, 46.8, 49.6, 31.8, 10.5, 44.5, 32.8)}
DECAY_SHARE = 0.2               # of a run on the new domain


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)              # a trunk each
    width: int = 128                                # of four layers, heads of 64 or fewer
    batch_size: int = 8                             # sequences of 256 tokens
    trunk: int = 1500                               # updates at a constant rate
    decay: int = 400                                # updates
    sft: int = 400                                  # updates; once through the 3,177 rows of data/instruct
    domain: tuple[int, ...] = (150, 300, 600)       # updates on the new domain
    questions: int = 800                            # held out
    eval_tokens: int = 65536                        # of either domain
    data_dir: str = "data"                          # where the corpora are; relative to the project


# %% The experiment: a model's life is a list of stages, and train.py makes each from the checkpoint of the one before

def trained(*stages):
    """Folder of the last run of a list of stages (config files and options, how it starts from the one before); what is there is
    not run again, what was interrupted goes on."""
    folder = None
    for n, (words, start) in enumerate(stages, 1):
        before, folder = folder, runs.folder("annealing", stages[:n])
        if not runs.finish(train.main, *words, **({start: before} if start else {}), out_dir=folder, eval_interval=0, eval_tokens=2048,
                           save_interval=500, keep_last=1, sample_tokens=0, compile=False):
            raise BadInput(f"{folder}: its loss is no number; give the stage ({' '.join(words)}) a lower learning_rate")
    return folder


def from_nothing(seed, data, steps, decay, width, batch_size, data_dir):
    """The stage that begins a model; decay 0: a trunk."""
    return ["config/laptop.py", *runs.options(
        data=data, seed=seed, max_steps=steps, decay_steps=decay, n_embd=width, n_head=max(1, width // 64), n_ff=width * 5 // 2,
        batch_size=batch_size, data_dir=data_dir, learning_rate=0.01, min_lr=0.001)], None


def trunk_of(seed, trunk, shape):
    return from_nothing(seed, PLAIN, trunk, 0, **shape)


def make_trunk(seed, trunk, shape):
    trained(trunk_of(seed, trunk, shape))


def labels(seed, decay_data, times, trunk, decay, sft, questions, eval_tokens, shape):
    """Decay on decay_data, then SFT of `times` lengths from it -> {"bpb" of Python after the decay, "decay" and each of times:
    {"exact": %, "families": {name: %}}}"""
    stages = [trunk_of(seed, trunk, shape), (["config/laptop_anneal.py", *runs.options(decay_data=decay_data, decay_steps=decay)], "branch_from")]
    folder = trained(*stages)
    out = {"bpb": bits_per_byte(folder, PLAIN, eval_tokens, shape), "decay": exact_answers(folder, questions, shape)}
    for n in times:
        tuning = ["config/laptop_sft.py", *runs.options(seed=seed, max_steps=n * sft, batch_size=shape["batch_size"],
                                                        data_dir=shape["data_dir"], learning_rate=0.001, min_lr=0.0001)]
        out[str(n)] = exact_answers(trained(*stages, (tuning, "init_from")), questions, shape)
    return out


def adaptation(seed, start, steps, trunk, eval_tokens, shape):
    """`steps` updates on speeches, from the trunk or from nothing, decay included -> {corpus: held-out bits per byte}"""
    decay = round(DECAY_SHARE * steps)
    if start == "nothing":
        stages = [from_nothing(seed, "speeches", steps, decay, **shape)]
    else:
        stages = [trunk_of(seed, trunk, shape)]
        if steps:
            stages += [(runs.options(data="speeches", max_steps=trunk + steps, decay_steps=decay), "branch_from")]
    folder = trained(*stages)
    return {corpus: bits_per_byte(folder, corpus, eval_tokens, shape) for corpus in ("pytorch", "speeches")}


def exact_answers(folder, questions, shape):
    model, tokenizer = MiniCPM.from_pretrained(folder).eval(), load_tokenizer("bpe4096")
    found = evaluate.exact(model, tokenizer, evaluate.EvaluateConfig(questions=questions, batch_size=100),
                           ROOT / shape["data_dir"] / "instruct" / "test.jsonl")
    return {"exact": 100 * found["exact"], "families": {name: 100 * share for name, (share, _, _) in found["families"].items()}}


def bits_per_byte(folder, corpus, eval_tokens, shape):
    model, tokenizer = MiniCPM.from_pretrained(folder).eval(), load_tokenizer("bpe4096")
    config = evaluate.EvaluateConfig(eval_tokens=eval_tokens)
    return evaluate.bits_per_byte(model, open_corpus(shape["data_dir"], corpus, tokenizer, "val"), tokenizer, config, 256)["bpb"]


def experiment(settings, config):
    """(({decay_data: [labels of each seed]}, {(start, steps): [adaptation of each seed]}), stale)"""
    shape = {name: getattr(settings, name) for name in ("width", "batch_size", "data_dir")}
    rest = {"trunk": settings.trunk, "eval_tokens": settings.eval_tokens, "shape": shape}
    decays = [dict(seed=seed, decay_data=data, times=times, decay=settings.decay, sft=settings.sft, questions=settings.questions, **rest)
              for data, times in ((PLAIN, [1, 2]), (LABELLED, [1])) for seed in settings.seeds]
    domains = [dict(seed=seed, start=start, steps=steps, **rest) for start, steps in places(settings) for seed in settings.seeds]
    lacking = [job for work, jobs in ((labels, decays), (adaptation, domains)) for job in runs.lacking("annealing", work, jobs, config).values()]
    if lacking and not config.draw:
        runs.prepare(config, data="pytorch:1,speeches:1,instruct:1", tokenizer="bpe4096", data_dir=settings.data_dir)
        trunks = {seed: dict(seed=seed, trunk=settings.trunk, shape=shape) for seed in sorted({job["seed"] for job in lacking})}
        for _ in runs.run(make_trunk, trunks, config.workers or os.cpu_count()):      # before anything wants to go on from them
            pass
    (by_decay, old), (by_place, older) = runs.collect("annealing", labels, decays, config), runs.collect("annealing", adaptation, domains, config)
    of_each = len(settings.seeds)
    return ({data: by_decay[i * of_each:][:of_each] for i, data in enumerate((PLAIN, LABELLED))},
            {place: by_place[i * of_each:][:of_each] for i, place in enumerate(places(settings))}), old or older


def places(settings):
    """(start, updates) of all runs on the new domain; ("trunk", 0) is the trunk as it is."""
    return [("trunk", 0), *((start, steps) for start in ("trunk", "nothing") for steps in settings.domain)]


# %% The figure

def draw(results, settings, path, stale):
    by_decay, by_place = results
    figure, axes = runs.figure(2, 2, "Labelled data in the decay, and a new domain for a stable trunk", stale, width=6, height=3.8)
    (answers, families), (new, old) = axes
    for x, (data, times) in enumerate(ROWS.values()):
        for style, stage in ((runs.STYLES[1], "decay"), (runs.STYLES[0], str(times))):
            values = [result[stage]["exact"] for result in by_decay[data]]
            answers.plot([x - 0.12] * len(values), values, color=style["color"], marker=style["marker"], linestyle="", fillstyle="none",
                         label=("after the decay" if stage == "decay" else "after SFT") if x == 0 else None)
            answers.plot([x - 0.12], [np.mean(values)], color=style["color"], marker="_", markersize=22, linestyle="")
    for run, x, marker in (("A-1", 0, "D"), ("A-2", 2, "D"), ("B-1", 0, "^"), ("B-2", 1, "^"), ("B-3", 2, "^")):
        answers.plot([x + 0.15], [np.mean(PAPER[run])], color="0.5", marker=marker, linestyle="",
                     label={"A-1": "paper's A (2.4B), mean of its seven", "B-1": "paper's B (1.2B)"}.get(run))
    answers.set_xticks(range(3), [f"{row}\ndecay: {data.replace(',', ' ')}\nSFT x {times}" for row, (data, times) in ROWS.items()], fontsize=7)
    answers.set(ylabel="right answers (%)", title="questions answered exactly: each seed, and the mean", ylim=(0, None), xlim=(-0.5, 2.5))
    answers.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.9))

    names = list(by_decay[PLAIN][0]["1"]["families"])
    for offset, style, (row, (data, times)) in zip((-0.2, 0, 0.2), runs.STYLES, ROWS.items()):
        values = np.array([[result[str(times)]["families"][name] for name in names] for result in by_decay[data]])
        families.errorbar(np.arange(len(names)) + offset, values.mean(0), [values.mean(0) - values.min(0), values.max(0) - values.mean(0)],
                          label=row, **{**style, "linestyle": ""})
    families.set_xticks(range(len(names)), names, fontsize=7)
    families.set(ylabel="right answers (%)", title="after SFT, by kind of task (bars: lowest and highest seed)", ylim=(-2, 102))
    families.legend(fontsize=7)

    for ax, corpus in ((new, "speeches"), (old, "pytorch")):
        for style, start in zip(runs.STYLES, ("trunk", "nothing")):
            steps = [n for s, n in places(settings) if s == start]
            values = np.array([[result[corpus] for result in by_place[start, n]] for n in steps]).T      # (seeds, lengths)
            tokens = np.array(steps) * settings.batch_size * 256 / 1e6
            runs.curve(ax, tokens, values, style, label=f"from the {start}" if start == "trunk" else "starting over")
        ax.set(xlabel="tokens of speeches (millions)", ylabel="held-out bits per byte",
               title="the new domain (speeches)" if corpus == "speeches" else "what becomes of the old one (pytorch)")
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)


# %% The checks

def checks(results, settings):
    by_decay, by_place = results
    exact = {row: [result[str(times)]["exact"] for result in by_decay[data]] for row, (data, times) in ROWS.items()}
    mean = {run: np.mean(scores) for run, scores in PAPER.items()}
    plain, twice, labelled = exact.values()
    cost = np.mean([result["bpb"] for result in by_decay[LABELLED]]) - np.mean([result["bpb"] for result in by_decay[PLAIN]])
    bpb = {place: [result["speeches"] for result in results] for place, results in by_place.items()}
    return [
        Check("SFT data in the decay, then SFT (A-2), above SFT alone (A-1), from every trunk",
              f"{spread(labelled)} against {spread(plain)} % exact; the mixture costs {cost:+.3f} bits per byte of Python",
              f"{mean['A-2']:.1f} against {mean['A-1']:.1f}", all(a > b for a, b in zip(labelled, plain))),
        Check("twice the SFT (B-2) does not make up for it (B-3), from any trunk", f"{spread(twice)} against {spread(labelled)} % exact",
              f"{mean['B-2']:.1f} against {mean['B-3']:.1f}", all(a > b for a, b in zip(labelled, twice))),
        Check("going on from the trunk on a new domain is ahead of starting over at equal tokens of it",
              "; ".join(f"{n} updates: {spread(bpb['trunk', n], 3)} against {spread(bpb['nothing', n], 3)} bits per byte" for n in settings.domain),
              "-", all(max(bpb["trunk", n]) < min(bpb["nothing", n]) for n in settings.domain)),
    ]


def spread(values, digits=1):
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# %% What it means: the 2.4B's decay is 18,500 updates of 4M tokens, a fifteenth of all that it reads and twelve times its SFT; what is in the
# data then, it learns while the rate falls. Here too every trunk answers more after SFT when it met instructions in its decay, and for the
# price of 0.03 bits per byte of what else the decay would have taught it. And a trunk is kept: each new mixture or domain costs a decay, not
# a pre-training.
#
# One check does not hold: twice the SFT gets further than instructions in the decay. B-2 sees more conversations than A-2 does in decay and
# SFT together, and our held-out questions are of the very kinds that SFT trains on, so that more of it is more of the right thing. The paper's
# benchmarks are not of the kind of its SFT data: what is measured there is what a model knew before, and that is where a decay can add.
#
# Exercises
# 1. `learning_rate=0.001, min_lr=0.0001` of the SFT: at 0.003, three times where the decay ended, what is left of the difference?
# 2. `LABELLED`: instruct:0.1 and instruct:0.9. Where is the best mixture after the decay, where after SFT? What does Python pay?
# 3. `data="speeches"` of the branch: mix in pytorch:0.2. How much of the old domain stays, and what does the new one pay?

@exits_cleanly
def main(argv):
    quick = dict(seeds=(0,), width=32, batch_size=2, trunk=4, decay=2, sft=2, domain=(4,), questions=8, eval_tokens=1024)
    settings, config = runs.settings(argv, Settings, quick, __doc__)
    results, stale = experiment(settings, config)
    draw(results, settings, runs.path("annealing", "figures", config), stale)
    runs.report(checks(results, settings), stale)


if __name__ == "__main__":
    main()
