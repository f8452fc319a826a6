"""Where a run begins, where it ends, and what it may take from another one."""
import json
import math
import os
import shutil
import signal

import pytest
import torch
from test_train import curve, fails, interrupted, poisoned, same, weights

from configurator import ROOT, BadInput, build
from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import checkpoint
from engine.distributed import World
from engine.run import (
    latest_stable,
    new_state,
    set_horizon_from_time,
    stop_on_signals,
    why_not_stable,
)
from model import MiniCPM, MiniCPMConfig, init_weights
from train import TrainConfig, learning_rate_at, main, train


def rates(out):
    return [line["lr"] for line in curve(out)[0]]


def train_config(**values):
    return build([TrainConfig],
                 {"learning_rate": 0.01, "min_lr": 0.001, "quiet": True, **values})[0]


def planned_rates(config):
    """Return the rate of every update of a new run."""
    state = new_state(config)
    return [learning_rate_at(config, state) for state.step in range(state.max_steps)]


# ---- the edges of the schedules

@pytest.mark.parametrize("schedule", [
    *({"decay": decay} for decay in ("exponential", "linear", "cosine", "1-sqrt")),
    {"schedule": "cosine"}])
def test_the_last_update_uses_the_floor_or_the_command_is_refused(schedule):
    shares = ({}, {"decay_share": 0.5}, {"decay_share": 0.99}, {"decay_steps": 1})
    n_refused = 0
    for max_steps in (1, 2, 3, 7, 20):
        for warmup in (None, 0, 1, 3, 7, 20, 30):
            for decay in shares[:1] if "schedule" in schedule else shares:
                config = train_config(max_steps=max_steps, warmup_steps=warmup, **schedule, **decay)
                try:
                    found = planned_rates(config)
                except BadInput as error:
                    n_refused += 1
                    assert warmup and f"--warmup_steps={warmup}" in str(error)
                    continue
                decays = schedule.get("schedule") or new_state(config).decay_steps
                assert found[-1] == (0.001 if decays else 0.01)
                assert max(found) <= 0.01 * (1 + 1e-12)
    assert n_refused


def test_a_warm_up_beyond_the_stable_stage_is_refused_with_its_numbers(train_tiny, capsys):
    new = f"--out_dir={train_tiny.tmp_path / 'new'}"
    said = fails(capsys, 2, train_tiny.config, new, "--max_steps=100", "--decay_steps=50",
                 "--warmup_steps=90")
    assert said == ("--warmup_steps=90: the warm-up would end "
                    "at step 90, but the stable stage ends "
                    "at step 50; lower it, or give more --max_steps\n")
    assert "--warmup_steps=20: " in fails(capsys, 2, train_tiny.config, new, "--max_steps=20",
                                          "--warmup_steps=20")


def test_rewarming_comes_before_the_decay(train_tiny, capsys):
    trunk = train_tiny("trunk", "--max_steps=30", "--decay_steps=10")
    last, out = checkpoint.resolve(trunk), train_tiny.tmp_path / "rewarmed"
    main([f"--branch_from={last}", f"--out_dir={out}", "--rewarm_steps=6", "--decay_steps=4"])
    found = rates(out)
    assert len(found) == 10 and found[:6] == pytest.approx([0.01 * n / 6 for n in range(1, 7)])
    assert found[6] == 0.01 and found[6:] == sorted(found[6:], reverse=True) and found[-1] == 0.001
    # By default the decay is a fifth of the whole run, and begins at the peak too.
    main([f"--branch_from={last}", f"--out_dir={out}", "--rewarm_steps=6", "--overwrite=True"])
    found = rates(out)
    assert len(found) == 6 + 9 and found[5] == found[6] == 0.01 and found[-1] == 0.001
    said = fails(capsys, 2, f"--branch_from={last}", f"--out_dir={out}", "--overwrite=True",
                 "--rewarm_steps=30", "--decay_steps=20", "--max_steps=70")
    assert "--rewarm_steps=30: the warm-up would end at step 60, but the stable stage ends" in said


