"""What a training step costs on this machine, and how it grows.

    python -m tools.bench [config/NAME.py ...] [--key=value ...]    an update of train.py's loop, taken apart; default config/laptop.py
    python -m tools.bench --nanogpt=PATH                            and of nanoGPT's model.py (a checkout of it), each in turn
    python -m tools.bench --task=sizes                              over tokens and over parameters: out/bench/sizes.jsonl, sizes.png
    python -m tools.bench --task=decode                             tokens/s of generating, one sequence at a time

Tokens are random: no corpus is needed. Files go to out/bench, or --out_dir. Sizes and programs get a process each, because
what one leaves behind in malloc's heap slows the next.
"""
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from configurator import ROOT, BadInput, configure, exits_cleanly, print_differences
from data.dataset import make_batches
from data.tokenizer import load_tokenizer
from engine import checkpoint
from engine.device import pick_device, pick_dtype
from engine.memory import check_memory, choose_micro_batch
from engine.run import new_state
from model import MiniCPM, MiniCPMConfig, init_weights
from train import TrainConfig, language_loss, train

PHASES = {"data": "data", "forward": "forward", "backward": "backward", "update": "clip, optimizer, and the rest of the loop"}
WARM_UP = 3                             # updates before the timed ones; the first compiles
PROMPT = 16                             # tokens before the generated ones
SEQUENCES = (2, 4, 8, 16, 32)           # sizes: batch_size of the series over tokens; block_size is the config's
PARAMETERS = (1e6, 3e6, 1e7, 3e7, 1e8)  # sizes: about, without the embedding; batch_size is the config's


@dataclass
class BenchConfig:
    task: Literal['step', 'sizes', 'decode'] = 'step'   # what to measure
    updates: int = 10                   # timed updates, of which medians are taken; at least 2
    peak_flops: float | None = None     # FLOP/s that the chip can do in its compute dtype, for MFU; unset: no MFU
    nanogpt: str | None = None          # step: folder of a nanoGPT checkout to compare with
    program: Literal['ours', 'nanogpt-float32', 'nanogpt-bfloat16'] = 'ours'    # with nanogpt and json: the one to measure
    rounds: int = 3                     # turns of each program with nanogpt, and of generating
    new_tokens: int = 512               # decode: tokens to generate
    json: bool = False                  # True: one JSON line instead of text

    def problems(self):
        out = [f"--{name}={getattr(self, name)}: must be above {least}" for name, least in
               (("updates", 1), ("peak_flops", 0), ("rounds", 0), ("new_tokens", 0))
               if getattr(self, name) is not None and getattr(self, name) <= least]
        if self.program != "ours" and not (self.nanogpt and self.json):
            out.append(f"--program={self.program}: only with --nanogpt=PATH and --json=True")
        if self.nanogpt and (self.task != "step" or not Path(self.nanogpt, "model.py").is_file()):
            out.append(f"--nanogpt={self.nanogpt}: is the folder of a checkout, with its model.py, and goes with --task=step")
        return out


def read_options(argv):
    """(BenchConfig, TrainConfig, MiniCPMConfig, settings), the last being all that decides a measurement, as JSON gives it back."""
    argv = argv if any(word.endswith(".py") for word in argv) else ["config/laptop.py", *argv]
    argv = argv if any(word.startswith("--out_dir") for word in argv) else [*argv, "--out_dir=out/bench"]   # a config's is a run's
    (bench, config, shape), given = configure(argv, BenchConfig, TrainConfig, MiniCPMConfig, usage=__doc__)
    if config.init_from or config.branch_from:
        raise BadInput("--init_from, --branch_from: a shape is measured, not a checkpoint; give the config it was trained with")
    if bench.nanogpt and (shape.num_experts or shape.n_head * shape.head_size != shape.n_embd):
        raise BadInput("--nanogpt: has neither experts nor heads of another size than n_embd / n_head; give another shape")
    if "vocab_size" not in given:
        shape = replace(shape, vocab_size=load_tokenizer(config.tokenizer).n_vocab)
    check_memory(shape, pick_device(config.device))
    settings = json.loads(json.dumps({**asdict(bench), **asdict(config), **asdict(shape)}))
    return bench, config, shape, {k: v for k, v in settings.items() if k not in ("out_dir", "overwrite", "json", "quiet")}


