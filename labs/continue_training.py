"""Lab: which checkpoint is worth continuing? (paper abstract and section 4.3)

Question    A model is trained, and then more text arrives, of the same domain or of a new one. Is
            it better to continue from a checkpoint whose learning rate never fell, or is one that
            has been decayed as good, if its rate is warmed up again?
Claim       WSD is "conducive to continuous training and domain adaptation" (abstract): a stable
            checkpoint can be trained further and decayed anew at any time. The paper does not
            compare it with continuing from a decayed model. Others have studied that case. Gupta
            et al. (2023) warm the rate up again: the loss first rises on old and new text, and in
            the long run the new text is learned better. Ibrahim et al. (2024) find that warming
            up, decaying again and replaying old text match training anew on everything; because
            the warm-up makes the model forget, they too propose schedules with a constant rate.
Write down  before you run it: held-out bits per byte after 180 more updates on Python from a stable
            checkpoint, a decayed one and a cosine's end, all of 600 updates. And on speeches?
            Which of them forgets most of its Python?
Command     python -m labs.continue_training    22 minutes on two cores; --quick=True: a
                                                few seconds, to see that it works

Models of 1.3M parameters read Python source for the same number of tokens: at a constant rate
(stable), with a decay in their last fifth (decayed), or with a cosine. Then each continues, with
its optimizer's state, on more Python (same domain) or on State of the Union addresses (new
domain). The decayed model and the cosine warm up to the peak rate again; the stable one is still
there. All decay in the last fifth. Two controls: the decayed model continues at its last rate
without a warm-up, and a new model starts on the speeches.
"""
# %%
import itertools
from dataclasses import dataclass

import numpy as np

from configurator import exits_cleanly
from data.dataset import open_corpus
from engine import metrics
from labs import runs
from labs.runs import Check
from tools import evaluate

OLD, NEW = "pytorch", "speeches"
PEAK, LAST = 0.01, 0.001        # learning rates
DECAY_SHARE = 0.2               # of the first training, and of the second
REWARM_SHARE = 0.1              # of the second training: linear warm-up
STABLE, DECAYED, COSINE = "stable", "decayed, warmed up", "cosine, warmed up"
KEPT, NOTHING = "decayed, last rate kept", "from nothing"
STARTS = (STABLE, DECAYED, COSINE, KEPT, NOTHING)
MARGIN = 0.05                   # bits per byte of the old domain


@dataclass
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 128                            # of four layers; heads of 64 or fewer
    batch_size: int = 8                         # sequences of 256 tokens
    before: int = 600                           # updates on Python
    more: tuple[int, ...] = (60, 180)            # updates after that
    eval_tokens: int = 65536                    # held-out tokens of each domain
    data_dir: str = "data"                      # folder of the corpora, relative to the project

    def problems(self):
        if self.more and min(self.more) < 10:
            return [f"--more={self.more}: must be at least 10, its warm-up is a tenth of it"]
        return []


# %% The experiment

def first_training(seed, start, before, common):
    """Train on Python and return the run folder of the checkpoint to continue from."""
    begin = dict(seed=seed, data=OLD, learning_rate=PEAK, min_lr=LAST, **common)
    if start == COSINE:
        return stage("config/laptop.py", schedule="cosine", max_steps=before, **begin)
    decay = round(DECAY_SHARE * before)
    trunk = stage("config/laptop.py", max_steps=before - decay, decay_steps=0, **begin)
    return stage(branch_from=trunk, max_steps=before, decay_steps=0 if start == STABLE else decay)


def stage(*config_files, eval_interval=0, **options):
    return runs.train_stage("continue_training", *config_files, eval_interval=eval_interval,
                            eval_tokens=8192, save_interval=0, sample_tokens=0, compile=False,
                            **options)


