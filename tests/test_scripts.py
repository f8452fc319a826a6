"""The scripts as a user runs them: README's commands, text out, bad input, and the laptop run without the family files."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import sample
import train
from configurator import ROOT
from data.tokenizer import load_tokenizer
from tools import evaluate

FAMILY = ("family", "tools", "labs")
LONG_OR_NETWORK = ("--to_gguf", "--task=sizes", "--simulate", "data/fineweb_edu", "config/gpu_124m.py", "data/plays", "data/speeches", "--data=plays",
                   "laptop_long", "laptop-long", "data/passkey")


def run(*argv, cwd=None, code=0):
    result = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
                            env={**os.environ, "PYTHONUTF8": "1"})
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """A copy of the project without family/, tools/ and labs/ in which `python train.py --max_steps=2` has run."""
    root = tmp_path_factory.mktemp("clone") / "nanocpm"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("out", ".git", "bpe4096", "bytes", "tests", *FAMILY))
    # The corpus is prepared by the command itself, from a torch package cut down to a hundred files.
    script = root / "data" / "pytorch" / "prepare.py"
    script.write_text(script.read_text(encoding="utf-8").replace('rglob("*.py"))', 'glob("nn/**/*.py"))'), encoding="utf-8")
    said = run("train.py", "--max_steps=2", cwd=root)
    return root, said


def test_the_first_command_prepares_trains_evaluates_draws_and_samples(laptop):
    root, said = laptop
    assert "1,279,104 with it" in said
    assert "a sample, temperature" in said and "finished: 2 steps" in said and "compile: off, 2 steps" in said
    assert (root / "out/laptop/loss.png").stat().st_size > 5000
    lines = [json.loads(line) for line in (root / "out/laptop/metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "tokens", "grad_norm", "tok_per_s"} <= lines[0].keys() and lines[-1]["val_bpb"] > 1


def test_sampling_needs_no_family_file_and_works_from_any_folder(laptop, tmp_path):
    root, _ = laptop
    assert len(run("sample.py", "--max_new_tokens=20", cwd=root)) > 10
    elsewhere = run(root / "sample.py", f"--ckpt={root / 'out/laptop'}", "--prompt=def forward(", "--max_new_tokens=5", cwd=tmp_path)
    assert elsewhere.startswith("def forward(")


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(python (?:-m )?[\w/.]+[^`]*)`", text)
    return [line for line in dict.fromkeys(lines + inline) if line.startswith("python ") and "pytest" not in line and "labs." not in line]


def test_readme_names_the_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install -r requirements.txt && python train.py\n" in text
    assert "\npip install -r requirements-dev.txt && python -m pytest\n" in text
    assert len(readme_commands()) > 12


@pytest.mark.parametrize("command", [c for c in readme_commands() if not any(word in c for word in LONG_OR_NETWORK) and "PATH" not in c])
def test_readme_command_runs(laptop, command, tmp_path):
    """As written, two steps long; a branch's decay is shortened, evaluation takes few questions."""
    root, _ = laptop
    words = shlex.split(command)[1:]
    if words[0] == "train.py":
        if "--help" not in words:
            words = [w for w in words if not w.startswith(("--max_steps", "--decay_steps=2"))]
            steps = "--decay_steps=2" if "branch" in command or "laptop_decay" in command or "laptop_anneal" in command else "--max_steps=2"
            words += ["--max_steps=4", "--decay_steps=0"] if "--decay_steps=0" in words else [steps]
            words.append("--eval_tokens=4096")
            if "out_dir" not in command and not any(stage in command for stage in ("anneal", "sft", "moe")):   # others start from these
                words.append(f"--out_dir={tmp_path / 'out'}")
            if "colab" in command:
                words += ["--batch_size=1", "--n_layer=2"]
    if words[0] == "sample.py":
        words.append("--max_new_tokens=5")                               # of a conversation, the input is at its end
    if words[0] == "-m":
        for folder in FAMILY:
            shutil.copytree(ROOT / folder, root / folder, dirs_exist_ok=True)
    if words[1:2] == ["tools.evaluate"]:
        words += ["--questions=8", "--eval_tokens=4096"]
    if words[1:2] == ["tools.bench"]:
        words += ["--updates=2", "--compile=False"]
    if "--from_hf=out/laptop-hf" in words and not (root / "out/laptop-hf").exists():
        run("-m", "tools.convert", "--to_hf=out/laptop-hf", cwd=root)
    if words[1:2] == ["family.dpo"]:
        words += ["--max_pairs=64", "--max_steps=2"]
    if words[0] == "data/instruct/prepare.py":
        words += ["--train=400", "--test=80"]
    elif words[0].startswith("data/"):
        words.append(f"--data_dir={tmp_path}")
    run(*words, cwd=root)
    if words[0] == "wsd.py":
        assert (root / "schedules.png").stat().st_size > 20000


