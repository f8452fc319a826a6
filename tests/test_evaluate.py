"""evaluate's numbers: those of train.py for every config, with the mask and the mixture of
training."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from configurator import ROOT, BadInput, configure
from data import packing
from data.corpus import write_corpus
from data.dataset import held_out_loss, measure, open_corpus, parse_mixture
from data.tokenizer import load_tokenizer
from engine import checkpoint, metrics
from family import dpo
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import evaluate

TOKENIZER = load_tokenizer("bytes")
BLOCK = 32
TINY = {"tokenizer": "bytes", "vocab_size": TOKENIZER.n_vocab, "n_layer": 1, "n_head": 2,
        "n_kv_head": 1, "head_dim": None, "n_embd": 16, "n_ff": 24, "dim_model_base": 16,
        "init_std": 0.5, "embd_init_std": 0.5, "max_position": 16, "block_size": BLOCK,
        "batch_size": 2, "micro_batch_size": 0, "batch_schedule": "0:2", "max_steps": 1,
        "minutes": None, "warmup_steps": 0, "decay_steps": None, "init_from": None,
        "branch_from": None, "recompute": 0, "async_save": False, "eval_tokens": 1000,
        "eval_interval": 0, "sample_tokens": 0, "compile": False, "quiet": True, "device": "cpu",
        "dtype": "float32"}
# those have no bits per byte
CONFIGS = sorted(path.name
                 for path in (ROOT / "config").glob("*.py") if not path.stem.endswith("dpo"))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    # a fifth of a second per run
    monkeypatch.setattr(metrics, "draw", lambda out_dir: None)


def is_packed(name):
    return name.startswith(("passkey", "instruct"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Every corpus that a config names: short documents, or rows of short conversations."""
    folder, names = tmp_path_factory.mktemp("data"), set()
    for name in CONFIGS:
        (config, _), _ = configure([f"config/{name}"], train.TrainConfig, MiniCPMConfig, usage="")
        names |= {*parse_mixture(config.data), *parse_mixture(config.decay_data or config.data)}
    for number, name in enumerate(sorted(names)):
        rng = np.random.default_rng(number)
        words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(1200)]
        if is_packed(name):
            talks = [[{"role": "user", "content": a}, {"role": "assistant", "content": b * 2}]
                     for a, b in zip(words, words[1:])]
            packing.write_rows(folder / name / "bytes", TOKENIZER,
                               [("train" if i % 4 else "val", talk)
                                for i, talk in enumerate(talks)], BLOCK)
        else:
            texts = [("train" if i % 4 else "val", word * 3) for i, word in enumerate(words)]
            write_corpus(folder / name / "bytes", TOKENIZER, texts)
    return folder


def run(out, data_dir, *config, **options):
    """Train one update; return the last val_bpb of train.py."""
    options = {**TINY, "data_dir": data_dir, "out_dir": out, **options}
    train.main([*config, *(f"--{name}={value}" for name, value in options.items())])
    return metrics.read(out)[1][-1]["val_bpb"]


def evaluated(capsys, ckpt, data_dir, *options):
    capsys.readouterr()
    evaluate.main([f"--ckpt={ckpt}", f"--data_dir={data_dir}", "--task=bpb", "--json=True",
                   *options])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluate_says_what_train_said_for_every_config(name, data_dir, tmp_path, capsys):
    said = run(tmp_path / "run", data_dir, f"config/{name}")
    same = evaluated(capsys, tmp_path / "run", data_dir, f"--eval_tokens={TINY['eval_tokens']}")
    assert same["bpb"] == pytest.approx(said, rel=1e-6)
    # all held-out tokens, in the shares of the mixture
    every = evaluated(capsys, tmp_path / "run", data_dir)
    assert abs(every["bpb"] - said) < 4 * same["bpb_se"] and every["targets"] > 2 * same["targets"]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("data",
                         ["pytorch", "instruct", "pytorch:0.7,instruct:0.2,fineweb_edu:0.1"])
def test_the_mask_is_that_of_training(data, mask, data_dir, tmp_path, capsys):
    """It was that of packed rows, whatever the training: text trained with a mask was measured
    without it."""
    said = run(tmp_path / "run", data_dir, data=data, doc_mask=mask)
    found = evaluated(capsys, tmp_path / "run", data_dir, "--eval_tokens=1000")
    assert found["doc_mask"] is mask and found["bpb"] == pytest.approx(said, rel=1e-6)
    model = MiniCPM.from_pretrained(tmp_path / "run").eval()
    sources = {open_corpus(data_dir, name, TOKENIZER, "val"): share
               for name, share in parse_mixture(data).items()}
    other = measure(model, sources, TOKENIZER.token_bytes(), BLOCK, 1000, 16,
                    None if mask else TOKENIZER.bos)
    # so the mask shows in this number
    assert abs(other["bpb"] - said) > 1e-3


