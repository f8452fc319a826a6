"""decay_dynamics: its quantities on a loss whose curvature is known, its checks on made-up runs, and its quick run."""
import copy

import numpy as np
import pytest
import torch

from engine import metrics
from labs import decay_dynamics as lab
from labs import runs

NAMES = ("update", "norm", "same direction", "slope", "curvature", "ten times", "all the way", "convex", "is lower")


def test_the_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda name, kind, config: tmp_path / f"{name}.{kind}.png")
    lab.main(["--quick=True", "--workers=1"])
    out = capsys.readouterr().out
    assert (tmp_path / "decay_dynamics.figures.png").stat().st_size > 10_000
    assert all(name in out for name in NAMES) and "nan" not in out
    (line,) = metrics.read_jsonl(tmp_path / "decay_dynamics.results.png")
    result = line["result"]
    assert result["steps"][-1] == 39 and {len(series) for name, series in result.items() if name != "lines"} == {len(result["steps"])}
    assert result["lr"][0] == 0.01 and 0.001 < result["lr"][-1] < 0.002
    from_stable, to_stable = result["lines"].values()
    assert from_stable[lab.START] == to_stable[lab.END], "both lines pass through the last stable weights"


def test_directional_derivatives_of_a_parabola():
    """loss = x.H.x / 2: the slope along v at x + v is (x + v).H.v / |v|, its change v.H.v / |v|^2."""
    H, x, v = torch.diag(torch.tensor([1.0, 10.0])), torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    d1, d2, curvature = lab.directional(H @ x, H @ (x + v), v)
    assert (d1, d2) == pytest.approx((5.0, 10.0)) and curvature == pytest.approx(10 / 26 ** 1.5)


def test_line_facts():
    place, depth, rise, bend = lab.line_facts([(p - 1) ** 2 for p in lab.LINE])
    assert (place, depth) == pytest.approx((1, 1)) and rise < 0 < bend
    _, _, rise, bend = lab.line_facts([-p + 0.3 * np.sin(10 * p) for p in lab.LINE])
    assert rise > 0 > bend, "a hill between"


def made_up(settings):
    """Results as the paper has them."""
    steps = list(range(settings.every + 1, settings.steps, settings.every))
    decayed = np.array(steps) > settings.steps * (1 - settings.decay_share)
    series = lambda stable, end: np.where(decayed, end, stable).tolist()                                    # noqa: E731
    result = {"steps": steps, "lr": series(0.01, 0.001), "largest update": series(0.1, 0.01), "gradient norm": series(1, 0.5),
              "cosine": series(-0.1, 0.3), "D1": series(-0.2, 0.01), "D2": series(1, 2), "curvature": series(1, 10),
              "norm in training": series(1, 1), "cosine in training": series(0.01, 0.01),
              "lines": {"stable to decayed": [(p - 1) ** 2 for p in lab.LINE], "stable to stable": [(p - 0.5) ** 2 for p in lab.LINE]}}
    return [result, copy.deepcopy(result)]


def test_checks_hold_on_the_papers_picture_and_fail_without_it():
    settings = lab.Settings()
    assert [check.holds for check in lab.checks(made_up(settings), settings)] == [True] * len(NAMES)
    for i, (name, spoil) in enumerate((
            ("largest update", lambda y: [0.1] * len(y)), ("gradient norm", lambda y: y[::-1]), ("cosine", lambda y: [-0.1] * len(y)),
            ("D1", lambda y: [0.2] * len(y)), ("curvature", lambda y: y[::-1]))):
        results = made_up(settings)
        for result in results:
            result[name] = spoil(result[name])
        assert [n for n, check in enumerate(lab.checks(results, settings)) if not check.holds] == ([4, 5] if name == "curvature" else [i]), name
    results = made_up(settings)
    results[1]["lines"]["stable to decayed"][lab.MIDDLE] += 1       # a hill in one seed
    results[1]["lines"]["stable to stable"][lab.MIDDLE] += 1
    assert [n for n, check in enumerate(lab.checks(results, settings)) if not check.holds] == [6, 7, 8]


def test_settings_that_leave_nothing_to_compare_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        lab.main(["--every=1", "--decay_share=0.6"])
    assert stop.value.code == 2 and "--every=1" in (said := capsys.readouterr().err) and "--decay_share=0.6" in said
