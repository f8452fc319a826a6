"""What a GPU must show: kernels against plain formulas, runs against the CPU's, memory, speed.

    python -m pytest -m gpu -s          on one card; writes gpu_report.json

gpu_report.json has one entry per test, with what it measured; paste it into an issue. A test that
has a form "cpu" runs there in the default suite, through the same functions.
"""
import json
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import finish, launch, start

from configurator import ROOT
from data.dataset import Prefetch
from engine import checkpoint, metrics, ops
from engine.distributed import World
from model import MiniCPM, MiniCPMConfig, init_weights

HAS_GPU = torch.cuda.is_available()
CUDA = pytest.param("cuda",
                    marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU here")])
both = pytest.mark.parametrize("device", ["cpu", CUDA])
gpu_only = pytest.mark.parametrize("device", [CUDA])
REPORT, FOUND = ROOT / "gpu_report.json", {}


@pytest.fixture
def record(request):
    """record(name=value, ...) adds what a test on a GPU found to gpu_report.json."""
    values, begin = {}, time.monotonic()

    def write(outcome):
        seconds = round(time.monotonic() - begin, 1)
        FOUND[request.node.name] = {"outcome": outcome, "seconds": seconds, **values}
        checkpoint.write_json(REPORT, {"machine": machine(), "tests": FOUND})
    if not request.node.get_closest_marker("gpu"):
        yield values.update
        return
    write("killed")
    yield values.update
    write(getattr(request.node, "outcome", "failed before it began"))
    print(f"\n{request.node.name}: {FOUND[request.node.name]}")


def machine():
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "gpus": torch.cuda.device_count(), "cudnn": torch.backends.cudnn.version(),
            **checkpoint.provenance()}


def apart(a, b):
    """Return the largest difference between two lists of numbers."""
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b))


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- kernels against the formulas

def document_attention(device, dtype, T, grad):
    """Return the relative errors of FlexAttention, its output and gradients, against the mask of
    T x T elements: random documents, 4 query heads that share 2 key heads of 64."""
    generator = torch.Generator().manual_seed(T)
    doc_ids = (torch.rand(2, T, generator=generator) < 8 / T).cumsum(1).to(device)
    found = {}
    for flex in (True, False):
        generator = torch.Generator().manual_seed(T)
        q, k, v = (torch.randn(2, heads, T, 64, generator=generator).to(device, dtype)
                   .requires_grad_(grad) for heads in (4, 2, 2))
        mask = ops.attention_mask(doc_ids, T, T, torch.device(device), flex=flex)
        y = ops.attention(q, k, v, mask, flash=flex)
        if grad:
            (y.float() ** 2).sum().backward()
        found[flex] = [y.detach(), *(x.grad for x in (q, k, v) if grad)]
    return [relative_error(a, b) for a, b in zip(found[True], found[False])]


@gpu_only
@pytest.mark.parametrize("T", [100, 129, 1000])
def test_documents(device, T, record):
    """FlexAttention at odd lengths. (On a CPU it has no backward pass: tests/test_ops.py.)"""
    errors = document_attention(device, torch.bfloat16, T, grad=True)
    record(errors=errors)
    assert max(errors) < 2e-2, errors


@gpu_only
def test_documents_in_a_compiled_model(device, record):
    """Eager and compiled blocks with FlexAttention against the written-out softmax."""
    config = MiniCPMConfig(vocab_size=512, n_layer=2, n_head=4, n_kv_head=2, n_embd=256, n_ff=512)
    generator = torch.Generator().manual_seed(0)
    losses = {}
    for name, flash, compiled in (("mask", False, False), ("eager", True, False),
                                  ("compiled", True, True)):
        model = MiniCPM(config)
        init_weights(model, 0)
        model.to(device)
        model.numerics.dtype, model.numerics.flash = torch.bfloat16, flash
        forward = torch.compile(model, dynamic=False) if compiled else model
        generator.manual_seed(0)
        for _ in range(3):                      # other documents in every batch
            idx = torch.randint(0, 512, (2, 777), generator=generator).to(device)
            doc_ids = (torch.rand(2, 777, generator=generator) < 0.02).cumsum(1).to(device)
            nll, _ = forward(idx, idx.roll(-1, 1), doc_ids=doc_ids)
            nll.sum().backward()
        gradient = model.blocks[0].attn.wqkv.weight.grad
        losses[name] = (nll.mean().item(), gradient)
    errors = {name: [abs(loss - losses["mask"][0]), relative_error(gradient, losses["mask"][1])]
              for name, (loss, gradient) in losses.items()}
    record(errors=errors)
    assert max(max(error) for error in errors.values()) < 3e-2, errors


