"""Labs: a run is made once, again when what it comes from changes, and not lost when a lab is
interrupted."""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_prepare import error_of

from configurator import ROOT, BadInput
from engine import checkpoint, metrics
from labs import course, mup_coordinates, runs

LAB = '''"""A lab."""
import numpy as np

FACTOR = 3

def note(x, made=[]):
    made.append(x)
    return made

def times(x):
    """Doc."""
    return FACTOR * x       # a comment

def work(x):
    note(x)
    if x < 0:
        raise KeyboardInterrupt("enough")
    return {"y": times(x), "z": float(np.sqrt(x))}

def unrelated():
    return 1
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """lab(old, new, ...) -> the module of a lab with these changes to its text."""
    monkeypatch.setattr(runs, "path", lambda lab, kind, config: tmp_path / f"{lab}.{kind}")
    monkeypatch.syspath_prepend(tmp_path)

    def make(*changes):
        text = LAB
        for old, new in zip(changes[::2], changes[1::2]):
            assert old in text
            text = text.replace(old, new)
        name = f"a_lab_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)
    yield make
    for name in [name for name in sys.modules if name.startswith("a_lab_")]:
        del sys.modules[name]


def made_by(lab):
    return lab.note.__defaults__[0]


ONE = runs.LabConfig(workers=1)
DRAW = runs.LabConfig(draw=True)


def test_a_run_is_made_once_and_a_new_setting_runs_alone(lab):
    first = lab()
    assert runs.collect(
        "lab", first.work, [{"x": 4}, {"x": 9}], ONE) == [{"y": 12, "z": 2}, {"y": 27, "z": 3}]
    assert runs.collect("lab", first.work, [{"x": 9}, {"x": 1}, {"x": 9}],
                        ONE) == [{"y": 27, "z": 3}, {"y": 3, "z": 1}, {"y": 27, "z": 3}]
    assert made_by(first) == [4, 9, 1] and not runs.missing_jobs("lab", first.work, [{"x": 1}], ONE)


@pytest.mark.parametrize("changes, runs_again",
                         [(('"y": times(x)', '"y": 2 * times(x)'), True),
                          (("x < 0", "x < -1"), True), (("np.sqrt", "np.square"), True),
                          (("FACTOR * x", "x * FACTOR"), True),
                          (("FACTOR = 3", "FACTOR = 4"), True), (("Doc.", "Document."), False),
                          (("note(x)\n", "note(x)       # why\n"), False),
                          (("return 1", "return 2"), False)])
def test_a_changed_experiment_runs_again_and_other_code_does_not(lab, changes, runs_again):
    runs.collect("lab", lab().work, [{"x": 4}], ONE)
    changed = lab(*changes)
    assert runs.is_stale("lab", changed, DRAW) == runs_again
    assert runs.collect("lab", changed.work, [{"x": 4}], DRAW) == [{"y": 12, "z": 2}]
    assert made_by(changed) == []
    runs.collect("lab", changed.work, [{"x": 4}], ONE)
    assert made_by(changed) == ([4] if runs_again else [])
    assert not runs.is_stale("lab", changed, DRAW)
    del changed.work
    # results of a function that is gone
    assert runs.is_stale("lab", changed, DRAW)


def test_changed_golden_numbers_make_results_stale_until_they_are_rekeyed(
        lab, tmp_path, monkeypatch):
    module, jobs = lab(), [{"x": 4}]
    results = runs.collect("lab", module.work, jobs, ONE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "golden.json").write_text("{}")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.collect("lab", module.work, jobs, DRAW) == results
    assert runs.is_stale("lab", module, DRAW)
    assert runs.collect("lab", module.work, jobs, runs.LabConfig(draw=True, rekey=True)) == results
    assert not runs.is_stale("lab", module, DRAW) and made_by(module) == [4]
    with pytest.raises(BadInput, match="lacks 1 of 1 results"):
        runs.collect("lab", module.work, [{"x": 5}], runs.LabConfig(draw=True, rekey=True))


def test_a_notebook_s_own_words_are_no_settings_of_a_lab(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    # another test may have imported it
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with pytest.raises(BadInput, match="-f"):
        runs.settings(sys.argv[1:], mup_coordinates.Settings, {}, "")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert runs.settings(sys.argv[1:], mup_coordinates.Settings, {},
                         "") == (mup_coordinates.Settings(), runs.LabConfig())
    assert runs.settings(["--seeds=4"], mup_coordinates.Settings, {}, "")[0].seeds == (4,)


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_of_a_lab_in_one_line_and_keeps_what_is_done(tmp_path):
    file = tmp_path / "results.jsonl"
    (tmp_path / "a_lab.py").write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from configurator import exits_cleanly
from labs import runs

def work(x):
    time.sleep(x)
    return x

@exits_cleanly
def main(argv):
    from pathlib import Path
    runs.path = lambda lab, kind, config: Path({str(file)!r})
    jobs = [dict(x=0.1), dict(x=600), dict(x=601), dict(x=602)]
    runs.collect("lab", work, jobs, runs.LabConfig(workers=2))

if __name__ == "__main__":
    main()
""")
    lab = subprocess.Popen([sys.executable, str(tmp_path / "a_lab.py")], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    line = lab.stdout.readline()
    assert "x=0.1: 0 s" in line, lab.stderr.read()
    time.sleep(1)
    # as a terminal does, to all of them
    os.killpg(lab.pid, signal.SIGINT)
    assert lab.communicate(timeout=30)[1] == "interrupted\n" and lab.returncode == 130
    assert [line["result"] for line in metrics.read_jsonl(file)] == [0.1]


def test_an_interrupted_lab_keeps_what_it_has_and_goes_on(lab, tmp_path):
    module = lab()
    with pytest.raises(KeyboardInterrupt):
        runs.collect("lab", module.work, [{"x": 4}, {"x": -1}, {"x": 9}], ONE)
    with open(tmp_path / "lab.results", "a") as f:
        f.write('{"work": "work", "job": {"x": 9')                         # killed while writing
    assert [r["y"] for r in runs.collect("lab", module.work, [{"x": 4}, {"x": 9}], ONE)] == [12, 27]
    assert made_by(module) == [4, -1, 9]
    assert [json.loads(line)["job"]
            for line in (tmp_path / "lab.results").read_text().splitlines()] == [{"x": 4}, {"x": 9}]
    with pytest.raises(BadInput,
                       match=r"lab.results: lacks 1 of 2 results; run the lab without --draw=True"):
        runs.collect("lab", module.work, [{"x": 4}, {"x": 25}], DRAW)
    with checkpoint.lock(
            tmp_path / ".lab"), pytest.raises(BadInput, match="in use by another process"):
        runs.collect("lab", module.work, [{"x": 25}], ONE)
    (tmp_path / "lab.results").write_text("{\n{}\n")
    with pytest.raises(BadInput, match=r"lab.results:1: not JSON"):
        runs.collect("lab", module.work, [{"x": 4}], ONE)


def test_the_coordinate_check_runs_quickly_and_tells_a_rule_that_is_off(
        lab_files, capsys):
    mup_coordinates.main(["--quick=True", "--workers=1"])
    said = capsys.readouterr().out
    assert len(re.findall("^(holds|does not hold) \\|", said, re.M)) == 12
    assert (lab_files / "mup_coordinates.png").stat().st_size > 10_000
    assert "\nholds | standard: they grow from the start" in said
    assert "\nholds | without the learning-rate rule" in said
    assert "--widht: unknown option" in error_of(mup_coordinates, ["--widht=64"], capsys)


@pytest.mark.parametrize("lab, option, said",
                         [("wsd_vs_cosine", "every=0", "--every=0: must be at least 1"),
                          ("continue_training", "more=5", "--more=(5,): must be at least 10"),
                          ("lr_transfer", "widths=32",
                           "--search_widths=(32, 128): give two of --widths=(32,)"),
                          ("lr_transfer", "search_widths=32,96",
                           "--search_widths=(32, 96): give two of --widths=(32, 64, 128, 256)"),
                          ("preferences", "sft_coef=0", "--sft_coef=0.0: must be above 0"),])
def test_settings_with_which_a_lab_cannot_end_are_refused_before_it_runs(
        lab, option, said, monkeypatch, capsys):
    monkeypatch.setattr(runs, "collect", lambda *a: pytest.fail("runs"))
    assert said in error_of(importlib.import_module(f"labs.{lab}"), [f"--{option}"], capsys)


def test_only_the_default_settings_draw_over_the_committed_figures(tmp_path, monkeypatch):
    real = runs.path
    monkeypatch.setattr(runs, "path",
                        lambda lab, kind, config: real(lab, kind, config) if kind == "results"
                        else tmp_path / f"{lab} {config.quick}.png")
    monkeypatch.setattr(mup_coordinates, "draw", lambda *a: runs.figure(1, 1, "")[0])
    monkeypatch.setattr(mup_coordinates, "slide", lambda *a: "")
    for options, names in ((["--seeds=0"],
                            {"mup_coordinates_own True.png", "mup_coordinates_own_slide True.png"}),
                           ([], {"mup_coordinates False.png", "mup_coordinates_slide False.png"})):
        mup_coordinates.main(["--draw=True", *options])
        assert {file.name for file in tmp_path.iterdir()} == names
        for file in tmp_path.iterdir():
            file.unlink()


# ---- the course

@pytest.fixture(scope="module")
def recorded():
    """The checks and results of every lab; they take ten seconds."""
    return {name: course.recorded(name, module) for name, module in course.modules().items()}


def test_the_course_is_what_the_results_say(recorded, monkeypatch):
    monkeypatch.setattr(course, "recorded", lambda name, module: recorded[name])
    written = (ROOT / "labs" / "README.md").read_text(encoding="utf-8")
    assert written == course.page(), "run python -m labs.course"


def test_a_changed_result_changes_the_course(tmp_path, monkeypatch):
    lines = metrics.read_jsonl(ROOT / "labs" / "results" / "mup_coordinates.jsonl")
    for line in lines:
        if line["job"]["rule"] == "muP":
            line["result"]["10"]["mlp"] *= line["job"]["width"]
    monkeypatch.setattr(runs, "path", lambda lab, kind, config: tmp_path / f"{lab}.{kind}")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "mup_coordinates.results").write_text(text)
    assert "steepest power 0.9" in course.page()
    assert "| **does not hold** |" in course.page().split("steepest power")[1].split("\n")[0]


def test_the_checks_of_the_code_are_those_that_were_set_beforehand(recorded):
    for name, (checks, _) in recorded.items():
        registered = runs.register(name)
        withdrawn = {claim
                     for claim, (_, change) in registered.items()
                     if change.startswith("badly asked: ")}
        assert {check.claim for check in checks} == registered.keys() - withdrawn, name
        for claim, (date, change) in registered.items():
            assert re.fullmatch(r"2026-\d\d-\d\d", date) and re.match(
                "-$|badly asked: .|changed after seeing: .", change), claim


def test_a_check_that_was_changed_or_withdrawn_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    # a student's copy without the page
    assert runs.register("one") == {}
    (tmp_path / "labs").mkdir()
    (tmp_path / "labs" / "PREREGISTER.md").write_text(
        "# Title\n\n## one\n\n| check | set | since then |\n|---|---|---|\n| a | 2026-11-30 | - |\n"
        "| b | 2026-11-30 | changed after seeing: was c, 5 |\n\n"
        "## other\n\n| check | set | since then |\n|---|---|---|\n| d | 2026-11-30 | - |\n")
    assert runs.register("one") == {"a": ("2026-11-30", "-"),
                                    "b": ("2026-11-30", "changed after seeing: was c, 5")}
    said = [runs.verdict(runs.Check(claim, "", holds), runs.register("one"))
            for claim, holds in (("a", True), ("a", False), ("b", True))]
    assert said == ["holds", "does not hold", "changed after seeing, holds"]


def test_p_is_that_of_student_s_tables():
    # 2.920 and 6.965 are the one-sided 5 % and 1 % points for 2 degrees of freedom, 2.132 the 5 %
    # point for 4
    for n, t, p in ((3, 2.920, 0.05), (3, 6.965, 0.01), (5, 2.132, 0.05)):
        seeds = np.linspace(-1, 1, n)
        assert runs.p_value(seeds + t * seeds.std(ddof=1) / n ** 0.5) == pytest.approx(p, rel=2e-3)
    # one seed; no spread
    assert all(np.isnan(runs.p_value(same)) for same in ([0.1], [0, 0, 0]))
    assert runs.p_value([1, 0, -1]) == pytest.approx(0.5, abs=1e-4)
    assert runs.p_value([-3, -3.1, -2.9]) > 0.99


def test_every_lab_reads_from_its_question_to_its_exercises():
    for name, module in course.modules().items():
        text = (ROOT / "labs" / f"{name}.py").read_text(encoding="utf-8")
        parts = [text.index(part)
                 for part in ("Question", "Claim", "Write down", f"python -m labs.{name}", "# %%",
                              "def experiment(", "def draw(", "def checks(", "# Exercises", "# 1. ",
                              "# 2. ", "# 3. ", "def main(")]
        assert parts == sorted(parts), name
        assert module.__doc__.startswith(
            "Lab: ") and "section" in module.__doc__ or name == "serving"
