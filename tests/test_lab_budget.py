"""labs/budget.py: what a run costs, what the strategies see, the score, and the recorded
leaderboard."""
import json
import re

import numpy as np
import pytest
from test_prepare import error_of

from configurator import BadInput
from engine import metrics
from labs import budget as lab
from labs import runs
from labs.strategies import STRATEGIES

SETTINGS = lab.Settings()
DRAW = runs.LabConfig(draw=True)


def law_of_world(width, starts, seed, eval_tokens, **options):
    """Losses by a law, a little noise per seed, and worse at a rate other than 0.01."""
    n = {8: 3e3, 16: 11920, 24: 26000, 32: 47392, 48: 106416, 64: 188992}[width]
    rate = abs(np.log(options.get("learning_rate", 0.01) / 0.01)) / 10
    return [400 * n ** -0.5 + 300 * (2048 * end) ** -0.45 + 0.6 + 0.001 * (seed % 3) + rate
            for _, end in starts]


@pytest.fixture
def world(monkeypatch):
    """Runs whose losses follow a law; the jobs that were asked for."""
    asked = []

    def collect(name, work, jobs, config):
        asked.extend(jobs)
        return [law_of_world(**job) for job in jobs]
    monkeypatch.setattr(runs, "collect", collect)
    return asked


def raising(error):
    def function(*_):
        raise error
    return function


def game(**more):
    return lab.Game(SETTINGS, DRAW, **more)


def test_a_run_costs_its_trunk_and_its_decays_and_the_limits_hold(world):
    played = game()
    n, tokens, longest = played.size(64)
    assert (n, tokens) == (188_992, 16 * 128) and longest == int(8e11 / (6 * n * tokens)) == 344
    assert played.target == (n, tokens * 1722)
    assert 6 * n * tokens * 1722 <= 4e12 < 6 * n * tokens * 1723
    # trunk to 180, decays of 10 and 20 updates
    played.run(64, [100, 200])
    assert 4e12 - played.left == 6 * n * tokens * (180 + 10 + 20)
    assert world[-1]["starts"] == [[90, 100], [180, 200]]
    assert played.size(64, batch_size=32)[1:] == (2 * tokens, 172)
    assert played.size(64, n_layer=2)[0] < n
    assert [point[:2] for point in played.points] == [(n, 100 * tokens), (n, 200 * tokens)]
    with pytest.raises(BadInput, match="344 updates are allowed for a run"):
        played.run(64, [345])                                   # so the target cannot be run either
    with pytest.raises(BadInput, match="344 updates are allowed for a run"):
        played.run(64, [1722])
    left = [played.run(64, [344], seed=seed) for seed in range(4)]
    with pytest.raises(BadInput, match="are left"):
        played.run(64, [344])
    assert len(left) == 4 and 0 < played.left < 8e11
    assert [job["seed"] for job in world] == [0, 0, 1, 2, 3]
    assert set(world[0]) == {"width", "starts", "seed", "eval_tokens"}


