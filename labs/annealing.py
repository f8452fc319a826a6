"""Lab: when to show labelled data, and what a stable trunk is good for (paper section 5, table 1).

Question    There is much text, and there are few questions with answers. Should the model see the
            answers only at the end (SFT), or also while the learning rate decays? And when text of
            another domain arrives: continue from the stable trunk, or start over?
Claim       SFT data belongs in the decay as well: the same SFT afterwards then ends higher (A-2
            beats A-1), and twice the SFT does not make up for leaving it out (B-3 beats B-2). A
            stable trunk can be trained further and adapted to new domains (abstract).
Write down  before you run it: exact answers (%) of the three rows below, after the decay and after
            SFT. How many updates on speeches from scratch are worth the first 150 from a trunk that
            has read only Python?
Command     python -m labs.annealing    about 17 minutes on two cores; --quick=True: a few seconds,
                                        to see that it works

Three trunks (one per seed) of 1.3M parameters read Python source at a constant learning rate. Two
decays branch from each, with and without instructions in their data. SFT follows both; as in the
paper it begins at the learning rate at which the decay ended. The models then answer held-out
questions of data/instruct greedily; an answer counts if it is exactly the expected one. In the
second experiment the trunk continues on State of the Union addresses, and a new model starts on
the same ones.
"""
# %%
import itertools
import os
from dataclasses import dataclass

import numpy as np

from configurator import ROOT, exits_cleanly
from data.dataset import open_corpus
from labs import runs
from labs.runs import Check
from tools import evaluate

PLAIN, LABELLED = "pytorch", "pytorch:0.7,instruct:0.3"     # data of the decay

# Rows of the paper's table 1: (data of the decay, length of the SFT). Its scores for each row are
# means over the seven benchmarks of that table.
ROWS = {"A-1, B-1": (PLAIN, 1), "B-2": (PLAIN, 2), "A-2, B-3": (LABELLED, 1)}
PAPER = {"A (2.4B)": (30.14, np.nan, 37.57), "B (1.2B)": (35.26, 35.21, 37.87)}

DECAY_SHARE = 0.2               # of a run on the new domain


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)          # one trunk per seed
    width: int = 128                            # of four layers; heads of 64 or fewer
    batch_size: int = 8                         # sequences of 256 tokens
    trunk: int = 1500                           # updates at a constant learning rate
    decay: int = 400                            # updates
    sft: int = 400                              # updates: one epoch of data/instruct
    domain: tuple[int, ...] = (150, 300, 600)   # updates on the new domain
    questions: int = 800                        # held-out questions
    eval_tokens: int = 65536                    # held-out tokens of each domain
    data_dir: str = "data"                      # folder of the corpora, relative to the project


# %% The experiment: each stage of a model's life starts from the checkpoint of the stage before

def stage(*config_files, **options):
    return runs.train_stage("annealing", *config_files, eval_interval=0, eval_tokens=2048,
                       save_interval=500, keep_last=1, sample_tokens=0, compile=False, **options)


