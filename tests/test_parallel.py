"""Several processes are one: the same losses as one process, checkpoints that reshard, failures
that cost nothing."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import finish, launch
from torch._dynamo.testing import CompileCounter

import train
from configurator import ROOT, BadInput
from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import checkpoint, distributed, metrics
from engine.distributed import World
from engine.run import RunState, new_state
from model import Block, Linear, MiniCPM, MiniCPMConfig, init_weights

pytestmark = pytest.mark.skipif(sys.platform == "win32",
                                reason="torchrun with gloo is tried on Linux and macOS")

TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")
# Runs train.main for each list of options in a file, in the process group that torchrun made.
RUNS = """
import json, sys
sys.path.insert(0, {root!r})
import torch, train
torch.set_num_threads(1)
for argv in json.load(open(sys.argv[1])):
    train.main(argv)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus of bytes and a tiny config."""
    folder = tmp_path_factory.mktemp("parallel")
    write_corpus(folder / "data" / "one" / "bytes", load_tokenizer("bytes"),
                 [("train", TEXT * 4), ("val", TEXT[:700])])
    (folder / "runs.py").write_text(RUNS.format(root=str(ROOT)))
    (folder / "tiny.py").write_text(f"""
data_dir = {str(folder / "data")!r}
data = "one"
tokenizer = "bytes"
n_layer = 3
n_head = 4
n_kv_head = 2
n_embd = 64
n_ff = 96
dim_model_base = 32
block_size = 16
batch_size = 8
learning_rate = 0.01
max_steps = 20
log_interval = 1
save_interval = 10
eval_interval = 10
eval_tokens = 200
sample_tokens = 0
dtype = "float32"
device = "cpu"
compile = False
""")
    return folder


def options(place, name, *more):
    return [str(place / "tiny.py"), f"--out_dir={place / name}", *more]


def alone(place, name, *more):
    """Losses of a run in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main(options(place, name, "--quiet=True", *more))
    torch.set_num_threads(threads)
    return losses(place, name)


def together(place, processes, *runs):
    """Run each list of options in one group of processes; what they print."""
    path = place / f"runs-{time.time_ns()}.json"
    path.write_text(json.dumps(list(runs)))
    return finish(launch(processes, place / "runs.py", path))


def losses(place, name):
    return [x["loss"] for x in metrics.read(place / name)[0]]


def close(a, b, within=1e-5):
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < within


VARIANTS = {"tied": [], "untied": ["--tie_word_embeddings=False"],
            "experts": ["--num_experts=4", "--router_z_coef=0.001", "--micro_batch_size=2"]}
PAIRS = {
    **{f"2-{name}": (name, more) for name, more in VARIANTS.items()},
    "2-replicate": ("tied", ["--replicate=2"]),
    "2-accumulate": ("tied", ["--micro_batch_size=1", "--recompute=2"]),
    "2-async": ("tied", ["--async_save=True"]),
    "2-knobs": ("tied", ["--micro_batch_size=1", "--recompute=1", "--sync_micro_steps=True",
                         "--reshard_after_forward=False"])}


@pytest.fixture(scope="module")
def pairs(place):
    """The runs of two processes, all in one group: a group takes seconds to start."""
    together(place, 2, options(place, "2-bfloat16", "--dtype=bfloat16"),
             *[options(place, name, *more) for name, (_, more) in PAIRS.items()])