def test_readme_paths_and_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:config|data|engine|family|tools|labs|tests)/[\w/.]+\.py)`", text) + re.findall(r"\]\((assets/[\w.]+)\)", text):
        assert (ROOT / path).exists(), path
    for file, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name}\b|^    {name.split('.')[-1]}:", source, re.M), (file, name)


# ---- sample.py and evaluate.py

def said_by(main, capsys, *argv, code=None):
    capsys.readouterr()
    if code is None:
        main(list(map(str, argv)))
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    said = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in said and len(said.splitlines()) == 1, said
    return said


def test_samples_repeat_by_seed_and_rows_are_independent(laptop, capsys):
    ckpt = f"--ckpt={laptop[0] / 'out/laptop'}"
    three = said_by(sample.main, capsys, ckpt, "--num_samples=3", "--max_new_tokens=12", "--prompt=é").split("--- sample ")[1:]
    again = said_by(sample.main, capsys, ckpt, "--num_samples=3", "--max_new_tokens=12", "--prompt=é").split("--- sample ")[1:]
    assert three == again and len(set(text[2:] for text in three)) == 3
    second = said_by(sample.main, capsys, ckpt, "--max_new_tokens=12", "--prompt=é", "--seed=1338")
    assert second.strip() == three[1][2:].strip()


def test_streaming_never_breaks_a_character(laptop):
    class Speaker:
        """Says a text with several bytes per character, one byte per token."""

        def generate(self, prompts, *rest):
            return iter([torch.tensor([b]) for b in "né 用户 ok".encode()])
    tokenizer = load_tokenizer("bytes")
    parts = list(sample.stream(Speaker(), tokenizer, [1], sample.SampleConfig(), 0))
    assert "".join(parts) == "né 用户 ok" and all("\ufffd" not in part for part in parts)


def test_the_token_that_begins_a_document_is_drawn_only_if_it_also_ends_one():
    class Model:
        def generate(self, prompts, *rest):
            return rest[-2:]                                             # stop_ids, never_ids
    tokenizer = load_tokenizer("bytes")
    assert sample.generate(Model(), tokenizer, [[1]], sample.SampleConfig(), 0) == ([tokenizer.eos], [tokenizer.bos])
    tokenizer.bos = tokenizer.eos                                        # as in gpt2
    assert sample.generate(Model(), tokenizer, [[1]], sample.SampleConfig(), 0) == ([tokenizer.eos], [])


def test_chat_answers_until_input_ends(laptop, capsys, monkeypatch):
    said = iter(["hello", "and again"])
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, ""))
    plain = sample.stream
    monkeypatch.setattr(sample, "stream", lambda model, tok, ids, *rest: prompts.append(ids) or plain(model, tok, ids, *rest))
    said_by(sample.main, capsys, f"--ckpt={laptop[0] / 'out/laptop'}", "--chat=True", "--max_new_tokens=8")
    assert len(prompts) == 2 and len(prompts[1]) > len(prompts[0]) and prompts[1][:len(prompts[0])] == prompts[0]


def test_bad_prompts_are_one_line(laptop, capsys, tmp_path):
    ckpt = f"--ckpt={laptop[0] / 'out/laptop'}"
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "not UTF-8 (byte 0xff at 2)" in said_by(sample.main, capsys, ckpt, f"--prompt_file={tmp_path / 'bad.txt'}", code=2)
    assert "empty" in said_by(sample.main, capsys, ckpt, f"--prompt_file={tmp_path / 'empty.txt'}", code=2)
    assert "needs a value" in said_by(sample.main, capsys, ckpt, "--prompt=", code=2)
    assert "surrogate" in said_by(sample.main, capsys, ckpt, "--prompt=a\udcff", code=2)
    assert "context of 4096" in said_by(sample.main, capsys, ckpt, "--prompt=" + "word " * 5000, code=2)
    assert "No such file" in said_by(sample.main, capsys, ckpt, "--prompt_file=nowhere.txt", code=2)
    assert "no such checkpoint" in said_by(sample.main, capsys, "--ckpt=nowhere", code=2)


def test_evaluate_gives_numbers_with_errors(laptop, capsys):
    root = laptop[0]
    argv = (f"--ckpt={root / 'out/laptop'}", f"--data_dir={root / 'data'}", "--questions=20", "--context=16", "--continuation=8")
    result = json.loads(said_by(evaluate.main, capsys, *argv, "--eval_tokens=4096", "--json=True"))
    assert 1 < result["bpb"] < 20 and 0 < result["bpb_se"] < 1 and 0 <= result["cloze"] <= 1 and result["questions"] == 20
    assert "chance 25 %" in said_by(evaluate.main, capsys, *argv, "--task=cloze")
    assert "no corpus here" in said_by(evaluate.main, capsys, *argv, "--data=plays", code=2)


def test_the_true_continuation_is_found_by_a_model_that_knows_it(laptop):
    """Questions are built right: scoring each ending by whether it follows its context in the text gives 100 %."""
    from data.dataset import open_corpus
    tokenizer = load_tokenizer("bpe4096")
    corpus = open_corpus(str(laptop[0] / "data"), "pytorch", tokenizer, "val")
    text = " ".join(map(str, corpus.read(0, corpus.n_tokens)))
    for context, endings, place in evaluate.make_questions(corpus, tokenizer, evaluate.EvaluateConfig(questions=20, context=16, continuation=8)):
        follows = [" ".join(map(str, [*context, *ending])) in text for ending in endings]
        assert follows[place] and sum(follows) == 1


def test_help_lists_every_knob(capsys):
    from dataclasses import fields

    from model import MiniCPMConfig
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name}=" in said for cls in (train.TrainConfig, MiniCPMConfig) for f in fields(cls))
