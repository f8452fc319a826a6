"""Lab: how fast a small model answers, and what limits it (paper appendices D and E)

Question    A model writes one token after another. What limits the speed: arithmetic, or reading
            the weights from memory?
Claim       At batch 1 every weight is read once per token and used for one multiplication, so the
            memory bandwidth sets the speed: half the bytes give twice the tokens/s. This is why
            small models, few bits per weight, experts (a token reads only some) and cached keys
            and values (else earlier tokens are computed again) make generation faster. A batch
            reads the weights once for all its sequences.
Write down  before you run it: at 20 GB/s, how many tokens/s can a model of 500M float32 parameters
            write? Are eight experts, two per token, closer in speed to the dense model of their
            total size or of their active size? And at batch 16?
Command     python -m labs.serving      the committed timings of one machine; --quick=True: a few
                                        seconds, to see that it works
            python -m labs.serving --machine=mine       your own, stored under that name: about two
                                        minutes and 4 GB of memory; close all other programs

The wind tunnel's models with random weights, in float32, through MiniCPM.generate. Random weights
cost what trained ones cost, but a random router spreads tokens evenly. The bandwidth is measured in
every round, by the same kind of product with a matrix much larger than the processor's caches.
Numbers are medians over the rounds.
"""
# %%
import dataclasses
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

import train
from configurator import ROOT, exits_cleanly
from engine import ops
from labs import runs
from labs.runs import Check
from model import MiniCPM, MiniCPMConfig, init_weights

VOCAB = 4096
BYTES = 4                                   # per weight and per entry of the cache
MOE = {"num_experts": 8, "num_experts_per_tok": 2}
KINDS = {                                   # (feed-forward size, in feed-forwards; model options)
    "dense": (1, {}), "8 experts, 2 a token": (1, MOE),
    "dense, size of 2": (2, {}), "dense, size of 8": (8, {}),
}
EXPERTS = list(KINDS)[1:]
PHONE = (2e9, 18)                           # bytes and tokens/s of the 2.4B in int4, iPhone 15 Pro


@dataclass
class Settings:
    models: tuple[str, ...] = ("laptop", "tunnel_9m", "tunnel_30m", "tunnel_70m", "tunnel_170m",
                               "tunnel_500m")               # config/NAME.py, by size
    batch_model: str = "tunnel_70m"
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    context_model: str = "tunnel_9m"
    contexts: tuple[int, ...] = (64, 256, 1024, 4096)       # tokens of the prompt
    expert_model: str = "tunnel_30m"        # each expert is its feed-forward
    expert_batches: tuple[int, ...] = (1, 4, 16)
    prompt: int = 32                        # tokens of the prompt in all other series
    tokens: int = 16                        # generated and timed after the prompt
    rounds: int = 5
    probe_mb: int = 512                     # size of the matrix that measures the bandwidth
    machine: str = "committed"              # name under which the timings are stored

    def problems(self):
        needs = [(name, "1 or more") for name in ("tokens", "rounds", "prompt", "probe_mb")
                 if getattr(self, name) < 1]
        needs += [(name, "two or more") for name in ("models", "contexts")
                  if len(getattr(self, name)) < 2]
        if self.batches[:1] != (1,) or not any(1 < batch <= 8 for batch in self.batches):
            needs.append(("batches", "1 first, and one of 2 to 8"))
        if 1 not in self.expert_batches:
            needs.append(("expert_batches", "1 among them"))
        return [f"--{name}={getattr(self, name)}: needs {what}" for name, what in needs]


# %% The experiment: four series of points, each point measured once per round

def shape_of(model, kind):
    """Return the MiniCPMConfig of config/MODEL.py as one of KINDS."""
    config_file = str(ROOT / "config" / f"{model}.py")
    shape = train.read_config([config_file, f"--vocab_size={VOCAB}"])[1]
    size, options = KINDS[kind]
    return dataclasses.replace(shape, n_ff=size * shape.n_ff, **options)