# ---- one measurement, in this process: each returns ([seconds], {how it was computed})

def random_batches(config, vocab_size):
    """train.py's batch source, over random tokens in memory."""
    tokens = np.random.default_rng(config.seed).integers(0, vocab_size, max(2 ** 20, 2 * config.block_size + 2), np.uint32)
    source = SimpleNamespace(n_tokens=len(tokens), row=None, read=lambda offset, length: tokens[offset:offset + length])
    return make_batches(lambda name: source, config.seed, config.block_size, bos=0 if config.doc_mask else None)


def wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def step(bench, config, shape):
    """Updates of train.py's loop as in a long run, by a clock in what it calls.

    To know when a phase ends one must wait for the GPU, which costs: there every other update, for the total, goes without.
    """
    config = replace(config, max_steps=10 ** 9, minutes=None, quiet=True)          # far away: no decay, and compiling repays
    device, state, model = pick_device(config.device), new_state(config), MiniCPM(shape)
    init_weights(model, config.seed)
    model.to(device)
    batches, rows, clock = random_batches(config, shape.vocab_size), [dict.fromkeys(PHASES, 0.0)], time.perf_counter()

    def ended(phase, wait=False):
        nonlocal clock
        if wait or len(rows) % 2:
            wait_for(device)
        now = time.perf_counter()
        rows[-1][phase] += now - clock
        clock = now

    def timed_batches(*where):
        ended("update")                                                  # the gradients of the update before are freed
        return batches(*where)

    def timed_loss(forward, part):
        ended("data")                                                    # and its way to the device
        out = language_loss(forward, part)
        ended("forward")
        return out

    model.wte.weight.register_post_accumulate_grad_hook(lambda p: ended("backward"))      # where every backward pass ends
    updates = train(config, timed_batches, timed_loss, model, state)
    for _ in range(WARM_UP + bench.updates):
        next(updates)
        ended("update", wait=True)
        rows.append(dict.fromkeys(PHASES, 0.0))
    updates.close()
    kept = list(enumerate(rows[:-1]))[WARM_UP:]
    return [sum(row.values()) for i, row in kept if device.type == "cpu" or i % 2], {
        "phases": {phase: median(row[phase] for i, row in kept if device.type == "cpu" or i % 2 == 0) for phase in PHASES},
        "device": str(device), "dtype": str(model.numerics.dtype)[6:], "compiled": state.compiled, "micro": state.micro,
        "n_params": shape.n_params, "n_params_non_embedding": shape.n_params_non_embedding}


def step_of_nanogpt(bench, config, shape):
    """The same of nanoGPT in this shape: float32 eager, or bfloat16 autocast and compiled. Its feed-forward stays its own."""
    device, dtype, times = pick_device(config.device), getattr(torch, bench.program.partition("-")[2]), []
    compiled, batches = dtype == torch.bfloat16, random_batches(config, shape.vocab_size)
    micro = config.micro_batch_size or choose_micro_batch(shape, config, config.batch_size, device)
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(bench.nanogpt, "model.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)        # its dataclass looks itself up there
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py
    with contextlib.redirect_stdout(io.StringIO()):                                # it reports on itself
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(block_size=config.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
                                            n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=False)).to(device)
        # Not our learning rate, which is muP's: every rate is as fast, as long as the weights stay numbers.
        optimizer = model.configure_optimizers(config.weight_decay, 1e-3, (config.beta1, config.beta2), device.type)
    forward = torch.compile(model) if compiled else model
    for i in range(WARM_UP + bench.updates):
        clock = time.perf_counter()
        batch, n = batches([[0, "random"]], i * config.batch_size, config.batch_size)
        for j in range(0, config.batch_size, micro):
            idx, targets = (batch[name][j:j + micro].to(device) for name in ("idx", "targets"))
            with torch.amp.autocast(device.type, dtype, enabled=compiled):
                _, loss = forward(idx, targets)
            (loss * targets.numel() / n).backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(device)
        times.append(time.perf_counter() - clock)
    return times[WARM_UP:], {"device": str(device), "dtype": str(dtype)[6:], "compiled": compiled, "micro": micro,
                             "n_params": sum(p.numel() for p in model.parameters())}


