"""labs/preferences.py: the quick run, and checks that fail when they should."""
import dataclasses
from dataclasses import asdict
from pathlib import Path

import pytest

from data.tokenizer import load_tokenizer
from engine import checkpoint, metrics
from labs import preferences, runs
from model import MiniCPM, MiniCPMConfig, init_weights

SETTINGS = dataclasses.replace(preferences.Settings(), betas=(0.1, 1.0), seeds=(0, 1))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Redirect everything that the lab writes to tmp_path."""
    monkeypatch.setattr(runs, "path", lambda lab, kind, config: tmp_path / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}")
    monkeypatch.setattr(runs, "folder", lambda lab, job, plain=runs.folder: str(tmp_path / Path(plain(lab, job)).name))
    return tmp_path


def test_the_quick_run_draws_and_reuses_its_results(place, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "draw", lambda folder: None)            # one figure per run takes long
    preferences.main(["--quick=True", "--workers=1"])
    results, said = (place / "preferences.jsonl").read_text(), capsys.readouterr().out
    lines = metrics.read_jsonl(place / "preferences.jsonl")
    assert len(lines) == 1 + 2 * 2 and (place / "preferences.png").stat().st_size > 10_000
    assert all(line["result"]["kl"] > 0 and len(line["result"]["curve"]["margin"]) for line in lines[1:])
    assert said.count("|") == 5 and str(place) not in results
    preferences.main(["--quick=True", "--workers=1"])                   # nothing is run again
    assert (place / "preferences.jsonl").read_text() == results


def test_a_given_checkpoint_is_identified_by_its_weights(place):
    config = MiniCPMConfig(vocab_size=load_tokenizer("bytes").n_vocab, n_layer=1, n_head=1, n_embd=8, n_ff=8)
    model, starts = MiniCPM(config), []
    for name, seed in (("one", 0), ("the same", 0), ("other", 1)):
        init_weights(model, seed)
        checkpoint.save_checkpoint(place / name, 0, {"model": model.state_dict()}, {"model": asdict(config)}, load_tokenizer("bytes").save)
        starts.append(preferences.keep_copy(str(place / name)))
    assert starts[0] == starts[1] != starts[2]
    assert MiniCPM.from_pretrained(preferences.start_folder(starts[2])).config == config


def made_up(**changes):
    """Return results of all runs; changes: {measure: value of every run, or a function of (sft_coef, beta)}."""
    values = {"accuracy": 1.0, "kl": lambda sft_coef, beta: 1 / beta, "exact": 0.6, "tokens": 4.0, **changes}
    return {(sft_coef, beta): [{name: value(sft_coef, beta) if callable(value) else value for name, value in values.items()}] * 2
            for sft_coef in SETTINGS.sft_coefs for beta in SETTINGS.betas}


@pytest.mark.parametrize("changes, fails", [
    ({}, []),
    ({"accuracy": lambda sft_coef, beta: 0.79 if beta == 1 else 1}, [0]),
    ({"tokens": lambda sft_coef, beta: 7.5 if beta == 1 else 4}, [1]),
    ({"exact": lambda sft_coef, beta: 0.58 if sft_coef else 0.5}, [2]),
    ({"exact": lambda sft_coef, beta: 0.4 if not sft_coef else 0.6}, []),             # the tax is that of the runs with the SFT term
    ({"kl": lambda sft_coef, beta: beta if sft_coef else 1 / beta}, [4]),
])
def test_checks_fail_when_they_should(changes, fails):
    checks = preferences.checks(({"exact": 0.62, "tokens": 8.0}, made_up(**changes)), SETTINGS)
    assert [n for n, check in enumerate(checks) if not check.holds] == fails


def test_a_diverged_run_fails_its_checks():
    after = made_up()
    after[1.0, 0.1] = [None, after[1.0, 0.1][0]]
    assert not any(check.holds for n, check in enumerate(preferences.checks(({"exact": 0.62, "tokens": 8.0}, after), SETTINGS)) if n != 3)