@gpu_only
def test_documents_of_128k_tokens(device, record):
    """No T x T tensor: one of booleans alone would have 16 GiB."""
    T = 131072
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    q, k, v = (torch.randn(1, 2, T, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    doc_ids = (torch.rand(1, T, device=device) < 1e-4).cumsum(1)
    mask = ops.attention_mask(doc_ids, T, T, torch.device(device), flex=True)
    ops.attention(q, k, v, mask, flash=True).float().sum().backward()
    peak = torch.cuda.max_memory_allocated()
    record(peak_mib=peak / 2 ** 20)
    assert peak < 2 ** 31, peak


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts(device, dtype, record):
    """The grouped product of sorted rows against a loop over experts, one of them without rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 32, generator=generator)
    weight = torch.randn(4, 48, 32, generator=generator)
    ends = [5, 5, 20, 37]                       # the second expert has none
    errors = []
    ours = [tensor.to(device, dtype).requires_grad_(True) for tensor in (x, weight)]
    y = ops.grouped_linear(*ours, torch.tensor(ends, dtype=torch.int32, device=device))
    (y.float() ** 2).sum().backward()
    plain = [tensor.to(device, dtype).requires_grad_(True) for tensor in (x, weight)]
    starts = [0, *ends[:-1]]
    parts = [plain[0][a:b] @ plain[1][e].T for e, (a, b) in enumerate(zip(starts, ends))]
    expected = torch.cat(parts)
    (expected.float() ** 2).sum().backward()
    pairs = [(y.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(ours, plain))]
    errors = [relative_error(a, b) for a, b in pairs]
    record(errors=errors)
    assert max(errors) < (1e-5 if dtype == torch.float32 else 2e-2), errors


@both
@pytest.mark.parametrize("rows, vocab_size", [(7, 129), (300, 1000), (2048, 122753)])
def test_loss(device, rows, vocab_size, record, monkeypatch):
    """The loss over slices of the vocabulary against PyTorch's, with ignored targets."""
    if device == "cpu" and rows > 1000:
        rows = 64
    monkeypatch.setitem(ops.MAX_LOGITS, device, rows * 256)     # several slices
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (rows, vocab_size))
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    targets[::3] = -100
    scale = torch.rand(rows, generator=generator)
    found = []
    for function in (ops.cross_entropy, plain_cross_entropy):
        inputs = [tensor.to(device).requires_grad_(True) for tensor in (hidden, weight)]
        nll = function(inputs[0].to(torch.bfloat16), inputs[1], targets.to(device))
        (nll * scale.to(device)).sum().backward()
        found.append([nll.detach(), *(tensor.grad for tensor in inputs)])
    errors = [relative_error(a, b) for a, b in zip(*found)]
    record(errors=errors)
    assert errors[0] < 1e-4 and max(errors) < 2e-2, errors


def plain_cross_entropy(hidden, weight, targets):
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


@both
def test_next_batch(device, record):
    """A batch that a thread has prepared is the one that it would be, pinned on a GPU."""
    def batches(plan, first, count):
        idx = torch.arange(first, first + count)[:, None].expand(-1, 8).contiguous()
        return {"idx": idx, "targets": idx + 1}, idx.numel()
    with Prefetch(batches, World(device=torch.device(device)), ahead=True) as ahead:
        for first in range(0, 12, 4):
            (batch, n_targets), (expected, n_expected) = (
                source([[0, "any"]], first, 4) for source in (ahead, batches))
            assert n_targets == n_expected and batch.keys() == expected.keys()
            for name, tensor in batch.items():
                assert tensor.is_pinned() == (device == "cuda")
                moved = tensor.to(device, non_blocking=True)
                assert torch.equal(moved.cpu(), expected[name])
    record()


# ---- runs

RUN = ["--max_steps=20", "--n_embd=64", "--n_head=2", "--n_ff=96", "--block_size=48",
       "--batch_size=8"]
KINDS = {"dense": [], "experts": ["--num_experts=4"], "documents": ["--doc_mask=True"]}


def losses(train_tiny, name, *options):
    """Return the losses of 20 steps of a tiny model. --device etc. are in the options."""
    return [line["loss"] for line in metrics.read(train_tiny(name, *RUN, *options))[0]]


@gpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_and_cpu(device, kind, train_tiny, record):
    """Twenty float32 steps on the GPU and on the CPU."""
    options = [*KINDS[kind], "--compile=False", "--flash=False"]
    on_cpu = losses(train_tiny, "cpu", "--device=cpu", *options)
    on_gpu = losses(train_tiny, "gpu", "--device=cuda", *options)
    record(apart=apart(on_cpu, on_gpu), last=on_gpu[-1])
    assert apart(on_cpu, on_gpu) < 2e-3


@both
@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_compute(device, kind, train_tiny, record):
    """Eager is compiled is recomputed, with fused attention and without."""
    if device == "cpu" and kind != "dense":
        pytest.skip("tests/test_model.py and tests/test_moe.py compare these on a CPU")
    options = [*KINDS[kind], f"--device={device}"]
    plain = losses(train_tiny, "plain", *options, "--compile=False", "--flash=False")
    ways = {"flash": ["--compile=False"], "recomputed": ["--compile=False", "--recompute=1"]}
    if device == "cuda":                        # on a CPU twenty steps are too few to compile
        ways |= {"compiled": [], "compiled_recomputed": ["--recompute=1"]}
    far = {way: apart(losses(train_tiny, way, *options, *more), plain)
           for way, more in ways.items()}
    record(apart=far)
    assert max(far.values()) < (1e-5 if device == "cpu" else 2e-3), far


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(device, dtype, train_tiny, record):
    """bfloat16, and float16 with its loss scaler (a T4's way), against float32."""
    options = [f"--device={device}", "--compile=False"] if device == "cpu" else ["--device=cuda"]
    full = losses(train_tiny, "float32", *options)
    half = losses(train_tiny, dtype, *options, f"--dtype={dtype}")
    assert 0 < apart(full, half) < 0.05
    meta = checkpoint.read_meta(checkpoint.resolve(train_tiny.tmp_path / dtype))
    record(apart=apart(full, half))
    assert (meta["run"]["scaler"] is not None) == (dtype == "float16")


@both
def test_asynchronous_saving(device, train_tiny, record):
    """A checkpoint that was written while training went on is the one that a pause gives."""
    options = [f"--device={device}", "--deterministic=True", "--save_interval=7", "--keep_last=9",
               "--compile=False"]
    folders = [train_tiny("pause", *RUN, *options),
               train_tiny("async", *RUN, *options, "--async_save=True")]
    for step in ("step-00000007", "step-00000014", "step-00000020"):
        for part in ("model", "optimizer"):
            one, two = (dict(checkpoint.read_tensors(folder / step, part)) for folder in folders)
            assert all(torch.equal(one[name][...], two[name][...]) for name in one), (step, part)
    pauses = [[line["save_pause_s"] for line in metrics.read_jsonl(folder / "metrics.jsonl")
               if "save_pause_s" in line] for folder in folders]
    record(pauses=pauses)


@gpu_only
def test_kill_and_resume(device, train_tiny, record):
    """Killed in the middle and repeated: the losses of the undisturbed run, to the last bit."""
    more = [*RUN, "--device=cuda", "--dtype=bfloat16", "--deterministic=True", "--max_steps=200"]
    undisturbed = train_tiny("undisturbed", *more)
    command = ["train.py", train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'killed'}", *more]
    process = start(*command)
    until = time.monotonic() + 120
    while len(checkpoint.checkpoints(train_tiny.tmp_path / "killed")) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    said = finish(start(*command))
    a, b = ([line["loss"] for line in metrics.read(folder)[0]]
            for folder in (undisturbed, train_tiny.tmp_path / "killed"))
    record(resumed=said.split("from step")[1].split()[0])
    assert "continuing" in said and a == b


@both
def test_torchrun(device, train_tiny, record):
    """One process under torchrun: its process group (NCCL on a GPU) and FSDP2."""
    options = [*RUN, f"--device={device}",
               "--compile=False" if device == "cpu" else "--recompute=1"]
    alone = train_tiny("alone", *options)
    finish(launch(1, "train.py", train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'torchrun'}",
                  *options))
    a, b = ([line["loss"] for line in metrics.read(folder)[0]]
            for folder in (alone, train_tiny.tmp_path / "torchrun"))
    last = checkpoint.resolve(train_tiny.tmp_path / "torchrun")
    sharded = last / "model-00001-of-00001.safetensors"
    record(apart=apart(a, b))
    assert sharded.exists() and apart(a, b) < (1e-5 if device == "cpu" else 2e-3)


