"""Preference optimisation: the formula, the reference's log-probabilities, and a tiny model that
learns a preference."""
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from test_tokenizer import CHATML, released_folder

import train as train_module
from configurator import BadInput, build
from data.tokenizer import chat_ids, load_tokenizer
from engine import checkpoint, metrics
from family import dpo
from model import MiniCPM, MiniCPMConfig, init_weights

LN2 = math.log(2)


def write_pairs(path, n, seed):
    """Write n pairs. The chosen answer is the one in digits, whether it is longer or shorter."""
    rng = random.Random(seed)
    letters = lambda alphabet, most: "".join(rng.choices(alphabet, k=rng.randint(1, most)))
    path.write_text("".join(json.dumps({"prompt": letters("pqrst", 6), "chosen": letters(
        "0123456789", 4), "rejected": letters("abcdefgh", 4)}) + "\n" for _ in range(n)))
    return path


def write_model(folder, seed):
    config = MiniCPMConfig(vocab_size=load_tokenizer("bytes").n_vocab, n_layer=2, n_head=2,
                           n_kv_head=1, n_embd=32, n_ff=48, dim_model_base=16)
    model = MiniCPM(config)
    init_weights(model, seed)
    checkpoint.save_checkpoint(folder, 0, {"model": model.state_dict()}, {"model": asdict(config)},
                               load_tokenizer("bytes").save)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, pairs, and a finished run 'straight' over them."""
    folder = tmp_path_factory.mktemp("dpo")
    write_model(folder / "sft", 0)
    write_pairs(folder / "train.jsonl", 250, 1)
    write_pairs(folder / "test.jsonl", 21, 2)
    (folder / "tiny.py").write_text(f"""
init_from = {str(folder / "sft")!r}
pairs = {str(folder / "train.jsonl")!r}
val_pairs = {str(folder / "test.jsonl")!r}
block_size = 16
batch_size = 8
learning_rate = 0.003
log_interval = 1
eval_interval = 15
save_interval = 10
dtype = "float32"
device = "cpu"
quiet = True
""")
    run(folder, "straight")
    return folder


def run(place, out, *options):
    dpo.main([str(place / "tiny.py"), f"--out_dir={place / out}", *options])
    return place / out


def curve(out):
    training, held_out = metrics.read(out)
    return [{name: value for name, value in line.items() if name != "tok_per_s"}
            for line in training], held_out


def refused(capsys, *argv):
    """Return the error message of a command that exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        dpo.main(list(map(str, argv)))
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "Traceback" not in said
    return said


def killed(monkeypatch, at, *args):
    """Start a run and interrupt it after `at` updates."""
    plain = train_module.train

    def breaking(*args, **kwargs):
        for update in plain(*args, **kwargs):
            if update.step == at:
                raise KeyboardInterrupt
            yield update
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train_module, "train", breaking)
        run(*args)


# ---- the loss

def test_the_loss_is_the_formula():
    """Against -log(c^b r'^b / (c^b r'^b + r^b c'^b)) over plain probabilities: the Bradley-Terry
    likelihood of the choice."""
    policy, reference, beta = torch.rand(5, 2) + 0.1, torch.rand(5, 2) + 0.1, 0.3
    odds = ((policy[:, 0] / reference[:, 0]) / (policy[:, 1] / reference[:, 1])) ** beta
    right, wrong = odds / (1 + odds), 1 / (1 + odds)
    assert torch.allclose(dpo.dpo_loss(policy.log(), reference.log(), beta), -right.log(),
                          atol=1e-6)
    assert torch.allclose(dpo.dpo_loss(policy.log(), reference.log(), beta, 0.2),
                          -0.8 * right.log() - 0.2 * wrong.log(), atol=1e-6)


def test_the_gradient_raises_the_chosen_answer_and_vanishes_at_the_smoothed_odds():
    policy = torch.zeros(1, 2, requires_grad=True)
    dpo.dpo_loss(policy, torch.zeros(1, 2), beta=0.1).sum().backward()
    assert policy.grad.tolist() == [[pytest.approx(-0.05), pytest.approx(0.05)]]
    # 0.2 wrong labels correspond to odds of 4 to 1
    certain = torch.tensor([[math.log(4) / 0.1, 0.0]], requires_grad=True)
    dpo.dpo_loss(certain, torch.zeros(1, 2), 0.1, label_smoothing=0.2).sum().backward()
    assert certain.grad.abs().max() < 1e-6


def test_the_sft_term_is_the_nll_per_token_of_the_chosen_answer():
    (config,) = build([dpo.DPOConfig], {"init_from": "x", "pairs": "x", "sft_coef": 0.5})
    policy = torch.tensor([[-3.0, -4.0]])
    losses, measures = dpo.dpo_metrics(policy, policy, torch.tensor([2]), config)
    assert losses.tolist() == [pytest.approx(LN2 + 0.5 * 1.5)]
    assert measures["chosen_nll"].tolist() == [1.5]
    assert measures["accuracy"].tolist() == [0.5] and measures["kl"].tolist() == [0]