def test_a_branch_decays_by_a_cosine_from_the_peak_on(train_tiny, capsys):
    trunk = train_tiny("trunk", "--max_steps=10", "--decay_steps=0", "--warmup_steps=2")
    branch = [f"--branch_from={trunk}", f"--out_dir={train_tiny.tmp_path / 'branch'}"]
    assert "--max_steps: a branch without a decay" in fails(capsys, 2, *branch, "--schedule=cosine")
    said = fails(capsys, 2, *branch, "--decay_steps=5", "--warmup_steps=4")
    assert "has done its warm-up; --rewarm_steps" in said
    main([*branch, "--schedule=cosine", "--max_steps=16"])
    train_tiny("halved", "--max_steps=10", "--decay_steps=4", "--half_life=2")
    # its half-life is not for this
    main([f"--branch_from={train_tiny.tmp_path / 'halved'}", "--decay=linear", "--decay_steps=2",
          f"--out_dir={train_tiny.tmp_path / 'linear'}"])
    found = rates(train_tiny.tmp_path / "branch")
    assert len(found) == 6 and found[0] == pytest.approx(0.01) and found[-1] == 0.001
    assert found == sorted(found, reverse=True)


class Clock:
    """What a timed run asks of its log, with updates that take a constant time."""

    def __init__(self, state, seconds):
        self.state, self.seconds, self.said = state, seconds, []

    def run_seconds(self):
        return self.state.step * self.seconds

    def seconds_per_step(self):
        return self.seconds if self.state.step >= 2 else None

    def say(self, text):
        self.said.append(text)


def timed_rates(config, seconds):
    """Return (rate of every update, RunState, what was said) of a run given minutes."""
    state = new_state(config)
    log, found = Clock(state, seconds), []
    while state.step != state.max_steps:
        if state.max_steps is None:
            set_horizon_from_time(config, state, log, World())
            if state.step == state.max_steps:
                break
        found.append(learning_rate_at(config, state))
        state.step += 1
    return found, state, log.said


@pytest.mark.parametrize("seconds", [0.05, 1, 5.4, 40])
def test_a_timed_run_warms_up_and_decays_however_slow_it_is(seconds):
    found, state, said = timed_rates(train_config(minutes=5), seconds)
    assert found[-1] == 0.001 and max(found) == 0.01 and not said
    assert state.warmup == max(1, min(100, round(0.025 * 300 / seconds)))
    assert state.warmup <= state.decay_start


def test_a_timed_run_cuts_a_warm_up_that_does_not_fit_and_says_so():
    found, state, said = timed_rates(train_config(minutes=5, warmup_steps=200), 5.4)
    assert found[-1] == 0.001 and found[state.decay_start] == 0.01
    assert said == [f"step {state.decay_start}: the stable share of --minutes=5 ends within the "
                    "warm-up of 200 updates, so the warm-up ends here"]


def test_cosine_has_a_period(train_tiny, capsys):
    def by_hand(s, T):
        return 0.001 + 0.009 * (1 + math.cos(math.pi * s / (T - 1))) / 2
    loop = rates(train_tiny("loop", "--schedule=cosine_loop", "--cosine_period=5",
                            "--max_steps=12"))
    assert loop == pytest.approx([by_hand(s, 5) for s in range(12)])
    assert loop[4] == pytest.approx(0.001) and loop[8] == pytest.approx(0.01)
    short = rates(train_tiny("short", "--schedule=cosine", "--cosine_period=5", "--max_steps=12"))
    assert short == pytest.approx([by_hand(s, 5) for s in range(5)] + [0.001] * 7)
    new = f"--out_dir={train_tiny.tmp_path / 'new'}"
    for options, expected in (
            (["--schedule=cosine_loop"], "rises again after --cosine_period"),
            (["--cosine_period=5"], "only with --schedule=cosine or cosine_loop"),
            (["--schedule=cosine", "--cosine_period=5", "--warmup_steps=5"],
             "but the cosine ends at step 5"),
            (["--schedule=cosine", "--decay_data=two"], "--decay_data=two: only with"),
            (["--half_life=3", "--decay=linear"], "only with --decay=exponential")):
        said = fails(capsys, 2, train_tiny.config, new, "--max_steps=12", *options)
        assert expected in said and len(said.splitlines()) == 1