# ---- memory and speed: shapes of the paper with fewer layers, so that they fit one card

SHAPES = {"gpu_124m": ["config/gpu_124m.py", "--batch_size=32", "--micro_batch_size=16"],
          "minicpm_1b": ["config/minicpm_1b.py", "--n_layer=13", "--batch_schedule=0:8",
                         "--micro_batch_size=2"],
          "minicpm_2b": ["config/minicpm_2b.py", "--n_layer=8", "--batch_size=8",
                         "--micro_batch_size=2"],}
TINY_SHAPE = ["config/gpu_124m.py", "--n_layer=2", "--n_embd=64", "--n_head=2", "--n_ff=96",
              "--vocab_size=512", "--block_size=32", "--batch_size=4", "--micro_batch_size=2",
              "--compile=False", "--device=cpu"]


def printed_json(process):
    """Return the JSON that a process prints among warnings."""
    return json.loads(next(line for line in finish(process).splitlines() if line.startswith("{")))


def measure(*options, torchrun=False):
    """Return what tools.bench finds, in a process of its own."""
    command = ["-m", "tools.bench", *options, "--updates=6", "--json=True"]
    return printed_json(launch(1, *command) if torchrun else start(*command))


def about_speed(found):
    names = ("tokens_per_s", "seconds", "mfu", "peak_memory", "attention", "phases")
    return {name: found[name] for name in names if name in found}


