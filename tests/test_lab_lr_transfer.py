"""labs/lr_transfer.py: its machinery, and its checks on curves whose best rate is known."""
import dataclasses
import json
import math

import numpy as np
import pytest

from engine.run import NonFinite
from labs import lr_transfer as lab
from labs import runs

SETTINGS = dataclasses.replace(lab.Settings(), seeds=(0, 1, 2))


def curve(best, rates, loss=2.0):
    """A parabola in log loss over log rate, with all seeds; they differ in level, not in the best
    rate."""
    return {rate: {seed: loss * math.exp(0.05 * math.log2(rate / best) ** 2) + 0.01 * (seed == 2)
                   - 0.01 * (seed == 1) for seed in range(3)} for rate in rates}


def curves_of(sizes, bests, rates):
    return {size: curve(best, rates) for size, best in zip(sizes, bests)}


def results(rates=(0.01,) * 4, control=(0.008, 0.004, 0.002, 0.001), depths=(0.01,) * 3,
            large=(1.7, 1.8, 1.9, 2.0)):
    """What experiment() gives if the best rates are these, and the losses of four sets of constants
    at the larger width."""
    curves = {"muP": curves_of(SETTINGS.widths, rates, SETTINGS.rates),
              "control": curves_of(SETTINGS.widths, control, SETTINGS.control_rates),
              "depth": curves_of(SETTINGS.depths, depths, SETTINGS.rates)}
    return curves, [lab.PAPER] * 4, {32: np.array([1.9, 2.0, 2.1, 2.2]), 128: np.array(large)}


def holds(*args, **kwargs):
    return [bool(check.holds) for check in lab.checks(results(*args, **kwargs), SETTINGS)]


def test_quick_run(lab_files, monkeypatch, capsys):
    lab.main(["--quick=True", "--workers=1"])
    first = capsys.readouterr().out
    assert "rank correlation" in first
    assert all((lab_files / f"lr_transfer{part}.png").stat().st_size > 10_000
               for part in ("", "_slide"))
    jobs = [json.loads(line)["job"]
            for line in (lab_files / "lr_transfer.jsonl").read_text().splitlines()]
    assert {(job["width"], job["mup"])
            for job in jobs} == {(32, True), (64, True), (32, False), (64, False)}
    assert {job["seed"] for job in jobs} == {0, 1} and any("scale_depth" in job for job in jobs)
    lab.main(["--quick=True", "--workers=1"])                            # all is known now
    assert capsys.readouterr().out == "".join(line + "\n"
                                              for line in first.splitlines()
                                              if not line.startswith("["))


def test_checks_hold_if_the_claims_do():
    assert holds() == [True] * 6


@pytest.mark.parametrize("which, changed",
                         [(0, {"rates": (0.02, 0.01, 0.01, 0.009)}),
                          (1, {"depths": (0.005, 0.01, 0.0105)}),
                          (2, {"control": (0.004, 0.002, 0.002, 0.0012)}),
                          (3, {"rates": (0.01, 0.01, 0.01, 0.004)}), (3, {"control": (0.004,) * 4}),
                          (4, {"large": (1.9, 1.8, 1.7, 2.0)}),
                          (5, {"large": (1.9, 1.8, 1.7, 2.0)})])
def test_each_check_fails_if_its_claim_does(which, changed):
    assert holds(**changed)[which] is False


def test_the_vertex_is_found_between_the_rates_of_the_grid():
    assert lab.vertices(curve(0.0085, SETTINGS.rates)) == pytest.approx([0.0085] * 3, rel=0.02)
    partly = {rate: losses if rate < 0.03 else {0: math.inf}
              for rate, losses in curve(0.0085, SETTINGS.rates).items()}
    # a run that diverged does not count
    assert lab.vertices(partly) == pytest.approx([0.0085] * 3, rel=0.02)
    falling = {rate: {seed: 1 / rate for seed in range(3)} for rate in SETTINGS.rates}
    # no vertex: not the same
    assert not lab.same({32: lab.vertices(falling), 64: np.array([0.01] * 3)})


def test_the_search_follows_the_lowest_point_and_repeats_it_with_all_seeds():
    truth = curve(0.0012, SETTINGS.control_rates)
    found = lab.rate_curve({}, (0.004, 0.008), SETTINGS.control_rates, SETTINGS.seeds,
                           lambda jobs: [truth[job["learning_rate"]][job["seed"]] for job in jobs])
    assert {rate: len(losses) for rate, losses in found.items()} == {
        0.0005: 3, 0.001: 3, 0.002: 3, 0.004: 1, 0.008: 1}


def test_the_best_rate_is_taken_where_all_seeds_ran():
    lucky = {0.01: {0: 2.0, 1: 2.1, 2: 2.2}, 0.02: {0: 2.05, 1: 2.1, 2: 2.1}, 0.04: {0: 1.9},
             0.005: {0: 1.0, 1: 1.0, 2: math.inf}}
    assert lab.best_rate(lucky) == 0.02


def test_a_run_that_diverges_is_a_result(monkeypatch):
    def diverges():
        yield
        raise NonFinite("step 2")
    monkeypatch.setattr(runs, "begin", lambda *args, **settings: (None, diverges(), None))
    assert lab.final_loss(32, 2, 0, True, 4, 2048, learning_rate=9.0) == {"loss": None}
