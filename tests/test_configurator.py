"""Config files and options: what wins, what each type takes, and that every mistake is reported at
once, one line each."""
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import train
from configurator import ROOT, BadInput, configure, exits_cleanly
from model import MiniCPMConfig


@dataclass
class Knobs:
    steps: int = 10                     # updates; # is no end of
                                        # this comment
    rate: float = 0.5                   # per second
    name: str = "x"
    flag: bool = True
    limit: int | None = 7
    note: str | None = None
    kind: Literal["a", "b"] = "a"
    factors: tuple[float, ...] = ()

    def problems(self):
        too_few = self.limit is not None and self.steps <= self.limit
        return [f"--steps={self.steps}: must be above --limit={self.limit}"] if too_few else []


def read(*argv):
    (knobs,), given = configure(list(argv), Knobs, usage="usage")
    return knobs, given


def problems_of(*argv):
    with pytest.raises(BadInput) as caught:
        read(*argv)
    lines = str(caught.value).splitlines()
    assert list(caught.value.args) == lines, "one line a problem"
    return lines


def error_lines(main, argv, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(argv)
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def file(tmp_path):
    def write(text, name="a.py"):
        (tmp_path / name).write_text(text, encoding="latin-1" if "é" in text else "utf-8")
        return str(tmp_path / name)
    return write


def test_the_later_wins_between_files_and_options(file):
    first, second = file('"""Words."""\nsteps = 100 '
                         ' # why\nname = "first"'), file("steps = 200\nlimit = None", "b.py")
    assert read(first)[0] == Knobs(100, name="first")
    assert read(first, second)[0].steps == 200 and read(second, first)[0].steps == 100
    assert read(first, "--steps=300", second)[0].steps == 200
    knobs, given = read(first, second, "--steps=300")
    assert (knobs.steps, knobs.name, knobs.limit) == (300, "first", None)
    # set, even where the value is the default's
    assert given == {"steps": 300, "name": "first", "limit": None}


def test_files_calculate_and_options_take_every_type(file):
    knobs, _ = read(file("\ufeffsteps = 8 * 2048 // 64\nlimit = steps - 1\nrate = 1e-2 "
                         "/ 4\nflag = not True\nfactors = [1, 2 ** 0.5]\nnote = None"))
    assert knobs == Knobs(256, 0.0025, flag=False, limit=255, factors=(1.0, 2 ** 0.5))
    knobs, _ = read("--steps=20", "--rate=1e-3", "--name=a=b,c =", "--flag=False", "--limit=None",
                    "--note=None", "--kind=b", "--factors=1,1.5,2e0")
    assert knobs == Knobs(20, 0.001, "a=b,c =", False, None, None, "b", (1.0, 1.5, 2.0))
    knobs, _ = read("--rate=1", "--limit=3", "--note=text", "--factors=3")
    assert type(knobs.rate) is float
    assert (knobs.limit, knobs.note, knobs.factors) == (3, "text", (3.0,))


def test_a_wrong_option_takes_one_line():
    """A number too large for a float raised OverflowError, which came through as a traceback."""
    for option, line in {"--steps=1e-3": "--steps takes int, not '1e-3'",
                         "--limit=2.5": "--limit takes int, not '2.5'",
                         "--rate=fast": "--rate takes float, not 'fast'",
                         "--rate=nan": "--rate takes a finite number, not 'nan'",
                         "--flag=yes": "--flag takes True or False, not 'yes'",
                         "--flag=1": "--flag takes True or False, not '1'",
                         "--kind=c": "--kind is one of a, b, not 'c'",
                         "--factors=1,,2": "--factors takes float, not ''",
                         "--name=": "--name needs a value: --name=VALUE",
                         "--flag": "--flag needs a value: --flag=VALUE",
                         "--step=3": "--step: unknown option; did you mean --steps?",
                         "--zzz=3": "--zzz: unknown option; --help lists them all",
                         "steps=3": "steps=3: neither a config file (.py) nor --key=value",
                         "--steps=" + "9" * 400: "--steps takes a number below 1e308",}.items():
        assert problems_of(option) == [line]


def test_a_wrong_line_of_a_config_file_takes_one_line(file):
    """flag = 1 passed once, since 1 == True."""
    for text, line in {"x = 1\nsteps += 1": "2: a config file holds "
                       "assignments 'name = value' only",
                       "import os": "1: a config file holds assignments 'name = value' only",
                       "\n\nstepz = 3": "3: stepz: unknown option; did you mean --steps?",
                       "steps = 10 / 2": "1: steps takes int, not 5.0",
                       "rate = '0.1.2'": "1: rate takes float, not '0.1.2'",
                       "flag = 1": "1: flag takes True or False, not 1",
                       "name = 3": "1: name takes text, not 3",
                       "name = ''": "1: name takes text, not ''",
                       "factors = 3": "1: factors takes numbers separated by commas, not 3",
                       "steps = other * 2": "1: name 'other' is not defined",
                       "steps = open('x')": "1: name 'open' is not defined",}.items():
        path = file(text)
        assert problems_of(path) == [f"{path}:{line}"]
    for text in ("steps = = 3", "name = 'é'", "steps = 3\0"):
        (line,) = problems_of(file(text))
        assert "a.py:" in line and "not Python" in line
    assert problems_of("config/labtop.py") == ["config/labtop.py: no such config "
                                               "file; did you mean config/laptop.py?"]
    assert problems_of("qqqq.py") == ["qqqq.py: no such config file"]


def test_all_problems_at_once_and_nothing_that_only_follows_from_them(file):
    """Impossible combinations were once reported only after all other mistakes had been mended."""
    path = file("rat = 1\nflag = 'yes'")
    assert problems_of(path, "--kind=c", "--name=",
                       "--steps=3") == [f"{path}:1: rat: unknown option; did you mean --rate?",
                                        f"{path}:2: flag takes True or False, not 'yes'",
                                        "--kind is one of a, b, not 'c'",
                                        "--name needs a value: --name=VALUE",
                                        "--steps=3: must be above --limit=7"]
    assert [len(problems_of("--steps=3", unread))
            for unread in ("--limit=many", "--limit=", "--limits=1")] == [1, 1, 1]
    assert problems_of("--steps=3", "missing.py") == ["missing.py: no such config file"]


def test_train_reports_all_and_exits_with_2(capsys):
    argv = ["--n_layerz=3", "--max_steps=1e3", "--compile=yes", "--out_dir=", "--n_head=6",
            "--n_kv_head=4", "--head_dim=63", "--decay_share=0.1", "--decay_steps=5",
            "--schedule=wsdd", "--data=a,b"]
    lines = error_lines(train.main, argv, capsys)
    starts = ["--n_layerz: unknown option; did you mean --n_layer?", "--max_steps takes int",
              "--compile takes True or False", "--out_dir needs a value",
              "--schedule is one of wsd", "--decay_share and --decay_steps: give one",
              "--data='a,b': give NAME", "--n_kv_head=4: does not divide --n_head=6",
              "--head_dim=63: must be even (RoPE rotates pairs)"]
    assert [line[:len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_exits_cleanly_hides_no_bugs(capsys):
    @exits_cleanly
    def fail(error):
        raise error

    assert error_lines(fail, BadInput("one", "two"), capsys) == ["one", "two"]
    assert error_lines(fail, FileNotFoundError(2, "No such file", "a/b"),
                       capsys) == ["a/b: No such file"]
    with pytest.raises(ValueError, match="bug"):
        fail(ValueError("bug"))


# What any script of the project is: a main that exits cleanly.
SCRIPT = r"""
import sys
from configurator import BadInput, configure, exits_cleanly
from wsd import DrawConfig

@exits_cleanly
def main(argv):
    if argv:
        configure(argv, DrawConfig, usage="\u7528 in the usage")
    print("\u7528\u6237 caf\u00e9 \udcff")
    said = input("> ")
    print(ascii(said))
    if said == "bad":
        raise BadInput("\u7528: bad")
    for i in range(100_000):
        print(i)

main()
"""


ENV = {**{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
       "PYTHONPATH": str(ROOT)}


def script(stdin=b"", argv=(), encoding="utf-8", close=False, stdout=subprocess.PIPE, flags=()):
    """Run SCRIPT in a process; return (exit status, stdout, stderr). close: nobody reads its
    output."""
    process = subprocess.Popen([sys.executable, *flags, "-c", SCRIPT, *argv], stdin=subprocess.PIPE,
                               stdout=stdout, stderr=subprocess.PIPE,
                               env={**ENV, "PYTHONIOENCODING": encoding})
    if close:
        process.stdout.close()
        process.stdout = None
    out, err = process.communicate(stdin)
    return process.returncode, out, err


def test_output_in_any_encoding_ends_no_script():
    """Windows pipes and old consoles: print raised UnicodeEncodeError, and input()
    UnicodeDecodeError."""
    assert script(b"bad", encoding="ascii") == (2, b"\\u7528\\u6237 caf\\xe9 \\udcff\n> 'bad'\n",
                                                b"\\u7528: bad\n")
    code, out, err = script(b"bad", encoding="cp1252")
    assert (code, out.splitlines()[0]) == (2, b"\\u7528\\u6237 caf\xe9 \\udcff")
    assert b"Traceback" not in err
    code, out, err = script(b"a\xff\n")
    assert (code, err) == (0, b"")
    assert out.splitlines()[:2] == ["\u7528\u6237 caf\u00e9 \\udcff".encode(), b"> 'a\\udcff'"]
    assert script(argv=["--help"], encoding="ascii")[1].startswith(b"\\u7528 in the usage")


@pytest.mark.parametrize("argv", [(), ("--help",)])
@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_output_that_nobody_reads_ends_a_script_quietly(argv, flags):
    """`| head` gave a traceback, or "Exception ignored" and status 120 from the interpreter."""
    code, _, err = script(b"x\n", argv, close=True, flags=flags)
    assert (code, err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        assert script(b"x\n", stdout=full)[::2] == (2, b"writing: No space left on device\n")


def test_a_script_without_standard_streams_works():
    code = "import sys; sys.stdin = sys.stdout = None\n" + SCRIPT.replace('input("> ")', '"x"')
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == 0


def test_help_lists_every_knob_with_type_default_and_comment(capsys):
    for main, classes in ((train.main, (train.TrainConfig, MiniCPMConfig)),
                          (lambda argv: read(*argv), (Knobs,))):
        with pytest.raises(SystemExit, match="^0$"):
            main(["--nonsense", "--help"])
        lines = (text := capsys.readouterr().out).splitlines()
        for cls, field in [(cls, field) for cls in classes for field in fields(cls)]:
            (at,) = [i for i, line in enumerate(lines) if line.startswith(f"  --{field.name}=")]
            assert lines[at].endswith(f"(default {field.default!r})")
            assert cls is Knobs or lines[at
                                         + 1].startswith("        "), f"{field.name} has no comment"
    assert "(default 10)\n        updates; # is no end of this comment\n  --rate=float" in text
    assert "\n  --kind=a|b  (default 'a')\n" in text
