"""Experts: the grouped product against a loop, what the router is told, and dense models upcycled
without a change of function."""
import dataclasses
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from configurator import ROOT, BadInput, configure
from data.tokenizer import load_tokenizer
from engine import checkpoint
from engine.ops import rows_by_expert
from family import upcycle
from model import (
    MiniCPM,
    MiniCPMConfig,
    MoE,
    SwiGLU,
    init_weights,
    mup_table,
    optimizer_groups,
    routing_metrics,
)
from tools import convert, plan
from train import TrainConfig

DENSE = MiniCPMConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, n_ff=48, dim_model_base=16)
SMALL = dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2, router_z_coef=0.001)


def make(config, seed=1):
    model = MiniCPM(config)
    init_weights(model, seed)
    return model


def ids(*shape, seed=0):
    return torch.randint(0, DENSE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def total(nll, aux, n=None):
    """What the loop minimises."""
    return nll.sum() / (n or nll.numel()) + sum(
        value for name, value in aux.items() if name.endswith("_loss"))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- the layer

def looped(moe, x):
    """The layer one token and one expert at a time, in x's dtype where the layer computes in it."""
    out = []
    for row in x.flatten(0, 1):
        p = (moe.router.weight.to(x.dtype).float() @ row.float()).softmax(0)
        weight, expert = p.topk(moe.k)
        y = 0
        for w, e in zip(weight / weight.sum() if moe.k > 1 else weight, expert):
            gate, up = (moe.experts.w_in[e].to(x.dtype) @ row).chunk(2)
            y = y + w * (moe.experts.w_out[e].to(x.dtype) @ (F.silu(gate) * up)).float()
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("E, k, shape",
                         [(1, 1, (2, 3)), (2, 1, (1, 1)), (4, 2, (2, 9)), (8, 8, (1, 5)),
                          (3, 2, (2, 60)), (64, 3, (2, 4))])
def test_the_grouped_product_equals_a_loop(E, k, shape, dtype, within, monkeypatch):
    """One token, experts without tokens (64 of them for 24 choices), all experts, rows filled up (3
    experts): values and gradients."""
    moe = MoE(dataclasses.replace(SMALL, num_experts=E, num_experts_per_tok=k))
    generator = torch.Generator().manual_seed(E)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    x = torch.randn(*shape, SMALL.n_embd, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(*shape, SMALL.n_embd, generator=generator)
    results = []
    for y in (moe(x)[0], looped(moe, x)):
        assert y.dtype == torch.float32 and y.shape == x.shape
        results.append((y, *torch.autograd.grad((y * g).sum(), [x, *moe.parameters()])))
    for ours, reference in zip(*results):
        largest = reference.float().abs().max().clamp(min=1e-3 if E == 1 else 0)
        assert (ours - reference).float().abs().max() <= within * largest
    # in float32 one product for each expert that has rows
    with torch.no_grad():
        assert torch.allclose(moe(x)[0], results[1][0], atol=within, rtol=within)
        monkeypatch.setattr("engine.ops.ONEDNN", False)                         # a torch without it
        assert torch.allclose(moe(x)[0], results[1][0], atol=within, rtol=within)
    used = set(moe(x)[1][1].unique().tolist())
    unused = [e for e in range(E) if e not in used]
    assert (results[0][3][unused] == 0).all() and (E < 64 or len(unused) >= 40)


def test_rows_are_laid_out_by_expert_in_few_sizes():
    """oneDNN builds a kernel for every number of rows that it meets, which cost a third of a step
    of experts on CPU."""
    expert = torch.tensor([2, 0, 2, 2, 0])
    row, pair, ends = rows_by_expert(expert, 3, multiple=4)
    assert row.tolist() == [4, 0, 5, 6, 1] and ends.tolist() == [4, 4, 8]
    assert ends.dtype == torch.int32
    assert pair.tolist() == [1, 4, 5, 5, 0, 2, 3] + 7 * [5]
    assert [t.tolist()
            for t in rows_by_expert(expert, 3, 1)] == [[2, 0, 3, 4, 1], [1, 4, 0, 2, 3], [2, 2, 5]]


def test_one_expert_per_token_is_weighted_by_its_probability_so_its_router_learns():
    """Renormalized, the weight would be 1 and the router's gradient from the loss 0."""
    model = make(dataclasses.replace(SMALL, num_experts_per_tok=1, balance_coef=0, router_z_coef=0))
    of_loss = gradients(model, whole_nll(model, ids(2, 16), ids(2, 16, seed=1)))
    assert all(of_loss[f"blocks.{i}.mlp.router.weight"].abs().max() > 1e-4 for i in range(2))
    assert of_loss["blocks.0.mlp.experts.w_out"].abs().max() > 1e-4


def test_equal_experts_are_the_dense_layer():
    dense, moe = SwiGLU(DENSE), MoE(dataclasses.replace(SMALL, num_experts=8,
                                                        num_experts_per_tok=3))
    torch.nn.init.normal_(moe.router.weight)
    with torch.no_grad():
        moe.experts.w_in.copy_(dense.w_in.weight)
        moe.experts.w_out.copy_(dense.w_out.weight)
    x = torch.randn(2, 7, 32)
    assert (moe(x)[0] - dense(x)).abs().max() < 1e-6


def test_sizes_that_the_grouped_product_can_not_take_are_refused():
    said = str(pytest.raises(BadInput, MiniCPM,
                             dataclasses.replace(SMALL, n_embd=36, n_ff=44)).value).splitlines()
    assert len(said) == 2 and "--n_embd=36" in said[0] and "multiple of 8" in said[1]
    assert "--num_experts_per_tok=5" in str(
        pytest.raises(BadInput, MiniCPM, dataclasses.replace(SMALL, num_experts_per_tok=5)).value)
    assert "--balance_coef=-1: must not be negative" in str(
        pytest.raises(BadInput, MiniCPM, dataclasses.replace(DENSE, balance_coef=-1)).value)


# ---- what is reported of the router

def test_the_balance_loss_is_switchs_and_transformers():
    moe_code = pytest.importorskip("transformers.models.granitemoe.modeling_granitemoe")
    config = dataclasses.replace(SMALL, num_experts=5, num_experts_per_tok=3)
    # (L, B, T, E)
    logits = 2 * torch.randn(3, 4, 7, 5, generator=torch.Generator().manual_seed(0))
    expert = logits.topk(3).indices
    aux = routing_metrics(config, logits, expert)
    by_hand = z = 0
    for layer in range(3):
        for sequence in range(4):
            p = logits[layer, sequence].softmax(-1)
            f = [(expert[layer, sequence] == e).sum().item() / (7 * 3) for e in range(5)]
            by_hand += 5 * sum(f[e] * p[:, e].mean().item() for e in range(5)) / 4
            z += sum(math.log(sum(map(math.exp, row))) ** 2
                     for row in logits[layer, sequence].tolist()) / 7 / 4
    assert aux["balance_loss"].item() == pytest.approx(0.01 * by_hand, rel=1e-5)
    assert aux["z_loss"].item() == pytest.approx(0.001 * z, rel=1e-5)
    theirs = sum(moe_code.load_balancing_loss_func((logits[layer, sequence],), 5, 3) / 3 / 4
                 for layer in range(3) for sequence in range(4))
    # they sum over the choices
    assert aux["balance_loss"].item() == pytest.approx(0.01 * theirs.item(), rel=1e-5)
    assert (aux["expert_load"].sum(1) - 1).abs().max() < 1e-6 and aux["expert_load"].shape == (3, 5)
    assert aux["router_entropy"].shape == (3,) and (aux["router_entropy"] < math.log(5)).all()
    even = routing_metrics(config, torch.zeros(3, 1, 5, 5),
                           torch.arange(5).view(1, 1, 5, 1).expand(3, 1, 5, 3))
    assert even["balance_loss"].item() == pytest.approx(0.01 * 3)
    assert even["router_entropy"].tolist() == pytest.approx([math.log(5)] * 3)


def test_losses_do_not_depend_on_micro_batches():
    model, idx, targets = make(SMALL), ids(4, 12), ids(4, 12, seed=1)
    whole = model(idx, targets)
    assert set(whole[1]) == {"balance_loss", "z_loss", "expert_load", "router_entropy"}
    assert not any(whole[1][name].requires_grad for name in ("expert_load", "router_entropy"))
    expected = gradients(model, total(*whole))
    parts = [model(idx[i:i + 1], targets[i:i + 1]) for i in range(4)]
    for name, value in whole[1].items():
        assert (sum(aux[name] for _, aux in parts) / 4 - value).abs().max() < 1e-6
    found = gradients(model, sum(total(*part) for part in parts) / 4)
    assert all((found[name] - g).abs().max() < 1e-6 for name, g in expected.items())
    without = gradients(model, whole_nll(model, idx, targets))
    assert (without["blocks.0.mlp.router.weight"]
            - expected["blocks.0.mlp.router.weight"]).abs().max() > 1e-5


def whole_nll(model, idx, targets):
    return model(idx, targets)[0].mean()


def test_evaluation_reports_nothing_and_dense_models_nothing_at_all():
    with torch.no_grad():
        assert make(SMALL)(ids(1, 5), ids(1, 5))[1] == {}
    assert make(DENSE)(ids(1, 5), ids(1, 5))[1] == {}
    assert "z_loss" not in make(
        dataclasses.replace(SMALL, router_z_coef=0.0))(ids(1, 5), ids(1, 5))[1]


@pytest.mark.parametrize("how, dtype, within",
                         [("recompute", torch.float32, 1e-6), ("compiled", torch.float32, 1e-6),
                          ("compiled", torch.bfloat16, 1e-2)])
def test_recomputed_and_compiled_blocks_give_the_same(how, dtype, within):
    idx, targets = ids(2, 16), ids(2, 16, seed=1)
    plain, other = make(SMALL), make(SMALL)
    plain.numerics.dtype = other.numerics.dtype = dtype
    if how == "recompute":
        from engine.distributed import recompute_blocks
        recompute_blocks(other, 1)
    # in bfloat16 nothing breaks the graph
    else:
        for block in other.blocks:
            block.compile(dynamic=False, fullgraph=dtype == torch.bfloat16, backend="aot_eager")
    expected, found = plain(idx, targets), other(idx, targets)
    assert all((a - b).abs().max() <= within * a.abs().max()
               for a, b in [(expected[0], found[0]), *zip(expected[1].values(), found[1].values())])
    expected, found = gradients(plain, total(*expected)), gradients(other, total(*found))
    assert all((found[name] - g).abs().max() <= 10 * within * g.abs().max()
               for name, g in expected.items())


@pytest.mark.slow
def test_the_whole_model_compiled_with_inductor_gives_the_same():
    idx, targets = ids(2, 16), ids(2, 16, seed=1)
    plain, other = make(SMALL), make(SMALL)
    expected, found = plain(idx, targets), torch.compile(other, dynamic=False)(idx, targets)
    assert all((expected[1][name] - value).abs().max() < 1e-5 for name, value in found[1].items())
    expected, found = gradients(plain, total(*expected)), gradients(other, total(*found))
    assert all((found[name] - g).abs().max() < 1e-5 for name, g in expected.items())


def test_cached_generation_gives_the_same_tokens():
    model = make(SMALL).eval()
    prompts = [ids(9, seed=2).tolist(), ids(4, seed=3).tolist()]
    runs = [[row.tolist() for row in model.generate(prompts, 12, temperature=0, use_cache=cached)]
            for cached in (True, False)]
    assert runs[0] == runs[1]


def test_roles_of_experts_and_router():
    model = make(SMALL)
    groups = {group["role"]: group for group in optimizer_groups(model, 0.1)}
    assert set(groups) == {"embedding", "matrix", "experts", "router", "norm"}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert (groups["experts"]["lr_scale"], groups["experts"]["weight_decay"]) == (16 / 32, 0.1)
    assert (groups["router"]["lr_scale"], groups["router"]["weight_decay"]) == (16 / 32, 0)
    assert abs(model.blocks[0].mlp.experts.w_in.std() / (0.1 / math.sqrt(2)) - 1) < 0.03
    assert mup_table(SMALL)["router"].std == 0.1 / math.sqrt(2)


# Two processes, the model spread over them, each with half of a batch: the losses and gradients of
# one process with all of it.
TWO = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
import train
from engine import distributed
from model import MiniCPM, init_weights
from test_moe import SMALL, gradients, ids, make, total
torch.set_num_threads(1)
rank, dtype, recompute = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
with torch.device("meta"):
    model = MiniCPM(SMALL)
model.numerics.dtype = dtype
config = train.TrainConfig(max_steps=1, recompute=recompute)
distributed.distribute(model, config, mesh, dtype, compiled=False)
model.to_empty(device="cpu")
init_weights(model, 1, distributed.copy_local_shard)
alone, idx, targets = make(SMALL), ids(4, 12), ids(4, 12, seed=1)
alone.numerics.dtype = dtype
nll, aux = alone(idx, targets)
expected = gradients(alone, total(nll, aux))
half = slice(2 * rank, 2 * rank + 2)
nll, here = model(idx[half], targets[half])
total(nll, here).backward()                     # gradients are averaged over the ranks
found = {{name: p.grad.full_tensor() for name, p in model.named_parameters()}}
# all experts, half of their rows
assert model.blocks[0].mlp.experts.w_in.to_local().shape == (4, 48, 32)
for name, value in aux.items():
    mean = here[name].detach().clone()
    dist.all_reduce(mean)
    assert (mean / 2 - value).abs().max() < 1e-6, name
for name, g in expected.items():
    within = 1e-6 if dtype == torch.float32 else 0.02 * g.abs().max()
    assert (found[name] - g).abs().max() < within, name
distributed.leave_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo is tried on Linux and macOS")
@pytest.mark.parametrize("dtype, recompute", [("float32", 0), ("float32", 1), ("bfloat16", 0)])
def test_two_processes_are_one(dtype, recompute, tmp_path):
    argv = [sys.executable, "-c", TWO.format(root=str(ROOT))]
    both = [subprocess.Popen([*argv, str(rank), dtype, str(recompute), str(tmp_path / "store")],
                             stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in both:
        assert process.wait(timeout=120) == 0, process.stderr.read()


# ---- upcycling

def save(out_dir, model, step=0, run=None):
    """A checkpoint of a run folder, with the byte tokenizer."""
    tokenizer = load_tokenizer("bytes")
    meta = {"model": dataclasses.asdict(model.config),
            "tokenizer_hash": tokenizer.hash} | ({"run": {"step": step, **run},
                                                  "train": {"schedule": "wsd"}} if run else {})
    return checkpoint.save_checkpoint(out_dir, step, {"model": model.state_dict()}, meta,
                                      tokenizer.save)


def run(*argv):
    upcycle.main([str(word) for word in argv])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return said[0]


def without_experts(config):
    """A config with what no dense checkpoint says taken out."""
    return dataclasses.replace(config, num_experts=0)


@torch.no_grad()
def test_an_upcycled_checkpoint_computes_what_the_dense_one_did(tmp_path, capsys):
    dense = make(DENSE)
    source = save(tmp_path / "dense", dense)
    run(f"--ckpt={source}", f"--out={tmp_path / 'moe'}", "--num_experts=6",
        "--num_experts_per_tok=3")
    assert "6 experts" in capsys.readouterr().out
    moe = MiniCPM.from_pretrained(tmp_path / "moe")
    assert (moe.config.num_experts, moe.config.num_experts_per_tok) == (6, 3)
    assert without_experts(moe.config) == dataclasses.replace(DENSE, num_experts_per_tok=3)
    assert (moe(ids(2, 40)) - dense(ids(2, 40))).abs().max() < 1e-5
    assert all(torch.equal(moe.blocks[1].mlp.experts.w_out[e], dense.blocks[1].mlp.w_out.weight)
               for e in range(6))
    assert not torch.equal(moe.blocks[0].mlp.router.weight, moe.blocks[1].mlp.router.weight)
    folder = checkpoint.resolve(tmp_path / "moe")
    assert load_tokenizer(str(folder)).hash == load_tokenizer("bytes").hash
    run(f"--ckpt={source}", f"--out={tmp_path / 'again'}", "--num_experts=6",
        "--num_experts_per_tok=3")
    run(f"--ckpt={source}", f"--out={tmp_path / 'again'}", "--num_experts=6",
        "--num_experts_per_tok=3", "--overwrite=True", "--seed=7")
    routers = [MiniCPM.from_pretrained(tmp_path / name).blocks[0].mlp.router.weight
               for name in ("moe", "again")]
    assert not torch.equal(*routers)
    # A Hugging Face folder of it, and back.
    convert.main([f"--ckpt={tmp_path / 'moe'}", f"--to_hf={tmp_path / 'hf'}", "--form=minicpm"])
    assert (MiniCPM.from_pretrained(tmp_path / "hf")(ids(2, 40))
            - dense(ids(2, 40))).abs().max() < 1e-5


def test_routers_are_drawn_with_a_variance_of_a_hundredth_at_the_base_width():
    config = dataclasses.replace(DENSE, n_embd=512, dim_model_base=512, num_experts=8)
    pairs = dict(upcycle.upcycled([("blocks.0.mlp.w_in.weight", torch.zeros(96, 512)),
                                   ("norm.weight", torch.ones(512))], config, 0))
    assert pairs.keys() == {"blocks.0.mlp.experts.w_in", "blocks.0.mlp.router.weight",
                            "norm.weight"}
    assert pairs["blocks.0.mlp.router.weight"].var().item() == pytest.approx(0.01, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("form", ["minicpm", "granite"])
def test_a_released_folder_is_upcycled(form, tmp_path):
    dense = make(DENSE).to(torch.bfloat16)
    convert.main([f"--ckpt={save(tmp_path / 'dense', dense)}", f"--to_hf={tmp_path / 'hf'}",
                  f"--form={form}"])
    run(f"--ckpt={tmp_path / 'hf'}", f"--out={tmp_path / 'moe'}", "--num_experts=4")
    assert MiniCPM.from_pretrained(tmp_path / "moe").wte.weight.dtype == torch.bfloat16
    moe = MiniCPM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert (moe(ids(2, 40)) - dense.float()(ids(2, 40))).abs().max() < 1e-5
    meta = json.loads((tmp_path / "moe" / "step-00000000" / "meta.json").read_text())
    assert meta["upcycled"]["from"] == str(tmp_path / "hf")


def test_one_expert_per_token_is_neither_exported_nor_imported(tmp_path, capsys):
    """Other runtimes weight it by 1."""
    one = dataclasses.replace(SMALL, num_experts_per_tok=1)
    source = save(tmp_path / "one", make(one))
    for form in ("granite", "minicpm"):
        with pytest.raises(SystemExit):
            convert.main([f"--ckpt={source}", f"--to_hf={tmp_path / 'hf'}", f"--form={form}"])
        assert "num_experts_per_tok=1" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    convert.main([f"--ckpt={save(tmp_path / 'two', make(SMALL))}",
                  f"--to_hf={tmp_path / 'two-hf'}"])
    file = tmp_path / "two-hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts_per_tok": 1}))
    with pytest.raises(BadInput, match="num_experts_per_tok=1: its code gives the only expert"):
        MiniCPM.from_pretrained(file.parent)


def test_of_a_run_the_last_stable_checkpoint_is_taken(tmp_path, capsys):
    for step in (10, 20, 25, 30):
        save(tmp_path / "run", make(DENSE, seed=step), step, {"max_steps": 30, "decay_steps": 10})
    run(f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'moe'}")
    stable = MiniCPM.from_pretrained(tmp_path / "run" / "step-00000020")
    assert torch.equal(MiniCPM.from_pretrained(tmp_path / "moe").wte.weight, stable.wte.weight)
    assert "step-00000020" in capsys.readouterr().out
    for step in (10, 20):
        shutil.rmtree(tmp_path / "run" / f"step-000000{step}")
    assert "--ckpt=" in refused(capsys, f"--ckpt={tmp_path / 'run'}",
                                f"--out={tmp_path / 'decayed'}")
    run(f"--ckpt={tmp_path / 'run' / 'step-00000030'}", f"--out={tmp_path / 'decayed'}")


def test_what_can_not_be_upcycled(tmp_path, capsys):
    source, out = save(tmp_path / "dense", make(DENSE)), tmp_path / "out"
    experts = save(tmp_path / "experts", make(SMALL))
    assert "4 experts already" in refused(capsys, f"--ckpt={experts}", f"--out={out}")
    assert "--num_experts_per_tok=9: must be from 1 to --num_experts=8" in refused(
        capsys, f"--ckpt={source}", f"--out={out}", "--num_experts_per_tok=9")
    assert "--num_experts=0" in refused(capsys, f"--ckpt={source}", f"--out={out}",
                                        "--num_experts=0")
    assert "would not compute what the dense one does" in refused(
        capsys, f"--ckpt={source}", f"--out={out}", "--num_experts_per_tok=1")
    assert "no such checkpoint" in refused(capsys, f"--ckpt={tmp_path / 'nothing'}", f"--out={out}")
    odd = save(tmp_path / "odd", make(dataclasses.replace(DENSE, n_ff=50)))
    assert "--n_ff=50" in refused(capsys, f"--ckpt={odd}", f"--out={out}")
    assert "exists already" in refused(capsys, f"--ckpt={source}", f"--out={tmp_path / 'experts'}")
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "holds a run" in refused(capsys, f"--ckpt={source}", f"--out={out}", "--overwrite=True")


def test_a_full_disk_or_damage_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = save(tmp_path / "dense", make(DENSE))
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device",
                          str(args[1])) if kind is OSError else kind("No space left on device")
        return written(*args)
    written = upcycle.save_file
    monkeypatch.setattr(upcycle, "save_file", full)
    for kind in (OSError, checkpoint.SafetensorError):
        calls.clear()
        assert "No space left" in refused(capsys, f"--ckpt={source}", f"--out={tmp_path / 'moe'}")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]
    monkeypatch.undo()
    damaged = source / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert "sha256 differs" in refused(capsys, f"--ckpt={source}", f"--out={tmp_path / 'moe'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_upcycling_holds_one_block_at_a_time(tmp_path):
    config = MiniCPMConfig(vocab_size=4096, n_layer=24, n_head=8, n_embd=512, n_ff=1280)
    source = save(tmp_path / "dense", make(config))
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from family import upcycle
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = kib("VmRSS")
upcycle.main(["--ckpt={source}", "--out={tmp_path / 'moe'}"])
print((kib("VmHWM") - before) * 1024)
"""
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              check=True).stdout.split()[-1])
    size = sum(path.stat().st_size for path in (tmp_path / "moe" / "step-00000000").iterdir())
    print(f"\npeak {peak / size:.2f} x the output of {size / 1e6:.0f} MB")
    assert peak < 0.5 * size


# ---- configs

def test_the_8x2b_is_the_papers(capsys, monkeypatch, tmp_path):
    # where no such checkpoint is: a plan needs none
    monkeypatch.chdir(tmp_path)
    (config, model), _ = configure(["config/minicpm_moe.py"], TrainConfig, MiniCPMConfig, usage="")
    assert (model.n_params_non_embedding, model.n_params_active) == (13_590_468_864, 4_035_320_064)
    assert config.max_steps * config.batch_size * config.block_size == pytest.approx(
        0.511e12, rel=0.001)
    plan.main(["config/minicpm_moe.py", "--gpus=64", "--gpu=h100", "--micro_batch_size=15"])
    assert "fits: " in capsys.readouterr().out.splitlines()[-1]


def test_the_laptop_config_starts_from_what_upcycle_writes_by_default():
    (config,), given = configure([str(ROOT / "config" / "laptop_moe.py")], TrainConfig, usage="")
    assert config.init_from == upcycle.UpcycleConfig.out and "num_experts" not in given
    assert upcycle.UpcycleConfig.ckpt == configure(
        [str(ROOT / "config" / "laptop.py")], TrainConfig, MiniCPMConfig, usage="")[0][0].out_dir
