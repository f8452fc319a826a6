"""Long runs: a trace of some updates, the slowest rank, skipped spikes, no search for garbage."""
import gc
import json
import time

import pytest
import torch
from test_loading import needs_gloo, options, place, together  # noqa: F401
from test_train import curve, fails, interrupted, same, weights

import train as train_module
from configurator import build
from engine import checkpoint, metrics
from engine import run as run_module
from engine.distributed import World
from engine.run import SPIKE_WINDOW, RunState
from model import MiniCPM, MiniCPMConfig, init_weights
from train import TrainConfig, train

ENOUGH = SPIKE_WINDOW + 5               # updates after which a spike is skipped


# ---- --profile_steps

def events(path):
    """[(name, start, duration)] of a trace."""
    trace = json.loads(path.read_text())
    return [(x["name"], x["ts"], x.get("dur", 0)) for x in trace["traceEvents"] if "ts" in x]


def traced(out, rank=0):
    """The updates that a trace covers."""
    names = {name for name, *_ in events(out / f"trace-rank{rank}.json")}
    return sorted(name for name in names if name.startswith("update "))


def test_a_trace_covers_the_updates_that_were_asked_for(train_tiny):
    out = train_tiny("traced", "--max_steps=6", "--profile_steps=2:4")
    found = events(out / "trace-rank0.json")
    assert traced(out) == ["update 3", "update 4"]
    for update in traced(out):                                           # with its matrix products
        start, length = next((ts, dur) for name, ts, dur in found if name == update and dur)
        inside = {name for name, ts, dur in found if start <= ts and ts + dur <= start + length}
        assert inside & {"aten::mm", "aten::addmm"}, inside
    assert curve(out) == curve(train_tiny("plain", "--max_steps=6"))
    train_tiny("traced", "--max_steps=6", "--overwrite=True")
    assert not (out / "trace-rank0.json").exists()                       # it was the other run's


def test_a_run_that_ends_early_or_resumes_traces_what_it_makes(train_tiny):
    out = train_tiny("short", "--max_steps=4", "--decay_steps=0", "--profile_steps=2:9")
    assert traced(out) == ["update 3", "update 4"]
    train_tiny("short", "--max_steps=6", "--decay_steps=0", "--profile_steps=2:9")
    assert traced(out) == ["update 5", "update 6"]
    train_tiny("short", "--max_steps=7", "--decay_steps=0", "--profile_steps=0:1")       # is past
    assert traced(out) == ["update 5", "update 6"]


@pytest.mark.parametrize("value", ["4", "4:2", "3:3", "-1:2", "a:b", "1:2:3"])
def test_a_range_that_is_none_is_one_line(train_tiny, capsys, value):
    said = fails(capsys, 2, train_tiny.config, "--max_steps=6", f"--profile_steps={value}")
    assert f"--profile_steps={value}: is A:B" in said and len(said.splitlines()) == 1


# ---- ranks

def slow_rank(*argv):
    """Train while rank 1 takes its time to make a batch."""
    def make_source(config, tokenizer, world):
        batches, validate, sources = OPEN_DATA(config, tokenizer, world)

        def slow(plan, first, count):
            if torch.distributed.get_rank() == 1:
                time.sleep(0.05)
            return batches(plan, first, count)
        return slow, validate, sources
    train_module.run_training.__defaults__ = (train_module.language_loss, make_source)
    train_module.main(list(argv))


def poisoned_rank(*argv):
    """Train with a loss that is 1000 times as high on rank 1 in update 6."""
    run_module.SPIKE_WINDOW = 4
    loss = poisoned(6) if torch.distributed.get_rank() == 1 else train_module.language_loss
    train_module.run_training.__defaults__ = (loss, OPEN_DATA)
    train_module.main(list(argv))


OPEN_DATA = train_module.open_data


@needs_gloo
def test_the_slowest_rank_is_named_and_all_ranks_skip_a_spike_of_one(place):     # noqa: F811
    spike = ["--max_steps=8", "--save_interval=1", "--keep_last=99", "--skip_spikes=5"]
    slow = ["--log_interval=2", "--profile_steps=2:4"]
    together(place, 2, ["slow_rank", *options(place, "slow", *slow)],
             ["poisoned_rank", *options(place, "spike", *spike)], program=__file__)
    lines = metrics.read(place / "slow")[0]
    assert [x["step"] for x in lines] == [2, 4]
    for line in lines:
        assert line["slowest_rank"] == 1, line
        assert line["rank_s_max"] >= 0.05 and line["rank_s_min"] < line["rank_s_max"] / 2, line
    assert traced(place / "slow") == traced(place / "slow", rank=1) == ["update 3", "update 4"]
    assert [line["step"] for line in skipped(place / "spike")] == [6]
    before, skip, after = (weights(place / "spike", step) for step in (5, 6, 7))
    assert same(before, skip) and not same(skip, after)


# ---- --skip_spikes

def poisoned(at):
    """The usual loss, 1000 times as high in one update (one micro-batch per update)."""
    calls = []

    def loss(forward, micro_batch):
        calls.append(1)
        loss_sum, aux = train_module.language_loss(forward, micro_batch)
        return loss_sum * (1000 if len(calls) == at else 1), aux
    return loss


def skipped(out):
    return [x for x in metrics.read_jsonl(out / "metrics.jsonl") if "skipped" in x]