@pytest.mark.parametrize("shape", [pytest.param("tiny", id="cpu", marks=pytest.mark.slow), *(
    pytest.param(name, marks=CUDA.marks) for name in SHAPES)])
def test_speed(shape, record):
    """Updates alone and under torchrun (FSDP2), compiled; MFU and the kernel of the attention."""
    options = SHAPES.get(shape, TINY_SHAPE)
    sharded = measure(*options, torchrun=True)
    record(torchrun=about_speed(sharded))
    assert sharded["processes"] == 1 and sharded["tokens_per_s"] > 0
    if shape == "tiny":                         # tests/test_bench.py has one process on a CPU
        return
    alone = measure(*options)
    record(alone=about_speed(alone))
    assert alone["attention"] and sharded["attention"], "no fused kernel"


@gpu_only
@pytest.mark.parametrize("recompute", [0, 1])
def test_plan(device, recompute, record):
    """The peak of tools.plan's simulated update against the allocator's, eager, within 10 %."""
    options = [*SHAPES["minicpm_2b"], f"--recompute={recompute}"]
    plan = printed_json(start("-m", "tools.plan", *options, "--gpus=1", "--json=True"))
    found = measure(*options, "--compile=False", torchrun=True)
    ratio = plan["memory"]["peak"] / found["peak_memory"]
    compiled = measure(*options, torchrun=True)["peak_memory"]
    record(simulated=plan["memory"]["peak"], allocated=found["peak_memory"], compiled=compiled)
    assert 0.9 < ratio < 1.1


@gpu_only
@pytest.mark.parametrize("sequences", [1, 32])
def test_decoding(device, sequences, record):
    """Tokens/s of the 124M shape in bfloat16: eager, and with torch.compile."""
    config = MiniCPMConfig(vocab_size=50304, n_layer=12, n_head=12, n_embd=768, n_ff=1920)
    model = MiniCPM(config)
    init_weights(model, 0)
    model.to(device, torch.bfloat16).eval()
    model.numerics.dtype = torch.bfloat16
    prompts, speeds, texts = [list(range(1, 17))] * sequences, {}, {}
    for way in ("eager", "compiled"):
        if way == "compiled":
            model.hidden = torch.compile(model.hidden, dynamic=True)
        for _ in range(3):                      # the first two warm up
            clock = time.perf_counter()
            texts[way] = [ids.tolist() for ids in model.generate(prompts, 256, temperature=0)]
            speeds[way] = 256 * sequences / (time.perf_counter() - clock)
    record(tokens_per_s=speeds, equal=texts["eager"] == texts["compiled"])
