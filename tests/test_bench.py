"""bench.py: it measures the updates of the loop, nanoGPT takes its turn, bad input is one line."""
import json
import subprocess
import sys
import threading
import time

import pytest
import torch

from data.dataset import Prefetch
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import bench
from train import language_loss, train

TINY = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--n_ff=32", "--block_size=8", "--batch_size=4",
        "--vocab_size=64", "--updates=2", "--compile=False", "--device=cpu"]
NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 1
    vocab_size: int = 1
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.5
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: some")
        assert config.dropout == 0 and not config.bias
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.head(self.wte(idx))
        assert (logits.dtype == torch.bfloat16) == torch.is_autocast_enabled("cpu")
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits, loss

    def generate(self, idx, max_new_tokens, top_k):
        assert top_k == 50
        return torch.cat((idx, idx[:, :1].expand(-1, max_new_tokens)), 1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas,
                                 weight_decay=weight_decay)
"""


def json_of(capsys, *argv):
    capsys.readouterr()
    bench.main([*TINY, *argv, "--json=True"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_numbers_of_a_step_agree_with_each_other(capsys):
    found = json_of(capsys, "--peak_flops=1e9", "--micro_batch_size=2", "--updates=5")
    shape = MiniCPMConfig(vocab_size=64, n_layer=1, n_head=1, n_embd=16, n_ff=32)
    assert found["tokens"] == 32 and found["micro"] == 2 and not found["compiled"]
    assert found["n_params"] == shape.n_params
    assert found["tokens_per_s"] == pytest.approx(32 / found["seconds"])
    assert found["flops_per_s"] == pytest.approx(shape.flops_per_token(8) * found["tokens_per_s"])
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / 1e9)
    assert list(found["phases"]) == list(bench.PHASES) and min(found["phases"].values()) > 0
    assert sum(found["phases"].values()) <= found["slowest"]
    assert found["fastest"] <= found["seconds"] <= found["slowest"]
    assert found["settings"]["n_embd"] == 16 and found["settings"]["seed"] == 1337
    assert found["provenance"]["torch"] == torch.__version__


def test_time_counts_for_the_phase_in_which_it_passes(monkeypatch):
    """Sleep in the loss: forward. In the gradient of what it returns: backward. In the batch
    source: data."""
    clock = [0.0]
    monkeypatch.setattr(bench, "time",
                        type("Time", (), {"perf_counter": staticmethod(lambda: clock[0])}))

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            clock[0] += 4
            return grad

    def loss(forward, part):
        clock[0] += 2
        summed, aux = language_loss(forward, part)
        return Slow.apply(summed), aux

    def batches(config, vocab_size, real=bench.random_batches):
        source = real(config, vocab_size)

        def slow(*where):
            clock[0] += 1
            return source(*where)
        return slow

    real_clip = torch.nn.utils.clip_grad_norm_

    def clip(*args):
        clock[0] += 8
        return real_clip(*args)
    monkeypatch.setattr(bench, "language_loss", loss)
    monkeypatch.setattr(bench, "random_batches", batches)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    options, config, shape = bench.read_options([*TINY, "--micro_batch_size=2"])
    times, how = bench.step(options, config, shape)
    assert times == [1 + 2 * 2 + 2 * 4 + 8] * 2
    assert how["phases"] == {"data": 1, "forward": 4, "backward": 8, "rest": 8}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_that_is_prepared_ahead_costs_no_time_of_an_update(monkeypatch, ahead):
    """As on a GPU: the source works in its thread while the loss is computed, and the phases stay.
    """
    class Source(Prefetch):
        def __init__(self, batches, world):
            super().__init__(batches, world, ahead)

    def batches(config, vocab_size, real=bench.random_batches):
        source = real(config, vocab_size)

        def slow(*where):
            time.sleep(0.05)
            return source(*where)
        return slow

    def loss(forward, part):
        time.sleep(0.1)
        return language_loss(forward, part)
    monkeypatch.setattr(bench, "Prefetch", Source)
    monkeypatch.setattr(bench, "random_batches", batches)
    monkeypatch.setattr(bench, "language_loss", loss)
    threads = threading.enumerate()
    _, how = bench.step(*bench.read_options(TINY))
    assert how["phases"]["forward"] > 0.1 and (how["phases"]["data"] > 0.05) != ahead
    assert threading.enumerate() == threads


def test_looking_at_the_loop_does_not_change_it(monkeypatch):
    """The weights after a measurement are those of train() left alone."""
    options, config, shape = bench.read_options([*TINY, "--schedule=constant", "--warmup_steps=0"])
    models, build = [], bench.build_model
    monkeypatch.setattr(bench, "build_model", lambda *a: models.append(build(*a)) or models[-1])
    bench.step(options, config, shape)
    alone = MiniCPM(shape)
    init_weights(alone, config.seed)
    config.quiet, config.minutes, config.max_steps = True, None, bench.WARM_UP + options.updates
    for _ in train(config, bench.random_batches(config, 64), language_loss, alone):
        pass
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), alone.parameters()))


def test_decoding(capsys):
    found = json_of(capsys, "--task=decode", "--new_tokens=5", "--rounds=2", "--dtype=float32")
    assert found["tokens_per_s"] == pytest.approx(5 / found["seconds"])
    assert found["dtype"] == "float32"
    bench.main([*TINY, "--task=decode", "--new_tokens=5"])
    assert "5 tokens in" in capsys.readouterr().out


def test_other_programs_take_their_turns(in_process, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "model.py").write_text(NANOGPT)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    bench.main([*TINY, "--compare=True", f"--nanogpt={tmp_path}", "--rounds=2",
                "--micro_batch_size=2"])
    said = capsys.readouterr().out
    assert len(in_process) == 2 * 5 and len(compiled) == 2 * 2 and "number of" not in said
    assert all(said.count(f"round 2: {program},") == 1 for program in bench.PROGRAMS["step"])
    assert said.rstrip().endswith("ours-bfloat16 x 1.00")


def test_generation_next_to_other_programs(in_process, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "model.py").write_text(NANOGPT)
    bench.main([*TINY, "--compare=True", f"--nanogpt={tmp_path}", "--task=decode", "--new_tokens=4",
                "--prompts=3", "--rounds=1"])
    said = capsys.readouterr().out
    assert len(in_process) == 6 and said.count(": 12 tokens in") == 6
    assert said.rstrip().endswith("ours-int8 x 1.00")
    bench.main([*TINY, "--compare=True", "--task=decode", "--new_tokens=2", "--rounds=1"])
    assert "nanogpt" not in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["--updates=1"], "--updates=1: must be above 1"),
    (["--task=speed"], "step, decode"),
    (["--update=3"], "did you mean --updates?"),
    (["--nanogpt=nowhere"], "no"),
    (["--program=nanogpt-float32"], "give --nanogpt=PATH"),
    (["--program=ours-int8"], "--program=ours-int8: must be ours, nanogpt-float32"),
    (["--compare=True", "--num_experts=8"], "no experts"),
    (["--n_head=7"], "does not divide"),
    (["config/laptop.py", "--init_from=out/laptop"], "not a checkpoint"),
    (["--n_embd=2304000", "--n_head=36"], "GiB"),
])
def test_bad_input_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and words in said, said


def test_without_transformers_a_comparison_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, "--task=decode", "--program=transformers-float32"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "needs transformers" in said


def test_a_measurement_in_a_new_process_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.measure_in_process(TINY)["tokens"] == 32 and not list(tmp_path.iterdir())


def test_the_status_of_a_failed_process_is_passed_on(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 2, ""))
    with pytest.raises(SystemExit) as stop:
        bench.measure_in_process(TINY)
    assert stop.value.code == 2


def test_a_step_in_words(capsys):
    bench.main(TINY)
    said = capsys.readouterr().out
    assert "MFU n/a" in said and "eager: 32 tokens in" in said
    assert all(words in said for words in bench.PHASES.values())