def decode(bench, config, shape):
    """MiniCPM.generate of new_tokens at batch 1, weights in the compute dtype as from_pretrained gives them."""
    device, model = pick_device(config.device), MiniCPM(shape)
    dtype, times = pick_dtype(config.dtype, device), []
    init_weights(model, config.seed)
    model.to(device=device, dtype=dtype).eval()
    model.numerics.dtype, model.numerics.flash = dtype, config.flash
    prompt = np.random.default_rng(config.seed).integers(0, shape.vocab_size, PROMPT).tolist()
    for n in (8, *[bench.new_tokens] * bench.rounds):                    # the first warms up
        clock = time.perf_counter()
        list(model.generate([prompt], n, top_k=50))
        times.append(time.perf_counter() - clock)
    return times[1:], {"device": str(device), "dtype": str(dtype)[6:], "compiled": False, "n_params": shape.n_params}


def measure(bench, config, shape, settings):
    """What the options name, as a dict for JSON: times in seconds, FLOPs of forward and backward."""
    work = decode if bench.task == "decode" else step if bench.program == "ours" else step_of_nanogpt
    times, how = work(bench, config, shape)
    tokens = bench.new_tokens if bench.task == "decode" else config.batch_size * config.block_size
    found = {"program": bench.program, "tokens": tokens, "seconds": median(times), "fastest": min(times), "slowest": max(times),
             "tokens_per_s": tokens / median(times), **how}
    if "phases" in how:
        found["flops_per_s"] = shape.flops_per_token(config.block_size) * found["tokens_per_s"]
        found["mfu"] = found["flops_per_s"] / bench.peak_flops if bench.peak_flops else None
    return {**found, "settings": settings, "provenance": checkpoint.provenance()}


def in_words(x):
    """One line of what measure found."""
    return (f"{x['program']}, {x['n_params']:,} parameters, {x['device']}, {x['dtype']}, {'compiled' if x['compiled'] else 'eager'}: "
            f"{x['tokens']:,} tokens in {1000 * x['seconds']:,.1f} ms (median; {1000 * x['fastest']:,.1f} to "
            f"{1000 * x['slowest']:,.1f}), {x['tokens_per_s']:,.0f} tokens/s")


# ---- several, each in its own process

