"""What plan.py says before take-off: the paper's numbers, a verdict that turns, and memory that the real code confirms."""
import dataclasses
import json

import pytest
import torch

import model as model_file
from engine import memory
from model import MiniCPM, MiniCPMConfig
from tools import plan
from train import read_config

TWO, ONE, EXPERTS = "config/minicpm_2b.py", "config/minicpm_1b.py", ("config/minicpm_2b.py", "--num_experts=8", "--num_experts_per_tok=2")
SMALL = ("config/laptop.py", "--gpus=4", "--n_embd=256", "--n_head=4", "--n_kv_head=2", "--n_ff=640", "--n_layer=6", "--max_steps=100",
         "--minutes=None", "--batch_size=32", "--vocab_size=20000", "--block_size=512")


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


def test_parameters_are_the_papers(capsys):
    assert planned(capsys, TWO, "--gpus=64")["parameters"]["non_embedding"] == 2_442_057_984
    assert planned(capsys, ONE, "--gpus=60")["parameters"]["non_embedding"] == 1_247_442_432
    moe = planned(capsys, *EXPERTS, "--gpus=64")
    assert (moe["parameters"]["non_embedding"], moe["parameters"]["active"]) == (13_590_468_864, 4_035_320_064)
    assert moe["learning_rates"].keys() == {"embedding", "matrix", "experts", "router", "norm"}


def test_batch_law_rates_time_and_schedule(capsys):
    assert plan.batch_law(3.0) == pytest.approx(1.28e6, rel=0.01) and plan.batch_law(2.5) == pytest.approx(3.98e6, rel=0.01)
    p = planned(capsys, TWO, "--gpus=64", "--mfu=0.5")
    assert p["batch"]["loss"] == [pytest.approx(2.505, abs=1e-3)] and p["batch"]["tokens"] == [3_932_160]
    assert p["learning_rates"] == {"embedding": 0.01, "matrix": pytest.approx(0.01 / 9), "norm": 0.01}
    assert p["speed"]["tokens_per_s"] == pytest.approx(64 * 989e12 * 0.5 / p["flops_per_token"])
    assert p["flops_per_token"] == pytest.approx(6 * 2.7249e9 + 12 * 40 * 2304 * 4096, rel=1e-3)
    assert {name: stage["steps"] for name, stage in p["schedule"].items()} == {"warm-up": 2000, "stable": 259_000, "decay": 18_500}
    assert sum(stage["tokens"] for stage in p["schedule"].values()) == p["speed"]["tokens"] == 279_500 * 3_932_160
    assert p["schedule"]["decay"]["last_lr"] == pytest.approx(7.7e-4, rel=0.01)
    assert p["checkpoint"] == 12 * 2_724_880_896
    batch_changes = planned(capsys, ONE, "--gpus=60")
    assert batch_changes["speed"]["tokens"] == (50_000 * 480 + 254_700 * 960) * 4096