def test_without_a_mask_of_training_packed_rows_have_one_and_text_has_none(
        data_dir, tmp_path, capsys):
    """DPO compares answers in rows of their own; a released model says nothing of its training."""
    run(tmp_path / "sft", data_dir, data="instruct", doc_mask=True)
    (tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(8)))
    dpo.main([f"--init_from={tmp_path / 'sft'}", f"--pairs={tmp_path / 'pairs.jsonl'}",
              f"--out_dir={tmp_path / 'dpo'}", "--block_size=32", "--batch_size=2", "--max_steps=1",
              "--quiet=True", "--device=cpu", "--compile=False", "--data=instruct"])
    folder = checkpoint.resolve(tmp_path / "sft")
    meta = {key: value for key, value in checkpoint.read_meta(folder).items() if key == "model"}
    weights = dict(checkpoint.read_weights(folder))
    checkpoint.save_checkpoint(tmp_path / "imported", 0, {"model": weights}, meta, TOKENIZER.save)
    for ckpt in (tmp_path / "dpo", tmp_path / "imported"):
        assert evaluated(capsys, ckpt, data_dir, "--data=instruct")["doc_mask"]
        assert not evaluated(capsys, ckpt, data_dir, "--data=pytorch",
                             "--block_size=32")["doc_mask"]


# ---- a mixture, and its standard error

class Stub(SimpleNamespace):
    __hash__ = object.__hash__


def tiny_model():
    model = MiniCPM(MiniCPMConfig(vocab_size=TOKENIZER.n_vocab, n_layer=1, n_head=2, n_embd=16,
                                  n_ff=24, dim_model_base=16))
    init_weights(model, 0)
    return model.eval()


def corpora(data_dir, *names):
    return [open_corpus(data_dir, name, TOKENIZER, "val") for name in names]


def test_a_source_counts_by_its_share_however_little_of_it_there_is(data_dir, tmp_path):
    """Three windows at 0.9 and one hundred at 0.1: they were added up."""
    write_corpus(tmp_path / "short" / "bytes", TOKENIZER,
                 [("train", "x" * 200), ("val", "x" * 110)])
    (short,), (long,), model, sizes = corpora(
        tmp_path, "short"), corpora(data_dir, "pytorch"), tiny_model(), TOKENIZER.token_bytes()
    means = [held_out_loss(model, split, sizes, BLOCK, 10 ** 6, 16, "cpu").mean(1)
             for split in (short, long)]
    nats, targets, n_bytes = 0.9 * means[0] + 0.1 * means[1]
    for budget in (None, 3000):
        found = measure(model, {short: 0.9, long: 0.1}, sizes, BLOCK, budget, 16)
        assert found["bpb"] == pytest.approx(nats / math.log(2) / n_bytes,
                                             rel=1e-9 if budget is None else 0.01)
    assert measure(model, {short: 1.0}, sizes, BLOCK, None, 16)["targets"] == 3 * BLOCK


def test_the_standard_error_is_the_spread_of_repeated_draws(monkeypatch):
    rng, model = np.random.default_rng(0), Stub(wte=Stub(weight=torch.zeros(1)))
    sources = {Stub(n_tokens=1, level=2.0, windows=40): 0.7,
               Stub(n_tokens=1, level=5.0, windows=10): 0.3}

    def drawn(model, source, *rest):
        n_bytes = rng.integers(8, 24, source.windows)
        return np.stack([n_bytes * source.level + rng.normal(0, 3, source.windows),
                         np.full(source.windows, 8), n_bytes])
    monkeypatch.setattr("data.dataset.held_out_loss", drawn)
    found = [measure(model, sources, None, 8, None, 1) for _ in range(400)]
    spread = np.std([each["bpb"] for each in found])
    assert np.mean([each["bpb_se"] for each in found]) == pytest.approx(spread, rel=0.1)


