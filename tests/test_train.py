"""The loop and its contracts: resume, branch, trunk, signals, bad input, all on a tiny model
in-process."""
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import train as train_module
from configurator import ROOT, BadInput, build
from data import dataset
from data.tokenizer import load_tokenizer
from engine import checkpoint, device, metrics
from engine.distributed import World
from engine.run import RunState, new_state
from model import MiniCPM, MiniCPMConfig, init_weights
from train import TrainConfig, main, train


def curve(out):
    """Every training line without its speed, and every evaluation line: what must repeat to the
    last digit."""
    training, held_out = metrics.read(out)
    return [{k: v for k, v in x.items() if k != "tok_per_s"} for x in training], held_out


def weights(out, step=None):
    return dict(checkpoint.read_tensors(
        checkpoint.resolve(out if step is None else out / f"step-{step:08d}"), "model"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fails(capsys, code, *argv):
    """Run main, expect this exit status, no traceback, and return what it said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


class Interrupt(Exception):
    pass


def interrupted(monkeypatch, train_tiny, at, out, *options):
    """The run, broken off by force after `at` updates: nothing is saved beyond its intervals."""
    plain = train_module.train

    def breaking(*args, **kwargs):
        for update in plain(*args, **kwargs):
            if update.step == at:
                raise Interrupt
            yield update
    monkeypatch.setattr(train_module, "train", breaking)
    with pytest.raises(Interrupt):
        train_tiny(out, *options)
    monkeypatch.setattr(train_module, "train", plain)
    return train_tiny.tmp_path / out


# ---- the loop

def test_micro_batches_do_not_change_the_update(train_tiny):
    whole = curve(train_tiny("whole", "--max_steps=5", "--micro_batch_size=4"))[0]
    for size in (1, 3):
        parts = curve(train_tiny(f"parts{size}", "--max_steps=5", f"--micro_batch_size={size}"))[0]
        assert [x["loss"] for x in parts] == pytest.approx([x["loss"] for x in whole], abs=1e-4)


def test_train_is_a_generator_that_shows_gradients(data_dir, tmp_path):
    """Labs consume it in-process, without files: batch source and loss are theirs."""
    (config,) = build([TrainConfig],
                      dict(max_steps=4, batch_size=2, device="cpu", quiet=True,
                           out_dir=str(tmp_path / "none")))
    model = MiniCPM(MiniCPMConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=16, n_ff=24))
    init_weights(model, 0)

    def batches(plan, first, count):
        return {"idx": torch.arange(first, first + count)[:, None] % 11}, 2 * count

    def loss(forward, batch):
        nll, aux = forward(batch["idx"], (batch["idx"] + 1) % 11)
        return 2 * nll.sum(), {"extra": 0 * nll.sum()}
    updates = [(u.step, u.metrics["loss"],
                sum(p.grad.abs().sum().item() for p in u.model.parameters()))
               for u in train(config, batches, loss, model)]
    assert [u[0] for u in updates] == [1, 2, 3, 4] and all(u[2] > 0 for u in updates)
    assert not (tmp_path / "none").exists()


def test_batch_schedule_counts_samples(train_tiny):
    out = train_tiny("schedule", "--max_steps=6", "--batch_schedule=0:2,3:5")
    run = checkpoint.read_meta(checkpoint.resolve(out))["run"]
    assert run["samples_seen"] == 3 * 2 + 3 * 5 and run["tokens_seen"] == 21 * 16


def test_decay_data_begins_with_the_decay(train_tiny, capsys):
    out = train_tiny("mix", "--max_steps=10", "--decay_steps=4", "--decay_data=one:0.5,two:0.5")
    assert checkpoint.read_meta(
        checkpoint.resolve(out))["run"]["plan"] == [[0, "one"], [6 * 4, "one:0.5,two:0.5"]]
    other = train_tiny("pure", "--max_steps=10", "--decay_steps=4")
    a, b = curve(out)[0], curve(other)[0]
    assert a[:6] == b[:6] and all(x["loss"] != y["loss"] for x, y in zip(a[6:], b[6:]))
    # The metrics mark the switch, once, also in a branch and where a run resumes at that very step.
    marks = lambda out: [x for x in metrics.read_jsonl(out / "metrics.jsonl") if "decay_steps" in x]
    branch = train_tiny("mixed-branch", f"--branch_from={other / 'step-00000006'}",
                        "--decay_steps=3", "--decay_data=two")
    assert marks(branch) == [{"step": 6, "decay_steps": 3, "data": "two"}]
    assert checkpoint.read_meta(checkpoint.resolve(branch))["run"]["plan"][-1] == [6 * 4, "two"]
    for later in checkpoint.checkpoints(out)[1:]:
        shutil.rmtree(later)
    mixed = train_tiny("mix", "--max_steps=10", "--decay_steps=4", "--decay_data=one:0.5,two:0.5")
    assert marks(mixed) == [{"step": 6, "decay_steps": 4, "data": "one:0.5,two:0.5"}]
    assert [x["loss"] for x in curve(out)[0]] == [x["loss"] for x in a]


def test_a_timed_run_settles_its_horizon_and_decays(train_tiny):
    out = train_tiny("timed", "--minutes=0.06")
    meta = checkpoint.read_meta(checkpoint.resolve(out))
    run, training = meta["run"], curve(out)[0]
    assert run["step"] == run["max_steps"] and 0.05 < run["decay_steps"] / run["max_steps"] < 0.6
    assert training[-1]["lr"] == 0.001
    assert training[run["max_steps"] - run["decay_steps"] - 1]["lr"] == 0.01
    assert 1.5 < run["seconds"] < 12
    stable = out / f"step-{run['max_steps'] - run['decay_steps']:08d}"
    assert checkpoint.read_meta(stable)["run"]["max_steps"] == run["max_steps"]


# ---- resume

def test_an_interrupted_run_resumes_to_the_bit(train_tiny, monkeypatch):
    options = ("--max_steps=40", "--decay_steps=10", "--eval_interval=10")
    straight = train_tiny("straight", *options)
    # before any checkpoint, stable, in the decay
    for at in (3, 14, 33):
        broken = interrupted(monkeypatch, train_tiny, at, f"broken{at}", *options)
        assert curve(broken)[0][-1]["step"] == at
        train_tiny(f"broken{at}", *options)
        assert curve(broken) == curve(straight) and same(weights(broken), weights(straight))
        assert same(dict(checkpoint.read_tensors(checkpoint.resolve(broken), "optimizer")),
                    dict(checkpoint.read_tensors(checkpoint.resolve(straight), "optimizer")))


def test_a_timed_run_resumes_to_the_bit_from_the_end_of_its_stable_stage(train_tiny, monkeypatch):
    out = train_tiny("timed", "--minutes=0.05", "--keep_last=99")
    run = checkpoint.read_meta(checkpoint.resolve(out))["run"]
    before, final = curve(out), weights(out)
    for path in checkpoint.checkpoints(out):
        if int(path.name[5:]) > run["max_steps"] - run["decay_steps"]:
            shutil.rmtree(path)
    train_tiny("timed", "--minutes=0.05", "--keep_last=99")
    assert curve(out) == before and same(weights(out), final)


def spawn(train_tiny, out, *options):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), str(train_tiny.config),
                             f"--out_dir={train_tiny.tmp_path / out}", *options],
                            cwd=train_tiny.tmp_path, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for_step(out, step):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        log = out / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError("the run did not get there")


LONG = ("--max_steps=400", "--save_interval=7", "--compile=False")


def test_kill_minus_nine_then_repeat_equals_the_undisturbed_run(train_tiny):
    undisturbed = train_tiny("undisturbed", *LONG)
    for step in (30, 101):
        process = spawn(train_tiny, "killed", *LONG)
        wait_for_step(train_tiny.tmp_path / "killed", step)
        process.kill()
        process.communicate()
    killed = train_tiny("killed", *LONG)
    assert curve(killed) == curve(undisturbed) and same(weights(killed), weights(undisturbed))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM for other processes")
def test_sigterm_saves_says_how_to_continue_and_exits_zero(train_tiny):
    process = spawn(train_tiny, "stopped", *LONG)
    wait_for_step(train_tiny.tmp_path / "stopped", 20)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"stopped at step \d+ and saved; the same command continues", said)
    assert curve(train_tiny("stopped", *LONG)) == curve(train_tiny("undisturbed", *LONG))


def test_a_run_folder_serves_one_process(train_tiny, capsys):
    process = spawn(train_tiny, "shared", "--max_steps=100000", "--compile=False")
    wait_for_step(train_tiny.tmp_path / "shared", 2)
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'shared'}",
                 "--max_steps=100000", "--compile=False")
    process.kill()
    process.communicate()
    assert "in use by another process" in said


def test_repeating_a_finished_run_says_so(train_tiny, capsys, monkeypatch):
    train_tiny("done", "--max_steps=3")
    capsys.readouterr()
    train_tiny("done", "--max_steps=3")
    said = capsys.readouterr().out
    assert "is finished (3 steps): --overwrite=True" in said and "code has changed" not in said
    monkeypatch.setattr(checkpoint, "code_hash", lambda: "edited")
    train_tiny("done", "--max_steps=3")
    assert "code has changed since" in capsys.readouterr().out


def test_overwrite_starts_again_and_spares_other_files(train_tiny):
    out = train_tiny("again", "--max_steps=3", "--seed=1")
    first = curve(out)
    (out / "notes.txt").write_text("mine")
    train_tiny("again", "--max_steps=4", "--seed=2", "--overwrite=True")
    assert curve(out)[0][0] != first[0][0] and len(curve(out)[0]) == 4
    assert (out / "notes.txt").read_text() == "mine"


def test_other_settings_are_refused_by_name_and_intervals_are_not(train_tiny, capsys):
    out = train_tiny("run", "--max_steps=20", "--decay_steps=0")
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={out}", "--max_steps=20",
                 "--decay_steps=0", "--learning_rate=0.02", "--n_ff=64")
    assert len(said.splitlines()) == 2 and "--learning_rate=0.02" in said and "--n_ff=64" in said
    train_tiny("run", "--max_steps=24", "--decay_steps=0", "--save_interval=2", "--log_interval=2",
               "--keep_last=1")
    # both ended a stable stage
    assert [p.name[-2:] for p in checkpoint.checkpoints(out)] == ["20", "24"]


# ---- trunk and branch

def test_a_trunk_continued_equals_one_long_trunk(train_tiny):
    long = train_tiny("long", "--max_steps=30", "--decay_steps=0", "--warmup_steps=3")
    short = train_tiny("short", "--max_steps=20", "--decay_steps=0", "--warmup_steps=3")
    train_tiny("short", "--max_steps=30", "--decay_steps=0", "--warmup_steps=3")
    assert curve(short)[0] == curve(long)[0] and same(weights(short), weights(long))


def test_a_branch_equals_the_run_that_decayed_without_stopping(train_tiny):
    whole = train_tiny("whole", "--max_steps=30", "--decay_steps=10", "--warmup_steps=3")
    trunk = train_tiny("trunk", "--max_steps=20", "--decay_steps=0", "--warmup_steps=3")
    branch = train_tiny.tmp_path / "branch"
    main([f"--branch_from={trunk}", f"--out_dir={branch}", "--decay_steps=10"])
    assert curve(branch)[0] == curve(whole)[0][20:] and same(weights(branch), weights(whole))
    # The stable checkpoint of the finished run is found by itself, and carries its own trunk
    # further.
    again, further = train_tiny.tmp_path / "again", train_tiny.tmp_path / "further"
    main([f"--branch_from={whole}", f"--out_dir={again}", "--decay_steps=10"])
    assert same(weights(again), weights(whole))
    main([f"--branch_from={whole}", f"--out_dir={further}", "--decay_steps=0", "--max_steps=26"])
    assert {x["lr"] for x in curve(further)[0]} == {0.01}


def test_branches_that_make_no_sense_are_refused(train_tiny, capsys):
    whole = train_tiny("whole", "--max_steps=30", "--decay_steps=10")
    last = checkpoint.resolve(whole)
    new = f"--out_dir={train_tiny.tmp_path / 'new'}"
    assert "is in its decay" in fails(capsys, 2, f"--branch_from={last}", new, "--decay_steps=5")
    assert "folder of its own" in fails(capsys, 2, f"--branch_from={whole}", f"--out_dir={whole}",
                                        "--overwrite=True")
    assert "already" in fails(capsys, 2, f"--branch_from={whole}", new, "--max_steps=10")
    assert "--n_head=4" in fails(capsys, 2, f"--branch_from={whole}", new, "--n_head=4")
    assert not (train_tiny.tmp_path / "new").exists()
    main([f"--branch_from={last}", new, "--rewarm_steps=4", "--max_steps=50", "--decay_steps=10"])
    rates = {x["step"]: x["lr"] for x in curve(train_tiny.tmp_path / "new")[0]}
    assert rates[31] == 0.0025 and rates[34] == rates[40] == 0.01 and rates[50] == 0.001


def test_a_branch_on_new_data(train_tiny):
    trunk = train_tiny("trunk", "--max_steps=10", "--decay_steps=0")
    branch = train_tiny.tmp_path / "branch"
    main([f"--branch_from={trunk}", f"--out_dir={branch}", "--decay_steps=5", "--data=two"])
    assert checkpoint.read_meta(
        checkpoint.resolve(branch))["run"]["plan"] == [[0, "one"], [40, "two"]]


def test_init_from_takes_the_weights_and_the_model(train_tiny, capsys):
    trunk = train_tiny("trunk", "--max_steps=10")
    tuned = train_tiny.tmp_path / "tuned"
    common = [f"--init_from={trunk}", f"--out_dir={tuned}", "--data=one", "--tokenizer=bytes",
              "--max_steps=1", "--block_size=16", "--batch_size=2",
              f"--data_dir={train_tiny.config.parent}"]
    data_dir = re.search(r"data_dir = '(.*)'", train_tiny.config.read_text())[1]
    common[-1] = f"--data_dir={data_dir}"
    assert "--n_embd=64" in fails(capsys, 2, *common, "--n_embd=64")
    main([*common, "--rope_theta=50000", "--tie_word_embeddings=False", "--learning_rate=1e-9",
          "--min_lr=1e-10"])
    got = weights(tuned)
    assert torch.allclose(got["lm_head.weight"], weights(trunk)["wte.weight"], atol=1e-6)
    assert checkpoint.read_meta(checkpoint.resolve(tuned))["model"]["rope_theta"] == 50000
    assert "another tokenizer" in fails(capsys, 2, *common, "--overwrite=True",
                                        "--tokenizer=bpe4096")
    # the checkpoint's own
    main([*[x for x in common if "tokenizer" not in x], "--overwrite=True"])
    assert checkpoint.read_meta(
        checkpoint.resolve(tuned))["tokenizer_hash"] == load_tokenizer("bytes").hash


# ---- what goes wrong

def poisoned(monkeypatch, at):
    """The sample at this place of the data gives a loss that is no number."""
    plain = dataset.make_batches

    def make(*args, **kwargs):
        batches = plain(*args, **kwargs)

        def poisoned_batches(plan, first, count):
            batch, n = batches(plan, first, count)
            return batch, (math.nan if first <= at < first + count else n)
        return poisoned_batches
    monkeypatch.setattr(dataset, "make_batches", make)


def test_a_non_finite_loss_stops_with_three_and_can_be_gone_round(train_tiny, capsys, monkeypatch):
    poisoned(monkeypatch, at=4 * 15 + 2)                                   # update 16
    argv = (train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'nan'}", "--max_steps=20",
            "--decay_steps=0")
    said = fails(capsys, 3, *argv)
    assert "step 16" in said and "samples 60 to 63" in said and "step-00000010" in said
    assert "--skip_samples" in said
    assert checkpoint.resolve(train_tiny.tmp_path / "nan").name == "step-00000010"
    # an agent that restarts it does not loop
    assert "step 16" in fails(capsys, 3, *argv)
    main([*map(str, argv), "--skip_samples=4"])
    assert curve(train_tiny.tmp_path / "nan")[0][-1]["step"] == 20


BAD = {
    "--n_heads=2": "did you mean --n_head?",
    "--max_steps=1e2": "takes int",
    "--compile=yes": "True or False",
    "--learning_rate=": "needs a value",
    "--n_kv_head=3": "does not divide --n_head=2",
    "--head_dim=15": "must be even",
    "--block_size=100000": "has only",
    "--data=nowhere": "no corpus here",
    "--data=one:0.5,one:0.5": "distinct names",
    "--tokenizer=bpe": "no tokenizer 'bpe'",
    "--vocab_size=100": "has 264 tokens",
    "--device=cuda:7": "CUDA devices",
    "--decay_share=1.5": "below 1",
    "--schedule=sgdr": "is one of wsd",
    "--min_lr=1": "above --learning_rate",
    "--init_from=nowhere": "no such checkpoint",
    "--branch_from=nowhere": "no such checkpoint",
    "--batch_schedule=5:3": "--batch_schedule",
}


@pytest.mark.parametrize("option, expected", BAD.items())
def test_bad_input_is_one_line_and_exit_two(train_tiny, capsys, option, expected):
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'bad'}",
                 "--max_steps=2", option)
    assert expected in said and len(said.splitlines()) == 1


def test_all_problems_come_at_once(train_tiny, capsys):
    said = fails(capsys, 2, train_tiny.config, "--max_steps=x", "--n_hed=2", "--dtype=int8")
    assert len(said.splitlines()) == 3


def test_data_of_another_tokenizer_is_refused(train_tiny, capsys, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    meta = json.loads((tmp_path / "data/one/bytes/meta.json").read_text())
    (tmp_path
     / "data/one/bytes/meta.json").write_text(json.dumps({**meta, "tokenizer_hash": "0" * 64}))
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={tmp_path / 'bad'}", "--max_steps=2",
                 f"--data_dir={tmp_path / 'data'}")
    assert "prepared with another" in said


def test_a_folder_that_cannot_be_written(train_tiny, capsys):
    (train_tiny.tmp_path / "file").write_text("")
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'file' / 'run'}",
                 "--max_steps=2")
    assert "file" in said and len(said.splitlines()) == 1


def test_a_full_disk_leaves_the_last_good_checkpoint(train_tiny, capsys, monkeypatch):
    plain, calls = checkpoint.save_file, itertools.count()

    def full(tensors, path):
        if next(calls) >= 2:                                               # the second checkpoint
            raise OSError(28, "No space left on device", str(path))
        plain(tensors, path)
    monkeypatch.setattr(checkpoint, "save_file", full)
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'full'}",
                 "--max_steps=30")
    assert "No space left" in said and len(said.splitlines()) == 1
    monkeypatch.setattr(checkpoint, "save_file", plain)
    assert [p.name
            for p in checkpoint.checkpoints(train_tiny.tmp_path / "full")] == ["step-00000010"]
    assert curve(
        train_tiny("full", "--max_steps=30")) == curve(train_tiny("straight", "--max_steps=30"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_checkpoint_is_named(train_tiny, capsys, damage):
    out = train_tiny("run", "--max_steps=20", "--decay_steps=0")
    path = checkpoint.resolve(out) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    {"truncated": lambda: path.write_bytes(raw[:1000]), "missing": path.unlink,
     "flipped": lambda: path.write_bytes(raw)}[damage]()
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={out}", "--max_steps=30",
                 "--decay_steps=0")
    assert "model.safetensors" in said and len(said.splitlines()) == 1


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_built(train_tiny, capsys):
    said = fails(capsys, 2, train_tiny.config, f"--out_dir={train_tiny.tmp_path / 'big'}",
                 "--max_steps=2", "--n_layer=40000", "--n_embd=4096", "--n_ff=10240")
    assert "GiB" in said and len(said.splitlines()) == 1


def test_state_survives_json():
    state = RunState(step=3, plan=[[0, "one"]], skips=[[4, 8]], samples_seen=4)
    assert RunState(**json.loads(json.dumps(vars(state)))) == state and state.position == 12


# ---- the micro-batch on a GPU

def test_a_micro_batch_that_does_not_fit_is_halved_and_one_that_never_fits_is_an_error():
    def attempt(micro, most=3):
        tried.append(micro)
        if micro > most:
            raise torch.OutOfMemoryError("no memory")
    tried, said = [], []
    assert device.halve_until_it_fits(16, attempt, said.append) == 2 and tried == [16, 8, 4, 2]
    assert said[0] == "micro-batch: 16 sequences do not fit in memory, trying 8"
    with pytest.raises(BadInput,
                       match="ran out of memory: lower --micro_batch_size, give --recompute=1"):
        device.halve_until_it_fits(4, lambda micro: attempt(micro, most=0), said.append)


def test_the_estimate_for_a_gpu_follows_its_memory_and_divides_the_batch(monkeypatch):
    config, chosen = TrainConfig(max_steps=1, block_size=4096), []
    for gib in (1, 24, 48, 80, 10_000):
        monkeypatch.setattr(device, "available_memory", lambda device: gib * 2 ** 30)
        chosen.append(device.choose_micro_batch(MiniCPMConfig(n_layer=20), config, 60,
                                                torch.device("cuda"), shards=8))
    assert chosen == sorted(chosen) and chosen[0] == 1 and chosen[-1] == 60 and len(set(chosen)) > 2
    assert all(60 % micro == 0 for micro in chosen)


def test_the_estimate_counts_what_fsdp_holds_beside_a_single_shard(monkeypatch):
    """A process under torchrun makes no trial, so its estimate must leave room for whole gradients.
    """
    monkeypatch.setattr(device, "available_memory", lambda device: 40 * 2 ** 30)
    config, shape, chosen = TrainConfig(max_steps=1, block_size=4096,
                                        batch_size=60), MiniCPMConfig(n_layer=8), []
    for mesh in (None, SimpleNamespace(shape=(1,))):
        state = new_state(config)
        assert train_module.set_micro_batch(config, state, shape,
                                            World(device=torch.device("cuda"), mesh=mesh))
        chosen.append(state.micro)
    assert chosen == [6, 5]


def test_a_trial_of_a_micro_batch_leaves_no_trace(train_tiny):
    config, shape, _ = train_module.read_config([str(train_tiny.config), "--max_steps=5"])
    batches, *_ = dataset.open_data(config, load_tokenizer("bytes"))
    model = MiniCPM(shape)
    init_weights(model, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = new_state(config)
    train_module.try_micro_batch(config, state, model, model, train_module.language_loss, batches,
                                 World(), 2)
    assert all(p.grad is None and torch.equal(p, before[name])
               for name, p in model.named_parameters())
    assert state == new_state(config)


# ---- found by a review

def test_a_run_of_an_early_version_continues(train_tiny):
    """Its config.json says "asked" for "requested"."""
    straight = curve(train_tiny("straight", "--max_steps=20"))
    out = train_tiny("early", "--max_steps=10", "--decay_steps=0")
    text = (out / "config.json").read_text().replace('"requested"', '"asked"')
    (out / "config.json").write_text(text)
    train_tiny("early", "--max_steps=20", "--decay_steps=0")
    assert len(curve(out)[0]) == len(straight[0]) == 20


def test_a_restarted_command_does_not_overwrite_again(train_tiny, monkeypatch):
    out = train_tiny("restarted", "--max_steps=10", "--decay_steps=0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_tiny("restarted", "--max_steps=12", "--decay_steps=0", "--overwrite=True")
    assert [line["step"] for line in curve(out)[0]] == list(range(1, 13))


def test_a_marker_of_a_later_batch_outlives_a_save(train_tiny):
    """With async_save a checkpoint could be finished after the marker of a non-finite loss was
    written, and deleted it."""
    out = train_tiny("marked", "--max_steps=10", "--decay_steps=0")
    (out / "nonfinite.json").write_text(json.dumps({"samples_seen": 10 ** 6, "message": "later"}))
    train_tiny("marked", "--max_steps=20", "--decay_steps=0", "--skip_samples=4")
    assert (out / "nonfinite.json").exists()


def test_damaged_model_options_are_one_line(train_tiny, capsys):
    out = train_tiny("damaged", "--max_steps=10")
    meta = out / "step-00000010" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "model": None}))
    assert "no usable model config" in fails(capsys, 2, f"--init_from={out}", f"--out_dir={out}-2",
                                             "--max_steps=1", "--data=one")
