"""labs/continue_training.py: the quick run from corpora to checks; what each start does; checks can
fail."""
import copy
import json

import pytest

from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import metrics
from labs import continue_training as lab
from labs import runs


@pytest.fixture
def quick(lab_files, monkeypatch):
    """Write small corpora; return the words of the quick run, whose files go to lab_files."""
    tokenizer, data_dir = load_tokenizer("bpe4096"), lab_files / "data"
    for name, text in (("pytorch", "def f(x):\n    return x + {}\n"),
                       ("speeches", "My fellow citizens, in the year {} ")):
        write_corpus(data_dir / name / "bpe4096", tokenizer,
                     [(split, "".join(text.format(i) for i in range(300)))
                      for split in ("train", "val")])
    # one figure per run takes longest
    monkeypatch.setattr(metrics, "draw", lambda folder: None)
    return ["--quick=True", "--workers=1", f"--data_dir={data_dir}"]


@pytest.mark.slow
def test_the_quick_run_goes_from_corpora_to_checks_and_trains_nothing_twice(
        tmp_path, quick, monkeypatch, capsys):
    lab.main(quick)
    out = capsys.readouterr().out
    assert out.count("bits per byte") >= 7 and (tmp_path / "continue_training_slide.png").exists()
    second = []                             # trainings on speeches, 10 updates each
    for file in tmp_path.glob("*/config.json"):
        config = json.loads(file.read_text())["train"]
        if config["data"] == "speeches" and config["max_steps"] in (10, 20) and config["seed"] == 0:
            last = metrics.read(file.parent)[0][-1]
            assert last["step"] == config["max_steps"] and last["lr"] == pytest.approx(lab.LAST)
            second.append((config["branch_from"] is None, config["learning_rate"],
                           config["rewarm_steps"], config["decay_steps"]))
    assert sorted(second) == [(False, 0.001, 1, 0), (False, 0.01, 0, 2), (False, 0.01, 1, 2),
                              (False, 0.01, 1, 2), (True, 0.01, 0, 2)]

    monkeypatch.setattr(runs.train, "main", lambda words: pytest.fail(f"trained again: {words}"))
    monkeypatch.setattr(lab, "draw", lambda *a: None)
    lab.main([*quick, "--draw=True"])
    (tmp_path / "continue_training.jsonl").unlink()
    lab.main(quick)                         # from the finished runs
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if " | " in line][-7:] == [
        line for line in out.splitlines() if " | " in line]


SETTINGS = lab.Settings(seeds=(0, 1), more=(5, 10))
LOSSES = {lab.STABLE: (1.0, 1.5, 2.0), lab.DECAYED: (1.1, 1.6, 2.04), lab.COSINE: (1.2, 1.7, 2.1),
          lab.KEPT: (1.3, 1.8, 1.5), lab.NOTHING: (4, 1.9, 4)}


def places():
    """Return results in which every claim holds: same domain, new domain, old domain after the new
    one."""
    found = {}
    for start, (same, new, forgotten) in LOSSES.items():
        for more in (5, 10):
            found[start, lab.OLD, more] = [{lab.OLD: same + 0.01 * s, lab.NEW: 3.0} for s in (0, 1)]
            found[start, lab.NEW, more] = [{lab.OLD: forgotten + 0.01 * s, lab.NEW: new + 0.01 * s}
                                           for s in (0, 1)]
    return found


@pytest.mark.parametrize("start, data, corpus, value, broken",
                         [(lab.COSINE, lab.OLD, lab.OLD, 0.9, [0]),
                          (lab.DECAYED, lab.NEW, lab.NEW, 1.4, [1]),
                          (lab.COSINE, lab.NEW, lab.OLD, 1.9, [2]),
                          (lab.KEPT, lab.NEW, lab.NEW, 1.55, [3]),
                          (lab.KEPT, lab.NEW, lab.OLD, 2.2, [4]),
                          (lab.NOTHING, lab.NEW, lab.NEW, 1.4, [5, 6])])
def test_checks_hold_if_the_claims_do_and_fail_if_one_seed_at_one_length_contradicts(
        start, data, corpus, value, broken):
    assert [check.holds for check in lab.checks(places(), SETTINGS)] == [True] * 7
    changed = copy.deepcopy(places())
    changed[start, data, 5][1][corpus] = value
    assert [i for i, check in enumerate(lab.checks(changed, SETTINGS)) if not check.holds] == broken