def test_communication_by_hand(capsys):
    """Two micro-steps: four times the blocks in bfloat16 and twice the root in float32 arrive, the gradient leaves once."""
    p = planned(capsys, TWO, "--gpus=8", "--batch_size=16", "--micro_batch_size=1")
    root = 122753 * 2304 + 2304
    blocks = p["parameters"]["total"] - root
    assert p["communication"]["all-gather"] == pytest.approx(7 / 8 * (4 * 2 * blocks + 2 * 4 * root))
    assert p["communication"]["reduce-scatter"] == pytest.approx(7 / 8 * 4 * (blocks + root))
    assert p["communication"]["seconds"] == pytest.approx((p["communication"]["all-gather"] + p["communication"]["reduce-scatter"]) / 450e9)
    copies = planned(capsys, TWO, "--gpus=8", "--replicate=8", "--batch_size=16", "--micro_batch_size=1")["communication"]
    assert copies["all-gather"] == 0 and copies["all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * (blocks + root))


@pytest.mark.parametrize("argv", [
    (TWO, "--gpus=8", "--gpu=rtx4090"), (TWO, "--gpus=64", "--gpu=a100-40", "--micro_batch_size=15"), (*EXPERTS, "--gpus=64"),
    (*EXPERTS, "--gpus=8"), (TWO, "--gpus=64", "--gpu=a100-40", "--replicate=64", "--recompute=1"),
    (TWO, "--gpus=1", "--gpu=t4", "--dtype=float32", "--batch_size=1")])
def test_a_run_that_does_not_fit_fits_with_the_knob_that_is_named(capsys, argv):
    p = planned(capsys, *argv)
    assert not p["fits"] and p["remedies"] and p["memory"]["peak"] > p["memory"]["usable"]
    for way in p["remedies"]:
        peak = way.pop("peak")
        better = planned(capsys, *argv, f"--micro_batch_size={p['micro_batch_size']}",
                         *(f"--{name}={value}" for name, value in way.items()))
        assert better["fits"] and better["memory"]["peak"] == peak
    plan.main(list(argv))
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: ")


def test_what_cannot_fit_says_so_and_what_fits_too(capsys):
    plan.main([*EXPERTS, "--gpus=1", "--batch_size=1"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("more shards or another GPU make it fit")
    plan.main([TWO, "--gpus=64", "--recompute=1"])
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("fits: ") and "MFU of 40%" in said and "fused attention" in said


def test_the_laptop_run_is_the_default_and_runs_by_the_clock(capsys):
    plan.main(["--gpus=2"])
    said = capsys.readouterr().out
    assert said.startswith("1,279,104 parameters") and "by the clock" in said


def test_bad_input_is_one_line(capsys):
    assert "did you mean h100?" in refused(capsys, TWO, "--gpu=H1000")
    assert refused(capsys, TWO, "--gpus=7") == "--gpus=7: does not divide --batch_size=960; 6 or 8 would"
    assert "do not multiply to the 8 processes" in refused(capsys, TWO, "--gpus=8", "--shard=3")
    assert "--mfu" in refused(capsys, TWO, "--mfu=40")
    assert "did you mean --gpus" in refused(capsys, TWO, "--gpu_s=8")
    assert "bfloat16" in refused(capsys, TWO, "--gpu=t4")


def test_a_plan_allocates_nothing(capsys):
    """Two trillion parameters, in a moment."""
    p = planned(capsys, TWO, "--n_layer=100", "--n_embd=36864", "--n_head=576", "--n_ff=92160", "--gpus=64", "--gpu=b200")
    assert p["parameters"]["total"] > 1.5e12 and not p["fits"] and not p["remedies"]


def test_real_gradients_of_a_tied_embedding_are_summed_in_place(monkeypatch):
    """Fake ones are not, which is why the simulation is compared with one embedding more (moments' `cpu`)."""
    where, backward = [], model_file.ChunkedNLL.backward

    def watched(context, grad):
        grads = backward(context, grad)
        where.append(grads[1].data_ptr())
        return grads
    monkeypatch.setattr(model_file.ChunkedNLL, "backward", staticmethod(watched))
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 1000)
    model = MiniCPM(MiniCPMConfig(vocab_size=500, n_layer=1, n_head=2, n_embd=128, n_ff=64))
    model_file.init_weights(model, 0)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model(idx, idx)[0].sum().backward()
    assert model.wte.weight.grad.data_ptr() == where[0]


@pytest.mark.parametrize("options", [("--micro_batch_size=8",), ("--micro_batch_size=2", "--recompute=1"),
                                     ("--micro_batch_size=2", "--sync_micro_steps=True"), ("--num_experts=4", "--tie_word_embeddings=False", "--micro_batch_size=4")])
def test_estimate_and_simulation_agree_for_a_small_model(capsys, options):
    simulation = planned(capsys, *SMALL, *options, "--simulate=True")["simulation"]
    assert simulation["agrees"] and abs(simulation["ratio"] - 1) <= 0.15, simulation
    assert simulation["categories"]["Sharded Param"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    (ONE, "--gpus=60", "--micro_batch_size=1"), (ONE, "--gpus=60", "--micro_batch_size=1", "--recompute=1"),
    (TWO, "--gpus=64", "--micro_batch_size=1"), (TWO, "--gpus=64", "--micro_batch_size=1", "--recompute=1"),
    (TWO, "--gpus=64", "--micro_batch_size=1", "--batch_size=64"),
    (TWO, "--gpus=64", "--replicate=8", "--recompute=2", "--micro_batch_size=3"),
    (TWO, "--gpus=64", "--batch_size=64", "--block_size=131072", "--micro_batch_size=1", "--recompute=1"),
    (TWO, "--gpus=64", "--micro_batch_size=1", "--sync_micro_steps=True"), (*EXPERTS, "--gpus=64", "--micro_batch_size=1"), (*EXPERTS, "--gpus=64", "--batch_size=64", "--micro_batch_size=1", "--recompute=1")])
def test_estimate_and_simulation_agree_for_the_released_sizes(capsys, options):
    simulation = planned(capsys, *options, "--simulate=True")["simulation"]
    assert simulation["agrees"], simulation


def test_a_gpu_s_micro_batch_is_the_largest_that_the_estimate_fits(monkeypatch):
    """The rule of train.py, without a GPU: only its free memory is asked."""
    config, model = read_config(["config/tunnel_500m.py"])[:2]
    free, gpu = 40 * 2 ** 30, torch.device("cuda")
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    micro = memory.choose_micro_batch(model, config, 64, gpu)
    room = memory.USABLE * free - 2 * model.n_params_non_embedding         # rounded matrices, of one process
    peak = lambda m: memory.peak_of(model, config, m, 64, 1)[0]            # noqa: E731
    assert 1 < micro < 64 and 64 % micro == 0 and peak(micro) <= room < peak(2 * micro)
    assert memory.choose_micro_batch(model, dataclasses.replace(config, recompute=1), 64, gpu) > micro
    assert memory.choose_micro_batch(model, config, 64, torch.device("cpu")) * config.block_size <= memory.MICRO_TOKENS_CPU
