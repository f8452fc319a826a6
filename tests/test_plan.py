"""plan.py: the paper's numbers, a simulation that agrees with formulas, remedies that work."""
import dataclasses
import json
import time

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from configurator import configure
from engine import distributed, ops
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import plan
from train import TrainConfig

TWO, ONE = "config/minicpm_2b.py", "config/minicpm_1b.py"
EXPERTS = (TWO, "--num_experts=8", "--num_experts_per_tok=2")
SMALL = ("config/laptop.py", "--gpus=4", "--n_embd=256", "--n_head=4", "--n_kv_head=2",
         "--n_ff=640", "--n_layer=2", "--max_steps=100", "--minutes=None", "--batch_size=16",
         "--vocab_size=2000", "--block_size=512")


def planned(capsys, *argv):
    plan.main([*argv, "--json=True"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        plan.main(list(argv))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return said[0]


def setup_of(*argv):
    (options, config, model), _ = configure(list(argv), plan.PlanConfig, TrainConfig, MiniCPMConfig,
                                            usage="")
    replicate, shard = distributed.mesh_shape(config, options.gpus, plan.GPUS_PER_NODE)
    return plan.Setup(model, config.dtype, config.block_size, config.batch_size,
                      config.micro_batch_size, replicate, shard, config.recompute,
                      config.sync_micro_steps, config.reshard_after_forward)


@pytest.fixture
def no_simulation(monkeypatch):
    """For tests of what follows from formulas: the memory of every setup is 0."""
    monkeypatch.setattr(plan, "simulate",
                        lambda setup: dict.fromkeys([*plan.CATEGORIES, "peak"], 0))


@pytest.fixture
def gpu_of(monkeypatch):
    """gpu_of(bytes): give an h100 that much usable memory, and let no other GPU be there."""
    def gpu_of(usable):
        monkeypatch.setattr(plan, "GPUS", {"h100": plan.GPUS[
            "h100"]._replace(memory=usable / plan.USABLE / plan.GIB)})
    return gpu_of


# ---- formulas

def test_parameters_are_the_papers(capsys, no_simulation):
    assert planned(capsys, TWO, "--gpus=64")["parameters"]["non_embedding"] == 2_442_057_984
    assert planned(capsys, ONE, "--gpus=60")["parameters"]["non_embedding"] == 1_247_442_432
    moe = planned(capsys, *EXPERTS, "--gpus=64")
    assert (moe["parameters"]["non_embedding"], moe[
        "parameters"]["active"]) == (13_590_468_864, 4_035_320_064)
    assert moe["learning_rates"].keys() == {"embedding", "matrix", "experts", "router", "norm"}


def test_batch_law_rates_time_and_schedule(capsys, no_simulation):
    assert plan.batch_law(3.0) == pytest.approx(1.28e6, rel=0.01)
    assert plan.batch_law(2.5) == pytest.approx(3.98e6, rel=0.01)
    assert plan.best_loss(plan.batch_law(2.7)) == pytest.approx(2.7)
    p = planned(capsys, TWO, "--gpus=64", "--mfu=0.5")
    assert p["batch"]["best_loss"] == [pytest.approx(2.505, abs=1e-3)]
    assert p["batch"]["tokens"] == [3_932_160]
    assert p["learning_rates"] == {"embedding": 0.01, "matrix": pytest.approx(0.01 / 9),
                                   "norm": 0.01}
    assert p["speed"]["flops_per_token"] == pytest.approx(
        6 * 2.7249e9 + 12 * 40 * 2304 * 4096, rel=1e-3)
    assert p["speed"]["tokens_per_s"] == pytest.approx(64 * 989e12 * 0.5
                                                       / p["speed"]["flops_per_token"])
    assert {name: stage["steps"] for name, stage in p["schedule"].items()} == {
        "warm-up": 2000, "stable": 259_000, "decay": 18_500}
    assert sum(stage["tokens"]
               for stage in p["schedule"].values()) == p["speed"]["tokens"] == 279_500 * 3_932_160
    assert p["schedule"]["decay"]["last_lr"] == pytest.approx(7.7e-4, rel=0.01)
    assert p["checkpoint"] == 12 * 2_724_880_896
    batch_changes = planned(capsys, ONE, "--gpus=60")
    assert batch_changes["speed"]["tokens"] == (50_000 * 480 + 254_700 * 960) * 4096
    recomputed = planned(capsys, TWO, "--gpus=64", "--recompute=1")["speed"]
    assert recomputed["mfu"] == 0.4 and 0.5 < recomputed["busy"] < 0.4 * 4 / 3


def test_communication_by_hand(capsys, no_simulation):
    """Two micro-steps: four times the blocks in bfloat16 and twice the root in float32 arrive, the
    gradient leaves once."""
    p = planned(capsys, TWO, "--gpus=8", "--batch_size=16", "--micro_batch_size=1")
    root = 122753 * 2304 + 2304
    blocks = p["parameters"]["total"] - root
    assert p["communication"]["all-gather"] == pytest.approx(
        7 / 8 * (4 * 2 * blocks + 2 * 4 * root))
    assert p["communication"]["reduce-scatter"] == pytest.approx(7 / 8 * 4 * (blocks + root))
    assert p["communication"]["seconds"] == pytest.approx(
        (p["communication"]["all-gather"] + p["communication"]["reduce-scatter"]) / 450e9)
    once = planned(capsys, TWO, "--gpus=8", "--batch_size=16", "--micro_batch_size=1",
                   "--reshard_after_forward=False")
    assert once[
        "communication"]["all-gather"] == pytest.approx(7 / 8 * (2 * 2 * blocks + 2 * 4 * root))
    assert once["communication"]["reduce-scatter"] == p["communication"]["reduce-scatter"]
    assert once["memory"]["gathered_blocks"] == 2 * blocks
    copies = planned(capsys, TWO, "--gpus=8", "--replicate=8", "--batch_size=16",
                     "--micro_batch_size=1")["communication"]
    assert copies["all-gather"] == 0
    assert copies["all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * (blocks + root))


def test_the_laptop_run_is_the_default_and_runs_by_the_clock(capsys):
    plan.main(["--gpus=2"])
    said = capsys.readouterr().out
    assert said.startswith("model: 1,279,104 parameters") and "minutes instead of steps" in said
    assert "MFU 40%" in said and "fused attention" in said and "torch.compile" in said
    assert said.splitlines()[-1].startswith("fits: ")


def test_every_node_holds_a_copy_by_default(capsys, no_simulation):
    """By the rule of train.py, for nodes of 8 GPUs; the plan says what else there is."""
    for options, mesh in {("--gpus=8",): (1, 8), ("--gpus=64",): (8, 8), ("--gpus=60",): (1, 60),
                          ("--gpus=64", "--shard=64"): (1, 64),
                          ("--gpus=64", "--replicate=4"): (4, 16)}.items():
        p = planned(capsys, TWO, *options)
        assert (p["replicate"], p["shard"]) == mesh
        plan.main([TWO, *options])
        said = capsys.readouterr().out
        assert f"mesh: {mesh[0]} x {mesh[1]}, copies x GPUs per copy" in said
        assert ("every node of 8 GPUs holds a copy" in said
                and "--shard=64 makes one copy" in said) == (options == ("--gpus=64",))


def test_bad_input_is_one_line(capsys):
    assert "is one of a100-40, a100-80, h100" in refused(capsys, TWO, "--gpu=H1000")
    assert refused(capsys, TWO,
                   "--gpus=7") == "--gpus=7: does not divide --batch_size=960; 6 or 8 would"
    assert "their product is not the number of processes, 8" in refused(
        capsys, TWO, "--gpus=8", "--shard=3")
    assert "--mfu" in refused(capsys, TWO, "--mfu=40")
    assert "did you mean --gpus" in refused(capsys, TWO, "--gpu_s=8")
    assert "bfloat16" in refused(capsys, TWO, "--gpu=t4")
    assert "bfloat16 only" in refused(capsys, *EXPERTS, "--dtype=float32")


# ---- memory

@pytest.mark.parametrize("options",
                         [(), ("--recompute=1",), ("--dtype=float32",), ("--n_kv_head=None",)])
def test_a_block_keeps_what_autograd_saves_of_it(options):
    """Bytes that one more block adds to an update of one micro-step, read off model.py line by
    line."""
    setup = setup_of(*SMALL, "--micro_batch_size=4", *options)
    m, width = setup.model, 4 if setup.dtype == "float32" else 2
    C, H, K, D, F = m.n_embd, m.n_head, m.kv_heads, m.head_size, m.n_ff
    # the stream into both norms, float32; one number of each norm
    per_token = 2 * 4 * C + 2 * 4
    per_token += width * 2 * C                                             # into wqkv and w_in
    # qkv, of which v is a view; rotated q and k
    per_token += width * (H + 2 * K) * D + width * (H + K) * D
    # attention's output and its log-sum-exp
    per_token += width * H * D + 4 * H
    # gate, up, silu(gate), and the product
    per_token += width * 4 * F
    if setup.recompute:
        per_token = 4 * C                                                  # the block's input
    # with two moments; the gradient is not there yet
    parameters = 2 * C * D * (H + K) + 3 * C * F + 2 * C
    expected = 4 * setup.block_size * per_token + 3 * 4 * parameters / 4
    peaks = [plan.simulate(dataclasses.replace(setup,
                                               model=dataclasses.replace(m, n_layer=n)))["peak"]
             for n in (1, 2)]
    # After a recomputed block its gradient is held while the next ones are recomputed: the peak is
    # not at the first of them.
    assert peaks[1] - peaks[0] == pytest.approx(expected, rel=0.2 if setup.recompute else 0.001)


def test_parameters_gradients_and_moments_are_those_of_the_formula():
    """Three micro-steps whose gradients are accumulated: at the peak all of them are there,
    unsharded, in float32."""
    setup = setup_of(*SMALL, "--micro_batch_size=1")
    memory, n = plan.simulate(setup), setup.model.n_params
    assert memory["optimizer_state"] == pytest.approx(8 * n / 4, rel=0.001)
    assert memory["gradients"] == pytest.approx(4 * n, rel=0.001)
    assert sum(memory[name] for name in plan.CATEGORIES) == memory["peak"]
    reduced = plan.simulate(dataclasses.replace(setup, sync_micro_steps=True))
    assert reduced["peak"] < memory["peak"] - 0.7 * 4 * setup.model.n_params_non_embedding


@pytest.mark.parametrize("options",
                         [("--micro_batch_size=4", "--dtype=float32"),
                          ("--micro_batch_size=2", "--recompute=1")])
def test_blocks_that_stay_gathered_cost_what_the_plan_says(capsys, options):
    """All blocks but the two that are gathered at a time anyway."""
    setup = setup_of(*SMALL, "--n_layer=5", *options)
    peaks = [plan.simulate(dataclasses.replace(setup, reshard_after_forward=reshard))["peak"]
             for reshard in (True, False)]
    blocks = plan.gathered_bytes(setup)[0]
    assert 3 / 5 * 0.99 * blocks <= peaks[1] - peaks[0] <= 1.01 * blocks
    plan.main([*SMALL, "--n_layer=5", *options])
    assert (f"keeps all blocks gathered until their backward pass: {plan.size(blocks)}, "
            f"not included") in capsys.readouterr().out


@pytest.mark.parametrize("options",
                         [("--micro_batch_size=1",),
                          ("--num_experts=4", "--micro_batch_size=4",
                           "--tie_word_embeddings=False")])
def test_shortcuts_of_the_simulation_change_nothing(monkeypatch, options):
    """Three micro-steps instead of four, one peak instead of one per module."""
    setup = setup_of(*SMALL, *options)
    monkeypatch.setitem(ops.MAX_LOGITS, "cuda", 2 ** 18)
    short = plan.simulate.__wrapped__(setup)

    class FullTracker(FSDPMemTracker):
        label_accumulated_gradients = plan.PeakTracker.label_accumulated_gradients
    monkeypatch.setattr(plan, "PeakTracker", FullTracker)
    monkeypatch.setattr(plan, "min", lambda limit, micro_steps: micro_steps, raising=False)
    assert plan.simulate.__wrapped__(setup) == short


def test_real_gradients_of_a_tied_embedding_are_summed_in_place(monkeypatch):
    """Simulated ones are not, as --help says."""
    where, backward = [], ops.ChunkedCrossEntropy.backward

    def watched(context, grad):
        grads = backward(context, grad)
        where.append(grads[1].data_ptr())
        return grads
    monkeypatch.setattr(ops.ChunkedCrossEntropy, "backward", staticmethod(watched))
    monkeypatch.setitem(ops.MAX_LOGITS, "cpu", 1000)
    model = MiniCPM(MiniCPMConfig(vocab_size=500, n_layer=1, n_head=2, n_embd=128, n_ff=64))
    init_weights(model, 0)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model(idx, idx)[0].sum().backward()
    assert model.wte.weight.grad.data_ptr() == where[0]


def test_a_plan_allocates_nothing(capsys):
    """1.8 trillion parameters, in a moment."""
    p = planned(capsys, TWO, "--n_layer=1", "--n_embd=393216", "--n_head=6144", "--n_ff=983040",
                "--gpus=960", "--gpu=b200")
    assert p["parameters"]["total"] > 1.7e12 and not p["fits"]
    assert not any(trial["fits"] for trial in p["remedies"])


# ---- what fits, and what would

def test_the_micro_batch_is_the_largest_that_fits(capsys, gpu_of):
    peaks = {size: planned(capsys, *SMALL, f"--micro_batch_size={size}")["memory"]["peak"]
             for size in (1, 2, 4)}
    assert peaks[1] < peaks[2] < peaks[4]
    gpu_of((peaks[2] + peaks[4]) / 2)
    p = planned(capsys, *SMALL)
    assert p["fits"] and p["micro_batch_size"] == 2 and p["memory"]["peak"] == peaks[2]
    gpu_of(peaks[4])
    assert planned(capsys, *SMALL)["micro_batch_size"] == 4


@pytest.mark.parametrize("options, room, remedy",
                         [(("--micro_batch_size=4",), ("--micro_batch_size=2",),
                           {"micro_batch_size": 2}),
                          (("--micro_batch_size=1",),
                           ("--micro_batch_size=1", "--sync_micro_steps=True"),
                           {"sync_micro_steps": True}),
                          (("--batch_size=4", "--micro_batch_size=1"),
                           ("--batch_size=4", "--micro_batch_size=1", "--recompute=1"),
                           {"recompute": 1}),
                          (("--replicate=4", "--micro_batch_size=1"), ("--micro_batch_size=1",),
                           {"replicate": 1, "shard": 4}),
                          (("--gpus=16", "--recompute=1"),
                           ("--gpus=16", "--recompute=1", "--shard=16"),
                           {"replicate": 1, "shard": 16}),
                          (("--reshard_after_forward=False", "--micro_batch_size=1"),
                           ("--micro_batch_size=1",), {"reshard_after_forward": True}),
                          (("--gpus=1", "--batch_size=4", "--micro_batch_size=1"),
                           ("--batch_size=4", "--micro_batch_size=1", "--recompute=1"),
                           {"gpus": 4}),])
def test_a_run_that_does_not_fit_fits_with_the_knob_that_is_named(
        capsys, gpu_of, options, room, remedy):
    gpu_of(planned(capsys, *SMALL, *room)["memory"]["peak"])
    p = planned(capsys, *SMALL, *options)
    assert not p["fits"] and p["memory"]["peak"] > p["memory"]["usable"]
    *failed, trial = p["remedies"]
    assert trial["fits"] and not any(other["fits"] for other in failed)
    assert remedy.items() <= trial["options"].items()
    better = planned(capsys, *SMALL, *options,
                     *(f"--{name}={value}" for name, value in trial["options"].items()))
    assert better["fits"] and better["memory"]["peak"] == trial["peak"]
    plan.main([*SMALL, *options])
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("does not fit: ")
    assert said[-1].endswith(plan.as_options(trial["options"]))


def test_what_cannot_fit_says_so_and_a_larger_gpu_is_named(capsys, monkeypatch, gpu_of):
    monkeypatch.setitem(plan.GPUS, "t4", plan.GPUS["t4"]._replace(memory=0.01))
    plan.main([*SMALL, "--micro_batch_size=1", "--batch_size=4", "--dtype=float32", "--gpu=t4"])
    assert "--gpu=rtx4090" in capsys.readouterr().out.splitlines()[-1]
    gpu_of(1e6)
    plan.main([*SMALL, "--micro_batch_size=1", "--batch_size=4"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("nothing tried makes it fit")


def test_depth_is_extrapolated(monkeypatch):
    monkeypatch.setattr(plan, "SHALLOW", (2, 4))
    setup = setup_of(*SMALL, "--n_layer=6", "--micro_batch_size=4")
    assert plan.estimate_peak(setup) == pytest.approx(plan.simulate(setup)["peak"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("options, formula",
                         [((ONE, "--gpus=60"), 18.75), ((ONE, "--gpus=60", "--recompute=1"), 7.84),
                          ((TWO, "--gpus=64", "--shard=64"), 28.71),
                          ((TWO, "--gpus=64", "--shard=64", "--recompute=1"), 15.06),
                          ((TWO, "--gpus=64", "--shard=64", "--batch_size=64"), 18.56),
                          ((TWO, "--gpus=64"), 32.04),
                          ((TWO, "--gpus=64", "--shard=64", "--sync_micro_steps=True"), 18.72),
                          ((TWO, "--gpus=64", "--shard=64", "--micro_batch_size=15",
                            "--recompute=1"), 31.06),
                          ((TWO, "--gpus=64", "--replicate=8", "--recompute=2",
                            "--micro_batch_size=3"), 42.16),
                          ((TWO, "--gpus=64", "--shard=64", "--batch_size=64",
                            "--block_size=131072", "--recompute=1"), 63.04),
                          ((*EXPERTS, "--gpus=64", "--shard=64"), 86.15),
                          ((*EXPERTS, "--gpus=64", "--shard=64", "--batch_size=64",
                            "--recompute=1"), 9.44)])
def test_released_sizes_agree_with_formulas_and_with_shallow_models(options, formula):
    """GiB of a timeline that was derived by hand, moment by moment, from model.py and FSDP2's order
    of operations."""
    setup = setup_of("config/lab.py", options[0], "--micro_batch_size=1", *options[1:])
    peak = plan.simulate(setup)["peak"]
    assert peak / plan.GIB == pytest.approx(formula, rel=0.03)
    assert 0.85 * peak < plan.estimate_peak(setup) < 1.01 * peak


@pytest.mark.slow
def test_the_2b_on_64_ranks_is_planned_in_30_seconds(capsys):
    plan.simulate.cache_clear()
    start = time.process_time()
    assert planned(capsys, TWO, "--gpus=64", "--shard=64", "--gpu=h100",
                   "--micro_batch_size=0")["micro_batch_size"] == 3
    assert time.process_time() - start < 30


@pytest.mark.slow
def test_an_estimate_is_not_enough_to_fit(capsys):
    """Two shallow models say that the first knob does; all 40 blocks say that it does not."""
    sync, recompute, gpu = planned(capsys, TWO, "--gpus=8", "--gpu=rtx4090",
                                   "--micro_batch_size=0")["remedies"]
    assert sync["options"]["sync_micro_steps"] and not sync["fits"]
    assert recompute["options"]["recompute"] and recompute["fits"]
    assert gpu["options"] == {"gpu": "a100-40"}