def measure(seed, start, data, more, before, width, batch_size, eval_tokens, data_dir):
    """Train on Python as `start` says, then on `data` for `more` updates (0: not), and measure it.

    returns  {OLD and NEW: held-out bits per byte, "curve": [[updates since then, bits per byte
             of a small held-out part of data], ...]}
    """
    common = dict(batch_size=batch_size, data_dir=data_dir, **runs.shape(width, head=64))
    folder = None if start == NOTHING else first_training(seed, start, before, common)
    result = {"curve": []}
    if more:
        evaluations = metrics.read(folder)[1][-1:] if data == OLD else []
        warmup, steps = round(REWARM_SHARE * more), 0 if start == NOTHING else before
        options = dict(data=data, max_steps=steps + more, eval_interval=more // 10,
                       decay_steps=round(DECAY_SHARE * more))
        if start == NOTHING:
            folder = stage("config/laptop.py", seed=seed, learning_rate=PEAK, min_lr=LAST,
                           warmup_steps=warmup, **options, **common)
        elif start == STABLE:
            folder = stage(branch_from=folder, **options)
        elif start == KEPT:
            options |= dict(decay_steps=0, learning_rate=LAST, rewarm_steps=1)
            folder = stage(branch_from=folder, schedule="wsd", **options)
        else:
            folder = stage(branch_from=folder, schedule="wsd", rewarm_steps=warmup, **options)
        evaluations += metrics.read(folder)[1]
        result["curve"] = [[line["step"] - steps, line["val_bpb"]] for line in evaluations]
    model, tokenizer = runs.load_model(folder)
    config = evaluate.EvaluateConfig(eval_tokens=eval_tokens)
    for corpus in (OLD, NEW):
        held_out = open_corpus(data_dir, corpus, tokenizer, "val")
        found = evaluate.bits_per_byte(model, {held_out: 1.0}, tokenizer, config, 256)
        result[corpus] = found["bpb"]
    return result


def experiment(settings, config):
    """Return {(start, data, more): [result of measure for each seed]}.

    more = 0 is the checkpoint before the second training.
    """
    runs.prepare(config, data=f"{OLD}:1,{NEW}:1", tokenizer="bpe4096", data_dir=settings.data_dir)
    names = "before width batch_size eval_tokens data_dir".split()
    common = {name: getattr(settings, name) for name in names}
    second = [place for place in itertools.product(STARTS, (OLD, NEW), settings.more)
              if place[:2] != (NOTHING, OLD)]
    by_place = {}
    # One after the other: parallel jobs would otherwise train the same trunk at the same time.
    for places in ([(STABLE, OLD, 0)], [(DECAYED, OLD, 0), (COSINE, OLD, 0)], second):
        jobs = [dict(seed=seed, start=start, data=data, more=more, **common)
                for start, data, more in places for seed in settings.seeds]
        results = runs.collect("continue_training", measure, jobs, config)
        by_place |= runs.group(jobs, results, "start", "data", "more")
    return by_place


# %% The figure

def bpb(by_place, start, data, more, corpus):
    """Return (seeds,): bits per byte of a corpus at a place."""
    return np.array([result[corpus] for result in by_place[start, data, more]])


def draw_gaps(ax, by_place, settings, size):
    """Draw how far the decayed starts end above the stable one; size of the markers."""
    ticks = []
    for x, (data, more) in enumerate(itertools.product((OLD, NEW), settings.more)):
        ticks.append(f"{'same' if data == OLD else 'new'} domain,\n{more} updates")
        stable = bpb(by_place, STABLE, data, more, data)
        for shift, start, style in zip((-0.15, 0, 0.15), (DECAYED, COSINE, KEPT), runs.STYLES[1:]):
            if start == KEPT and data == NEW:       # 0.25 above: another scale
                continue
            gap = bpb(by_place, start, data, more, data) - stable
            runs.bars(ax, [x + shift], [gap], {**style, "linestyle": "", "markersize": size},
                      label=start if x == 0 else None)
    ax.axhline(0, color="black", label=STABLE)
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlim(-0.5, len(ticks) - 0.5)
    ax.set_ylabel("bits per byte against the stable start")


def draw(by_place, settings):
    figure, ((same, new), (gaps, old)) = runs.figure(
        2, 2, "The same tokens of Python, then more text (bands and bars: all seeds)", width=6,
        height=4)
    longest = max(settings.more)
    for style, start in zip(runs.STYLES, STARTS):
        for ax, data in ((same, OLD), (new, NEW)):
            if (start, data, longest) in by_place:
                curves = np.array([result["curve"] for result in by_place[start, data, longest]])
                runs.curve(ax, curves[0, :, 0], curves[:, :, 1], style, label=start)
        if start != NOTHING:
            first = DECAYED if start == KEPT else start     # the same checkpoint
            forgot = [bpb(by_place, first, OLD, 0, OLD),
                      *(bpb(by_place, start, NEW, more, OLD) for more in settings.more)]
            runs.curve(old, [0, *settings.more], np.array(forgot).T, style, label=start)
    for ax, title in ((same, "same domain (pytorch)"), (new, "new domain (speeches)")):
        ax.set(xlabel="updates of the second training", title=title,
               ylabel="bits per byte, a small held-out part")
    draw_gaps(gaps, by_place, settings, 6)
    gaps.set_title("at the end, all held-out text")
    old.set(xlabel="updates on the new domain", ylabel="held-out bits per byte of Python",
            title="what is left of the old domain")
    return figure


