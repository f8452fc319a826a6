"""The students' tests: `python -m pytest labs/assignments`.

    --adapters=FILE     whose answers: an adapters.py anywhere. Default: the one beside this file

Every test is one point; the points per assignment are printed at the end.
"""
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--adapters", default=str(HERE / "adapters.py"), metavar="FILE",
                     help="the adapters.py through which the answers are called")


def pytest_xdist_auto_num_workers(config):
    """Run in one process: the tests take less time than it takes to start workers."""
    return 0


def pytest_configure(config):
    if not Path(config.getoption("--adapters")).is_file():
        raise pytest.UsageError(f"--adapters={config.getoption('--adapters')}: no such file")
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"             # the message, and where it went wrong


@pytest.fixture(scope="session")
def student(request):
    """Return the module of adapters. Its folder can be imported from, for code that lies there."""
    path = Path(request.config.getoption("--adapters")).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("adapters", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(path.parent))


def pytest_terminal_summary(terminalreporter):
    points, possible = Counter(), Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            file = report.nodeid.split("::")[0]
            if "labs/assignments/tests/" in file:
                name = Path(file).stem.removeprefix("test_")
                points[name] += outcome == "passed"
                possible[name] += 1
    if possible:
        terminalreporter.section("points")
        for name in sorted(possible):
            terminalreporter.write_line(f"{name:<12} {points[name]:>2} of {possible[name]}")
        terminalreporter.write_line(f"{'total':<12} {points.total():>2} of {possible.total()}")
