"""The notebooks of labs/: the first hour runs, what is committed of it is clean, and the cloud
machine's first cell asks for what it needs."""
import json
import platform
import re
import subprocess
import sys

import nbformat
from nbclient import NotebookClient

from configurator import ROOT
from labs import course

START, COLAB = (nbformat.read(ROOT / "labs" / f"{name}.ipynb", as_version=4)
                for name in ("start", "colab"))


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_the_first_hour_runs_from_top_to_bottom(tmp_path):
    """With fewer updates and evaluation tokens, in a folder of its own."""
    book = nbformat.from_dict(START)
    changes = {"STEPS = 600": "STEPS = 12", "DECAY = 150": "DECAY = 4",
               "--overwrite=True": "--overwrite=True --eval_tokens=2048",
               "out/start": str(tmp_path), "max_new_tokens=200": "max_new_tokens=8",
               "ylim=(1.2, 2.4)": ""}
    for old, new in changes.items():
        assert old in str(book.cells)
        for cell in book.cells:
            cell.source = cell.source.replace(old, new)
    NotebookClient(book, timeout=300,
                   resources={"metadata": {"path": str(ROOT / "labs")}}).execute()
    said = "".join(output.get("text", "") for cell in code(book) for output in cell.outputs)
    assert said.count("12 updates") == 1 and said.count("16 updates") == 2
    assert re.search(r"the decay is ahead by -?0\.\d{3} nats", said)
    assert said.count("finished: ") == 3
    assert any("image/png" in output.get("data", {}) for cell in code(book)
               for output in cell.outputs)


def test_the_committed_first_hour_was_run_in_order_and_is_small_and_clean():
    text = (ROOT / "labs" / "start.ipynb").read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert [cell.execution_count for cell in code(START)] == list(range(1, len(code(START)) + 1))
    outputs = [output for cell in code(START) for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    said = "".join(str(output.get("text", output.get("data", {}).get("text/plain", "")))
                   for output in outputs)
    assert not re.search(r"/(home|root|tmp|Users|usr|work|opt)/|[A-Z]:\\\\", said)
    assert platform.node() not in said
    assert re.search(r"the decay is ahead by 0\.\d{3} nats", said)
    for cell, after in zip(START.cells, START.cells[1:]):
        assert ("code", "markdown") != (cell.cell_type, after.cell_type) or any(
            mark in after.source for mark in ("**Questions.**", "##"))


def first_cell(folder, repository=""):
    """Run colab.ipynb's first code cell in a folder; returns (status, what it printed last)."""
    source = code(COLAB)[0].source.replace('REPOSITORY = ""',
                                           f'REPOSITORY = "{repository}"') + "\nprint(os.getcwd())"
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True,
                          text=True)
    return done.returncode, (done.stdout or done.stderr).splitlines()[-1]


def test_the_cloud_notebook_asks_for_the_clone_s_address_unless_it_lies_in_one(tmp_path):
    assert first_cell(tmp_path) == (1, "AssertionError: REPOSITORY is empty: give "
                                    "the address of a clone, https://....git")
    assert first_cell(ROOT / "labs") == first_cell(ROOT) == (0, str(ROOT))
    origin, empty = tmp_path / "origin", tmp_path / "empty"
    empty.mkdir()
    origin.mkdir()
    (origin / "train.py").write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    for _ in range(2):                                                   # the cell can be run again
        assert first_cell(empty, origin.as_uri()) == (0, str(empty / "nanoCPM"))


def test_the_cloud_notebook_runs_a_lab():
    cells = [cell.source for cell in code(COLAB)]
    (chosen,) = [cell.split('"')[1] for cell in cells if cell.startswith("LAB = ")]
    assert chosen in course.modules() and any("-m labs.{LAB} --draw=True" in cell for cell in cells)
    assert not any(cell.get("outputs") for cell in COLAB.cells) and "OWNER" not in json.dumps(COLAB)
