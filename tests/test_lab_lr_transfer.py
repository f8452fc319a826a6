"""labs/lr_transfer.py: its machinery, and its checks on curves whose best rate is known."""
import dataclasses
import json
import math

import pytest

from engine.run import NonFinite
from labs import lr_transfer as lab
from labs import runs

SETTINGS = dataclasses.replace(lab.Settings(), seeds=(0, 1, 2))


def curve(rates, best, loss=2.0):
    """A valley around a rate, with seeds there and beside it."""
    made = {rate: {0: loss + 0.1 * abs(rates.index(rate) - rates.index(best))} for rate in rates}
    for rate in lab.neighbors(best, rates):
        made[rate].update({1: made[rate][0] + 0.01, 2: made[rate][0] - 0.01})
    return made


def seeds(loss):
    return {0: loss, 1: loss + 0.01, 2: loss - 0.01}


def results(rates=(0.01,) * 4, control=(0.008, 0.004, 0.002, 0.001), depths=(0.01,) * 3, found=1.95):
    """What experiment() gives where the best rates are these."""
    curves = {"muP": {size: curve(SETTINGS.rates, rate) for size, rate in zip(SETTINGS.widths, rates)},
              "control": {size: curve(SETTINGS.control_rates, rate) for size, rate in zip(SETTINGS.widths, control)},
              "depth": {size: curve(SETTINGS.rates, rate) for size, rate in zip(SETTINGS.depths, depths)}}
    trials = [(lab.PAPER | {"learning_rate": 0.02}, seeds(1.9)), (lab.PAPER, seeds(2.1))]
    return curves, trials, {32: (seeds(1.9), seeds(2.0)), 256: (seeds(found), seeds(2.0))}


def holds(*args, **kwargs):
    return [check.holds for check in lab.checks(results(*args, **kwargs), SETTINGS)]


def test_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda name, kind, config: tmp_path / f"{name}.{'png' if kind == 'figures' else 'jsonl'}")
    lab.main(["--quick=True", "--workers=1"])
    first = capsys.readouterr().out
    assert "best learning rate" in first and (tmp_path / "lr_transfer.png").stat().st_size > 10_000
    jobs = [json.loads(line)["job"] for line in (tmp_path / "lr_transfer.jsonl").read_text().splitlines()]
    assert {(job["width"], job["mup"]) for job in jobs} == {(32, True), (64, True), (32, False), (64, False)}
    assert {job["seed"] for job in jobs} == {0, 1} and any("scale_depth" in job for job in jobs)
    lab.main(["--quick=True", "--workers=1"])                            # all is known now
    assert capsys.readouterr().out == "".join(line + "\n" for line in first.splitlines() if not line.startswith("["))


def test_checks_hold_where_the_claims_do():
    assert holds() == [True] * 5


@pytest.mark.parametrize("which, changed", [
    (0, {"rates": (0.02, 0.01, 0.01, 0.005)}), (0, {"rates": (0.0025, 0.005, 0.005, 0.005)}), (1, {"depths": (0.005, 0.01, 0.02)}),
    (2, {"control": (0.002, 0.002, 0.002, 0.001)}), (3, {"rates": (0.01, 0.01, 0.01, 0.005)}), (3, {"control": (0.004,) * 4}),
    (4, {"found": 2.03})])
def test_each_check_fails_where_its_claim_does(which, changed):
    """A best rate that moves by two steps, or lies at the end of its curve; a control that stays; constants that do not carry over."""
    assert holds(**changed)[which] is False


def test_the_best_rate_is_taken_where_all_seeds_ran():
    lucky = {0.01: {0: 2.0, 1: 2.1, 2: 2.2}, 0.02: {0: 2.05, 1: 2.1, 2: 2.1}, 0.04: {0: 1.9}, 0.005: {0: 1.0, 1: 1.0, 2: math.inf}}
    assert lab.best_rate(lucky) == 0.02


def test_a_run_that_diverges_is_a_result(monkeypatch):
    def diverges():
        yield
        raise NonFinite("step 2")
    monkeypatch.setattr(runs, "begin", lambda *args, **settings: (None, diverges(), None))
    assert lab.final_loss(32, 2, 0, True, 4, 2048, learning_rate=9.0) == {"loss": None}
