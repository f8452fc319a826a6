"""labs/long_context.py: the quick run from corpora to checks, and checks that can fail."""
import copy
import re

import pytest
from test_prepare import script

from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import metrics
from labs import long_context, runs
from labs.long_context import FIXED, LONG, SHORT, UNTRAINED, VARIANTS


@pytest.fixture
def data_dir(tmp_path):
    """Write small versions of the lab's corpora; return their folder."""
    tokenizer, folder = load_tokenizer("bpe4096"), tmp_path / "data"
    for name in ("pytorch", "speeches", "speeches_long"):
        write_corpus(folder / name / "bpe4096", tokenizer,
                     [(split, "My fellow citizens, this is a long speech. " * 400)
                      for split in ("train", "val")])
    for size in (SHORT, LONG):
        script("passkey").main([f"--data_dir={folder}", f"--block_size={size}", "--documents=30"])
    return folder


@pytest.mark.slow          # half a minute
def test_the_quick_run_goes_from_corpora_to_checks_and_trains_nothing_twice(
        lab_files, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "draw", lambda folder: None)
    words = ["--quick=True", "--workers=1", f"--data_dir={data_dir}"]
    long_context.main(words)
    out = capsys.readouterr().out
    assert len(re.findall("^(holds|does not hold) \\|", out, re.M)) == 8
    assert (lab_files / "long_context.png").exists()
    assert (lab_files / "long_context_slide.png").exists()
    monkeypatch.setattr(runs.train, "main", lambda words: pytest.fail(f"trained again: {words}"))
    monkeypatch.setattr(long_context, "draw", lambda *a: None)
    monkeypatch.setattr(long_context, "slide", lambda *a: "")
    (lab_files / "long_context.jsonl").unlink()
    long_context.main(words)                                             # from the finished runs
    assert capsys.readouterr().out.splitlines()[-8:] == out.splitlines()[-8:]


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "folder", lambda lab, job: str(tmp_path / "run"))
    # as after Ctrl-C: it has saved and returned
    monkeypatch.setattr(runs.train, "main", lambda words: None)
    with pytest.raises(KeyboardInterrupt):
        long_context.stage("config/laptop.py", steps=3, seed=0, data_dir="data")


def made_up():
    """Return results for which every check holds: {(variant, trained length): [result of each base
    model]}."""
    share = {("no change", SHORT): (1, 0, 0), ("base", SHORT): (1, 0.1, 0),
             ("NTK", SHORT): (1, 0.3, 0), ("base + NTK", SHORT): (1, 0.3, 0.1),
             (FIXED, SHORT): (0.6, 0.3, 0), ("no change", LONG): (1, 0.7, 0),
             ("base", LONG): (1, 0.95, 0), ("NTK", LONG): (1, 0.9, 0.5),
             ("base + NTK", LONG): (1, 0.9, 0.6)}
    return {key: [{"keys": {str(tokens): [found * scale] * 2
                            for tokens, found in zip((SHORT, LONG, 2 * LONG), shares)},
                   "positions": [[0, 32, 4.0]]} for scale in (1, 0.999)]
            for key, shares in share.items()}


def test_checks_hold_if_the_claims_do_and_fail_if_not():
    settings = long_context.Settings(lengths=(SHORT, LONG, 2 * LONG), depths=(0.0, 1.0),
                                     seeds=(0, 1))
    assert set(made_up()) == {*((variant, SHORT) for variant in UNTRAINED),
                              *((variant, LONG) for variant in VARIANTS)}
    assert all(check.holds for check in long_context.checks(made_up(), settings))
    for fails, key, length, found in (([0], ("no change", SHORT), SHORT, 0.5),
                                      ([1], ("no change", SHORT), LONG, 0.1),
                                      ([2], ("no change", LONG), LONG, 0),
                                      ([3], ("base", LONG), LONG, 0.8),
                                      ([4], ("no change", LONG), LONG, 0.96),
                                      ([5], (FIXED, SHORT), SHORT, 1),
                                      ([6], ("NTK", LONG), 2 * LONG, 0.1),
                                      ([6], ("base", LONG), 2 * LONG, 0.5)):
        results = copy.deepcopy(made_up())
        for each in results[key]:
            each["keys"][str(length)] = [found, found]
        assert [n
                for n, check in enumerate(long_context.checks(results, settings))
                if not check.holds] == fails
    results = made_up()
    for each in results["no change", LONG]:
        each["positions"][0][2] = 4.2
    assert not long_context.checks(results, settings)[7].holds