def test_no_play_has_the_seeds_of_another_or_of_the_target(world):
    for number in range(3):
        for strategy in STRATEGIES.values():
            played = game(number=number)
            strategy(played)
            assert 0 <= played.left < 4e12 and {job["seed"] // 100 for job in world} == {number}
            world.clear()
    lab.run_target(SETTINGS, DRAW)
    assert [job["seed"] for job in world] == list(lab.TARGET_SEEDS)
    assert min(lab.TARGET_SEEDS) >= 1000


def test_a_run_that_diverged_is_not_a_number(monkeypatch):
    monkeypatch.setattr(runs, "collect", lambda *args: [[2.5, None]])
    played = game()
    assert np.isnan(played.run(
        32, [10, 20])).tolist() == np.isnan(np.array(played.points)[:, 2]).tolist() == [False, True]


def test_where_a_law_holds_the_strategy_that_fits_it_is_right(world):
    truth = law_of_world(64, [[0, 1722]], 0, 0)[0]
    found = {}
    for name, strategy in STRATEGIES.items():
        found[name], (low, high) = strategy(game())
        assert low <= found[name] <= high
    assert abs(found["full_law"] / truth - 1) < 0.005 and abs(found["one_size"] / truth - 1) < 0.01
    # a straight line has no floor
    assert abs(found["two_sizes"] / truth - 1) > 0.02


def test_a_rate_search_costs_half_of_the_budget_and_its_runs_are_not_in_the_fit(world):
    played = game()
    STRATEGIES["rate_first"](played)
    rates = [job.get("learning_rate") for job in world]
    assert rates[:5] == [0.0025, 0.005, 0.01, 0.02, 0.04] and set(rates[5:]) == {0.01}
    assert len(played.points) == 15


def test_decays_of_one_trunk_are_those_of_runs_of_their_own():
    options = dict(seed=3, eval_tokens=2048, n_layer=1)
    losses = lab.losses_of(16, [[3, 4], [6, 8]], **options)
    model, updates, validate = runs.begin("config/lab.py", **runs.shape(16, lab.HEAD), **options,
                                          max_steps=8, decay_steps=2, warmup_steps=6)
    assert [update.step for update in updates][-1] == 8 and validate()["val_loss"] == losses[1]
    assert len(losses) == 2 and losses[0] > losses[1]
    assert lab.losses_of(16, [[3, 4]], **options, learning_rate=1e30) == [None]


def test_the_score_counts_error_width_and_miss_and_is_proper():
    target = np.array([2.0])
    score = [lab.scores(np.array([row]), target)[0]
             for row in ([2.02, 2.0, 2.04, 0], [2.02, 2.01, 2.03, 0], [1.9, 1.8, 2.1, 0])]
    assert score == pytest.approx([1 + 0.2, 1 + 0.1 + 0.5, 5 + 1.5])
    # the quantiles are the best statement
    outcomes = np.random.default_rng(0).normal(2, 0.02, 20_000)
    half = 1.2816 * 0.02
    honest, narrow, wide, off = (lab.scores(np.array([[2 + shift, 2 - width + shift,
                                                       2 + width + shift, 0]]), outcomes)[0]
                                 for width, shift in ((half, 0), (half / 2, 0), (half * 2, 0),
                                                      (half, 0.01)))
    assert honest < min(narrow, wide, off)


def results(**errors):
    """What experiment() gives if the strategies are off by these % in three plays."""
    target = np.array([1.99, 2.0, 2.01])
    rows = {"full_law": (0.5, 1, -0.5), "one_size": (3, 4, 5), "two_sizes": (-6, -5, -7),
            "rate_first": (2, 3, 2), **errors}
    return target, {name: np.array([[2 + 0.02 * each, 1.96 + 0.02 * each, 2.04 + 0.02 * each, 4e12]
                                    for each in row]) for name, row in rows.items()}


@pytest.mark.parametrize("errors, fails",
                         [({}, []), ({"full_law": (0.5, 2.5, -0.5)}, [0]),
                          ({"one_size": (0, 0, 0.1)}, [1]), ({"two_sizes": (0, 0, 0.1)}, [2]),
                          ({"rate_first": (0, 0, 0.1)}, [3]),
                          ({"full_law": (9, 9, 9.1)}, [0, 1, 2, 3, 4])])
def test_each_check_can_fail(errors, fails):
    assert [i
            for i, check in enumerate(lab.checks(results(**errors), SETTINGS))
            if not check.holds] == fails


def test_your_own_strategy_is_scored_beside_the_committed_ones(tmp_path, monkeypatch, capsys):
    """A whole game with runs that are not trained: the reference first, then a file."""

    def path(name, kind, config):
        return tmp_path / f"{name}{config.quick}.{'png' if kind == 'figures' else 'jsonl'}"
    monkeypatch.setattr(runs, "path", path)
    monkeypatch.setattr(runs, "prepare", lambda config: None)
    monkeypatch.setattr(lab, "losses_of", law_of_world)
    lab.main(["--workers=1", "--plays=2"])
    capsys.readouterr()
    mine = tmp_path / "mine.py"
    mine.write_text("def strategy(game):\n    loss = game.run(64, "
                    "[344])[0]\n    return 0.8 * loss, (0.7 * loss, loss)\n")
    # an edited strategy plays again
    for factor in ("0.8", "0.9"):
        mine.write_text(mine.read_text().replace("0.8", factor))
        lab.main([f"--strategy={mine}", "--plays=2"])
        lines = metrics.read_jsonl(tmp_path / "budget_leaderboardTrue.jsonl")
        loss = law_of_world(64, [[0, 344]], 0, 0)[0]
        assert [line["job"]["strategy"] for line in lines] == ["mine.py"] * 2
        assert lines[0]["result"][0] == pytest.approx(float(factor) * loss)
    committed = (tmp_path / "budget_leaderboardFalse.jsonl").read_text().splitlines()
    assert {json.loads(line)["job"]["strategy"] for line in committed} == set(STRATEGIES)
    assert len(committed) == 8
    assert (tmp_path / "budget_ownTrue.png").stat().st_size > 10_000
    assert "     mine.py: score " in capsys.readouterr().out
    mine.write_text("def strategie(game):\n    pass\n")
    assert "has no function strategy(game)" in error_of(lab, [f"--strategy={mine}"], capsys)


def test_without_the_target_a_strategy_predicts_and_gets_no_score(
        world, lab_files, monkeypatch, capsys):
    """So that a class hands in its predictions first."""
    monkeypatch.setattr(runs, "prepare", lambda config: None)
    monkeypatch.setattr(lab, "run_target", raising(BadInput("lacks 3 of 3 results")))
    mine = lab_files / "mine.py"
    mine.write_text("def strategy(game):\n    return game.run(64, [344])[0], (0.5, 1.5)\n")
    lab.main([f"--strategy={mine}", "--plays=2"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^ +mine.py: \d\.\d{3}, interval 0.500 to 1.500, for 20% of the budget$",
                          said, re.M)) == 2
    assert "score" not in said and not list(lab_files.glob("*.png"))
    assert "lacks 3 of 3 results" in error_of(lab, ["--plays=2"], capsys)


def test_the_committed_leaderboard_is_what_the_strategies_say_of_the_recorded_runs():
    lines = metrics.read_jsonl(runs.path("budget_leaderboard", "results", DRAW))
    # yours may stand there too
    lines = [line for line in lines if line["job"]["strategy"] in STRATEGIES]
    assert len(lines) == SETTINGS.plays * len(STRATEGIES)
    for line in lines:
        job = line["job"]
        # 1e-3: of one fit to another
        again = lab.play(job["strategy"], job["number"], SETTINGS, DRAW)
        assert again == pytest.approx(line["result"], rel=1e-3), f"{job}: run python -m labs.budget"
