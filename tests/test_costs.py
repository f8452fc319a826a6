"""What things cost, measured: minutes long, so only `python -m pytest -m slow -n 0 -s` runs them.
Take them from a quiet machine."""
import statistics
import subprocess
import sys
import time

import pytest
import torch

from configurator import ROOT
from data.corpus import write_corpus
from data.dataset import make_batches, open_corpus
from data.tokenizer import load_tokenizer
from engine import checkpoint
from engine.device import tune_malloc
from model import MiniCPM, MiniCPMConfig, init_weights, optimizer_groups
from tools import convert
from train import language_loss, read_config, train

pytestmark = pytest.mark.slow


def test_the_loop_costs_under_three_percent_of_a_step(tmp_path):
    """Updates of train(), and bare ones (forward, backward, clipping, AdamW) of the same compiled
    model, in turn."""
    tokenizer = load_tokenizer("bpe4096")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py")))
    write_corpus(tmp_path / "data" / "code" / tokenizer.name, tokenizer,
                 [("train", text), ("val", text)])
    argv = ["config/laptop.py", "--data=code", f"--data_dir={tmp_path / 'data'}",
            f"--out_dir={tmp_path / 'run'}", "--minutes=5", f"--vocab_size={tokenizer.n_vocab}",
            "--save_interval=0", "--eval_interval=0", "--quiet=True"]
    config, shape, _ = read_config(argv)
    (tmp_path / "run").mkdir()
    model = MiniCPM(shape)
    init_weights(model, 0)
    batches = make_batches(lambda name: open_corpus(tmp_path / "data", name, tokenizer, "train"), 0,
                           config.block_size)
    seen = {}

    def loss(forward, part):
        seen["forward"] = forward
        return language_loss(forward, part)

    def bare_update(optimizer):
        nll, _ = seen["forward"](batch["idx"], batch["targets"])
        (nll.sum() / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    batch, n = batches([[0, "code"]], 0, config.batch_size)
    updates = train(config, batches, loss, model, tokenizer=tokenizer)
    update = next(updates)                                               # compiles
    looped, bare = [], []
    for _ in range(200):
        clock = time.perf_counter()
        update = next(updates)
        looped.append(time.perf_counter() - clock)
        update.optimizer.zero_grad()
        clock = time.perf_counter()
        bare_update(update.optimizer)
        bare.append(time.perf_counter() - clock)
    updates.close()
    ratio = statistics.median(looped) / statistics.median(bare)
    print(f"\nupdate of the loop {1000 * statistics.median(looped):.2f} ms, "
          f"bare {1000 * statistics.median(bare):.2f} ms: x {ratio:.3f}")
    assert ratio < 1.03


ONE_STEP = """
import ctypes, sys, torch
sys.path.insert(0, {root!r})
from model import MiniCPM, MiniCPMConfig, init_weights, optimizer_groups
config = MiniCPMConfig(vocab_size={vocab_size}, n_layer=4, n_head=8, n_embd=512, n_ff=1280)
model = MiniCPM(config)
init_weights(model, 0)
model.numerics.dtype, model.numerics.compiled = torch.bfloat16, {compiled}
optimizer = torch.optim.AdamW(optimizer_groups(model, 0.1), lr=1e-3, fused=True)
forward = torch.compile(model, dynamic=False) if {compiled} else model

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def step():
    idx = torch.randint(0, config.vocab_size, (16, 257))
    nll, _ = forward(idx[:, :-1], idx[:, 1:])
    assert nll.dtype == torch.float32
    nll.mean().backward()
    optimizer.step()
    optimizer.zero_grad()

step()
ctypes.CDLL("libc.so.6").malloc_trim(0)
# parameters and optimizer state, and the gradients to be
before = kib("VmRSS") + 4 * config.n_params / 1024
open("/proc/self/clear_refs", "w").write("5")               # forget the peak so far
step()
print((kib("VmHWM") - before) / 1024)
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_experts_costs_at_most_1_6_dense_ones_of_equal_active_size(compiled):
    """The laptop's model in bfloat16, rounds in turn: forward, backward, clipping and AdamW."""
    tune_malloc()
    shape = dict(vocab_size=4096, n_layer=4, n_head=2, n_embd=128, dim_model_base=64)
    tokens = torch.randint(0, 4096, (50, 8, 257), generator=torch.Generator().manual_seed(0))

    def stepper(config):
        model = MiniCPM(config)
        init_weights(model, 0)
        model.numerics.dtype = torch.bfloat16
        optimizer = torch.optim.AdamW(optimizer_groups(model, 0.1), lr=1e-3, fused=True)
        forward = torch.compile(model) if compiled else model

        def step(batch):
            nll, aux = forward(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            (nll.mean()
             + sum(value for name, value in aux.items() if name.endswith("_loss"))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return step

    steppers = {"dense": stepper(MiniCPMConfig(**shape, n_ff=640)), "experts": stepper(
        MiniCPMConfig(**shape, n_ff=320, num_experts=8, num_experts_per_tok=2))}
    times = {name: [] for name in steppers}
    for _ in range(10):                                                  # the first round compiles
        for name, step in steppers.items():
            clock = time.perf_counter()
            for batch in tokens[torch.randint(0, len(tokens), (10,))]:
                step(batch)
            times[name].append((time.perf_counter() - clock) / 10)
    dense, experts = (statistics.median(seconds[1:]) for seconds in times.values())
    print(f"\ncompiled={compiled}: experts {1000 * experts:.1f} ms a "
          f"step, dense {1000 * dense:.1f} ms: x {experts / dense:.2f}")
    assert experts / dense <= 1.6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_vocabulary_of_122753_hardly_costs_more_memory_than_one_of_32768(compiled):
    """Everything in a step of 4,096 tokens but parameters, gradients and optimizer state."""
    def mib(vocab_size):
        code = ONE_STEP.format(root=str(ROOT), vocab_size=vocab_size, compiled=compiled)
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                    check=True).stdout)
    large, small = mib(122753), mib(32768)
    print(f"\n{'compiled' if compiled else 'eager'}: {large:.0f} MiB at "
          f"122,753, {small:.0f} MiB at 32,768: x {large / small:.2f}")
    assert large <= 1.2 * small


LOAD = """
import sys, time
sys.path.insert(0, {root!r})
from model import MiniCPM

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before, began = kib("VmRSS"), time.time()
model = MiniCPM.from_pretrained({folder!r}).eval()
model.pack({quant!r})
print(time.time() - began, (kib("VmHWM") - before) * 1024 / (2 * model.config.n_params))
for _ in model.generate([list(range(3, 19))], 4, top_k=50):
    pass
began = time.time()
print(len(list(model.generate([list(range(3, 19))], 48, top_k=50))) / (time.time() - began))
"""
DECODE = """
import sys, time, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.bfloat16).eval()
idx, how = torch.arange(3, 19)[None], dict(do_sample=True, top_k=50, pad_token_id=0)
model.generate(idx, min_new_tokens=4, max_new_tokens=4, **how)
began = time.time()
model.generate(idx, min_new_tokens=48, max_new_tokens=48, **how)
print(48 / (time.time() - began))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_released_1b_model_loads_and_decodes(tmp_path):
    """Random weights in MiniCPM-1B's shape: time and peak memory of loading, tokens/s at batch 1
    beside transformers'."""
    pytest.importorskip("transformers")
    config = MiniCPMConfig(vocab_size=73440, n_layer=52, n_head=24, n_kv_head=8, n_embd=1536,
                           n_ff=3840)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MiniCPM(config).named_parameters()}
    weights = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.05 if len(shape) > 1
               else torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for form in ("minicpm", "granite"):
        (tmp_path / form).mkdir()
        convert.write_weights(tmp_path / form, convert.hf_tensors(config, weights, form))
        checkpoint.write_json(tmp_path / form / "config.json",
                              convert.hf_config(config, form, torch.bfloat16, None))
    del weights
    programs = {"none": (LOAD, "minicpm"), "int8": (LOAD, "minicpm"),
                "transformers": (DECODE, "granite")}
    found = {program: [] for program in programs}
    for _ in range(3):
        for program, (code, form) in programs.items():
            code = code.format(root=str(ROOT), folder=str(tmp_path / form), quant=program)
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  check=True).stdout.split()
            found[program].append(tuple(map(float, said)))
    medians = {program: [statistics.median(values) for values in zip(*rounds)]
               for program, rounds in found.items()}
    (theirs,) = medians.pop("transformers")
    for quant, (seconds, memory, speed) in medians.items():
        print(f"\n--quant={quant}: loading {seconds:.1f} s, peak "
              f"{memory:.3f} x the weights; {speed:.2f} tokens/s, "
              f"transformers {theirs:.2f}: x {speed / theirs:.2f}")
        assert seconds < 30 and memory <= 1.15
        assert speed >= {"none": 1.3, "int8": 1.8}[quant] * theirs