def measure(machine, points, tokens, rounds, probe_mb):
    """Time the generation at each point, and the memory bandwidth.

    points   dicts with model, kind, shape, batch, context, use_cache
    returns  {"processor", "threads", "bandwidth": [bytes/s of each round],
              "prefill": [[seconds until the first token, of each round] of each point],
              "decode": [[seconds per further token of all rows, of each round] of each point]}
    """
    models = {}
    for point in points:
        name = point["model"], point["kind"]
        if name not in models:
            models[name] = MiniCPM(MiniCPMConfig(**point["shape"])).eval()
            init_weights(models[name], 0)
            list(models[name].generate([[1]], 2))                        # warm-up
    row, matrix = torch.ones(1, 4096), torch.ones(probe_mb * 2 ** 20 // (4 * 4096), 4096)
    result = {"processor": processor(), "threads": torch.get_num_threads(), "bandwidth": [],
              "prefill": [[] for _ in points], "decode": [[] for _ in points]}
    for _ in range(rounds):
        result["bandwidth"].append(bandwidth(row, matrix))
        for n, point in enumerate(points):
            model = models[point["model"], point["kind"]]
            first, further = generation(model, point, tokens if point["use_cache"] else 1)
            result["prefill"][n].append(first)
            result["decode"][n].append(further)
    return result


def processor():
    """Return the name of the processor."""
    file = Path("/proc/cpuinfo")            # on Linux platform.processor() does not know it
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    return name[1] if name else platform.processor() or platform.machine()


@torch.inference_mode()
def bandwidth(row, matrix):
    """Return the bytes/s of row @ matrix.T, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ops.linear(row, matrix)
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds)


def generation(model, point, tokens):
    """Return the seconds until the first token, and the median of those per further token."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCAB, (point["batch"], point["context"])).tolist()
    times = [time.perf_counter()]
    for _ in model.generate(prompts, 1 + tokens, temperature=0, use_cache=point["use_cache"]):
        times.append(time.perf_counter())
    first, *further = np.diff(times)
    return float(first), float(median(further))


def bytes_read(shape, batch, context, tokens):
    """Return (bytes of weights, bytes of cache) that one decoding step of all rows reads.

    Of the experts it counts those that at least one row chooses, if all are equally likely. The
    embedding counts because it is the output head, too.
    """
    n_experts = shape.num_experts
    if n_experts:
        idle = (1 - shape.num_experts_per_tok / n_experts) ** batch     # probability for an expert
        n_experts *= 1 - idle
    weights = shape.count_non_embedding(n_experts) + VOCAB * shape.n_embd
    per_token = 2 * shape.n_layer * shape.kv_heads * shape.head_size
    return weights * BYTES, batch * (context + tokens / 2) * per_token * BYTES


def point(model, kind, batch, context, use_cache=True):
    return dict(model=model, kind=kind, shape=dataclasses.asdict(shape_of(model, kind)),
                batch=batch, context=context, use_cache=use_cache)


def series(settings):
    """Return {name of the series: its points}."""
    return {
        "sizes": [point(model, "dense", 1, settings.prompt) for model in settings.models],
        "batches": [point(settings.batch_model, "dense", batch, settings.prompt)
                    for batch in settings.batches],
        "contexts": [point(settings.context_model, "dense", 1, context, use_cache)
                     for use_cache in (True, False) for context in settings.contexts],
        "experts": [point(settings.expert_model, kind, batch, settings.prompt)
                    for kind in EXPERTS for batch in settings.expert_batches],
    }


def experiment(settings, config):
    """Return {name of the series: see rates}."""
    points = series(settings)
    fixed = {name: getattr(settings, name) for name in ("machine", "tokens", "rounds", "probe_mb")}
    jobs = [dict(points=points[name], **fixed) for name in points]
    config = dataclasses.replace(config, workers=1)      # parallel runs would share the bandwidth
    results = runs.collect("serving", measure, jobs, config)
    return {name: rates(points[name], result, settings)
            for name, result in zip(points, results)}


def rates(points, result, settings):
    """Return the speeds of a series as arrays.

    processor    name, and number of threads
    bandwidth    bytes/s
    bytes        (points,) that one decoding step reads
    prefill      (points,) tokens/s of reading the prompts
    decode       (rounds, points) tokens/s of writing, all sequences together
    """
    batch, context = (np.array([point[name] for point in points]) for name in ("batch", "context"))
    read = [bytes_read(MiniCPMConfig(**point["shape"]), point["batch"], point["context"],
                       settings.tokens) for point in points]
    return {"processor": f"{result['processor']}, {result['threads']} threads",
            "bandwidth": median(result["bandwidth"]), "bytes": np.sum(read, axis=1),
            "prefill": batch * context / np.median(result["prefill"], axis=1),
            "decode": batch / np.array(result["decode"]).T}


# %% The figure

POINTS = [{**style, "linestyle": ""} for style in runs.STYLES]


def draw_sizes(ax, part):
    """Draw the speed of writing over the bytes that a token reads, and the bandwidth's limit."""
    runs.bars(ax, part["bytes"], part["decode"].T, POINTS[0], np.median, label="writing, batch 1")
    ax.plot(part["bytes"], part["bandwidth"] / part["bytes"], "k--", label="limit of the bandwidth")
    ax.plot(*PHONE, label="paper: 2.4B in int4 on a phone", fillstyle="none", **POINTS[4])
    ax.set(xscale="log", yscale="log", xlabel="bytes read per token",
           ylabel="tokens/s, all sequences")


def slide(ax, found, settings):
    draw_sizes(ax, found["sizes"])
    return "At batch 1, large models write as fast as memory delivers weights"


def draw(found, settings):
    figure, axes = runs.figure(
        2, 2, "Generation with random weights in float32 (bars: slowest and fastest round)\n"
        + found["sizes"]["processor"], width=6, height=3.8)
    sizes, batches, contexts, experts = axes.flat

    part = found["sizes"]
    draw_sizes(sizes, part)
    sizes.plot(part["bytes"], part["prefill"], label="reading a prompt", **POINTS[1])
    sizes.set(title=f"{settings.models[0]} to {settings.models[-1]}")

    part = found["batches"]
    limit = np.array(settings.batches) * part["bandwidth"] / part["bytes"]
    runs.bars(batches, settings.batches, part["decode"].T, runs.STYLES[0], np.median,
              label="writing")
    batches.plot(settings.batches, limit, "k--", label="limit of the bandwidth")
    batches.axhline(max(part["prefill"]), color="k", linestyle=":", label="reading prompts")
    batches.set(xlabel="sequences in a batch", title=f"batch, {settings.batch_model}")

    part = found["contexts"]
    for style, label, decode in zip(runs.STYLES, ("with a cache", "without a cache"),
                                    np.split(part["decode"], 2, axis=1)):
        runs.bars(contexts, settings.contexts, decode.T, style, np.median, label=label)
    contexts.plot(settings.contexts, np.split(part["prefill"], 2)[0], label="reading the prompt",
                  **runs.STYLES[2])
    contexts.set(xlabel="tokens of the prompt", title=f"context, {settings.context_model}")

    by_kind = np.split(found["experts"]["decode"], len(EXPERTS), axis=1)
    for style, kind, decode in zip(runs.STYLES, EXPERTS, by_kind):
        runs.bars(experts, settings.expert_batches, decode.T, style, np.median, label=kind)
    experts.set(xlabel="sequences in a batch", title=f"experts, {settings.expert_model}")

    for ax in axes.flat:
        ax.set(xscale="log", yscale="log", ylabel="tokens/s, all sequences")
    for ax, ticks in ((batches, settings.batches), (contexts, settings.contexts),
                      (experts, settings.expert_batches)):
        ax.set_xticks(ticks, ticks)
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    return figure


# %% The checks

NEAR = 0.25                                 # to the power -1


def checks(found, settings):
    speed = {name: np.median(part["decode"], axis=0) for name, part in found.items()}
    with_cache, without_cache = np.split(speed["contexts"], 2)
    gain = with_cache / without_cache

    sizes, moved = found["sizes"], found["sizes"]["bytes"]
    power = np.polyfit(np.log(moved[-3:]), np.log(speed["sizes"][-3:]), 1)[0]
    reached, bandwidth = speed["sizes"][-1] * moved[-1], sizes["bandwidth"]
    bf16 = 2 * MiniCPMConfig().n_params                 # bytes of MiniCPM-2.4B

    many = max(batch for batch in settings.batches if batch <= 8)
    batch_gain = speed["batches"][settings.batches.index(many)] / speed["batches"][0]
    first = settings.expert_batches.index(1)
    moe, active, total = (speeds[first] for speeds in np.split(speed["experts"], len(EXPERTS)))
    return [
        Check("at batch 1, tokens/s of the three largest models fall with the bytes read: a power "
              f"within {NEAR} of -1", f"power {power:.2f}", abs(power + 1) < NEAR),
        Check("the largest reads its bytes at more than half of the measured bandwidth",
              f"{reached / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s, at which MiniCPM-2.4B in "
              f"bfloat16 could write {bandwidth / bf16:.1f} tokens/s",
              reached > 0.5 * bandwidth,
              paper=f"{PHONE[1]} tokens/s in int4 on a phone, "
                    f"{PHONE[0] * PHONE[1] / 1e9:.0f} GB/s"),
        Check(f"{many} sequences in a batch give more than {many / 2:g} times the tokens/s of one",
              f"{batch_gain:.1f} times", batch_gain > many / 2),
        Check("the gain of the cache grows with the context",
              ", ".join(f"x {x:.1f} at {n}" for x, n in zip(gain, settings.contexts)),
              all(np.diff(gain) > 0)),
        Check("at batch 1, experts are closer in speed to the dense model of their active size "
              "than to that of their total size",
              f"{moe:.0f} tokens/s, between {active:.0f} and {total:.0f}",
              moe ** 2 > active * total),
    ]


# %% What it means: the larger the model, the closer to the limit of the bandwidth. The smallest
# reads 8 of 41 GB/s, the largest 36. From the one to the other the bytes grow 384-fold, and the
# speed falls 81-fold: only for large models do half the bytes give twice the tokens/s. Small ones
# spend most of their time on what does not depend on the bytes. The limit is uncertain, too: the
# four series measured 41, 41, 55 and 53 GB/s on the same machine. Eight experts are between the
# dense models at batch 1 (107 tokens/s, 149 and 55), but as slow as that of the total size at batch
# 16 (370 and 351), where 7.9 of 8 experts are expected to be read.
#
# MiniCPM-2.4B in bfloat16 reads 5.4 GB per token, and 369 kB of cache for every earlier token, so
# at 4,096 tokens of context a fifth of the bytes it reads is cache. The 1.2B reads 106 kB: it has 8
# key-value heads for 24 query heads. A server fills batches until arithmetic is the limit; a phone
# has one sequence, and only fewer bytes help.
#
# Exercises
# Give each change a --machine name of its own.
# 1. `VOCAB` = 122753, that of the 2.4B: how much of the 9M model's speed is left, and what are its
#    bytes spent on?
# 2. In `shape_of`: n_kv_head=1. From which context on does it show in tunnel_9m?
# 3. In `measure`: model.to(torch.bfloat16), model.numerics.dtype = torch.bfloat16; and BYTES = 2.
#    Which sizes get faster, which slower?

@exits_cleanly
def main(argv):
    quick = dict(models=("lab", "laptop"), batch_model="lab", batches=(1, 2), context_model="lab",
                 contexts=(16, 64), expert_model="lab", expert_batches=(1, 2), prompt=8, tokens=4,
                 rounds=2, probe_mb=8)
    runs.main("serving", argv, Settings, quick, __doc__, experiment, draw, checks, slide)


if __name__ == "__main__":
    main()