def slide(ax, by_place, settings):
    draw_gaps(ax, by_place, settings, 14)
    more = max(settings.more)
    warmed, kept = ((bpb(by_place, start, OLD, more, OLD)
                     - bpb(by_place, STABLE, OLD, more, OLD)).mean() for start in (DECAYED, KEPT))
    return (f"A decayed start on the same text: {warmed:+.3f} bits per byte against a stable one\n"
            f"if it is warmed up again, {kept:+.3f} at its last rate")


# %% The checks

def compare(claim, by_place, start, others, data, corpus, margin=0):
    """Return the Check that after training on `data` a start has fewer bits per byte of a corpus
    than each of the others, for every length and seed. margin: how many more it may have."""
    said, leads = [], []
    for more in sorted({place[2] for place in by_place if place[:2] == (start, data)} - {0}):
        ours, rest = bpb(by_place, start, data, more, corpus), []
        for other in others:
            theirs = bpb(by_place, other, data, more, corpus)
            leads.append(theirs + margin - ours)
            rest.append(f"{runs.mean_and_range(theirs, '.3f')} ({other})")
        said.append(f"after {more} updates {runs.mean_and_range(ours, '.3f')} against "
                    + " and ".join(rest))
    return Check(claim, "; ".join(said) + " bits per byte", bool(np.all(np.array(leads) > 0)),
                 runs.p_value(np.transpose(leads)))


def checks(by_place, settings):
    every, warmed = "for every length and seed", [DECAYED, COSINE]
    return [
        compare("same domain: the stable checkpoint ends below the decayed one and the cosine's "
                f"end, both warmed up again, {every}", by_place, STABLE, warmed, OLD, OLD),
        compare("new domain: the stable checkpoint ends below the decayed one and the cosine's "
                f"end, both warmed up again, {every}", by_place, STABLE, warmed, NEW, NEW),
        compare("new domain: the stable checkpoint forgets no more of the old one than they do "
                f"(margin {MARGIN} bits per byte), {every}", by_place, STABLE, warmed, NEW, OLD,
                MARGIN),
        compare("new domain: the decayed checkpoint learns more if it is warmed up than at its "
                f"last rate, {every}", by_place, DECAYED, [KEPT], NEW, NEW),
        compare("new domain: and it forgets more of the old one, "
                f"{every}", by_place, KEPT, [DECAYED], NEW, OLD),
        *(compare(f"new domain: the {start.split(',')[0]} start beats starting from nothing, "
                  f"{every}", by_place, start, [NOTHING], NEW, NEW) for start in (STABLE, DECAYED)),
    ]


# %% What it means: warming up undoes the decay. On the same domain the loss of the decayed model
# rises to that of the stable checkpoint within 50 updates, and ends 0.015 bits per byte above it.
# That is what a stable checkpoint of the same age is worth here. The one that is usually kept is
# older: it lacks the 120 updates of the decay. What that costs was not measured. The cosine's end
# rises further and ends 0.09 (60 updates) and 0.07 (180) above the stable start. Why was not
# tested; nearly half of its updates were below half of the peak rate.
#
# The control says what the first check does not. The decayed model that keeps its last rate ends
# lowest of all on the same domain: 0.03 below the stable start after 180 updates, 0.07 after 60.
# For a short continuation it is best to stay at the bottom of the valley. The difference shrinks,
# so in a longer one the stable start may win. These runs are too short to see it.
#
# What is learned of the new domain hardly depends on which of the trained models continues at the
# peak rate. After 60 updates these three are level, so the second check does not hold. After 180
# the stable start is ahead for every seed, by 0.004 and 0.009. What is forgotten does depend on it:
# on Python the cosine's end is then 0.36 bits per byte worse than the stable start. The decayed
# start is 0.06 worse, which three seeds do not tell from 0. Keeping the last rate is worse for the
# new domain than starting from nothing, after 180 updates. But it forgets little: 0.2 bits per byte
# of Python, where the others forget 1.0 to 1.4. Gupta et al. and Ibrahim et al. find the same two
# sides of warming up.
#
# Exercises
# 1. `REWARM_SHARE`: try 0.02 and 0.4. Gupta et al. find that the length of the warm-up matters
#    little. Here too?
# 2. `options`: add learning_rate=0.003 for the starts that warm up. How much less is forgotten, and
#    how much less is learned of the new domain?
# 3. `data=data`: replay some Python with the speeches, "speeches:0.8,pytorch:0.2". How much of the
#    old domain is kept, and what does it cost on the new one?

@exits_cleanly
def main(argv):
    quick = dict(seeds=(0, 1), width=32, batch_size=2, before=10, more=(10,), eval_tokens=1024)
    runs.main("continue_training", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
