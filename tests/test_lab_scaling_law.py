"""The lab scaling_law: its fit, its best use of compute, its decays from one trunk, and runs of
one's own."""
import json
import re

import numpy as np
import pytest
from test_prepare import error_of

import train
from labs import runs, scaling_law
from labs.scaling_law import Law, Settings

TRUE = Law(8.0, 0.25, 60.0, 0.35, 0.6)


def made_up(law=TRUE, noise=0.0):
    """30 points of a law, and one of a larger model."""
    n = np.repeat([12e3, 47e3, 106e3, 189e3, 425e3], 6)
    d = n * np.tile([10, 20, 30, 40, 50, 60], 5)
    loss = scaling_law.loss_of(law, n, d) + np.random.default_rng(0).normal(0, noise, 30)
    return np.stack([n, d, loss],
                    1), np.array([[755e3, 7.55e6, scaling_law.loss_of(law, 755e3, 7.55e6)]])


def test_the_fit_finds_the_law_that_points_come_from():
    points, held_out = made_up()
    law = scaling_law.fit(points)
    assert law == pytest.approx(TRUE, rel=0.005) and scaling_law.r_squared(law, points) > 0.999999
    points, _ = made_up(noise=0.005)
    law, laws = scaling_law.fit(points), scaling_law.bootstrap(points[:, None], 20)
    assert scaling_law.loss_of(law, *held_out[0, :2]) == pytest.approx(held_out[0, 2], rel=0.02)
    assert all(low < value < high and high - low < value
               for value, (low, high) in zip(law, scaling_law.interval(laws).T))


def test_no_constant_of_a_fit_is_negative():
    points, _ = made_up(TRUE._replace(l_0=-0.1), noise=0.005)
    law = scaling_law.fit(points)
    assert law.l_0 < 1e-9 < min(law.c_n, law.c_d) and scaling_law.r_squared(law, points) > 0.99
    points, _ = made_up(TRUE._replace(c_n=0.0))
    law = scaling_law.fit(points)
    assert law.c_n < 1e-3 and (law.beta, law.l_0) == pytest.approx((0.35, 0.6), rel=0.01)


@pytest.mark.parametrize("law, unit",
                         [(TRUE, 1), scaling_law.PAPER["Code"][:1] + (1e9,),
                          (scaling_law.OTHERS["Hoffmann et al."], 1)])
def test_the_best_ratio_has_the_least_loss_of_a_budget(law, unit):
    best, flops = scaling_law.best_ratio(law, 1e15, unit), 1e15
    ratios = best * np.geomspace(0.5, 2, 201)
    n = np.sqrt(flops / 6 / ratios) / unit
    assert ratios[scaling_law.loss_of(law, n, ratios * n).argmin()] == pytest.approx(best, rel=0.01)


def test_the_papers_constants_give_its_192_as_far_as_they_are_rounded(monkeypatch):
    assert scaling_law.best_ratio(scaling_law.PAPER["Average"][0], 1e21,
                                  1e9) == pytest.approx(183.9, abs=0.1)
    points, held_out = made_up()
    results = points, held_out, TRUE, [TRUE] * 10
    assert scaling_law.checks(results, Settings())[0].holds
    law, ratio = scaling_law.PAPER["Code"]
    monkeypatch.setitem(scaling_law.PAPER, "Code", (law._replace(alpha=0.35), ratio))
    assert not scaling_law.checks(results, Settings())[0].holds


def test_checks_fail_where_the_claim_does():
    def held(points, held_out, law, laws):
        return [check.holds
                for check in scaling_law.checks((points, held_out, law, laws), Settings())]

    points, held_out = made_up(TRUE._replace(alpha=0.35, beta=0.25, c_d=12.0), noise=0.002)
    law, laws = scaling_law.fit(points), scaling_law.bootstrap(points[:, None], 10)
    assert held(points, held_out, law, laws) == [True] * 5
    other = points.copy()
    # the largest size is off the law of the others
    other[-6:, 2] *= 1.05
    assert held(other, held_out, law, laws)[2:3] == [False]
    held_out[0, 2] *= 1.03
    assert held(points, held_out, law, laws) == [True, True, True, False, True]
    assert not held(points, held_out[:0], law, laws)[3]                  # it diverged
    points[:, 2] = np.random.default_rng(0).permutation(points[:, 2])
    law = scaling_law.fit(points)
    assert not held(points, held_out, law, [law] * 10)[1]
    points, held_out = made_up()                                         # beta above alpha
    law = scaling_law.fit(points)
    assert held(points, held_out, law, [law] * 10) == [True, True, True, True, False]


def test_the_bootstrap_draws_trunks_of_every_size(monkeypatch):
    points, _ = made_up(noise=0.005)
    # one trunk of most sizes, two of the last
    trunks = [*points[:24].reshape(4, 6, 3), points[24:27], points[27:]]
    drawn = []
    monkeypatch.setattr(scaling_law, "fit", lambda points: drawn.append(points))
    # and one that diverged from the start
    scaling_law.bootstrap([*trunks, points[:0]], 20)
    assert all(len(np.unique(points[:, 0])) == 5 and len(points) == 30 for points in drawn)
    assert len({points.tobytes() for points in drawn}) == 4


