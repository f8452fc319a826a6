"""wsd_vs_cosine: its quick run, what an interruption leaves, and its checks on made-up losses."""
import numpy as np
import pytest

import train
from engine import metrics
from labs import runs
from labs import wsd_vs_cosine as lab

NAMES = ("drops sharply", "at no horizon worse", "is enough", "falls short", "best at its own end", "rises again", "form of the decay", "averaging")


def test_the_quick_run_and_its_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda name, kind, config: tmp_path / f"{name}.{kind}.png")
    monkeypatch.setattr(runs, "folder", lambda name, job: str(tmp_path / "folder"))
    lab.main(["--quick=True", "--workers=1"])
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and "nan" not in out
    assert (tmp_path / "wsd_vs_cosine.figures.png").stat().st_size > 10_000
    assert not (tmp_path / "folder").exists(), "checkpoints are gone when their results are kept"
    lines = metrics.read_jsonl(tmp_path / "wsd_vs_cosine.results.png")
    (trunk,) = [line["result"] for line in lines if line["work"] == "trunk_and_decays"]
    on_trunk = dict(trunk["trunk"])
    assert {8, 16} <= on_trunk.keys() and [d["curve"][-1][0] for d in trunk["decays"]] == [d["horizon"] for d in trunk["decays"]]
    short, long, loop = (dict(line["result"]) for line in lines if line["work"] == "cosine")
    assert short[8] == loop[8] != long[8], "until T a loop is a cosine, and T is what tells two cosines apart"
    assert short[16] != loop[16], "after T it is not"

    monkeypatch.setattr(train, "main", None)
    monkeypatch.setattr(train, "train", None)
    lab.main(["--quick=True", "--workers=1"])                            # nothing is trained a second time
    assert capsys.readouterr().out.splitlines() == [line for line in out.splitlines() if not line.startswith("[")]


def test_an_interrupted_run_ends_the_lab(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "main", lambda command: None)             # as after Ctrl-C: saved, and returned
    with pytest.raises(KeyboardInterrupt):
        lab.train_until(10, tmp_path, "--max_steps=10")


def made_up(settings):
    """Losses as the paper has them, of two seeds."""
    both, S = (lambda loss: np.array([loss, loss + 0.002])), settings.horizons
    short_of = {0.025: 0.03, 0.05: 0.015, 0.1: 0.0, 0.2: -0.005}
    found = {"trunk": {T: both(1.6 - T / 1e4) for T in S}, "averaged": {T: both(1.55 - T / 1e4) for T in S}, "decays": {}, "cosines": {}}
    for share, more in short_of.items():
        for i, form in enumerate(settings.forms):
            found["decays"].update({(T, share, form): {T: both(1.5 - T / 1e4 + more + 0.01 * i)} for T in (S[-1:] if i else S)})
    for T in S:
        found["cosines"][T, False] = {end: both(1.5 - end / 1e4 + (0 if end == T else 0.05)) for end in S}
    found["cosines"][S[0], True] = {end: both(1.5 - end / 1e4 + (0 if end == S[0] else 0.08)) for end in S}
    return found


def holding(found, settings):
    return [check.holds for check in lab.checks(found, settings)]


def test_checks_hold_on_the_papers_picture_and_fail_without_it():
    settings = lab.Settings(seeds=(0, 1))
    S, form = settings.horizons, settings.forms[0]
    assert holding(made_up(settings), settings) == [True] * len(NAMES)

    def failing(spoil):
        found = made_up(settings)
        spoil(found)
        return [i for i, holds in enumerate(holding(found, settings)) if not holds]

    def add(curve, T, more):
        curve[T] = curve[T] + more
    assert failing(lambda f: [add(f["trunk"], T, -0.08) for T in S[:1]]) == [0]
    assert failing(lambda f: add(f["decays"][S[1], 0.2, form], S[1], 0.02)) == [1]
    assert failing(lambda f: add(f["decays"][S[1], 0.1, form], S[1], 0.02)) == [2]
    assert failing(lambda f: add(f["decays"][S[-1], 0.025, form], S[-1], -0.025)) == [3]
    assert failing(lambda f: add(f["cosines"][S[0], False], S[1], -0.07)) == [4]
    assert failing(lambda f: add(f["cosines"][S[0], True], S[1], -0.09)) == [5]
    assert failing(lambda f: add(f["decays"][S[-1], 0.1, settings.forms[-1]], S[-1], 0.05)) == [6]
    assert failing(lambda f: add(f["averaged"], S[-1], -0.08)) == [7]


def test_what_four_lengths_cost():
    """A decay of a tenth: the trunk up to the last branch, and a tenth of every length; cosines cost their sum."""
    wsd, cosines = lab.updates_spent(lab.Settings(horizons=(100, 200, 300, 400)), 0.1)
    assert wsd.tolist() == [90 + 10, 180 + 10 + 20, 270 + 10 + 20 + 30, 360 + 10 + 20 + 30 + 40]
    assert cosines.tolist() == [100, 300, 600, 1000]


def test_settings_that_cannot_be_compared_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        lab.main(["--horizons=100", "--shares=0.2,0.1", "--forms=steep"])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and [line.split("=")[0] for line in said] == ["--horizons", "--shares", "--forms"]
