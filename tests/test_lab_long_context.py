"""labs/long_context.py: the quick run from corpora to checks, and checks that can fail."""
import copy
import re

import pytest
from test_prepare import script

from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import metrics
from labs import long_context, runs
from labs.long_context import LONG, SHORT, VARIANTS


@pytest.fixture
def data_dir(tmp_path):
    """Write small versions of the lab's corpora; return their folder."""
    tokenizer, folder = load_tokenizer("bpe4096"), tmp_path / "data"
    for name in ("pytorch", "speeches", "speeches_long"):
        write_corpus(folder / name / "bpe4096", tokenizer, [(split, "My fellow citizens, this is a long speech. " * 400) for split in ("train", "val")])
    for size in (SHORT, LONG):
        script("passkey").main([f"--data_dir={folder}", f"--block_size={size}", "--documents=30"])
    return folder


@pytest.mark.slow          # half a minute
def test_the_quick_run_goes_from_corpora_to_checks_and_trains_nothing_twice(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda lab, kind, config: tmp_path / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}")
    monkeypatch.setattr(runs, "folder", lambda lab, job: str(tmp_path / "runs" / str(abs(hash(runs.job_key(job))))))
    monkeypatch.setattr(metrics, "draw", lambda folder: None)
    words = ["--quick=True", "--workers=1", f"--data_dir={data_dir}"]
    long_context.main(words)
    out = capsys.readouterr().out
    assert len(re.findall("^(holds|does not hold) \\|", out, re.M)) == 7 and (tmp_path / "long_context.png").exists()
    monkeypatch.setattr(runs.train, "main", lambda words: pytest.fail(f"trained again: {words}"))
    monkeypatch.setattr(long_context, "draw", lambda *a: None)
    (tmp_path / "long_context.jsonl").unlink()
    long_context.main(words)                                             # from the finished runs
    assert capsys.readouterr().out.splitlines()[-7:] == out.splitlines()[-7:]


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "folder", lambda lab, job: str(tmp_path / "run"))
    monkeypatch.setattr(runs.train, "main", lambda words: None)        # as after Ctrl-C: it has saved and returned
    with pytest.raises(KeyboardInterrupt):
        long_context.stage("laptop.py", 3, "data")


def made_up():
    """Return results for which every check holds: {(variant, trained): [result of each seed]}."""
    share = {("no change", False): (1, 0, 0), ("base", False): (1, 0.1, 0), ("base + NTK", False): (1, 0.3, 0.1),
             ("no change", True): (1, 0.7, 0), ("base", True): (1, 0.95, 0), ("base + NTK", True): (1, 0.9, 0.6)}
    return {key: [{"keys": dict(zip((str(SHORT), str(LONG), str(2 * LONG)), ([found, found] for found in shares))), "positions": [[0, 32, 4.0]]}
                  for _ in range(2)] for key, shares in share.items()}


def test_checks_hold_if_the_claims_do_and_fail_if_not():
    settings = long_context.Settings(lengths=(SHORT, LONG, 2 * LONG), depths=(0.0, 1.0), seeds=(0, 1))
    assert set(made_up()) == {(variant, trained) for variant in VARIANTS for trained in (False, True)}
    assert all(check.holds for check in long_context.checks(made_up(), settings))
    for which, key, length, found in ((0, ("no change", False), SHORT, 0.5), (1, ("no change", False), LONG, 0.5), (2, ("base", True), LONG, 0.8),
                                      (3, ("no change", True), LONG, 0.96), (4, ("base + NTK", False), LONG, 0.05),
                                      (5, ("base + NTK", True), 2 * LONG, 0.1)):
        results = copy.deepcopy(made_up())
        for each in results[key]:
            each["keys"][str(length)] = [found, found]
        assert not long_context.checks(results, settings)[which].holds, which
    results = made_up()
    results["base", True][0]["positions"][0][2] = 4.2
    assert not long_context.checks(results, settings)[6].holds
