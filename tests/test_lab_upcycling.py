"""labs/upcycling.py: the quick run, and checks that fail when they should."""
from pathlib import Path

import pytest

from engine import metrics
from labs import runs, upcycling

SETTINGS = upcycling.Settings(experts=2)


def test_the_quick_run_draws_and_reuses_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda lab, kind, config: tmp_path / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}")
    monkeypatch.setattr(runs, "folder", lambda lab, job, plain=runs.folder: str(tmp_path / Path(plain(lab, job)).name))
    monkeypatch.setattr(metrics, "draw", lambda folder: None)            # one figure per run takes long
    upcycling.main(["--quick=True", "--workers=1"])
    results, said = (tmp_path / "upcycling.jsonl").read_text(), capsys.readouterr().out
    (line,) = metrics.read_jsonl(tmp_path / "upcycling.jsonl")
    steps = {name: [step for step, _ in curve] for name, curve in line["result"]["curves"].items()}
    assert steps["dense"] == steps["experts"] == list(range(2, 31, 2)) and steps["longer"][-1] > 30 and steps["scratch"][-1] > 30
    assert "holds | upcycled experts compute what the dense model computes" in said and (tmp_path / "upcycling.png").stat().st_size > 10_000
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name[0] != "."]   # checkpoints are gone
    upcycling.main(["--quick=True", "--workers=1"])                     # nothing is run again
    assert (tmp_path / "upcycling.jsonl").read_text() == results


def made_up(equal=1e-6, dense=2.0, longer=1.95, experts=(2.3, 2.2, 1.9), scratch=2.1, load=(0.8, 0.2)):
    curve = lambda losses: [[10 * n, loss] for n, loss in enumerate(losses, 1)]        # noqa: E731
    return {"equal": equal, "flops": [100, 150], "tokens": 2048, "loads": {"experts": [[load]]},
            "curves": {"dense": curve((2.25, 2.21, dense)), "longer": curve((2.25, 2.21, longer)), "experts": curve(experts),
                       "scratch": curve((3, 2.5, scratch))}}


@pytest.mark.parametrize("changes, fails", [
    ({}, []),
    ({"equal": 1e-3}, [0]),
    ({"dense": 1.8, "longer": 1.7}, [1, 2]),
    ({"longer": 1.85}, [2]),
    ({"scratch": 1.8}, [3]),
    ({"load": (0.9, 0.1)}, [4]),
])
def test_checks_fail_when_they_should(changes, fails):
    """One contradicting seed of two is enough."""
    checks = upcycling.checks([made_up(), made_up(**changes)], SETTINGS)
    assert [n for n, check in enumerate(checks) if not check.holds] == fails


def test_from_which_update_the_experts_stay_ahead():
    assert upcycling.ahead_from([made_up()]) == 20                      # behind at 10, ahead at 20 and 30
    assert upcycling.ahead_from([made_up(experts=(2.2, 2.1, 1.9))]) == 10
    assert upcycling.ahead_from([made_up(experts=(2.2, 2.1, 2.1))]) is None


def test_a_diverged_seed_is_reported():
    (check,) = upcycling.checks([made_up(), None], SETTINGS)
    assert not check.holds and "1 of 2" in check.ours