def measure_apart(argv):
    """measure of these options in a process of its own, whose errors go to the terminal and whose exit status is ours."""
    result = subprocess.run([sys.executable, "-m", "tools.bench", *argv, "--json=True"], stdout=subprocess.PIPE, encoding="utf-8",
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    if result.returncode:
        raise SystemExit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def compare(bench, argv):
    """nanoGPT's two and ours in turn; medians over the rounds of tokens/s, and of the ratios within a round."""
    rows = []
    for i in range(bench.rounds):
        rows.append([measure_apart([*argv, f"--program={name}"]) for name in ("nanogpt-float32", "nanogpt-bfloat16", "ours")])
        print(*(f"round {i + 1}: {in_words(x)}" for x in rows[-1]), sep="\n", flush=True)
    for name, column in zip(("nanoGPT float32", "nanoGPT bfloat16", "ours"), zip(*rows)):
        ratio = median(row[-1]["tokens_per_s"] / x["tokens_per_s"] for row, x in zip(rows, column))
        print(f"{name:>16}: {median(x['tokens_per_s'] for x in column):9,.0f} tokens/s; ours x {ratio:.2f}")


def shape_options(n_params):
    """A model of about so many parameters beside the embedding: heads of 64, and at least as many layers as heads."""
    layers = {heads: round(n_params / (11.5 * (64 * heads) ** 2)) for heads in range(1, 100)}     # attention 4, SwiGLU 7.5 C^2
    heads = max(heads for heads in layers if heads == 1 or layers[heads] >= heads)
    return [f"--n_layer={max(1, layers[heads])}", f"--n_head={heads}", f"--n_embd={64 * heads}", f"--n_ff={160 * heads}",
            "--n_kv_head=None", "--head_dim=None", "--num_experts=0"]


def sizes(config, argv):
    """Measure what sizes.jsonl still lacks of the two series, a line each, and draw it."""
    argv, file = ["--compile=False", *argv, "--task=step"], Path(config.out_dir, "sizes.jsonl")   # what argv says of compile wins
    plan = [("tokens", [*argv, f"--batch_size={n}"]) for n in SEQUENCES] + [("parameters", [*argv, *shape_options(n)]) for n in PARAMETERS]
    wanted = [read_options(options)[-1] for _, options in plan]          # and finds all problems before any time is spent
    try:
        kept = file.read_text(encoding="utf-8") if file.exists() and not config.overwrite else ""
        lines = [json.loads(line) for line in kept.splitlines()]
        odd = {name for want, line in zip(wanted, lines) for name in want if want[name] != line["settings"][name]}
    except (ValueError, KeyError, TypeError):
        odd = {"unreadable ones"}
    if odd:
        raise BadInput(f"{file}: has other settings ({', '.join(sorted(odd))}); give --overwrite=True or another --out_dir")
    file.parent.mkdir(parents=True, exist_ok=True)
    if lines:
        print(f"{len(lines)} of {len(plan)} measurements are in {file}; --overwrite=True makes them anew"
              + ("" if lines[0]["provenance"]["code"] == checkpoint.code_hash() else " (and the code has changed since)"))
    if len(lines) < len(plan) and not wanted[0]["compile"]:
        print("eager: compiling each size would take longer than measuring it; --compile=True does it all the same")
    with open(file, "a" if lines else "w", encoding="utf-8") as f:
        for series, options in plan[len(lines):]:
            lines.append({"series": series, **measure_apart(options)})
            print(json.dumps(lines[-1]), file=f, flush=True)
            print(in_words(lines[-1]), flush=True)
    draw_sizes(lines, file.with_suffix(".png"))


def draw_sizes(lines, path):
    """Seconds over tokens and over parameters, log-log, with the slope of the straight line that fits best."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    keys = (("tokens", "tokens an update"), ("n_params_non_embedding", "parameters without the embedding"))
    for axes, series, (key, label), (fixed, of) in zip(panels, ("tokens", "parameters"), keys, keys[::-1]):
        points = [line for line in lines if line["series"] == series]
        x, seconds = (np.array([line[name] for line in points], float) for name in (key, "seconds"))
        slope, offset = np.polyfit(np.log(x), np.log(seconds), 1)
        axes.loglog(x, seconds, "ko", label="measured")
        axes.loglog(x, np.exp(offset) * x ** slope, color="tab:blue", label=f"slope {slope:.2f} (linear: 1)")
        axes.set_title(f"{points[0][fixed]:,} {of}; {points[0]['device']}, {points[0]['dtype']}", fontsize=9)
        axes.set(xlabel=label, ylabel="seconds an update")
        axes.set_xticks([], minor=True)
        axes.set_xticks(x, [f"{n:,.0f}" if n < 1e5 else f"{n / 1e6:.1f}M" for n in x])
        axes.grid(alpha=0.3)
        axes.legend()
        print(f"log time over log {series}: slope {slope:.2f} (linear: 1)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"drew {path}")


@exits_cleanly
def main(argv):
    bench, config, shape, settings = read_options(argv)
    if bench.task == "sizes":
        return sizes(config, argv)
    if bench.nanogpt and not bench.json:
        return compare(bench, argv)
    found = measure(bench, config, shape, settings)
    if bench.json:
        print(json.dumps(found))
        return
    print_differences(bench, config, shape)
    print(in_words(found))
    for phase, seconds in found.get("phases", {}).items():
        print(f"{1000 * seconds:10.2f} ms  {100 * seconds / sum(found['phases'].values()):5.1f} %  {PHASES[phase]}")
    if "phases" in found:
        mfu = f"{100 * found['mfu']:.1f} %" if found["mfu"] else "n/a: give --peak_flops"
        print(f"{found['flops_per_s'] / 1e9:10,.1f} GFLOP/s, MFU {mfu}")


if __name__ == "__main__":
    main()