# ---- stable: past the warm-up, and not yet on a falling rate

def reason(out, step):
    return why_not_stable(checkpoint.read_meta(out / f"step-{step:08d}"))


def test_what_counts_as_stable(train_tiny):
    often = ("--max_steps=12", "--save_interval=2", "--keep_last=99", "--warmup_steps=3")
    wsd = train_tiny("wsd", *often, "--decay_steps=4")
    assert [reason(wsd, step) is None for step in (2, 4, 6, 8, 10, 12)] == [0, 1, 1, 1, 0, 0]
    assert "in its warm-up (until step 3)" == reason(wsd, 2)
    assert "in its decay (stable until step 8)" == reason(wsd, 10)
    assert latest_stable(wsd).name == "step-00000008"
    constant = train_tiny("constant", *often, "--schedule=constant")
    assert [reason(constant, step) is None for step in (2, 4, 12)] == [0, 1, 1]
    cosine = train_tiny("cosine", *often, "--schedule=cosine")
    assert all(reason(cosine, step) for step in (2, 4, 12))
    loop = train_tiny("loop", *often, "--schedule=cosine_loop", "--cosine_period=6")
    assert all(reason(loop, step) for step in (2, 4, 12))


def test_a_cosine_is_no_trunk(train_tiny, capsys):
    options = ("--schedule=cosine", "--warmup_steps=2")
    out = train_tiny("cosine", *options, "--max_steps=20")
    new = train_tiny.tmp_path / "new"
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={out}", *options, "--max_steps=30")
    assert "its learning rate falls from step 2 on; begin another run" in said
    assert "in the fall of its cosine" in fails(capsys, 2, f"--branch_from={out}",
                                                f"--out_dir={new}", "--max_steps=30")
    main([f"--branch_from={out}", f"--out_dir={new}", "--rewarm_steps=3", "--max_steps=30"])
    found = rates(new)
    assert len(found) == 10 and found[2] == 0.01 and found[-1] == 0.001
    assert found[2:] == sorted(found[2:], reverse=True)


# ---- what comes from a checkpoint, and what from the command

def init_from(train_tiny, start, name, *options):
    """Start a run of one step from a checkpoint; return its model's config."""
    out = train_tiny.tmp_path / name
    fixed = ["--max_steps=1", "--block_size=16", "--batch_size=2", "--sample_tokens=0",
             "--data=one", f"--data_dir={data_dir_of(train_tiny)}", "--quiet=True"]
    main([f"--init_from={start}", f"--out_dir={out}", *fixed, *options])
    return checkpoint.read_meta(checkpoint.resolve(out))["model"]


def data_dir_of(train_tiny):
    line = next(x for x in train_tiny.config.read_text().splitlines() if x.startswith("data_dir"))
    return line.split("'")[1]


def test_how_fast_a_run_learns_comes_from_its_command(train_tiny):
    slow = train_tiny("one-rate", "--max_steps=2", "--mup_lr=False")
    assert init_from(train_tiny, slow, "tuned")["mup_lr"] is True
    assert init_from(train_tiny, slow, "tuned-too", "--mup_lr=False")["mup_lr"] is False