def test_log_probabilities_cover_only_the_last_answer_and_ignore_padding(place):
    tokenizer, model = load_tokenizer("bytes"), MiniCPM.from_pretrained(place / "sft")
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"}]
    answers = ("efg", "h")
    batch = dpo.make_batch([dpo.encode(tokenizer, messages, answers, 64)], [0, 0], 64)
    found, _ = dpo.answer_logp(model, batch)
    for side, answer in enumerate(answers):
        prompt = chat_ids(tokenizer, messages, generate=True)[0]
        ids = [*prompt, *tokenizer.encode(answer), tokenizer.eos]
        logp = model(torch.tensor([ids])).log_softmax(-1)[0]
        wanted = sum(logp[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
        assert found[:, side].tolist() == [pytest.approx(wanted, abs=1e-4)] * 2


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_log_probabilities_end_with_the_token_that_ends_the_answer(end, tmp_path):
    """The newline that ChatML writes after it has no part, even if the folder names another end."""
    folder = released_folder(tmp_path / "model", "bytes", CHATML, eos=end)
    tokenizer = load_tokenizer(str(folder))
    messages = [{"role": role, "content": text} for role, text in
                (("user", "a"), ("assistant", "b"), ("user", "c"))]
    prompt, _ = chat_ids(tokenizer, messages, generate=True)
    rows = dpo.encode(tokenizer, messages, ("yes", "no"), 64)
    for (idx, targets), answer in zip(rows, ("yes", "no")):
        learned = [*tokenizer.encode(answer), tokenizer.special("<|im_end|>")]
        assert [*idx, targets[-1]] == [*prompt, *learned]
        assert targets.tolist() == [-100] * (len(prompt) - 1) + learned


def test_batches_have_few_shapes_and_every_epoch_its_own_order():
    (config,) = build([dpo.DPOConfig],
                      {"init_from": "x", "pairs": "x", "block_size": 10, "batch_size": 4,
                       "epochs": 2})
    row = torch.zeros(1, dtype=torch.int32).numpy()
    pairs = [((row.repeat(n), row.repeat(n)), (row, row)) for n in range(1, 11)]
    batches = dpo.pair_batches(pairs, config)
    epochs = [batches(None, first, 10)[0]["index"].tolist() for first in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    assert batches(None, 4, 4)[0]["index"].tolist() == epochs[0][4:8]
    assert {dpo.make_batch([pair], [0], 10)["idx"].shape[2] for pair in pairs} == {3, 6, 9, 12}
    assert dpo.count_updates(config, 10) == 5


def test_held_out_pairs_are_shared_by_the_ranks_and_none_is_left_out():
    row = torch.zeros(1, dtype=torch.int32).numpy()
    pairs = [((row, row), (row, row))] * 13
    for ranks in (1, 2, 3, 5):
        shares = [[batch["index"].tolist()
                   for batch in dpo.held_out_batches(pairs, 4, 8, rank, ranks)]
                  for rank in range(ranks)]
        assert {len(share) for share in shares} == {-(-4 // ranks)}      # collective forwards
        index = [i for share in shares for batch in share for i in batch]
        assert index[:13] == list(range(13))
        assert {len(batch) for share in shares for batch in share} == {4}


# ---- runs

def test_a_run_says_its_epochs_once(place, capsys):
    run(place, "epochs", "--max_steps=2", "--quiet=False", "--batch_size=50", "--eval_interval=0")
    said = capsys.readouterr().out
    assert said.count("epochs of") == 1 and "epochs of the whole run: pairs 0.40\n" in said
    run(place, "often", "--max_steps=2", "--quiet=False", "--batch_size=60", "--eval_interval=0",
        "--max_pairs=25")
    said = capsys.readouterr().out
    assert "run: pairs 4.80" in said and "note: pairs: after about 4 epochs" in said


def test_a_run_starts_at_ln_2_and_learns_the_preference(place):
    training, held_out = curve(place / "straight")
    assert abs(training[0]["loss"] - LN2) < 1e-6 and training[0]["kl"] == training[0]["margin"] == 0
    # one epoch, cosine
    assert len(training) == 250 // 8 and training[0]["lr"] <= 0.003 and training[-1]["lr"] < 0.0004
    assert held_out[-1]["val_accuracy"] == 1 and held_out[-1]["val_loss"] < 0.5
    assert training[-1]["chosen_reward"] > training[-1]["rejected_reward"]
    assert training[-1]["kl"] == pytest.approx(
        -(training[-1]["chosen_reward"] + training[-1]["rejected_reward"]) / (2 * 0.1), abs=1e-4)
    assert (place / "straight" / "loss.png").stat().st_size > 5000
    meta = checkpoint.read_meta(checkpoint.resolve(place / "straight"))
    assert meta["model"]["mup_lr"] is False


def test_the_reference_is_the_model_that_the_run_starts_from(place):
    model = MiniCPM.from_pretrained(place / "sft")
    tables = load_file(place / "straight" / "reference.safetensors")
    for split, file in (("train", "train.jsonl"), ("val", "test.jsonl")):
        records = [json.loads(line) for line in (place / file).read_text().splitlines()]
        pairs = [dpo.encode(load_tokenizer("bytes"), [{"role": "user", "content": r["prompt"]}],
                            (r["chosen"], r["rejected"]), 16) for r in records]
        batch = dpo.make_batch(pairs, range(len(pairs)), 16)
        with torch.no_grad():
            logp, _ = dpo.answer_logp(model, batch)
        assert torch.allclose(tables[split], logp, atol=1e-4)


def test_micro_batches_do_not_change_the_run(place):
    parts = curve(run(place, "parts", "--micro_batch_size=2", "--max_steps=5"))[0]
    whole = curve(run(place, "whole", "--micro_batch_size=8", "--max_steps=5"))[0]
    for name in ("loss", "margin", "accuracy", "chosen_logp", "kl"):
        assert [x[name] for x in parts] == pytest.approx([x[name] for x in whole], abs=1e-4), name


def test_a_killed_run_continues_with_identical_results(place, monkeypatch, capsys):
    killed(monkeypatch, 17, place, "killed")
    # it is read from the file
    monkeypatch.setattr(dpo, "compute_reference", None)
    run(place, "killed")
    assert curve(place / "killed") == curve(place / "straight")
    weights = [dict(checkpoint.read_tensors(checkpoint.resolve(place / out), "model"))
               for out in ("killed", "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    run(place, "killed")
    assert "is finished (31 steps)" in capsys.readouterr().out


def test_a_reference_of_other_pairs_or_another_model_is_refused(place, monkeypatch, capsys):
    pairs = write_pairs(place / "changing.jsonl", 60, 3)
    argv = [place / "tiny.py", f"--pairs={pairs}", f"--out_dir={place / 'other'}"]
    # before its first checkpoint
    killed(monkeypatch, 1, place, "other", f"--pairs={pairs}")
    write_model(place / "another", 5)
    said = refused(capsys, *argv, f"--init_from={place / 'another'}")
    assert "reference.safetensors: does not match this run's model;" in said and "\n" not in said
    assert "this run's model and numerics;" in refused(
        capsys, *argv, f"--init_from={place / 'another'}", "--dtype=bfloat16")
    killed(monkeypatch, 5, place, "other", f"--pairs={pairs}", "--save_interval=4")
    write_pairs(pairs, 60, 4)
    assert "this run's pairs;" in refused(capsys, *argv, "--save_interval=4")
    (place / "other" / "reference.safetensors").unlink()
    assert "reference.safetensors: missing" in refused(capsys, *argv, "--save_interval=4")
    (place / "other" / "reference.safetensors").write_bytes(b"nonsense")
    assert "not a table of log-probabilities" in refused(capsys, *argv, "--save_interval=4")
    (place / "other" / "reference.safetensors").unlink()
    assert abs(curve(run(place, "other", f"--pairs={pairs}", "--overwrite=True",
                         "--max_steps=1"))[0][0]["loss"] - LN2) < 1e-6


def test_pairs_of_a_twentieth_of_the_prompts_are_held_out_and_long_ones_counted(place, capsys):
    (config,) = build([dpo.DPOConfig],
                      {"init_from": "x", "pairs": str(place / "train.jsonl"), "block_size": 12})
    said = []
    splits = dpo.load_pairs(config, load_tokenizer("bytes"), said.append)
    records = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    # <s> <user> <AI>; eos is target only
    longest = [3 + len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) for r in records]
    too_long = sum(n > 12 for n in longest)
    assert 0 < too_long < 250
    assert said == [f"{place / 'train.jsonl'}: {too_long} pairs "
                    "left out, longer than --block_size=12 tokens"]
    assert len(splits["train"]) + len(splits["val"]) == 250 - too_long
    assert 0 < len(splits["val"]) < 30
    few = dpo.load_pairs(build([dpo.DPOConfig], asdict(config) | {"max_pairs": 100})[0],
                         load_tokenizer("bytes"), said.append)
    assert len(few["train"]) == 100
    with pytest.raises(BadInput, match="no pair for training of at most --block_size=2"):
        dpo.load_pairs(build([dpo.DPOConfig], asdict(config) | {"block_size": 2})[0],
                       load_tokenizer("bytes"), said.append)


def test_few_prompts_leave_no_split_empty_and_one_prompt_says_why(tmp_path):
    """Few pairs ended in "no pair for validation of at most --block_size tokens", which was not the
    reason."""
    path, said = tmp_path / "few.jsonl", []
    (config,) = build([dpo.DPOConfig], {"init_from": "x", "pairs": str(path)})
    for prompts in ("pq", "ppqr", "pqrstuvw"):
        path.write_text("\n".join(json.dumps({"prompt": p, "chosen": "c", "rejected": "r"})
                                  for p in prompts))
        splits = dpo.load_pairs(config, load_tokenizer("bytes"), said.append)
        assert len(splits["train"]) + len(splits["val"]) == len(prompts) and splits["train"]
        assert splits["val"]
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n' * 3)
    with pytest.raises(BadInput, match=r"few.jsonl: its pairs \(3\) all have one prompt, "
                       r"so none can be held out; give --val_pairs"):
        dpo.load_pairs(config, load_tokenizer("bytes"), said.append)


def test_a_pair_that_cannot_be_encoded_is_named_and_counted(tmp_path, monkeypatch):
    path, said, plain = tmp_path / "pairs.jsonl", [], dpo.encode
    path.write_text("\n".join(json.dumps({"prompt": p, "chosen": "c", "rejected": "r"})
                              for p in "pqrs"))

    def encode(tokenizer, messages, answers, block_size):
        if messages[0]["content"] == "q":
            raise BadInput("the template knows no such turn")
        return plain(tokenizer, messages, answers, block_size)
    monkeypatch.setattr(dpo, "encode", encode)
    (config,) = build([dpo.DPOConfig], {"init_from": "x", "pairs": str(path)})
    with pytest.raises(BadInput,
                       match="pairs.jsonl:2: the template knows no such turn; correct it, or"):
        dpo.load_pairs(config, load_tokenizer("bytes"), said.append)
    config.skip_bad = True
    assert sum(map(len, dpo.load_pairs(config, load_tokenizer("bytes"), said.append).values())) == 3
    assert said == [f"skipped 1 of 4; the first: {path}:2: the template knows no such turn"]


def test_bad_input_is_one_line_each(place, capsys):
    said = refused(capsys, "--beta=0", "--epochs=-1", "--label_smoothing=0.5", "--sft_coef=-1",
                   "--minutes=5", "--max_pairs=0")
    lines = said.splitlines()
    assert len(lines) == 9
    assert [line.partition(":")[0]
            for line in lines if "needed" in line] == ["--init_from", "--pairs"]
    assert "did you mean --beta" in refused(capsys, place / "tiny.py", "--betta=1")
    assert "has only 250 pairs" in refused(capsys, place / "tiny.py", f"--out_dir={place / 'none'}",
                                           "--batch_size=251")
    for bad, complaint in (('{"prompt": "a", "chosen": "b", "rejected": "b"}',
                            "chosen equals rejected"), ('{"prompt": "a", ', "not JSON"),
                           ('{"prompt": "a", "chosen": "b"}', "unbalanced pair"),
                           ('{"prompt": "a", "chosen": " ", "rejected": "b"}', "empty")):
        (place / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + bad)
        said = refused(capsys, place / "tiny.py", f"--out_dir={place / 'none'}",
                       f"--pairs={place / 'bad.jsonl'}")
        assert "bad.jsonl:2: " in said and complaint in said and "\n" not in said
    assert not (place / "none").exists()


def test_help_explains_the_knobs_of_both(capsys):
    with pytest.raises(SystemExit) as end:
        dpo.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "pull towards the reference" in said
    assert "AdamW's, on matrices only" in said
    assert "--learning_rate=float  (default 1e-05)" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32",
                    reason="torchrun with gloo is tried on Linux and macOS")
def test_two_processes_are_one(place):
    """Sharded; with micro-steps and recomputing; replicated: each gives the curve of one process.
    """
    for name, more in (("2-shard", ()), ("2-parts", ("--micro_batch_size=2", "--recompute=2")),
                       ("2-copies", ("--replicate=2",))):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                   "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m",
                   "family.dpo", str(place / "tiny.py"), f"--out_dir={place / name}", *more]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
        (one, one_held_out), (two, two_held_out) = curve(place / "straight"), curve(place / name)
        assert abs(two[0]["loss"] - LN2) < 1e-6
        for key in ("loss", "margin", "accuracy", "kl"):
            assert [x[key]
                    for x in two] == pytest.approx([x[key] for x in one], abs=1e-5), (name, key)
        assert two_held_out[-1]["val_loss"] == pytest.approx(one_held_out[-1]["val_loss"], abs=1e-5)