def test_two_processes_are_one(place, pairs):
    expected = {name: alone(place, f"1-{name}", *more) for name, more in VARIANTS.items()}
    for name, (variant, _) in PAIRS.items():
        assert close(losses(place, name), expected[variant]), name
    # What is no loss of tokens is averaged over ranks and micro-steps; a rank's micro-batch of 2 is
    # half of the one process's share.
    for name in ("balance_loss", "z_loss", "router_entropy", "expert_load"):
        one, two = (torch.tensor([x[name] for x in metrics.read(place / run)[0]])
                    for run in ("1-experts", "2-experts"))
        assert torch.allclose(one, two, atol=1e-5), name
    evaluations = [metrics.read(place / name)[1] for name in ("1-tied", "2-tied")]
    assert [x["step"] for x in evaluations[1]] == [10, 20]
    assert abs(evaluations[0][1]["val_bpb"] - evaluations[1][1]["val_bpb"]) < 1e-5
    # bfloat16: the same rule of rounding, so the same curve but for the order of sums.
    apart = [abs(a - b)
             for a, b in zip(losses(place, "2-bfloat16"),
                             alone(place, "1-bfloat16", "--dtype=bfloat16"))]
    assert max(apart) < 0.02
    assert max(abs(a - b) for a, b in zip(losses(place, "1-bfloat16"), expected["tied"])) > 1e-4
    # The checkpoint in pieces holds what the one process has, and every script takes it.
    one, two = (dict(checkpoint.read_weights(checkpoint.resolve(place / name)))
                for name in ("1-tied", "2-tied"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    folder = checkpoint.resolve(place / "2-tied")
    assert {"model-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
            "index.json"} <= set(checkpoint.read_meta(folder)["files"])
    same = [dict(checkpoint.read_tensors(checkpoint.resolve(place / name), "optimizer"))
            for name in ("2-tied", "2-async")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def cut_short(place, run, name):
    """A copy of a run as a kill behind its stable end leaves it, at step 16 of 20, under another
    name."""
    shutil.copytree(place / run, place / name)
    shutil.rmtree(place / name / "step-00000020")
    config = json.loads((place / name / "config.json").read_text())
    config["requested"]["out_dir"] = str(place / name)
    (place / name / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_resume_and_branch_across_sizes(place):
    straight = alone(place, "straight")
    cut_short(place, "straight", "1-to-2")
    cut_short(place, "straight", "1-to-4")
    together(place, 2, options(place, "1-to-2"), options(place, "whole"))
    cut_short(place, "whole", "2-to-2")
    cut_short(place, "whole", "2-to-1")
    together(place, 2, options(place, "2-to-2"))
    assert losses(place, "2-to-2") == losses(place, "whole")               # equal sizes: to the bit
    together(place, 4, options(place, "1-to-4"),
             options(place, "2x2", "--replicate=2", "--shard=2"))
    alone(place, "2-to-1")
    for name in ("1-to-2", "whole", "2-to-1", "1-to-4", "2x2"):
        assert close(losses(place, name), straight), name
    train.main([f"--branch_from={place / 'whole' / 'step-00000016'}",
                f"--out_dir={place / 'branch'}", "--decay_steps=2", "--quiet=True"])
    assert checkpoint.resolve(place / "branch").name == "step-00000018"


# ---- what every rank decides alike

def test_the_smallest_micro_batch_of_all_ranks_counts(monkeypatch):
    monkeypatch.setattr(World, "all_gather", lambda self, value: [value, 2])
    state = new_state(train.TrainConfig(max_steps=9))
    config = train.TrainConfig(max_steps=9, batch_size=16)
    assert train.set_micro_batch(config, state, MiniCPMConfig(vocab_size=64), World(size=2))
    assert state.micro == 2


@pytest.mark.slow
def test_ranks_with_unequal_memory_train_with_one_micro_batch(place):
    """Rank 0 has room for four sequences, rank 1 for one: both take one."""
    (place / "unequal.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.device.MICRO_TOKENS_CPU = 16 * (4 if os.environ["RANK"] == "0" else 1)
train.main(sys.argv[1:])
""")
    process = launch(2, place / "unequal.py", *options(place, "unequal"))
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "micro-batch 1," in said, said
    assert checkpoint.read_meta(checkpoint.resolve(place / "unequal"))["run"]["micro"] == 1
    assert close(losses(place, "unequal"), alone(place, "1-unequal"))


def test_a_run_goes_on_with_fewer_processes_and_other_knobs(place, pairs):
    """The micro-batch is chosen again if what decides it has changed, and else kept."""
    straight = alone(place, "1-knobs", "--micro_batch_size=8")
    assert micro(place, "2-knobs") == 1 and micro(place, "2-tied") == 4
    for name in ("2-knobs", "2-tied"):
        cut_short(place, name, f"{name}-1")
        assert close(alone(place, f"{name}-1"), straight)
        assert micro(place, f"{name}-1") == 8
    cut_short(place, "1-knobs", "1-knobs-1")
    assert alone(place, "1-knobs-1") == straight and micro(place, "1-knobs-1") == 8
    cut_short(place, "1-knobs", "1-knobs-2")
    assert close(alone(place, "1-knobs-2", "--micro_batch_size=3"), straight)
    assert micro(place, "1-knobs-2") == 3


def micro(place, name):
    return checkpoint.read_meta(checkpoint.resolve(place / name))["run"]["micro"]


def test_several_nodes_hold_a_copy_each_unless_a_command_says_otherwise():
    def shape(size, per_node, **values):
        return distributed.mesh_shape(train.TrainConfig(max_steps=1, **values), size, per_node)
    assert shape(8, 8) == (1, 8) and shape(64, 8) == (8, 8) and shape(4, 8) == (1, 4)
    # nodes of unequal size
    assert shape(12, 8) == (1, 12)
    assert shape(16, 8, shard=16) == (1, 16) == shape(16, 8, replicate=1)
    assert shape(16, 8, replicate=4) == (4, 4) and shape(16, 8, replicate=2, shard=8) == (2, 8)
    with pytest.raises(BadInput, match="not the number of processes, 16"):
        shape(16, 8, shard=5)


# ---- compiled blocks

@pytest.fixture
def alone_in_a_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch._dynamo.reset()


def sharded(compiled, monkeypatch=None, **values):
    """Return (a model as torchrun's processes have it, CompileCounter of its blocks)."""
    counter, dtype = CompileCounter(), values.pop("dtype", torch.float32)
    if compiled:
        torch._dynamo.reset()
        to_counter = functools.partialmethod(torch.nn.Module.compile, backend=counter)
        monkeypatch.setattr(Block, "compile", to_counter)
    config = train.TrainConfig(max_steps=1, recompute=values.pop("recompute", 0))
    with torch.device("meta"):
        model = MiniCPM(MiniCPMConfig(vocab_size=64, n_head=2, n_embd=32, n_ff=48, **values))
    model.numerics.dtype = dtype
    distributed.distribute(model, config, distributed.make_mesh("cpu", 1, 1), dtype, compiled)
    model.to_empty(device="cpu")
    init_weights(model, 0, distributed.copy_local_shard)
    return model, counter


def loss_and_gradient(model, doc_ids, batch=2):
    idx = torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(0))
    nll, aux = model(idx, idx, doc_ids=doc_ids)
    (nll.sum() + aux.get("balance_loss", 0)).backward()
    return nll.detach(), model.blocks[0].attn.wqkv.weight.grad.full_tensor()


EXPERTS = {"num_experts": 4, "dtype": torch.bfloat16}


@pytest.mark.parametrize("recompute, frames", [(0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.parametrize("kind", [{}, EXPERTS], ids=["dense", "experts"])
def test_all_blocks_share_one_compiled_graph(alone_in_a_group, monkeypatch, kind, doc_mask,
                                             recompute, frames):
    """Whatever is recomputed, and however deep: two graphs only if every second block recomputes.
    """
    doc_ids = torch.arange(16).div(5, rounding_mode="floor").expand(2, -1) if doc_mask else None
    model, counter = sharded(True, monkeypatch, n_layer=12, recompute=recompute, **kind)
    found = loss_and_gradient(model, doc_ids)
    assert counter.frame_count == frames
    eager = loss_and_gradient(sharded(False, n_layer=12, recompute=recompute, **kind)[0], doc_ids)
    assert all(torch.equal(a, b) for a, b in zip(found, eager))


def test_experts_in_float32_compile_in_parts_or_the_run_says_that_they_do_not(
        alone_in_a_group, monkeypatch):
    for recompute in (0, 1):
        model, counter = sharded(True, monkeypatch, n_layer=2, num_experts=4, recompute=recompute)
        loss_and_gradient(model, None)
        config, said = train.TrainConfig(max_steps=1, recompute=recompute, fused=False), []
        train.describe(config, train.make_optimizer(config, model, None), model,
                       RunState(compiled=True, micro=1), torch.float32, distributed.World(),
                       said.append)
        noted = said[-1].startswith("compile: not the blocks that --recompute names")
        assert noted == (counter.frame_count == 0) == bool(recompute)


def test_one_copy_is_sharded_in_one_dimension(alone_in_a_group):
    """FSDP2 would treat a mesh of 1 x N as copies, and reduce between them."""
    from torch.distributed.tensor import Shard
    assert sharded(False, n_layer=1)[0].blocks[0].attn.wqkv.weight.placements == (Shard(0),)


def test_blocks_compile_for_every_size_of_training_and_evaluation(alone_in_a_group, monkeypatch):
    """Dynamo's own limit of 8 graphs would end a run whose stages and corpora have more sizes."""
    model, counter = sharded(True, monkeypatch, n_layer=2)
    for batch in range(1, 7):
        loss_and_gradient(model, None, batch)
        with torch.no_grad():
            model.eval()(torch.zeros(batch, 16, dtype=torch.int64))
        model.train()
    assert counter.frame_count == 12


HAS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")


@HAS_COMPILER
def test_what_evaluates_on_a_cpu_can_be_compiled():
    """Under torchrun evaluation runs through the compiled blocks, without gradients."""
    layer, x = Linear(64, 96), torch.randn(2, 32, 64)
    torch.nn.init.normal_(layer.weight)
    with torch.no_grad():
        assert torch.allclose(torch.compile(layer, dynamic=False, fullgraph=True)(x), layer(x),
                              atol=1e-4)


@pytest.mark.slow
@HAS_COMPILER
def test_compiled_recomputed_blocks_train_and_evaluate_alike(place):
    (place / "compiled.py").write_text((place / "runs.py").read_text().replace(
        "import torch, train", "import torch, train; train.device.COMPILE_PAYS_AFTER = 0"))
    variants = {"0": ["--recompute=0"], "1": ["--recompute=1"],
                "2-mask": ["--recompute=2", "--doc_mask=True"]}
    runs = [options(place, f"compiled-{name}", *more, "--compile=True")
            for name, more in variants.items()]
    (place / "compiled.json").write_text(json.dumps(runs))
    process = launch(2, place / "compiled.py", place / "compiled.json")
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0 and said.count("cpu, float32, compiled") == len(variants), said
    for name, more in variants.items():
        assert close(losses(place, f"compiled-{name}"), alone(place, f"eager-{name}", *more)), name
        found, expected = (metrics.read(place / f"{kind}-{name}")[1]
                           for kind in ("compiled", "eager"))
        assert close([x["val_bpb"] for x in found], [x["val_bpb"] for x in expected]), name


# ---- failures

def children(pid):
    out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in out.split()]


def wait_for(process, place, name, step):
    """Until the run has logged a step."""
    path = place / name / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (path.exists()
               and any(x["step"] >= step
                       for x in metrics.read_jsonl(place / name / "metrics.jsonl"))):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)


def test_recomputing_changes_nothing_but_memory(place):
    assert alone(place, "recomputed", "--recompute=1") == alone(place, "kept")


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_nothing_is_lost(place):
    expected = alone(place, "undisturbed", "--max_steps=60")
    process = launch(2, ROOT / "train.py", *options(place, "killed", "--max_steps=60"), restarts=2)
    wait_for(process, place, "killed", 15)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "continuing" in said and close(losses(place, "killed"), expected, 1e-4)


@pytest.mark.slow
def test_a_terminated_group_saves_and_continues(place):
    if not (place / "undisturbed").exists():
        alone(place, "undisturbed", "--max_steps=60")
    expected = losses(place, "undisturbed")
    process = launch(2, ROOT / "train.py", *options(place, "stopped", "--max_steps=60"))
    wait_for(process, place, "stopped", 13)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    step = json.loads((checkpoint.resolve(place / "stopped") / "meta.json").read_text())["step"]
    assert 13 <= step < 60 and f"stopped at step {step} and saved" in said
    together(place, 2, options(place, "stopped", "--max_steps=60"))
    assert close(losses(place, "stopped"), expected, 1e-4)


@pytest.mark.parametrize("patience", [pytest.param(1, marks=pytest.mark.slow), 60])
def test_torchrun_must_wait_for_the_save_that_a_signal_asks_for(place, patience):
    """A slow step, then a slow save. torchrun kills what takes longer than its --shutdown-timeout,
    30 s by default.

    The signal comes twice, as in a job of Slurm, which sends it to all processes, of which torchrun
    sends it again.
    """
    name = f"patience-{patience}"
    (place / f"{name}.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
rank, write = os.environ["RANK"], train.checkpoint.write_tensors
def slow_write(*args):
    time.sleep(2.5)
    return write(*args)
def slow_loss(model, batch, calls=[]):
    calls.append(1)
    if len(calls) == 13:
        print("step 13 begins", flush=True)
        time.sleep(1.5)
    return train.language_loss(model, batch)
train.checkpoint.write_tensors = slow_write
train.run_training.__defaults__ = (slow_loss, *train.run_training.__defaults__[1:])
train.main(sys.argv[1:])
saved = bool(train.checkpoint.checkpoints({str(place / name)!r}))
print("rank", rank, "ends, the checkpoint exists:", saved, flush=True)
""")
    process = launch(2, place / f"{name}.py",
                     *options(place, name, "--save_interval=0", "--max_steps=60"),
                     torchrun=[f"--shutdown-timeout={patience}"])
    said = ""
    while "step 13 begins" not in said:
        said += process.stdout.readline()
    workers = children(process.pid)
    process.terminate()
    for _ in range(2):
        time.sleep(0.3)
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
    said += process.communicate(timeout=60)[0]
    assert not any(map(runs, workers))
    saved = [path.name for path in checkpoint.checkpoints(place / name)]
    if patience == 1:
        assert saved == [] and "stopped at step" not in said
        return
    assert saved == ["step-00000013"] and "stopped at step 13 and saved" in said, said
    # the step of the signal was the last one
    assert len(losses(place, name)) == 13
    # no process ends before it does
    assert said.count("ends, the checkpoint exists: True") == 2


def test_slurm_gives_torchrun_longer_than_torchrun_gives_its_workers():
    script = (ROOT / "slurm.sh").read_text()
    before_the_limit, = map(int, re.findall(r"--signal=TERM@(\d+)", script))
    patience, = map(int, re.findall(r"--shutdown-timeout=(\d+)", script))
    assert 30 < patience < before_the_limit


def runs(pid):
    """Return whether a process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True,
                           text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def refused(place, processes, name, *more, code=2):
    """What a group that can't do what is asked prints; all of its processes have ended."""
    process = launch(processes, ROOT / "train.py", *options(place, name, *more))
    said = process.communicate(timeout=120)[0]
    assert process.returncode and f"exitcode  : {code}" in said, said
    return said.split("torch/distributed/elastic")[0]


@pytest.mark.slow
@pytest.mark.parametrize("option, message",
                         [("--shard=3", "their product is not the number of processes, 2"),
                          ("--batch_size=7", "is not a multiple of the 2 processes"),
                          ("--data=nothing", "no corpus here")])
def test_what_a_group_can_not_do_ends_all_of_it(place, option, message):
    said = refused(place, 2, "x", option)
    assert message in said and "Traceback" not in said, said
    assert not (place / "x" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_ranks_with_another_configuration_are_named(place):
    """Also what only the machine decides, such as the dtype of --dtype=auto: FSDP would wait for
    ever."""
    (place / "uneven.py").write_text("import os, sys\nsys.path.insert(0, %r)\nimport torch, train\n"
                                     "train.device.pick_dtype = lambda *_: [torch.float32, "
                                     "torch.bfloat16][int(os.environ['RANK'])]\n"
                                     "train.main(sys.argv[1:] + ['--seed=' + os.environ['RANK']])\n"
                                     % str(ROOT))
    process = launch(2, place / "uneven.py", *options(place, "uneven"))
    said = process.communicate(timeout=120)[0]
    assert process.returncode and ("rank 1: has another configuration than rank "
                                   "0: dtype is bfloat16 and there float32, "
                                   "seed is 1 and there 0") in said, said


@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "middle"])
def test_a_shard_that_one_node_lacks_ends_all_ranks(place, when):
    """Missing at the start, or only found damaged when it is first read, by one of the ranks alone.
    """
    hide = 'dataset.Split.map_shard = lambda self, i: self.read_header("gone.bin")'
    if when == "start":
        hide = "os.listdir = lambda folder: []"
    (place / "lacking.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from data import dataset
if os.environ["RANK"] == "1":
    {hide}
train.main(sys.argv[1:])
""")
    process = launch(2, place / "lacking.py", *options(place, f"lacking-{when}"))
    said = process.communicate(timeout=120)[0].split("torch/distributed/elastic")[0]
    assert process.returncode and "rank 1: " in said and "shard is missing" in said
    assert "Traceback" not in said


def with_loss(place, name, statement):
    """A script that trains with the usual loss and a statement in it, which sees `loss` and the
    number of `calls` so far."""
    script = place / f"{name}.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import train
def other(model, batch, calls=[]):
    calls.append(1)
    loss, aux = train.language_loss(model, batch){statement}
    return loss, aux
train.run_training.__defaults__ = (other, *train.run_training.__defaults__[1:])
train.main(sys.argv[1:])
""")
    return script


def test_a_loss_that_is_no_number_stops_all_ranks(place):
    script = with_loss(place, "poisoned", """
    if len(calls) == 12 and os.environ["RANK"] == "1":
        loss = loss * float("nan")""")
    process = launch(2, script, *options(place, "poisoned"))
    said = process.communicate(timeout=120)[0]
    assert process.returncode and "exitcode  : 3" in said
    # rank 0 says it, and the last good checkpoint
    assert said.count("step 12: loss nan") == 1 and "step-00000010" in said


BROKEN = {   # how rank 1 fails, and what it says then
    "forward": ("""
    if len(calls) == 6 and rank_1:                              # the second micro-step of update 3
        fail(RuntimeError("a bug"))""", "RuntimeError: a bug"),
    "backward": ("""
    if len(calls) == 6 and rank_1:
        loss.register_hook(lambda grad: fail(torch.OutOfMemoryError("no memory")))""",
                 "the GPU ran out of memory: lower --micro_batch_size"),
    "saving": ("""
    if len(calls) == 6 and rank_1:              # rank 0 waits for its files, in a thread or not
        full = OSError(28, "No space left on device", "step-00000004")
        train.checkpoint.write_tensors = lambda *args: fail(full)""",
               "step-00000004: No space left on device"),
}


RARE = [("forward", ()), ("backward", ()), ("saving", ("--async_save=True",))]


@pytest.mark.parametrize("where, more",
                         [("saving", ()),
                          *(pytest.param(*case, marks=pytest.mark.slow) for case in RARE)])
def test_an_error_on_one_rank_ends_all_and_names_it(place, where, more):
    """A rank that raises must not wait for its peers, nor they for it: they may be inside a
    collective, or wait for its files."""
    statement, message = BROKEN[where]
    name = f"broken-{where}-{len(more)}"
    script = with_loss(place, name, """
    rank_1 = os.environ["RANK"] == "1"
    def fail(error):
        print("failed at", time.time(), flush=True)
        raise error""" + statement)
    process = launch(2, script,
                     *options(place, name, "--micro_batch_size=2", "--save_interval=4", *more))
    said = ""
    while "failed at" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    workers = children(process.pid)
    said += process.communicate(timeout=60)[0]
    seconds = time.time() - float(re.search(r"failed at ([\d.]+)", said)[1])
    print(f"\n{name}: all processes gone {seconds:.1f} s after the error")
    assert process.returncode and seconds < 30 and not any(map(runs, workers))
    mine = said.split("torch/distributed/elastic")[0]
    assert f"rank 1: {message}" in mine, said
    assert all("lost contact with the other processes" in line
               for line in mine.splitlines() if line.startswith("rank 0:"))


@pytest.mark.slow
def test_a_silent_peer_ends_in_an_error(place):
    script = with_loss(place, "silent", """
    if len(calls) == 5 and os.environ["RANK"] == "1":
        time.sleep(600)""")
    began = time.monotonic()
    process = launch(2, script, *options(place, "silent", "--timeout=0.05"))
    said = process.communicate(timeout=120)[0]
    assert process.returncode and "rank 0: lost contact with the other processes" in said
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_killed_node_is_replaced_and_nothing_is_lost(place):
    """Two agents, as on two nodes; one is killed with its worker and another takes its place."""
    import socket
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def node():
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                   "--nproc_per_node=1", "--max-restarts=5", "--rdzv-backend=c10d",
                   f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=1", str(ROOT / "train.py"),
                   *options(place, "nodes", "--max_steps=300")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, cwd=ROOT,
                                env={**os.environ, "OMP_NUM_THREADS": "1",
                                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    head = node()
    # the first one keeps the meeting point
    time.sleep(2)
    lost = node()
    wait_for(head, place, "nodes", 35)
    for pid in [lost.pid, *children(lost.pid)]:
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    other = node()
    said = head.communicate(timeout=240)[0] + other.communicate(timeout=60)[0]
    assert head.returncode == 0 and other.returncode == 0, said
    assert "continuing" in said
    assert close(losses(place, "nodes"), alone(place, "no-nodes", "--max_steps=300"), 1e-2)


@pytest.mark.slow
def test_twenty_random_kills_lose_nothing(place):
    """A worker killed, the agent terminated, at random moments, saving included: the losses are
    those of an undisturbed run."""
    import random
    rng, steps = random.Random(0), 400
    arguments = ["--max_steps=400", "--save_interval=5", "--async_save=True"]
    together(place, 2, options(place, "calm", *arguments))
    for attempt in range(21):
        process = launch(2, ROOT / "train.py", *options(place, "stormy", *arguments), restarts=0)
        if attempt < 20:
            begun = (place / "stormy" / "metrics.jsonl").exists()
            done = len(losses(place, "stormy")) if begun else 0
            wait_for(process, place, "stormy", min(steps - 1, done + rng.randrange(1, 15)))
            time.sleep(rng.random() * 0.05)
            how = rng.choice(["worker", "worker", "agent", "all"])
            workers = children(process.pid)
            if how == "agent":
                process.terminate()
            for pid in {"worker": workers[:1], "agent": [], "all": [process.pid, *workers]}[how]:
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=240)
        for pid in [*children(process.pid)]:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0
    assert losses(place, "stormy") == losses(place, "calm")
