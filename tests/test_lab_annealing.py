"""labs/annealing.py: the quick run from corpora to checks; finished stages are not trained again; checks can fail."""
import copy

import pytest

from configurator import BadInput
from data.corpus import write_corpus
from data.packing import write_rows
from data.tokenizer import load_tokenizer
from engine import checkpoint, metrics
from labs import annealing, runs

TALKS = [("train" if i % 4 else "val", [{"role": "user", "content": f"Repeat: {i}"}, {"role": "assistant", "content": str(i)}]) for i in range(80)]


@pytest.fixture
def data_dir(tmp_path):
    """Write small versions of the lab's three corpora; return their folder."""
    tokenizer, folder = load_tokenizer("bpe4096"), tmp_path / "data"
    for name, text in (("pytorch", "def f(x):\n    return x + {}\n"), ("speeches", "My fellow citizens, in the year {} ")):
        write_corpus(folder / name / "bpe4096", tokenizer, [(split, "".join(text.format(i) for i in range(300))) for split in ("train", "val")])
    write_rows(folder / "instruct" / "bpe4096", tokenizer, iter(TALKS), 256)
    checkpoint.write_json(folder / "instruct" / "test.json", [{"messages": messages, "family": "copy"} for _, messages in TALKS[:8]])
    (folder / "instruct" / "test.json").rename(folder / "instruct" / "test.jsonl")
    return folder


@pytest.mark.slow
def test_the_quick_run_goes_from_corpora_to_checks_and_trains_nothing_twice(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(runs, "path", lambda lab, kind, config: tmp_path / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}")
    monkeypatch.setattr(runs, "folder", lambda lab, job: str(tmp_path / "runs" / str(hash(runs.job_key(job)))))
    monkeypatch.setattr(metrics, "draw", lambda folder: None)            # one figure per run takes longest
    words = ["--quick=True", "--workers=1", f"--data_dir={data_dir}"]
    annealing.main(words)
    out = capsys.readouterr().out
    assert out.count("% exact") == 2 and "4 updates" in out and (tmp_path / "annealing.png").exists()

    monkeypatch.setattr(runs.train, "main", lambda words: pytest.fail(f"trained again: {words}"))
    monkeypatch.setattr(annealing, "draw", lambda *a: None)
    annealing.main([*words, "--draw=True"])                              # from the results
    (tmp_path / "annealing.jsonl").unlink()
    annealing.main(words)                                                # from the finished runs
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if " | " in line][-3:] == [line for line in out.splitlines() if " | " in line]


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "folder", lambda lab, job: str(tmp_path / "run"))
    monkeypatch.setattr(runs.train, "main", lambda words: None)        # as after Ctrl-C: it has saved and returned
    with pytest.raises(KeyboardInterrupt):
        annealing.stage("config/laptop.py")


def test_a_stage_that_diverges_ends_the_lab_with_a_reason(monkeypatch):
    monkeypatch.setattr(runs, "finish", lambda *words, **options: False)
    with pytest.raises(BadInput, match="NaN or infinite; lower this stage's learning_rate"):
        annealing.stage("config/laptop.py")


def answers(exact):
    return {"exact": exact, "families": {"copy": exact}}


SETTINGS = annealing.Settings(seeds=(0, 1), domain=(10,))
BY_DECAY = {annealing.PLAIN: [{"bpb": 1.0, "decay": answers(0), "1": answers(20 + s), "2": answers(25 + s)} for s in (0, 1)],
            annealing.LABELLED: [{"bpb": 1.02, "decay": answers(9), "1": answers(30 + s)} for s in (0, 1)]}
BY_PLACE = {("trunk", 0): [{"pytorch": 1.0, "speeches": 3.0}] * 2, ("trunk", 10): [{"pytorch": 1.5, "speeches": 1.6}, {"pytorch": 1.5, "speeches": 1.7}],
            ("nothing", 10): [{"pytorch": 4.0, "speeches": 1.9}, {"pytorch": 4.0, "speeches": 2.0}]}


def test_checks_hold_if_the_claims_do_and_fail_if_one_seed_contradicts():
    assert [check.holds for check in annealing.checks((BY_DECAY, BY_PLACE), SETTINGS)] == [True, True, True]
    assert "+0.020 bits" in annealing.checks((BY_DECAY, BY_PLACE), SETTINGS)[0].ours and \
        annealing.checks((BY_DECAY, BY_PLACE), SETTINGS)[0].paper == "37.6 against 30.1"
    for i, change in enumerate((lambda d, p: d[annealing.PLAIN][1].update({"1": answers(32)}),
                                lambda d, p: d[annealing.PLAIN][0].update({"2": answers(31)}),
                                lambda d, p: p["nothing", 10][0].update(speeches=1.65))):
        decay, place = copy.deepcopy((BY_DECAY, BY_PLACE))
        change(decay, place)
        assert [check.holds for check in annealing.checks((decay, place), SETTINGS)] == [j != i for j in range(3)]
