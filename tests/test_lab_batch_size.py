"""labs/batch_size.py: its machinery, and its arithmetic on curves whose best batch is known."""
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from configurator import BadInput
from labs import batch_size as lab
from labs import runs
from model import MiniCPMConfig

BATCHES = [2 ** k for k in range(8, 14)]


def made_up(a, b, offset=1.0, batches=BATCHES):
    """{batch: curve} where level L costs the fewest tokens at batch a / L^b, and offset times them in all."""
    levels = np.geomspace(4, 1.5, 400)
    return {batch: [[float(offset * 2e7 * level ** -12 * math.exp(0.15 * math.log(batch * level ** b / a) ** 2)), float(level)] for level in levels]
            for batch in batches}


def test_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda name, kind, config: tmp_path / f"{name}.{kind}.{'png' if kind == 'figures' else 'jsonl'}")
    lab.main(["--quick=True", "--workers=1"])
    assert (tmp_path / "batch_size.figures.png").stat().st_size > 10_000
    results = [json.loads(line)["result"] for line in (tmp_path / "batch_size.results.jsonl").read_text().splitlines()]
    assert {result["batch"] for result in results} == {128, 256, 512}
    assert all(result["curve"][-1][1] < result["curve"][0][1] for result in results)           # it learns
    assert "the best batch grows as the loss falls" in capsys.readouterr().out


def test_the_fit_finds_the_law_that_made_the_curves():
    groups = {(size, seed): made_up(5e4, 5.0, offset) for size, seed, offset in ((10, 0, 1.0), (10, 1, 1.1), (40, 0, 0.5), (40, 1, 0.6))}
    points = lab.best_batches(groups)
    found = lab.fit(points)
    assert found["b"] == pytest.approx(5.0, rel=0.03)
    assert found["a"] == pytest.approx(5e4, rel=0.1)
    assert found["r2"] > 0.99
    assert found["b_interval"][0] <= found["b"] <= found["b_interval"][1]
    assert all(check.holds for check in lab.checks((None, points, found), lab.Settings()))


def test_checks_fail_where_the_claim_is_wrong():
    """A best batch that shrinks, and one that goes with the size of the model."""
    shrinks = lab.best_batches({(size, 0): made_up(100, -3.0) for size in (10, 20, 40)})
    assert not lab.checks((None, shrinks, lab.fit(shrinks)), lab.Settings())[0].holds
    by_size = lab.best_batches({(size, 0): made_up(size * 1e4, 5.0) for size in (1, 2, 5)})
    assert not lab.checks((None, by_size, lab.fit(by_size)), lab.Settings())[2].holds


def test_a_cheapest_batch_at_the_end_of_those_tried_is_no_best_one():
    assert lab.parabola({256: 3.0, 512: 2.0, 1024: 1.0}) is None
    assert lab.parabola({256: 3.0, 512: 2.0}) is None
    assert lab.parabola({256: 2.0, 512: 1.0, 1024: 2.0}) == pytest.approx((512, 1.0))


def test_tokens_to_a_level():
    curve = [[100, 3.0], [200, 2.0], [400, 2.5], [800, 1.0]]
    assert lab.tokens_to(curve, 2.0) == pytest.approx(200)
    assert lab.tokens_to(curve, 2.5) == pytest.approx(math.sqrt(100 * 200))                    # the first time, not the second
    assert lab.tokens_to(curve, 3.0) is None and lab.tokens_to(curve, 0.9) is None


def run_folder(folder, batch, width, curve, **train):
    folder.mkdir(parents=True)
    config = {"train": {"batch_size": batch // 128, "block_size": 128, "batch_schedule": None, "seed": 1, **train},
              "model": {"n_embd": width, "n_head": 2, "n_layer": 2, "n_ff": 64, "vocab_size": 256}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": i, "loss": loss, "tokens": round(tokens) + batch} for i, (tokens, loss) in enumerate(curve)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + [{"step": 9, "val_loss": 1.0}]))


def test_own_runs_are_grouped_by_size_and_fitted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda name, kind, config: tmp_path / f"{name}.{kind}.png")
    monkeypatch.setattr(lab, "draw", lambda results, settings: Figure())
    for width in (32, 64, 128):
        for batch, curve in made_up(5e4, 5.0).items():
            run_folder(tmp_path / "sweep" / f"{width}-{batch}", batch, width, curve)
    groups = lab.read_runs(str(tmp_path / "sweep" / "*" / "metrics.jsonl"))
    config = MiniCPMConfig(n_embd=32, n_head=2, n_layer=2, n_ff=64, vocab_size=256)
    assert len(groups) == 3 and set(groups[config.n_params_non_embedding, 1]) == set(BATCHES)
    lab.main([f"--runs={tmp_path}/sweep/*"])
    assert (tmp_path / "batch_size_own.figures.png").exists() and not (tmp_path / "batch_size.figures.png").exists()
    assert "holds    | one power law" in capsys.readouterr().out


@pytest.mark.parametrize("train, batches, word", [
    ({}, BATCHES, "too few points"), ({}, BATCHES[:2], "too few points"), ({"batch_schedule": "0:8,100:16"}, BATCHES, "batch changes"),
    ({"block_size": 256, "batch_size": 8}, BATCHES, "second run"), (None, BATCHES, "no folder with a metrics.jsonl")])
def test_own_runs_that_cannot_be_fitted_take_one_line(tmp_path, capsys, train, batches, word):
    for batch, curve in made_up(5e4, 5.0, batches=batches).items() if train is not None else ():
        run_folder(tmp_path / str(batch), batch, 32, curve, **train)
    with pytest.raises(SystemExit) as caught:
        lab.main([f"--runs={tmp_path}/*"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and word in said and said.count("\n") == 1


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="without the config.json that train.py writes"):
        lab.read_runs(str(tmp_path))
