"""What several test files use: a tiny model on small corpora, trained in this process."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"     # one thread per worker, also in the processes of a test


def start(*command, **options):
    """Start `python COMMAND` in the project's folder, with one thread; its output is one text.

    options: of Popen
    """
    from configurator import ROOT
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def launch(processes, *command, restarts=0, torchrun=(), **options):
    """Start a command under torchrun, which takes more options in `torchrun`."""
    return start("-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                 f"--max-restarts={restarts}", "--rdzv-backend=c10d",
                 "--rdzv-endpoint=localhost:0", *torchrun, *command, **options)


def finish(process, timeout=300):
    """Wait for a process that must succeed. Returns what it printed."""
    said = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, said
    return said


def pytest_xdist_auto_num_workers(config):
    """Run the tests of a GPU one after the other: they measure, and share its memory."""
    return 0 if config.option.markexpr == "gpu" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Keep the outcome of a test for its fixtures (tests/test_gpu.py)."""
    report = yield
    if call.when == "call":
        item.outcome = report.outcome
    return report


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Two small corpora as bytes, 'one' and 'two', and 'one' with bpe4096 as well."""
    from configurator import ROOT
    from data.corpus import write_corpus
    from data.tokenizer import load_tokenizer
    folder, text = tmp_path_factory.mktemp("data"), (ROOT / "LICENSE").read_text(encoding="utf-8")
    tokenizer = load_tokenizer("bytes")
    for name, train in (("one", text * 4), ("two", text[::-1] * 4)):
        documents = [("train", train), ("val", text[:700])]
        write_corpus(folder / name / "bytes", tokenizer, documents)
    write_corpus(folder / "one" / "bpe4096", load_tokenizer("bpe4096"),
                 [("train", text * 4), ("val", text)])
    return folder


@pytest.fixture
def train_tiny(data_dir, tmp_path):
    """train_tiny(out, *options) trains a tiny model in this process and returns the run's folder.
    """
    from test_golden import TINY

    from train import main
    config = tmp_path / "tiny.py"
    config.write_text(TINY + f'''
data_dir = {str(data_dir)!r}
data = "one"
save_interval = 10
sample_tokens = 5
quiet = False
''', encoding="utf-8")

    def run(out, *options):
        main([str(config), f"--out_dir={tmp_path / out}", *options])
        return tmp_path / out
    run.config, run.tmp_path = config, tmp_path
    return run


@pytest.fixture
def in_process(monkeypatch):
    """tools.bench measures without new processes; the list of the argv that it was given."""
    from tools import bench
    calls = []

    def measure_in_process(argv):
        calls.append(argv)
        return bench.measure(*bench.read_options([*argv, "--json=True"]))
    monkeypatch.setattr(bench, "measure_in_process", measure_in_process)
    return calls


@pytest.fixture
def lab_files(tmp_path, monkeypatch):
    """tmp_path, to which everything goes that a lab writes."""
    from labs import runs
    plain = runs.folder

    def path(lab, kind, config):
        return tmp_path / f"{lab}.{'png' if kind == 'figures' else 'jsonl'}"

    def folder(lab, job):
        return str(tmp_path / Path(plain(lab, job)).name)
    monkeypatch.setattr(runs, "path", path)
    monkeypatch.setattr(runs, "folder", folder)
    return tmp_path