def test_options_beside_init_from_are_checked_against_the_checkpoint(train_tiny, capsys):
    plain = train_tiny("plain", "--max_steps=2")            # heads of 16
    numbers = "1,1.5,2,2.5,3,3.5,4,4.5"
    longrope = ("--rope_scaling=longrope", f"--rope_short_factor={numbers}",
                f"--rope_long_factor={numbers}", "--original_max_position=2048")
    model = init_from(train_tiny, plain, "longrope", *longrope, "--head_dim=16", "--n_kv_head=1")
    assert model["rope_scaling"] == "longrope" and len(model["rope_long_factor"]) == 8
    model = init_from(train_tiny, train_tiny.tmp_path / "longrope", "off", "--rope_scaling=none")
    assert model["rope_scaling"] == "none" and model["rope_long_factor"] == []
    assert model["original_max_position"] is None
    init_from(train_tiny, plain, "dynamic", "--rope_scaling=dynamic", "--rope_factor=4")
    model = init_from(train_tiny, train_tiny.tmp_path / "dynamic", "further", "--rope_factor=8")
    assert model["rope_factor"] == 8 and model["rope_scaling"] == "dynamic"
    model = init_from(train_tiny, train_tiny.tmp_path / "dynamic", "none", "--rope_scaling=none")
    assert model["rope_factor"] == 1
    said = fails(capsys, 2, f"--init_from={plain}", "--max_steps=1", "--out_dir=never",
                 "--rope_factor=8", f"--rope_long_factor={numbers}")
    assert len(said.splitlines()) == 2 and "only with" in said
    said = fails(capsys, 2, f"--init_from={plain}", "--max_steps=1", "--out_dir=never",
                 "--head_dim=8")
    assert said == f"--head_dim=8: {checkpoint.resolve(plain)} has 16\n"


# ---- a run is where it was found

def test_a_run_is_the_same_by_any_path_and_after_a_move(train_tiny, monkeypatch, capsys):
    options = ("--max_steps=20", "--decay_steps=0")
    whole = curve(train_tiny("whole", *options))[0]
    out = train_tiny("run", "--max_steps=10", "--decay_steps=0")
    monkeypatch.chdir(train_tiny.tmp_path)
    capsys.readouterr()
    main([str(train_tiny.config), "--out_dir=run/", "--max_steps=10", "--decay_steps=0"])
    assert "is finished" in capsys.readouterr().out
    moved = train_tiny.tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(out, moved)
    here = os.path.relpath(data_dir_of(train_tiny), ROOT)
    main([str(train_tiny.config), f"--out_dir={moved}", *options, f"--data_dir={here}"])
    assert curve(moved)[0] == whole and same(weights(moved), weights(train_tiny.tmp_path / "whole"))
    assert checkpoint.read_meta(checkpoint.resolve(moved))["train"]["out_dir"] == str(moved)
    assert not out.exists()


def test_what_a_run_began_from_is_the_same_by_any_path(train_tiny, monkeypatch, capsys):
    trunk = train_tiny("trunk", "--max_steps=6", "--decay_steps=0")
    monkeypatch.chdir(train_tiny.tmp_path)
    main(["--branch_from=trunk", "--out_dir=branch", "--decay_steps=4"])
    capsys.readouterr()
    for spelling in ("trunk/", trunk, "./trunk"):
        main([f"--branch_from={spelling}", "--out_dir=branch", "--decay_steps=4"])
        assert "is finished" in capsys.readouterr().out
    monkeypatch.chdir(train_tiny.tmp_path.parent)
    main([f"--branch_from={trunk}", f"--out_dir={train_tiny.tmp_path / 'branch'}",
          "--decay_steps=4"])
    assert "is finished" in capsys.readouterr().out
    shutil.copytree(trunk, train_tiny.tmp_path / "other")
    said = fails(capsys, 2, f"--branch_from={train_tiny.tmp_path / 'other'}",
                 f"--out_dir={train_tiny.tmp_path / 'branch'}", "--decay_steps=4")
    assert "was begun with trunk" in said


