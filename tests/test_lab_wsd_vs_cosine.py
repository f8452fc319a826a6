"""wsd_vs_cosine: its quick run, its horizons, and its checks on made-up losses."""
import numpy as np
import pytest

import train
from engine import metrics
from labs import runs
from labs import wsd_vs_cosine as lab

NAMES = ("below the trunk", "at no horizon worse", "is enough", "above one of", "grows by less",
         "ends later", "one horizon earlier", "rises again", "forms of the decay", "averaging")


def test_the_quick_run_and_its_cache(lab_files, monkeypatch, capsys):
    lab.main(["--quick=True", "--workers=1"])
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and "nan" not in out
    assert all((lab_files / f"wsd_vs_cosine{page}.png").stat().st_size > 10_000
               for page in ("", "_slide"))
    lines = metrics.read_jsonl(lab_files / "wsd_vs_cosine.jsonl")
    trunk = next(line["result"] for line in lines if line["work"] == "trunk_and_decays")
    first, last = (end for end, _ in trunk["averaged"])
    assert {first, last} <= dict(trunk["trunk"]).keys() and len(trunk["decays"]) == 2 * 2 + 1
    assert len(set(trunk["decays"])) == 5, "every decay has its start, end and form"
    short, long, loop = (dict(line["result"])
                         for line in lines if line["work"] == "cosine"
                         and line["job"]["common"]["seed"] == 0)
    assert short[first] == loop[
        first] != long[first], "until T a loop is a cosine, and T is what tells two cosines apart"
    assert short[last] != loop[last], "after T it is not"

    monkeypatch.setattr(train, "train", None)
    # nothing is trained a second time
    lab.main(["--quick=True", "--workers=1"])
    assert capsys.readouterr().out.splitlines() == [
        line for line in out.splitlines() if not line.startswith("[")]


def test_horizons_are_tokens_per_parameter():
    model = runs.build("config/lab.py", **lab.Settings().common(0), max_steps=100)[1]
    assert model.config.n_params_non_embedding == 47392
    assert lab.Settings().ratio == 8 * 128 / 47392
    assert lab.Settings().ends == [926, 1851, 2777, 3702]


def made_up(settings):
    """Losses as the paper has them, of two seeds."""
    both, S = (lambda loss: np.array([loss, loss + 0.002])), settings.ends
    short_of, first = {0.025: 0.03, 0.1: 0.0, 0.2: -0.005}, settings.forms[0]
    found = {"trunk": {T: both(1.6 - T / 1e5) for T in S},
             "averaged": {T: both(1.55 - T / 1e5) for T in S}, "cosines": {}}
    found["decays"] = {share: {T: both(1.5 - T / 1e5 + more) for T in S}
                       for share, more in short_of.items()}
    found["forms"] = {form: found["decays"][0.1][S[-1]] + (0 if form == first else 0.01)
                      for form in settings.forms}
    for i, T in enumerate(S):
        found["cosines"][T, False] = {end: both(1.5 - end / 1e5 + (0 if end == T else 0.05))
                                      for end in S[:i + 2]}
    found["cosines"][S[0], True] = {end: both(1.5 - end / 1e5 + (0 if end == S[0] else 0.08))
                                    for end in S[:3]}
    found["ends"] = {T: found["cosines"][T, False][T] for T in S}
    return found


def test_checks_hold_on_the_papers_picture_and_fail_without_it():
    settings = lab.Settings(seeds=(0, 1))
    S = settings.ends

    def failing(spoil):
        found = made_up(settings)
        spoil(found)
        # made-up seeds differ by the same everywhere
        with np.errstate(divide="ignore"):
            checks = lab.checks(found, settings)
        assert len(checks) == len(NAMES)
        assert all(name in check.claim for name, check in zip(NAMES, checks))
        return [i for i, check in enumerate(checks) if not check.holds]

    def add(curve, T, more):
        curve[T] = curve[T] + more
    assert failing(lambda f: None) == []
    assert failing(lambda f: add(f["trunk"], S[0], -0.06)) == [0]
    assert failing(lambda f: add(f["decays"][0.2], S[1], 0.02)) == [1]
    assert failing(lambda f: add(f["decays"][0.1], S[1], 0.02)) == [2]
    assert failing(lambda f: add(f["decays"][0.025], S[-1], -0.025)) == [3]
    assert failing(lambda f: add(f["decays"][0.2], S[0], -0.02)) == [4]
    assert failing(lambda f: add(f["cosines"][S[2], False], S[1], -0.045)) == [5]
    assert failing(lambda f: add(f["cosines"][S[0], False], S[1], -0.055)) == [6]
    assert failing(lambda f: add(f["cosines"][S[0], True], S[1], -0.09)) == [7]
    assert failing(lambda f: add(f["forms"], settings.forms[-1], 0.05)) == [8]
    assert failing(lambda f: add(f["averaged"], S[-1], -0.08)) == [9]


def test_settings_that_cannot_be_compared_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        lab.main(["--horizons=100", "--shares=0.2,0.1", "--forms=steep"])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert [line.split("=")[0] for line in said] == ["--horizons", "--shares", "--forms"]
