"""labs/batch_size.py: its machinery, and its arithmetic on losses whose best batch is known."""
import json
import math

import numpy as np
import pytest

from configurator import BadInput
from labs import batch_size as lab
from labs import runs
from model import MiniCPMConfig

BATCHES = [2 ** k for k in range(7, 14)]
LENGTHS = (2 ** 18, 2 ** 19, 2 ** 20)


def made_up(size, by, seed=0):
    """{tokens: {batch: loss}} of a size whose best batch is a power of the "loss" or of the
    "tokens", but for a seed's noise."""
    curves = {}
    for tokens in LENGTHS:
        loss = 2 * size ** -0.1 * (tokens / 2 ** 18) ** -0.12
        best = 8000 / loss ** 4 if by == "loss" else 500 * (tokens / 2 ** 18) ** 0.5
        best *= math.exp(0.02 * np.random.default_rng([seed, size, tokens]).normal())
        curves[tokens] = {batch: loss + 0.03 * math.log(batch / best) ** 2 for batch in BATCHES}
    return curves


def made_up_points(by):
    return lab.best_batches({(size, seed): made_up(size, by, seed) for size in (1, 4, 16)
                             for seed in range(3)})


def test_quick_run(lab_files):
    lab.main(["--quick=True", "--workers=1"])
    assert (lab_files / "batch_size.png").stat().st_size > 10_000
    results = [json.loads(line)["result"]
               for line in (lab_files / "batch_size.jsonl").read_text().splitlines()]
    # it learns
    assert all(result["losses"][1] < result["losses"][0] < math.log(264) for result in results)


def test_a_trunk_with_decays_is_what_train_makes_of_the_same_options():
    common = dict(n_layer=2, **runs.shape(16), seed=3, batch_size=4, learning_rate=0.02,
                  eval_tokens=2048)
    result = lab.trunk_and_decays(width=16, sequences=4, rate=0.02, seed=3, lengths=(5120, 10240),
                                  eval_tokens=2048)
    for end, loss in zip((10, 20), result["losses"]):
        _, updates, validate = runs.begin("config/lab.py", **common, max_steps=end,
                                          decay_steps=end // 5, warmup_steps=1)
        for _ in updates:
            pass
        assert validate()["val_loss"] == pytest.approx(loss, abs=1e-6)


def test_the_fits_find_the_law_that_made_the_losses():
    points = made_up_points("tokens")
    assert len(points) == 27
    assert lab.fit(points, "tokens", True)[0] == pytest.approx(0.5, abs=0.03)
    assert lab.fit(points, "tokens", False)[1] > 0.98 > lab.fit(points, "loss", False)[1]
    points = made_up_points("loss")
    assert lab.fit(points, "loss", False)[0] == pytest.approx(-4, abs=0.2)
    assert lab.fit(points, "loss", False)[1] > 0.98 > lab.fit(points, "tokens", False)[1]
    measured, expected = lab.growth_with_size(points)
    assert measured == pytest.approx(np.full(3, 0.4 * math.log(16)), abs=0.1)
    assert expected == pytest.approx(measured, abs=0.2)


def test_checks_tell_tokens_from_loss_and_growth_from_its_opposite():
    verdicts = {by: [check.holds
                     for check in lab.checks((None, None, made_up_points(by)), lab.Settings())]
                for by in ("tokens", "loss")}
    assert verdicts == {"tokens": [True, True, True, True], "loss": [True, True, False, False]}
    shrinks = [point._replace(batch=1e6 / point.batch) for point in made_up_points("tokens")]
    assert not lab.checks((None, None, shrinks), lab.Settings())[0].holds


def test_a_lowest_batch_at_the_end_of_those_tried_is_no_best_one():
    assert lab.lowest({256: 3.0, 512: 2.0, 1024: 1.0}) is None
    assert lab.lowest({256: 3.0, 512: 2.0}) is None and lab.lowest({}) is None
    assert lab.lowest({256: 2.0, 512: 1.0, 1024: 2.0, 2048: 9.0}) == pytest.approx((512, 1.0))


def run_folder(folder, batch, width, tokens, loss, decay=True, **train):
    folder.mkdir(parents=True)
    config = {"train": {"batch_size": batch // 128, "block_size": 128, "batch_schedule": None,
                        "seed": 1, **train},
              "model": {"n_embd": width, "n_head": 2, "n_layer": 2, "n_ff": 64, "vocab_size": 256}}
    (folder / "config.json").write_text(json.dumps(config))
    end = tokens // batch
    lines = [{"step": end - 1, "decay_steps": 1}] if decay else []
    lines += [{"step": end // 2, "val_loss": 9.0}, {"step": end, "val_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def sweep(folder, **train):
    """Run folders of three sizes, and the pattern that names them."""
    for size, width in ((1, 32), (4, 64), (16, 128)):
        for tokens, curve in made_up(size, "tokens").items():
            for batch, loss in curve.items():
                run_folder(folder / f"{width}-{batch}-{tokens}", batch, width, tokens, loss,
                           **train)
    return f"{folder}/*"


def test_own_runs_are_grouped_by_size_and_fitted(lab_files, capsys):
    pattern = sweep(lab_files / "sweep")
    config = MiniCPMConfig(n_embd=32, n_head=2, n_layer=2, n_ff=64, vocab_size=256)
    groups = lab.read_runs(pattern)
    assert len(groups) == 3
    assert set(groups[config.n_params_non_embedding, 1][260_000]) == set(BATCHES)
    lab.main([f"--runs={pattern}"])
    assert (lab_files / "batch_size_own.png").exists()
    assert not (lab_files / "batch_size.png").exists()
    said = capsys.readouterr().out
    assert "holds | one line for all sizes explains it better by the number of tokens" in said


@pytest.mark.parametrize("train, word",
                         [({"decay": False}, "too few points"),
                          ({"batch_schedule": "0:8,100:16"}, "batch changes"),
                          (None, "no folder with a metrics.jsonl")])
def test_own_runs_that_cannot_be_fitted_take_one_line(tmp_path, capsys, train, word):
    pattern = f"{tmp_path}/*" if train is None else sweep(tmp_path, **train)
    with pytest.raises(SystemExit) as caught:
        lab.main([f"--runs={pattern}"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and word in said and said.count("\n") == 1


def test_a_second_run_of_the_same_kind_is_named(tmp_path):
    for name in ("a", "b"):
        run_folder(tmp_path / name, 512, 32, 2 ** 18, 2.0)
    with pytest.raises(BadInput, match="b: a second run"):
        lab.read_runs(f"{tmp_path}/*")


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="without the config.json that train.py writes"):
        lab.read_runs(str(tmp_path))