def test_a_branch_that_was_stopped_goes_on(train_tiny, monkeypatch, tmp_path):
    """With the trunk's data_dir, also without the --max_steps that it was begun with."""
    trunk = train_tiny("trunk", "--max_steps=10", "--decay_steps=0")

    def branch(out, *options):
        main([f"--branch_from={trunk}", f"--out_dir={tmp_path / out}", *options])
    branch.tmp_path = tmp_path
    options = ("--max_steps=40", "--decay_steps=8")
    branch("whole", *options)
    interrupted(monkeypatch, branch, 25, "stopped", *options)
    branch("stopped", *options)
    interrupted(monkeypatch, branch, 25, "shorter", *options)
    branch("shorter", "--decay_steps=8")
    whole = curve(tmp_path / "whole")[0]
    assert curve(tmp_path / "stopped")[0] == curve(tmp_path / "shorter")[0] == whole


@pytest.mark.parametrize("command", ["resume", "branch"])
def test_a_corpus_prepared_again_is_noted(train_tiny, tmp_path, capsys, command):
    shutil.copytree(data_dir_of(train_tiny), tmp_path / "data")
    options = (f"--data_dir={tmp_path / 'data'}", "--decay_steps=0")
    out = train_tiny("run", *options, "--max_steps=10")
    first = checkpoint.read_meta(checkpoint.resolve(out))["run"]["corpora"]["one"]
    documents = [("train", "It has grown. " * 400), ("val", "It has grown. " * 40)]
    write_corpus(tmp_path / "data/one/bytes", load_tokenizer("bytes"), documents, overwrite=True)
    capsys.readouterr()
    if command == "resume":
        train_tiny("run", *options, "--max_steps=20")
    else:
        out = tmp_path / "branch"
        main([f"--branch_from={tmp_path / 'run'}", f"--out_dir={out}", "--decay_steps=4"])
    said = capsys.readouterr().out
    now = checkpoint.read_meta(checkpoint.resolve(out))["run"]["corpora"]["one"]
    assert f"note: one was prepared again since (sha256 {first[:12]}, now {now[:12]})" in said
    assert now != first


# ---- another horizon

def test_a_finished_run_is_not_continued_by_other_minutes(train_tiny, capsys):
    out = train_tiny("timed", "--minutes=0.03")
    before = (out / "config.json").read_text()
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={out}", "--minutes=0.06")
    assert "--minutes=0.06" in said and "branch from its stable checkpoint" in said
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={out}", "--minutes=0.03",
                 "--max_steps=100000")
    assert "--max_steps=100000" in said and "continuing" not in capsys.readouterr().out
    assert (out / "config.json").read_text() == before


def test_a_timed_trunk_goes_on_with_more_minutes(train_tiny, capsys):
    out = train_tiny("trunk", "--minutes=0.02", "--decay_steps=0")
    step = curve(out)[0][-1]["step"]
    train_tiny("trunk", "--minutes=0.04", "--decay_steps=0")
    assert curve(out)[0][-1]["step"] > step
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={out}", "--minutes=0.01",
                 "--decay_steps=0")
    assert "--minutes=0.01" in said and "has taken" in said


def test_another_horizon_in_the_warm_up_sets_it_anew(train_tiny, monkeypatch):
    """The default warm-up of 25 of 1,000 updates would not fit into 20."""
    interrupted(monkeypatch, train_tiny, 12, "run", "--max_steps=1000")
    out = train_tiny("run", "--max_steps=20")
    found = rates(out)
    assert len(found) == 20 and found[10] == 0.01 and found[-1] == 0.001


def test_a_rewarmed_branch_takes_a_shorter_horizon(train_tiny, monkeypatch, tmp_path):
    trunk = train_tiny("trunk", "--max_steps=20", "--decay_steps=10")

    def branch(out, *options):
        main([f"--branch_from={checkpoint.resolve(trunk)}", f"--out_dir={tmp_path / out}",
              "--rewarm_steps=12", "--save_interval=5", *options])
    branch.tmp_path = tmp_path
    interrupted(monkeypatch, branch, 28, "branch", "--max_steps=50")
    branch("branch", "--max_steps=36")
    found = rates(tmp_path / "branch")
    assert len(found) == 16 and max(found) == 0.01 and found[-1] == 0.001