def train_from_scratch(seed, data, steps, decay_steps, width, batch_size, data_dir):
    return stage("config/laptop.py", data=data, seed=seed, max_steps=steps, decay_steps=decay_steps,
                 n_embd=width, n_head=max(1, width // 64), n_ff=width * 5 // 2,
                 batch_size=batch_size, data_dir=data_dir, learning_rate=0.01, min_lr=0.001)


def train_trunk(seed, trunk, shape):
    return train_from_scratch(seed, PLAIN, trunk, 0, **shape)


def labels(seed, decay_data, times, trunk, decay, sft, questions, eval_tokens, shape):
    """Decay on decay_data, then run SFT of each length in times.

    returns  {"bpb": bits per byte of Python after the decay, "decay": answers after the decay,
              str(n): answers after n * sft updates of SFT}; answers are those of exact_answers
    """
    decayed = stage("config/laptop_anneal.py", branch_from=train_trunk(seed, trunk, shape),
                    decay_data=decay_data, decay_steps=decay)
    result = {"bpb": bits_per_byte(decayed, PLAIN, eval_tokens, shape),
              "decay": exact_answers(decayed, questions, shape)}
    for n in times:
        tuned = stage("config/laptop_sft.py", init_from=decayed, seed=seed, max_steps=n * sft,
                      batch_size=shape["batch_size"], data_dir=shape["data_dir"],
                      learning_rate=0.001, min_lr=0.0001)
        result[str(n)] = exact_answers(tuned, questions, shape)
    return result


def adaptation(seed, start, steps, trunk, eval_tokens, shape):
    """Train on speeches from the trunk or from nothing; return {corpus: held-out bits per byte}.

    steps    updates on speeches, decay included; 0: measure the trunk
    """
    decay_steps = round(DECAY_SHARE * steps)
    if start == "nothing":
        folder = train_from_scratch(seed, "speeches", steps, decay_steps, **shape)
    else:
        folder = train_trunk(seed, trunk, shape)
        if steps:
            folder = stage(branch_from=folder, data="speeches", max_steps=trunk + steps,
                           decay_steps=decay_steps)
    return {corpus: bits_per_byte(folder, corpus, eval_tokens, shape)
            for corpus in ("pytorch", "speeches")}


def exact_answers(folder, questions, shape):
    """Return {"exact": % of questions answered exactly, "families": {kind of task: %}}."""
    model, tokenizer = runs.load_model(folder)
    config = evaluate.EvaluateConfig(questions=questions, batch_size=100)
    file = ROOT / shape["data_dir"] / "instruct" / "test.jsonl"
    found = evaluate.exact(model, tokenizer, config, file)
    families = {name: 100 * share for name, (share, _, _) in found["families"].items()}
    return {"exact": 100 * found["exact"], "families": families}


def bits_per_byte(folder, corpus, eval_tokens, shape):
    model, tokenizer = runs.load_model(folder)
    held_out = open_corpus(shape["data_dir"], corpus, tokenizer, "val")
    config = evaluate.EvaluateConfig(eval_tokens=eval_tokens)
    return evaluate.bits_per_byte(model, {held_out: 1.0}, tokenizer, config, 256)["bpb"]


def experiment(settings, config):
    """Return ((by_decay, by_place), stale).

    by_decay  {decay_data: [result of labels for each seed]}
    by_place  {(start, steps): [result of adaptation for each seed]}; ("trunk", 0) is the trunk
    """
    shape = {name: getattr(settings, name) for name in ("width", "batch_size", "data_dir")}
    common = dict(trunk=settings.trunk, eval_tokens=settings.eval_tokens, shape=shape)
    decays = [dict(seed=seed, decay_data=data, times=times, decay=settings.decay, sft=settings.sft,
                   questions=settings.questions, **common)
              for data, times in ((PLAIN, [1, 2]), (LABELLED, [1])) for seed in settings.seeds]
    places = [("trunk", 0), *itertools.product(("trunk", "nothing"), settings.domain)]
    domains = [dict(seed=seed, start=start, steps=steps, **common)
               for start, steps in places for seed in settings.seeds]
    missing = [*runs.missing_jobs("annealing", labels, decays, config).values(),
               *runs.missing_jobs("annealing", adaptation, domains, config).values()]
    if missing and not config.draw:
        runs.prepare(config, data="pytorch:1,speeches:1,instruct:1", tokenizer="bpe4096",
                     data_dir=settings.data_dir)
        trunks = {job["seed"]: dict(seed=job["seed"], trunk=settings.trunk, shape=shape)
                  for job in missing}
        # Parallel jobs would otherwise train the same trunk at the same time.
        list(runs.run(train_trunk, trunks, config.workers or os.cpu_count()))
    by_decay, decays_stale = runs.collect("annealing", labels, decays, config)
    by_place, places_stale = runs.collect("annealing", adaptation, domains, config)
    return (runs.group(decays, by_decay, "decay_data"),
            runs.group(domains, by_place, "start", "steps")), decays_stale or places_stale


def exact_percent(by_decay, after_sft):
    """Return (seeds, rows): % of exact answers in each of ROWS, after SFT or after the decay."""
    columns = []
    for data, times in ROWS.values():
        name = str(times) if after_sft else "decay"
        columns.append([result[name]["exact"] for result in by_decay[data]])
    return np.array(columns).T


# %% The figure

def draw(results, settings):
    by_decay, by_place = results
    figure, ((answers, kinds), (new, old)) = runs.figure(
        2, 2, "Labelled data in the decay, and a new domain for a stable trunk (bars and bands: "
        "all seeds)", width=6, height=4)
    x, points = np.arange(len(ROWS)), [{**style, "linestyle": ""} for style in runs.STYLES]
    runs.bars(answers, x - 0.1, exact_percent(by_decay, after_sft=False).T, points[0],
              label="after the decay")
    runs.bars(answers, x - 0.1, exact_percent(by_decay, after_sft=True).T, points[1],
              label="after SFT")
    for (name, scores), style in zip(PAPER.items(), points[2:]):
        answers.plot(x + 0.1, scores, label=f"paper, {name}", fillstyle="none", **style)
    ticks = [f"{row}\n{data}\nSFT x {times}" for row, (data, times) in ROWS.items()]
    answers.set_xticks(x, ticks, fontsize=7)
    answers.set(ylabel="exact answers (%)", title="data of the decay, and length of SFT",
                xlim=(-0.5, 2.5), ylim=(-3, 100))

    names = list(by_decay[PLAIN][0]["1"]["families"])
    for shift, style, (row, (data, times)) in zip((-0.2, 0, 0.2), points, ROWS.items()):
        scores = [[result[str(times)]["families"][name] for result in by_decay[data]]
                  for name in names]                        # (kinds, seeds)
        runs.bars(kinds, np.arange(len(names)) + shift, scores, style, label=row)
    kinds.set_xticks(range(len(names)), names, fontsize=7)
    kinds.set(ylabel="exact answers (%)", title="after SFT, by kind of task", ylim=(-3, 103))

    for ax, corpus, title in ((new, "speeches", "new domain (speeches)"),
                              (old, "pytorch", "old domain (pytorch)")):
        for style, start in zip(runs.STYLES, ("trunk", "nothing")):
            steps = [steps for begin, steps in by_place if begin == start]
            bpb = np.array([[result[corpus] for result in by_place[start, n]] for n in steps]).T
            tokens = np.array(steps) * settings.batch_size * 256 / 1e6
            runs.curve(ax, tokens, bpb, style, label=f"from {start}")
        ax.set(xlabel="tokens of speeches (millions)", ylabel="held-out bits per byte", title=title)
    return figure


# %% The checks

def checks(results, settings):
    by_decay, by_place = results
    plain, twice, labelled = exact_percent(by_decay, after_sft=True).T
    paper_a, paper_b = PAPER.values()
    bpb = {data: np.mean([result["bpb"] for result in by_decay[data]]) for data in by_decay}
    speeches = {place: [result["speeches"] for result in by_place[place]] for place in by_place}
    trunk = [speeches["trunk", n] for n in settings.domain]
    nothing = [speeches["nothing", n] for n in settings.domain]
    return [
        Check("SFT data in the decay, then SFT (A-2), beats SFT alone (A-1), for every seed",
              f"{runs.mean_and_range(labelled)} against {runs.mean_and_range(plain)} % exact; "
              f"the mixture costs "
              f"{bpb[LABELLED] - bpb[PLAIN]:+.3f} bits per byte of Python",
              f"{paper_a[2]:.1f} against {paper_a[0]:.1f}", all(labelled > plain)),
        Check("SFT data in the decay, then SFT (B-3), beats twice the SFT (B-2), for every seed",
              f"{runs.mean_and_range(labelled)} against {runs.mean_and_range(twice)} % exact",
              f"{paper_b[2]:.1f} against {paper_b[1]:.1f}", all(labelled > twice)),
        Check("on a new domain, continuing from the trunk beats starting over after as many tokens",
              "; ".join(f"{n} updates: {runs.mean_and_range(a, '.3f')} against "
                        f"{runs.mean_and_range(b, '.3f')} bits per byte"
                        for n, a, b in zip(settings.domain, trunk, nothing)),
              "-", all(max(a) < min(b) for a, b in zip(trunk, nothing))),
    ]


# %% What it means: the decay of the 2.4B is 18,500 updates of 4M tokens, a fifteenth of all its
# tokens and twelve times its SFT. The model learns what the data of this stage contain while the
# learning rate falls. Here, too, every trunk answers more after SFT if it saw instructions in its
# decay, at a price of 0.03 bits per byte of Python. And the trunk is kept: a new mixture or domain
# costs one decay, not a new pre-training run.
#
# One check does not hold: twice the SFT gets further than instructions in the decay. B-2 sees more
# conversations than A-2 sees in decay and SFT together, and the held-out questions are of the same
# kinds as the SFT data, so more SFT is more of the right data. The paper's benchmarks differ from
# its SFT data: they measure knowledge from before SFT, and the decay can add to that.
#
# Exercises
# 1. `learning_rate=0.001, min_lr=0.0001` of the SFT: try 0.003, three times the rate at which the
#    decay ended. How much of the difference is left?
# 2. `LABELLED`: try instruct:0.1 and instruct:0.9. Which mixture is best after the decay, and which
#    after SFT? How much does Python lose?
# 3. `data="speeches"` of the branch: add pytorch:0.2. How much of the old domain is kept, and how
#    much does the new one lose?

@exits_cleanly
def main(argv):
    quick = dict(seeds=(0,), width=32, batch_size=2, trunk=4, decay=2, sft=2, domain=(4,),
                 questions=8, eval_tokens=1024)
    runs.main("annealing", argv, Settings, quick, __doc__, experiment, draw, checks)


if __name__ == "__main__":
    main()
