"""labs/annealing.py: the quick run from corpora to checks; finished stages are not trained again;
checks can fail."""
import copy

import pytest

from configurator import BadInput
from data.corpus import write_corpus
from data.instruct.prepare import write_jsonl
from data.packing import write_rows
from data.tokenizer import load_tokenizer
from engine import metrics
from labs import annealing, runs

TALKS = [{"family": annealing.FAMILIES[i % 8],
          "messages": [{"role": "user", "content": f"Repeat: {i}"},
                       {"role": "assistant", "content": str(i)}]} for i in range(320)]


@pytest.fixture
def data_dir(tmp_path):
    """Write small versions of the lab's two corpora; return their folder."""
    tokenizer, folder = load_tokenizer("bpe4096"), tmp_path / "data"
    write_corpus(folder / "pytorch" / "bpe4096", tokenizer,
                 [(split, "".join(f"def f(x):\n    return x + {i}\n" for i in range(300)))
                  for split in ("train", "val")])
    write_rows(folder / "instruct" / "bpe4096", tokenizer,
               (("val" if i % 5 == 0 else "train", talk["messages"])
                for i, talk in enumerate(TALKS)), 256)
    write_jsonl(folder / "instruct" / "train.jsonl", TALKS)
    write_jsonl(folder / "instruct" / "test.jsonl", TALKS)
    return folder


@pytest.mark.slow
def test_the_quick_run_goes_from_corpora_to_checks_and_trains_nothing_twice(
        lab_files, data_dir, monkeypatch, capsys):
    # one figure per run takes longest
    monkeypatch.setattr(metrics, "draw", lambda folder: None)
    words = ["--quick=True", "--workers=1", f"--data_dir={data_dir}"]
    annealing.main(words)
    out = capsys.readouterr().out
    assert out.count(" % exact") == out.count(" (p = ") == 3
    assert (lab_files / "annealing.png").exists() and (lab_files / "annealing_slide.png").exists()

    monkeypatch.setattr(runs.train, "main", lambda words: pytest.fail(f"trained again: {words}"))
    monkeypatch.setattr(annealing, "draw", lambda *a: None)
    annealing.main([*words, "--draw=True"])                              # from the results
    (lab_files / "annealing.jsonl").unlink()
    annealing.main(words)                                                # from the finished runs
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if " | " in line][-3:] == [
        line for line in out.splitlines() if " | " in line]


def test_sft_has_every_other_family_and_the_questions_for_choosing_are_not_those_of_the_results(
        data_dir):
    annealing.write_four(data_dir)
    folder = data_dir / annealing.FOUR
    assert {record["family"] for record in metrics.read_jsonl(
        folder / "train.jsonl")} == {"add", "sort", "backwards", "end"} == set(annealing.TRAINED)
    parts = [metrics.read_jsonl(folder / f"{name}.jsonl") for name in ("choose", "test")]
    assert len(parts[0]) == annealing.CHOOSING and parts[0] + parts[1] == TALKS
    assert (folder / "bpe4096" / "meta.json").exists()


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "folder", lambda lab, job: str(tmp_path / "run"))
    # as after Ctrl-C: it has saved and returned
    monkeypatch.setattr(runs.train, "main", lambda words: None)
    with pytest.raises(KeyboardInterrupt):
        annealing.stage("config/laptop.py")


def test_a_stage_that_diverges_ends_the_lab_with_a_reason(monkeypatch):
    monkeypatch.setattr(runs, "finish", lambda *words, **options: False)
    with pytest.raises(BadInput, match="NaN or infinite; lower this stage's learning_rate"):
        annealing.stage("config/laptop.py")


def answers(trained, others):
    return {"bpb": 1.0,
            "test": dict(zip(annealing.TRAINED + annealing.OTHERS, [trained] * 4 + [others] * 4))}


SETTINGS = annealing.Settings(seeds=(0, 1))
BY_ROW = {row: ([{"bpb": bpb}] * 2, [answers(trained + s, others) for s in (0, 1)])
          for row, bpb, trained, others in ((annealing.ONE, 1.0, 20, 2),
                                            (annealing.MORE, 1.0, 25, 2),
                                            (annealing.TWICE, 1.0, 35, 3),
                                            (annealing.DECAY, 1.02, 30, 30),
                                            (annealing.MIXED, 1.0, 20, 30))}


def test_checks_hold_if_the_claims_do_and_fail_if_one_seed_contradicts():
    assert [check.holds for check in annealing.checks((BY_ROW, {}), SETTINGS)] == [True, True, True]
    assert "+0.020 bits" in annealing.checks((BY_ROW, {}), SETTINGS)[0].ours
    assert annealing.checks((BY_ROW, {}), SETTINGS)[1].paper == "37.87 against 35.21"
    for i, (row, trained, others) in enumerate(((annealing.MORE, 40, 2), (annealing.TWICE, 35, 21),
                                                (annealing.MIXED, 20, 50))):
        rows = copy.deepcopy(BY_ROW)
        rows[row][1][1] = answers(trained, others)
        assert [check.holds for check in annealing.checks(
            (rows, {}), SETTINGS)] == [j != i for j in range(3)]
