"""Checkpoints: whole or not there, damage is named, nothing in them can run, one process at a time.
"""
import json
import pickle
import subprocess
import sys

import pytest
import torch

import sample
from configurator import ROOT, BadInput
from engine import checkpoint, metrics

TENSORS = {"model": {"a": torch.arange(600.).view(20, 30),
                     "b": torch.ones(3, dtype=torch.bfloat16)},
           "optimizer": {"a/step": torch.tensor(7.)}}


def save(out_dir, *steps, **meta):
    return [checkpoint.save_checkpoint(out_dir, step, TENSORS, meta) for step in steps][-1]


def names(out_dir):
    return sorted(path.name for path in out_dir.iterdir())


def test_what_is_saved_is_read(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, 3, TENSORS, {"run": {"é": 1}},
                                      lambda folder: (folder / "words.txt").write_text("kept"))
    assert path == tmp_path / "step-00000003" and names(tmp_path) == ["step-00000003"]
    assert (meta := checkpoint.read_meta(path))["step"] == 3 and meta["run"] == {"é": 1}
    assert sorted(meta["files"]) == ["model.safetensors", "optimizer.safetensors", "words.txt"]
    for part, tensors in TENSORS.items():
        read = dict(checkpoint.read_tensors(path, part))
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], t) and read[k].dtype == t.dtype for k, t in tensors.items())
    view = {"model": {"t": torch.arange(6.).view(2, 3).T,
                      "row": torch.eye(4, requires_grad=True)[1]}}
    assert dict(checkpoint.read_tensors(checkpoint.save_checkpoint(tmp_path, 4, view, {}),
                                        "model"))["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_run_folder_means_its_latest_checkpoint(tmp_path):
    first, last = save(tmp_path, 99_999_999), save(tmp_path, 100_000_000)
    # no meta.json: not complete
    (tmp_path / "step-00000200").mkdir()
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(str(last)) == last
    assert checkpoint.resolve(first) == first
    assert checkpoint.checkpoints(tmp_path) == [first, last]
    assert checkpoint.checkpoints(tmp_path / "none") == []
    for path, says in (("none", "no such checkpoint"),
                       ("step-00000200", "holds no complete checkpoint")):
        with pytest.raises(BadInput, match=f"{path}: {says}"):
            checkpoint.resolve(tmp_path / path)


def test_damage_is_one_line_that_names_the_file(tmp_path):
    def edit(name, change):
        return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))

    weights = "model.safetensors"
    for step, (name, says, damage) in enumerate([(weights, "not a complete file of tensors",
                                                  edit(weights, lambda raw: raw[:-1])),
                                                 (weights, "not a complete",
                                                  edit(weights, lambda raw: b"")),
                                                 (weights, "changed since",
                                                  edit(weights,
                                                       lambda raw: raw[:-1]
                                                       + bytes([raw[-1] ^ 1]))),
                                                 (weights, "missing",
                                                  lambda path: (path / weights).unlink()),
                                                 ("meta.json", "damaged",
                                                  edit("meta.json", lambda raw: raw[:40])),
                                                 ("meta.json", "damaged",
                                                  edit("meta.json", lambda raw: b"\xff")),
                                                 ("meta.json", "not the meta.json",
                                                  edit("meta.json", lambda raw: b"[]")),
                                                 ("meta.json", "not the meta.json",
                                                  edit("meta.json", lambda raw: b"{}")),]):
        damage(path := save(tmp_path, step))
        with pytest.raises(BadInput) as caught:
            dict(checkpoint.read_tensors(path, "model"))
        assert "\n" not in str(caught.value) and f"{path / name}: {says}" in str(caught.value)


def test_a_pickle_is_never_run(tmp_path, capsys):
    """As a file named by --ckpt, and in the place of the weights: even where meta.json vouches for
    it."""
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    evil, path = tmp_path / "evil.pt", save(tmp_path / "run", 1)
    torch.save(Payload(), evil)
    torch.load(evil, weights_only=False).close()                         # it works where it is let
    (tmp_path / "marker").unlink()
    for raw in (evil.read_bytes(), pickle.dumps(Payload())):
        evil.write_bytes(raw)
        with pytest.raises(SystemExit, match="^2$"):
            sample.main([f"--ckpt={evil}"])
        assert "single files (pickles) are never read" in capsys.readouterr().err
        (path / "model.safetensors").write_bytes(raw)
        for _ in range(2):
            with pytest.raises(BadInput, match="not a complete file of tensors"):
                dict(checkpoint.read_tensors(path, "model"))
            checkpoint.amend_meta(path.parent, 1, files={"model.safetensors": checkpoint.sha256(
                path / "model.safetensors")})
    assert names(tmp_path) == ["evil.pt", "run"]


def test_left_overs_of_a_killed_run_are_ignored_and_removed(tmp_path):
    """Only that of the same step was removed once: of a large model, tens of gigabytes stayed for
    ever."""
    first = save(tmp_path, 1)
    for name in (".step-00000002.tmp", ".step-00000003.tmp"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "meta.json").write_text("{}")
    assert checkpoint.resolve(tmp_path) == first
    assert save(tmp_path, 2) == checkpoint.resolve(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("error",
                         [OSError(28, "No space left on device"),
                          checkpoint.SafetensorError("I/O error: No space left")])
def test_a_failing_write_leaves_the_last_good_one(tmp_path, monkeypatch, error):
    last, save_file = save(tmp_path, 1, 2), checkpoint.save_file

    def full(tensors, path):
        if path.name == "optimizer.safetensors":
            raise error
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (2, 3):                                                  # 2 is there already
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, step)
        assert checkpoint.resolve(tmp_path) == last
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        assert torch.equal(dict(checkpoint.read_tensors(last, "model"))["a"], TENSORS["model"]["a"])


def test_prune_keeps_the_last_the_marked_and_every_nth(tmp_path):
    save(tmp_path, 1, 3, 5, 10, 15, 20)
    save(tmp_path, 2, keep=True)
    checkpoint.amend_meta(tmp_path, 3, keep=True)
    for last, every, kept in ((9, 0, (1, 2, 3, 5, 10, 15, 20)), (2, 5, (2, 3, 5, 10, 15, 20)),
                              (2, 0, (2, 3, 15, 20)), (1, 7, (2, 3, 20))):
        checkpoint.prune(tmp_path, last, every)
        assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_a_run_folder_has_one_process_and_is_free_when_it_is_killed(tmp_path):
    code = (f"from engine import checkpoint; held = checkpoint.lock({str(tmp_path)!r}); "
            f"print('held', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(BadInput, match="in use by another process"):
                checkpoint.lock(tmp_path)
        finally:
            other.kill()
    with checkpoint.lock(tmp_path):
        pass


def test_json_is_written_whole_or_not_at_all(tmp_path):
    checkpoint.write_json(path := tmp_path / "config.json", {"a": "é"})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": 1, "b": object()})
    assert checkpoint.read_json(path) == {"a": "é"}


def test_metrics_after_the_checkpoint_are_dropped_and_half_a_line_too(tmp_path):
    lines = [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 3.0}, {"step": 2, "val_loss": 3.1},
             {"step": 3, "loss": 2.5}]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    assert metrics.read(tmp_path) == ([lines[0], lines[1], lines[3]], [lines[2]])
    metrics.rewind(tmp_path, 2)
    assert [json.loads(line)
            for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:3]
    assert names(tmp_path) == ["metrics.jsonl"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n' + whole)
    with pytest.raises(BadInput, match="metrics.jsonl:1: not JSON"):
        metrics.read(tmp_path)
