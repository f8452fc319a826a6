"""labs/upcycling.py: the quick run, and checks that fail when they should."""

import pytest

from engine import metrics
from labs import upcycling

SETTINGS = upcycling.Settings(experts=2)


@pytest.mark.slow
def test_the_quick_run_draws_and_reuses_its_results(lab_files, monkeypatch, capsys):
    # one figure per run takes long
    monkeypatch.setattr(metrics, "draw", lambda folder: None)
    upcycling.main(["--quick=True", "--workers=1"])
    results, said = (lab_files / "upcycling.jsonl").read_text(), capsys.readouterr().out
    (line,) = metrics.read_jsonl(lab_files / "upcycling.jsonl")
    losses, loads = line["result"]["losses"], line["result"]["loads"]
    assert {name: len(found)
            for name, found in losses.items()} == {"dense": 4, "experts": 4, "scratch": 4}
    assert min(map(min, losses.values())) > 2 and len(loads["experts"]) == upcycling.PARTS
    assert "holds | upcycled experts compute what the dense model computes" in said
    assert all((lab_files / f"upcycling{part}.png").stat().st_size > 10_000
               for part in ("", "_slide"))
    # checkpoints are gone
    assert not [path for path in lab_files.iterdir() if path.is_dir() and path.name[0] != "."]
    upcycling.main(["--quick=True", "--workers=1"])                     # nothing is run again
    assert (lab_files / "upcycling.jsonl").read_text() == results


def made_up(equal=1e-6, dense=(2.2, 2.1, 2.0, 1.95), experts=(2.22, 2.1, 1.9, 1.87),
            scratch=(2.6, 2.4, 2.2, 1.8), load=(0.8, 0.2)):
    return {"equal": equal, "flops": [100, 150], "loads": {"experts": [[load]]},
            "losses": {"dense": dense, "experts": experts, "scratch": scratch}}


@pytest.mark.parametrize("changes, fails", [
    ({}, []),
    ({"equal": 1e-3}, [0]),
    ({"dense": (2.2, 2.1, 1.85, 1.8)}, [1]),
    ({"scratch": (2.6, 2.4, 2.05, 1.8)}, [2]),
    ({"scratch": (2.6, 2.4, 2.2, 2.0)}, [3]),
    ({"scratch": (2.6, 2.4, 2.2, 2.15)}, [3, 4]),
    ({"load": (0.9, 0.1)}, [5]),
])
def test_checks_fail_when_they_should(changes, fails):
    """One contradicting seed of two is enough, but for the check of a mean."""
    checks = upcycling.checks([made_up(), made_up(**changes)], SETTINGS)
    assert [n for n, check in enumerate(checks) if not check.holds] == fails


def test_where_two_models_are_level():
    # ahead of the dense model from 1/2 on; of experts from scratch by 0.3 at 1, behind by 0.07 at
    # 3/2
    results = [made_up()]
    assert upcycling.crossing(results, "dense") == pytest.approx(0.5)
    assert upcycling.lead(results, "scratch", 4, 2) == pytest.approx(0.1)
    assert upcycling.crossing(results, "scratch") == pytest.approx(1.5 ** (0.3 / 0.37))
    assert upcycling.crossing([made_up(scratch=(2.6, 2.5, 2.4, 2.3))], "scratch") is None


def test_a_diverged_seed_is_reported():
    (check,) = upcycling.checks([made_up(), None], SETTINGS)
    assert not check.holds and "1 of 2" in check.ours