def test_an_update_with_a_spike_is_skipped_and_the_run_goes_on(train_tiny, monkeypatch, capsys):
    monkeypatch.setattr(train_module.run_training, "__defaults__", (poisoned(ENOUGH), OPEN_DATA))
    out = train_tiny("spike", f"--max_steps={ENOUGH + 2}", "--skip_spikes=5", "--save_interval=1",
                     "--keep_last=99", "--decay_steps=0")
    before, skip, after = (weights(out, step) for step in (ENOUGH - 1, ENOUGH, ENOUGH + 1))
    assert same(before, skip) and not same(skip, after)
    (line,) = skipped(out)
    assert line["step"] == ENOUGH and line["grad_norm"] > 10 * line["limit"] > 0
    assert f"step {ENOUGH}: gradient norm " in capsys.readouterr().out
    states = {step: checkpoint.read_meta(out / f"step-{step:08d}")["run"]
              for step in (SPIKE_WINDOW, ENOUGH - 1, ENOUGH)}
    before, after = states[ENOUGH - 1], states[ENOUGH]
    assert after["step"] == ENOUGH and after["samples_seen"] == before["samples_seen"] + 4
    assert all(after[name] == before[name] for name in ("norm_mean", "norm_count"))     # untaught
    mean = sum(x["grad_norm"] for x in curve(out)[0][:SPIKE_WINDOW]) / SPIKE_WINDOW
    assert states[SPIKE_WINDOW]["norm_mean"] == pytest.approx(mean)


def test_a_run_killed_around_a_skip_resumes_to_the_bit(train_tiny, monkeypatch):
    monkeypatch.setattr(run_module, "SPIKE_WINDOW", 8)
    options = ("--max_steps=30", "--decay_steps=0", "--save_interval=4", "--skip_spikes=1.02")
    straight = train_tiny("straight", *options)                          # skips now and then
    steps = [x["step"] for x in skipped(straight)]
    assert any(8 < step < 28 for step in steps)
    for at in {next(step for step in steps if step > 8) + more for more in (0, 2)}:
        broken = interrupted(monkeypatch, train_tiny, at, f"broken{at}", *options)
        train_tiny(f"broken{at}", *options)
        assert curve(broken) == curve(straight) and same(weights(broken), weights(straight))
        assert skipped(broken) == skipped(straight)


def spikes(norms, factor=3.0):
    """Whether each of these norms is skipped, and what is said."""
    config, state, said = TrainConfig(max_steps=1, skip_spikes=factor), RunState(), []

    class Log:
        say, write = staticmethod(said.append), staticmethod(lambda **line: None)
    return [run_module.is_spike(config, state, norm, World(), Log) for norm in norms], said


def test_the_first_updates_are_never_skipped_and_a_new_level_is_accepted():
    calm, many = [1.0] * SPIKE_WINDOW, run_module.MAX_SPIKES
    assert not any(spikes([50.0, *calm[1:-1], 40.0])[0])
    assert spikes([*calm, 2.9, 3.5, 1.0])[0][-3:] == [False, True, False]
    assert not any(spikes([*calm, 1000.0], factor=0.0)[0])               # off
    skips, said = spikes([*calm, *[9.0] * (many + 3)])
    assert skips[SPIKE_WINDOW:] == [True] * many + [False] * 3 and "begins anew" in said[-1]
    assert not any(spikes([*calm, float("inf"), float("nan"), 1.0])[0])  # the scaler's affair


def test_float16s_scaler_goes_on_across_a_skip(monkeypatch):
    """update() after a step that was not made; on the CPU a scaler stands in for CUDA's."""
    (config,) = build([TrainConfig], dict(max_steps=SPIKE_WINDOW + 4, batch_size=2, device="cpu",
                                          quiet=True, compile=False, skip_spikes=5.0))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 4.0))
    model = MiniCPM(MiniCPMConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=16, n_ff=24))
    init_weights(model, 0)

    def batches(plan, first, count):
        idx = torch.arange(first, first + count)[:, None] % 11
        return {"idx": idx, "targets": (idx + 1) % 11}, count
    before, moved = None, []
    for update in train(config, batches, poisoned(SPIKE_WINDOW + 2), model):
        now = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        moved.append(before is None or not torch.equal(before, now))
        before = now
    assert moved == [True] * (SPIKE_WINDOW + 1) + [False, True, True]


@pytest.mark.parametrize("value", ["1", "0.5", "-2"])
def test_a_factor_that_skips_everything_is_one_line(train_tiny, capsys, value):
    said = fails(capsys, 2, train_tiny.config, "--max_steps=6", f"--skip_spikes={value}")
    assert f"--skip_spikes={float(value)}" in said and len(said.splitlines()) == 1


# ---- garbage collection

def test_a_run_is_not_searched_for_garbage_and_what_follows_is(train_tiny, monkeypatch):
    frozen, draw = [], metrics.TrainingLog.end_step

    def spy(self, *args, **kwargs):
        frozen.append(gc.get_freeze_count())
        return draw(self, *args, **kwargs)
    monkeypatch.setattr(metrics.TrainingLog, "end_step", spy)
    train_tiny("frozen", "--max_steps=4")
    assert frozen[0] == 0 and min(frozen[1:]) > 10_000 and gc.get_freeze_count() == 0


if __name__ == "__main__":
    from test_loading import work
    work(slow_rank=slow_rank, poisoned_rank=poisoned_rank)