def test_a_decay_from_the_trunk_is_the_run_of_that_length_and_a_divergence_is_a_result(monkeypatch):
    runs.prepare(runs.LabConfig())
    points = scaling_law.trunk_and_decays(16, (1.0, 2.0), 8, 0, 4096)
    _, updates, validate = runs.begin("config/lab.py", n_embd=16, n_head=1, n_ff=40, seed=0,
                                      batch_size=8, eval_tokens=4096, max_steps=23, warmup_steps=12,
                                      decay_steps=2)
    for update in updates:
        pass
    assert points[1] == {"n": 11920, "tokens": update.metrics["tokens"],
                         "loss": validate()["val_loss"]}
    assert points[0]["loss"] > points[1]["loss"]

    learns = train.language_loss

    def breaks(model, batch):
        seen.append(1)
        nll, aux = learns(model, batch)
        return nll * (np.nan if len(seen) > 14 else 1), aux
    monkeypatch.setattr(train, "language_loss", breaks)
    seen = []
    assert [point["loss"] is None
            for point in scaling_law.trunk_and_decays(16, (1.0, 2.0), 8, 0, 4096)] == [False, True]


def test_the_lab_runs_quickly_and_keeps_its_runs(lab_files, monkeypatch, capsys):
    scaling_law.main(["--quick=True", "--workers=1"])
    said = capsys.readouterr().out
    assert len(re.findall("^(holds|does not hold) \\|", said, re.M)) == 5
    assert "of 9 runs, R^2" in said
    assert (lab_files / "scaling_law.png").stat().st_size > 10_000
    monkeypatch.setattr(scaling_law, "draw", lambda *_: None)
    scaling_law.main(["--quick=True", "--workers=1"])
    assert "width=" not in capsys.readouterr().out                       # all is in the cache
    assert "--widths or --held_out_width: 20 is not a multiple of 16" in error_of(
        scaling_law, ["--quick=True", "--widths=16,20,32"], capsys)
    assert "--ratios: 0.1 tokens per parameter are less than two updates" in error_of(
        scaling_law, ["--quick=True", "--ratios=0.1,0.2,0.3", "--workers=1"], capsys)
    assert "--widths: a fit needs three of them or more" in error_of(
        scaling_law, ["--quick=True", "--widths=16,32", "--workers=1"], capsys)
    assert "--seeds: must be above 0" in error_of(scaling_law, ["--quick=True", "--seeds=0,1"],
                                                  capsys)


# ---- runs of one's own

@pytest.fixture
def own(lab_files):
    """write(name, width, {end of a decay in tokens: loss}): a folder as train.py leaves it."""

    def write(name, width, losses, data="pytorch"):
        folder = lab_files / name
        folder.mkdir()
        model = {"n_layer": 4, "n_embd": width, "n_head": width // 16, "n_ff": width * 5 // 2}
        meta = {"train": {"data": data, "tokenizer": "bytes"}, "model": model}
        (folder / "config.json").write_text(json.dumps(meta))
        lines = [{"step": 5, "loss": 3.0, "tokens": 5120}, {"step": 5, "val_loss": 2.9}]
        for tokens, loss in losses.items():
            end = tokens // 1024
            lines += [{"step": end - 10, "decay_steps": 10, "data": data},
                      {"step": end, "loss": 9.0, "tokens": tokens}, {"step": end, "val_loss": loss}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write


def test_own_runs_are_fitted_at_the_ends_of_their_decays(own, tmp_path, capsys):
    sizes = {width: 46 * width ** 2 + 9 * width for width in (16, 32, 64)}
    for width, n in sizes.items():
        for share in (1, 2, 4):
            tokens = 1024 * (share * n // 100)
            own(f"run-{width}-{share}", width, {tokens: scaling_law.loss_of(TRUE, n, tokens)})
    scaling_law.main([f"--runs={tmp_path}/run-*", "--resamples=10",
                      f"--runs={tmp_path}/run-*/metrics.jsonl"])
    said = capsys.readouterr().out
    assert "of 9 runs, R^2 1.0000" in said and re.search(r"beta +0\.35 ", said)
    assert (tmp_path / "scaling_law_own.png").stat().st_size > 10_000
    # these are checks of the lab's own runs
    assert "holds" not in said


def test_own_runs_that_cannot_be_fitted_are_refused_in_a_line(own, tmp_path, capsys):
    pattern = f"--runs={tmp_path}/run-*"
    assert "no folder with a metrics.jsonl" in error_of(scaling_law, [pattern], capsys)
    train.main(["config/lab.py", f"--out_dir={tmp_path}/run-real", "--n_layer=1", "--max_steps=4",
                "--decay_steps=2", "--eval_tokens=1024", "--quiet=True"])
    assert "too few points: 1 ends of decays, of 1 sizes and 1 lengths" in error_of(
        scaling_law, [pattern], capsys)
    own("run-other", 32, {102400: 2.0}, data="speeches")
    assert "pytorch with bytes; speeches with bytes" in error_of(scaling_law, [pattern], capsys)
    (tmp_path / "run-other" / "config.json").unlink()
    assert "run-other: metrics.jsonl without the config.json that train.py writes" in error_of(
        scaling_law, [pattern], capsys)
