"""Lab: what it is all for: how fast a small model answers, and what limits it (the reason for a small model; phones: paper, appendix D).

Question    A model writes one token after another. What does a token cost: arithmetic, or fetching the weights from memory?
Claim       At batch 1 every weight is read once for a token and used for one multiplication, so memory bandwidth sets the speed: half
            the bytes, twice the tokens/s. Hence small models, few bits a weight, experts (of which a token reads some) and caches of keys and
            values (without one every token before is computed again). A batch reads the weights once for all its sequences.
Write down  before you run it: at 20 GB/s, how many tokens/s can a model of 500M float32 parameters write? Eight experts, two a token:
            nearer to the dense model of what it holds, or of what a token uses? At batch 16?
Command     python -m labs.serving                      the committed timings, of one machine; --quick=True: seconds, to see that it works
            python -m labs.serving --machine=mine       yours, kept under that name: some two minutes and 4 GB of memory, with nothing
                                                        else running

The wind tunnel's shapes with random weights, which cost what trained ones do (a random router, though, spreads tokens evenly), in float32,
through MiniCPM.generate. In every round the bandwidth is measured too, by the same product of a row with a matrix far too large for the
processor's caches; numbers are medians over the rounds.
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

VOCAB, BYTES = 4096, 4                      # tokens; of a weight and of an entry of the cache
KINDS = {"dense": {}, "8 experts, 2 a token": {"num_experts": 8, "num_experts_per_tok": 2}, "dense, size of 2": {}, "dense, size of 8": {}}
EXPERTS = list(KINDS)[1:]
PHONE = (2e9, 18)                           # appendix D: the 2.4B in int4 on an iPhone 15 Pro: bytes, tokens/s


@dataclass
class Settings:
    models: tuple[str, ...] = ("laptop", "tunnel_9m", "tunnel_30m", "tunnel_70m", "tunnel_170m", "tunnel_500m")    # config/NAME.py, by size
    batch_model: str = "tunnel_70m"
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    context_model: str = "tunnel_9m"
    contexts: tuple[int, ...] = (64, 256, 1024, 4096)       # tokens of the prompt
    expert_model: str = "tunnel_30m"        # each of the experts is its feed-forward
    expert_batches: tuple[int, ...] = (1, 4, 16)
    prompt: int = 32                        # tokens, where it is not about context
    tokens: int = 16                        # timed after the prompt
    rounds: int = 5
    probe_mb: int = 512                     # matrix that the bandwidth is measured with
    machine: str = "committed"              # a name: timings are of one machine, and kept apart from those of others

    def problems(self):
        needs = {"models": (len(self.models) > 1, "two models or more"), "contexts": (len(self.contexts) > 1, "two lengths or more"),
                 "batches": (self.batches[0] == 1 and any(1 < batch <= 8 for batch in self.batches), "1 first, and one of 2 to 8"),
                 "expert_batches": (1 in self.expert_batches, "1 among them"), "tokens": (self.tokens > 0, "1 or more"),
                 "rounds": (self.rounds > 0, "1 or more"), "prompt": (self.prompt > 0, "1 or more"), "probe_mb": (self.probe_mb > 0, "1 or more")}
        return [f"--{name}={getattr(self, name)}: needs {what}" for name, (there, what) in needs.items() if not there]


# %% The experiment: four series, of each of which every point is measured in every round

def shape_of(model, kind):
    """MiniCPMConfig of config/NAME.py as one of KINDS: "size of 8" has the parameters that eight experts have, in one."""
    shape = train.read_config([str(ROOT / "config" / f"{model}.py"), f"--vocab_size={VOCAB}"])[1]
    size = int(kind[-1]) if "size of" in kind else 1
    return dataclasses.replace(shape, n_ff=size * shape.n_ff, **KINDS[kind])


def measure(machine, points, tokens, rounds, probe_mb):
    """points: dicts of model, kind, shape, batch, context, use_cache -> {"processor", "threads", "bandwidth": [bytes/s of each round],
    "prefill" and "decode": [[seconds of each round] of each point]}; prefill: until the first token, decode: a further one of all rows"""
    models = {}
    for point in points:
        if (point["model"], point["kind"]) not in models:
            model = models[point["model"], point["kind"]] = MiniCPM(MiniCPMConfig(**point["shape"])).eval()
            init_weights(model, 0)
            list(model.generate([[1]], 2))                               # warms up
    row, matrix = torch.ones(1, 4096), torch.ones(probe_mb * 2 ** 20 // (4 * 4096), 4096)
    out = {"processor": processor(), "threads": torch.get_num_threads(), "bandwidth": [], "prefill": [[] for _ in points],
           "decode": [[] for _ in points]}
    for _ in range(rounds):
        out["bandwidth"].append(bandwidth(row, matrix))
        for point, prefill, decode in zip(points, out["prefill"], out["decode"]):
            first, further = generation(models[point["model"], point["kind"]], point, tokens if point["use_cache"] else 1)
            prefill.append(first)
            decode.append(further)
    return out


def processor():
    """Its name."""
    file = Path("/proc/cpuinfo")                                         # of Linux; the others tell by themselves
    named = re.search(r"model name\s*: (.+)", file.read_text(encoding="utf-8")) if file.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


@torch.inference_mode()
def bandwidth(row, matrix):
    """Bytes/s of row @ matrix.T, the best of three."""
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        ops.linear(row, matrix)
        seconds.append(time.perf_counter() - clock)
    return matrix.nbytes / min(seconds)


def generation(model, point, tokens):
    """(seconds until the first token, median seconds of each of `tokens` further ones)"""
    prompts = np.random.default_rng(0).integers(0, VOCAB, (point["batch"], point["context"])).tolist()
    seconds, clock = [], time.perf_counter()
    for _ in model.generate(prompts, 1 + tokens, temperature=0, use_cache=point["use_cache"]):
        seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
    return seconds[0], median(seconds[1:])


def bytes_read(shape, batch, context, tokens):
    """(of weights, of the cache) that one decoded token of all rows reads. Experts: those that at least one of the rows chooses, if all
    are as likely. The table of embeddings counts as the head, which it is."""
    E, k = shape.num_experts, shape.num_experts_per_tok
    experts = E * (1 - (1 - k / E) ** batch) if E else 0
    weights = shape.count(experts) + VOCAB * shape.n_embd
    cache = batch * (context + tokens / 2) * 2 * shape.n_layer * shape.kv_heads * shape.head_size
    return weights * BYTES, cache * BYTES


def series(settings):
    """{name: points}"""
    point = lambda model, kind="dense", batch=1, context=settings.prompt, use_cache=True: dict(                    # noqa: E731
        model=model, kind=kind, shape=dataclasses.asdict(shape_of(model, kind)), batch=batch, context=context, use_cache=use_cache)
    return {"sizes": [point(model) for model in settings.models],
            "batches": [point(settings.batch_model, batch=batch) for batch in settings.batches],
            "contexts": [point(settings.context_model, context=context, use_cache=use_cache)
                         for use_cache in (True, False) for context in settings.contexts],
            "experts": [point(settings.expert_model, kind, batch) for kind in EXPERTS for batch in settings.expert_batches]}


def experiment(settings, config):
    """({series: {"bandwidth": bytes/s, "points": [point with tokens/s of "prefill" and "decode", bytes read a step]}}, stale)"""
    jobs = {name: dict(machine=settings.machine, points=points, tokens=settings.tokens, rounds=settings.rounds, probe_mb=settings.probe_mb)
            for name, points in series(settings).items()}
    alone = dataclasses.replace(config, workers=1)                       # side by side they would share the memory that they measure
    results, stale = runs.collect("serving", measure, list(jobs.values()), alone)
    return {name: {"processor": f"{result['processor']}, {result['threads']} threads", "bandwidth": median(result["bandwidth"]), "spread": (min(result["bandwidth"]), max(result["bandwidth"])),
                   "points": [in_rates(point, prefill, decode, settings) for point, prefill, decode in
                              zip(jobs[name]["points"], result["prefill"], result["decode"])]} for name, result in zip(jobs, results)}, stale


def in_rates(point, prefill, decode, settings):
    weights, cache = bytes_read(MiniCPMConfig(**point["shape"]), point["batch"], point["context"], settings.tokens)
    return {**point, "weights": weights, "cache": cache, "prefill": point["batch"] * point["context"] / median(prefill),
            "decode": point["batch"] / median(decode), "slowest": point["batch"] / max(decode), "fastest": point["batch"] / min(decode)}


# %% The figure

def curve(ax, xs, points, style, label):
    """tokens/s, with bars from the slowest to the fastest round."""
    rates = np.array([[p["slowest"], p["decode"], p["fastest"]] for p in points]).T
    ax.errorbar(xs, rates[1], [rates[1] - rates[0], rates[2] - rates[1]], label=label, **style)


def draw(found, settings, path, stale):
    figure, ((sizes, batches), (contexts, experts)) = runs.figure(
        2, 2, f"Tokens/s of generating, random weights, float32 ({found['sizes']['processor']}); bars: slowest and fastest round", stale, width=6, height=3.8)
    part = found["sizes"]
    moved = np.array([p["weights"] + p["cache"] for p in part["points"]])
    curve(sizes, moved / 1e6, part["points"], {**runs.STYLES[0], "linestyle": ""}, "writing, batch 1")
    sizes.plot(moved / 1e6, [p["prefill"] for p in part["points"]], label=f"reading a prompt of {settings.prompt}",
               **{**runs.STYLES[1], "linestyle": "", "fillstyle": "none"})
    line = np.array([min(moved), max(*moved, PHONE[0])])
    sizes.plot(line / 1e6, part["bandwidth"] / line, color="0.4", linestyle="--", label=f"{part['bandwidth'] / 1e9:.1f} GB/s, measured beside it")
    sizes.plot([PHONE[0] / 1e6], [PHONE[1]], marker="D", color="0.4", linestyle="", label="paper: 2.4B in int4, a phone")
    for p, x in zip(part["points"], moved):
        sizes.annotate(p["model"].removeprefix("tunnel_"), (x / 1e6, p["decode"]), textcoords="offset points", xytext=(5, 5), fontsize=7)
    sizes.set(xscale="log", yscale="log", xlabel="bytes read for a token (MB)", ylabel="tokens/s", title="model size")

    part = found["batches"]
    curve(batches, settings.batches, part["points"], runs.STYLES[0], settings.batch_model)
    batches.plot(settings.batches, [p["batch"] * part["bandwidth"] / (p["weights"] + p["cache"]) for p in part["points"]],
                 color="0.4", linestyle="--", label="by the measured bandwidth")
    batches.axhline(max(p["prefill"] for p in part["points"]), color="0.4", linestyle=":", label="reading a prompt (arithmetic)")
    batches.set(xscale="log", yscale="log", xlabel="sequences at a time", ylabel="tokens/s of all", title="batch")
    batches.set_xticks(settings.batches, settings.batches)

    points = found["contexts"]["points"]
    for style, use_cache in zip(runs.STYLES, (True, False)):
        curve(contexts, settings.contexts, [p for p in points if p["use_cache"] == use_cache], style,
              "with a cache" if use_cache else "without")
    contexts.plot(settings.contexts, [p["prefill"] for p in points if p["use_cache"]], label="reading the prompt",
                  **{**runs.STYLES[2], "fillstyle": "none"})
    contexts.set(xscale="log", yscale="log", xlabel="tokens before (context)", ylabel="tokens/s", title=f"context, {settings.context_model}")
    contexts.set_xticks(settings.contexts, settings.contexts)

    points = found["experts"]["points"]
    for style, kind in zip(runs.STYLES, EXPERTS):
        curve(experts, settings.expert_batches, [p for p in points if p["kind"] == kind], style, kind)
    experts.set(xscale="log", yscale="log", xlabel="sequences at a time", ylabel="tokens/s of all",
                title=f"experts: the feed-forward of {settings.expert_model}")
    experts.set_xticks(settings.expert_batches, settings.expert_batches)
    for ax in (sizes, batches, contexts, experts):
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)


# %% The checks

def checks(found, settings):
    points = {(p["model"], p["kind"], p["batch"], p["context"], p["use_cache"]): p for part in found.values() for p in part["points"]}
    speed_up = [points[settings.context_model, "dense", 1, n, True]["decode"] / points[settings.context_model, "dense", 1, n, False]["decode"]
                for n in settings.contexts]
    part, largest = found["sizes"], found["sizes"]["points"][-3:]
    moved = [p["weights"] + p["cache"] for p in largest]
    power = float(np.polyfit(np.log(moved), np.log([p["decode"] for p in largest]), 1)[0])
    reached, bf16 = largest[-1]["decode"] * moved[-1], 2 * MiniCPMConfig().n_params
    many = max(batch for batch in settings.batches if batch <= 8)
    gain = points[settings.batch_model, "dense", many, settings.prompt, True]["decode"] / found["batches"]["points"][0]["decode"]
    rate = {kind: points[settings.expert_model, kind, 1, settings.prompt, True]["decode"] for kind in EXPERTS}
    moe, active, total = rate.values()
    return [
        Check("at batch 1 tokens/s of the three largest models fall as the bytes read grow", f"power {power:.2f}", "-", abs(power + 1) < 0.25),
        Check("the largest reads its bytes at more than half of the measured bandwidth",
              f"{reached / 1e9:.1f} of {part['bandwidth'] / 1e9:.1f} GB/s, at which MiniCPM-2.4B in bfloat16 could write "
              f"{part['bandwidth'] / bf16:.1f} tokens/s", f"{PHONE[1]} tokens/s in int4 on a phone, {PHONE[0] * PHONE[1] / 1e9:.0f} GB/s",
              reached > 0.5 * part["bandwidth"]),
        Check(f"{many} sequences at a time give more than {many / 2:g} times the tokens/s of one", f"{gain:.1f} times", "-", gain > many / 2),
        Check("what the cache gains grows with the context", ", ".join(f"x {s:.1f} at {n}" for s, n in zip(speed_up, settings.contexts)), "-",
              all(a < b for a, b in zip(speed_up, speed_up[1:]))),
        Check("at batch 1 experts are nearer to the dense model of what a token uses than to that of what they hold",
              f"{moe:.0f} tokens/s, between {active:.0f} and {total:.0f}", "-", moe ** 2 > active * total),
    ]


# %% What it means: MiniCPM-2.4B reads 5.4 GB for a token in bfloat16 and 369 kB of cache for every token before it, so that at 4,096 tokens
# of context a fifth of what it reads is cache; the 1.2B, with 8 heads of keys for 24 of queries, keeps 106 kB. A server fills batches
# until arithmetic is the limit; a phone has one sequence, and only fewer bytes help it.
#
# Exercises
# Give each a --machine of its own name, that of its change.
# 1. `VOCAB` = 122753, that of the 2.4B: what of the 9M model's speed is left, and where do its bytes go?
# 2. In `shape_of`: n_kv_head=1. At which context does one begin to see it in tunnel_9m?
# 3. In `measure`: model.to(torch.bfloat16) and model.numerics.dtype = torch.bfloat16, and BYTES = 2. Which sizes gain, which lose?

@exits_cleanly
def main(argv):
    quick = dict(models=("lab", "laptop"), batch_model="lab", batches=(1, 2), context_model="lab", contexts=(16, 64), expert_model="lab",
                 expert_batches=(1, 2), prompt=8, tokens=4, rounds=2, probe_mb=8)
    settings, config = runs.settings(argv, Settings, quick, __doc__)
    found, stale = experiment(settings, config)
    draw(found, settings, runs.path("serving", "figures", config), stale)
    runs.report(checks(found, settings), stale)


if __name__ == "__main__":
    main()