def test_one_window_has_no_standard_error_and_a_split_without_text_no_bits(
        data_dir, tmp_path, capsys):
    """One window said +- 0.0000; a split of empty documents divided by its 0 bytes."""
    run(tmp_path / "run", data_dir, data="pytorch")
    assert evaluated(capsys, tmp_path / "run", data_dir, "--eval_tokens=40")["bpb_se"] is None
    evaluate.main([f"--ckpt={tmp_path / 'run'}", f"--data_dir={data_dir}", "--task=bpb",
                   "--eval_tokens=40"])
    assert "(one window) bits per byte" in capsys.readouterr().out
    marks = np.array([TOKENIZER.bos, TOKENIZER.eos] * BLOCK)
    empty = Stub(folder="empty", split="val", row=None, n_tokens=len(marks),
                 read=lambda offset, n: marks[offset:offset + n])
    (text,), model, sizes = corpora(data_dir, "pytorch"), tiny_model(), TOKENIZER.token_bytes()
    with pytest.raises(BadInput, match="empty: held-out data without text and answers"):
        measure(model, {empty: 1.0}, sizes, BLOCK, None, 16)
    of_text = measure(model, {text: 1.0}, sizes, BLOCK, None, 16)
    assert measure(model, {text: 0.5, empty: 0.5}, sizes, BLOCK, None,
                   16)["bpb"] == pytest.approx(of_text["bpb"])


def test_documents_are_kept_apart_in_packed_rows_only_if_nothing_is_known_of_the_training(data_dir):
    """A mixture with packed rows was masked as a whole."""
    (rows, text), model, sizes = corpora(data_dir, "instruct",
                                         "pytorch"), tiny_model(), TOKENIZER.token_bytes()

    def bpb(sources, bos, **options):
        return measure(model, sources, sizes, BLOCK, None, 16, bos, **options)["bpb"]
    apart, together = ({split: bpb({split: 1.0}, bos) for split in (rows, text)}
                       for bos in (TOKENIZER.bos, None))
    assert all(apart[split] != together[split] for split in (rows, text))
    assert bpb({rows: 1.0}, TOKENIZER.bos, rows_only=True) == apart[rows]
    assert bpb({text: 1.0}, TOKENIZER.bos, rows_only=True) == together[text]


def test_the_other_tasks_take_the_first_corpus_that_suits_them(data_dir, tmp_path, capsys):
    data = "instruct:0.5,pytorch:0.3,speeches:0.2"
    run(tmp_path / "run", data_dir, data=data)
    capsys.readouterr()
    argv = [f"--ckpt={tmp_path / 'run'}", f"--data_dir={data_dir}", "--context=4",
            "--continuation=4", "--questions=9", "--json=True"]
    evaluate.main(argv)
    found = json.loads(capsys.readouterr().out)
    evaluate.main([*argv, "--data=pytorch", "--task=cloze"])
    assert found["data"] == data and found["cloze"] == json.loads(capsys.readouterr().out)["cloze"]
    assert "bpb" in found
    # not the length of the rows
    evaluate.main([*argv, "--task=positions", "--block_size=2"])
    assert [row[:2] for row in json.loads(capsys.readouterr().out)["positions"]] == [[0, 2]]
    for task in ("cloze", "passkey", "positions"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*argv, "--data=instruct", f"--task={task}"])
        assert f"--task={task}: instruct is packed in rows" in capsys.readouterr().err


# ---- another RoPE

def test_scaling_can_be_turned_off_or_changed(data_dir, tmp_path, capsys):
    """What the checkpoint's own scaling uses was kept, and refused with the other one."""
    factors = "1,2,3,4"
    longrope = {"rope_scaling": "longrope", "rope_short_factor": factors,
                "rope_long_factor": factors, "original_max_position": 8}
    run(tmp_path / "longrope", data_dir, data="pytorch", **longrope)
    run(tmp_path / "dynamic", data_dir, data="pytorch", rope_scaling="dynamic", rope_factor=4)
    for ckpt in ("longrope", "dynamic"):
        own, plain = (evaluated(capsys, tmp_path / ckpt, data_dir, *options)["bpb"]
                      for options in ([], ["--rope_scaling=none"]))
        model = MiniCPM.from_pretrained(tmp_path / ckpt)
        evaluate.change_rope(model, evaluate.EvaluateConfig(rope_scaling="none"))
        assert own != plain and (model.config.rope_factor, model.config.rope_long_factor) == (1, ())
    evaluated(capsys, tmp_path / "longrope", data_dir, "--rope_scaling=linear", "--rope_factor=2")
    evaluated(capsys, tmp_path / "longrope", data_dir, "--max_position=32")
    assert MiniCPM.from_pretrained(tmp_path / "longrope").config.rope_long_factor == (1, 2, 3, 4)