# ---- bad places in the data

def test_two_bad_places_between_two_checkpoints_are_passed(train_tiny, capsys, monkeypatch):
    for place in (4 * 12 + 2, 4 * 15 + 1):                  # updates 13 and 16; saved at 10 and 20
        poisoned(monkeypatch, at=place)
    argv = list(map(str, (train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'nan'}",
                          "--max_steps=20", "--decay_steps=0")))
    assert "step 13" in fails(capsys, 3, *argv)
    assert "step 15" in fails(capsys, 3, *argv, "--skip_samples=4")     # the second, 4 samples on
    main([*argv, "--skip_samples=4"])
    run = checkpoint.read_meta(checkpoint.resolve(train_tiny.tmp_path / "nan"))["run"]
    assert run["step"] == 20 and run["skips"] == [[48, 4], [56, 4]]
    assert not (train_tiny.tmp_path / "nan" / "nonfinite.json").exists()


def test_a_bad_place_before_the_first_checkpoint_is_passed_too(train_tiny, capsys, monkeypatch):
    poisoned(monkeypatch, at=2)
    argv = list(map(str, (train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'nan'}",
                          "--max_steps=12", "--decay_steps=0")))
    assert "step 1:" in fails(capsys, 3, *argv)
    assert "step 1:" in fails(capsys, 3, *argv)
    main([*argv, "--skip_samples=4"])
    run = checkpoint.read_meta(checkpoint.resolve(train_tiny.tmp_path / "nan"))["run"]
    assert run["step"] == 12 and run["skips"] == [[0, 4]]


def tiny_model(**values):
    model = MiniCPM(MiniCPMConfig(vocab_size=11, n_layer=2, n_head=2, n_embd=16, n_ff=24, **values))
    init_weights(model, 0)
    return model


def random_batches(targets):
    """Return a batch source of random tokens with these targets (count, T)."""
    def batches(plan, first, count):
        generator = torch.Generator().manual_seed(first)
        idx = torch.randint(11, targets.shape, generator=generator)
        return {"idx": idx[:count], "targets": targets[:count]}, int((targets >= 0).sum())
    return batches


def language_loss(forward, batch):
    nll, aux = forward(batch["idx"], batch["targets"])
    return nll.sum(), aux


def test_a_step_without_targets_is_no_divergence():
    config = train_config(max_steps=2, batch_size=2, device="cpu", weight_decay=0.0)
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = random_batches(torch.full((2, 6), -100))
    losses = [update.metrics["loss"] for update in train(config, batches, language_loss, model)]
    assert losses == [0, 0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("micro", [1, 3, 5, 8])
def test_unequal_micro_batches_weigh_by_their_size(micro):
    """8 = 3 + 3 + 2: the balance loss is in the loss, and in the metrics, as of the whole batch."""
    targets = torch.randint(11, (8, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for size in (8, micro):
        config = train_config(max_steps=1, batch_size=8, micro_batch_size=size, device="cpu",
                              dtype="float32")
        model = tiny_model(num_experts=4, balance_coef=1.0, router_z_coef=0.1)
        (update,) = train(config, random_batches(targets), language_loss, model)
        found.append(update.metrics)
    whole, parts = found
    for name in ("loss", "grad_norm", "balance_loss", "z_loss", "router_entropy", "expert_load"):
        assert torch.allclose(torch.tensor(parts[name]), torch.tensor(whole[name]), rtol=1e-5), name


def test_a_second_ctrl_c_ends_a_process_and_a_second_sigterm_does_not():
    """torchrun sends its workers again what Slurm has sent to every process."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert should_stop() and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_folder_says_where_its_command_was_given(train_tiny):
    out = train_tiny("run", "--max_steps=2")
    assert json.loads((out / "config.json").read_text())["cwd"] == os.getcwd()
