"""Long contexts: retrieval documents and their score, parts of a corpus by length, untying, limits,
the configs of each step."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_prepare import error_of, script

import sample
from configurator import ROOT, BadInput, configure
from data import passkeys
from data.corpus import write_corpus
from data.dataset import ANSWER, PADDING, Split, open_corpus
from data.tokenizer import load_tokenizer
from family import passkey
from model import KVCache, MiniCPM, MiniCPMConfig
from tools import evaluate, plan
from train import TrainConfig, main

BPE = load_tokenizer("bpe4096")
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Corpus 'speeches': one text to train on, another one held out."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "speeches" / "bpe4096", BPE,
                 [("train", TEXT * 3), ("val", TEXT.upper() * 3)])
    return folder


# ---- documents

def key_of(statement):
    return " " + statement.partition(" is ")[2].partition(".")[0]


def test_keys_are_disjoint_and_each_word_is_one_token():
    train, val = map(set, passkeys.KEYS.values())
    assert not train & val and len(train | val) == len(passkeys.WORDS) ** 2
    assert 0.05 < passkeys.CHANCE * len(val) < 0.15
    assert all(len(BPE.encode(" " + word)) == 1 for word in passkeys.NAMES + passkeys.WORDS)
    assert not set(passkeys.NAMES) & set(passkeys.WORDS)


@pytest.mark.parametrize("length", [100, 256])
@pytest.mark.parametrize("depths", [[0], [0.4], [1], [0.2, 0.9], [0.5, 0.1, 0.5]])
def test_a_document_has_its_length_its_keys_at_their_depths_and_the_answers_at_its_end(
        length, depths):
    filler = np.array(BPE.encode(TEXT))
    ids, asked_for = passkeys.make_document(np.random.default_rng(1), "val", filler, BPE, length,
                                            depths)
    again, _ = passkeys.make_document(np.random.default_rng(1), "val", filler, BPE, length, depths)
    assert len(ids) == length and ids[0] == BPE.bos and (ids == again).all()
    parts = BPE.decode(ids[1:].tolist()).split("What is it? ")
    body, asked = parts[0], parts[1:]
    assert len(asked) == len(depths) and asked_for[-1]
    assert BPE.decode(ids[asked_for].tolist()) == "".join(key_of(text) for text in asked)
    filler_tokens = len(BPE.encode(body)) - body.count("pass key") * 10
    # each question is its statement, word for word
    for text, depth in zip(asked, depths):
        statement = text.strip().rstrip(".") + ".\n"
        before = body[:body.index(statement)]
        place = len(BPE.encode(before)) - before.count("pass key") * 10
        assert key_of(statement) in passkeys.KEYS["val"] and abs(place - depth * filler_tokens) <= 3


def test_prepare_writes_answers_whose_keys_and_filler_are_the_split_s_own(data_dir, capsys):
    prepare = script("passkey")
    prepare.main([f"--data_dir={data_dir}", "--block_size=300", "--documents=50"])
    texts, most = {}, 0
    for split in ("train", "val"):
        corpus = open_corpus(data_dir, "passkey_300", BPE, split)
        tokens, classes = corpus.read(0, corpus.n_tokens), corpus.classes.read(0, corpus.n_tokens)
        # no document is cut
        assert corpus.row == 301 and (tokens.reshape(-1, 301)[:, 0] == BPE.bos).all()
        assert ((classes == PADDING) | (tokens != BPE.bos)).all()
        texts[split] = [text for text in BPE.decode(tokens.tolist()).split("</s>") if text]
        answers = BPE.decode(tokens[classes == ANSWER].tolist())
        assert answers == "".join(key_of(line.removeprefix("What is it?")) for text in texts[split]
                                  for line in text.split("\n") if line.startswith("What is it?"))
        for text in texts[split]:
            stated = [line for line in text.split("\n") if line.startswith("The pass key of")] + \
                ([text[3:].split("\n")[0]] if text.startswith("<s>The pass key of") else [])
            asked = [line.removeprefix("What is it? ")
                     for line in text.split("\n") if line.startswith("What is it?")]
            assert sorted(stated) == sorted(asked)
            assert all(key_of(line) in passkeys.KEYS[split] for line in asked)
            most = max(most, len(asked))
    assert len(texts["train"]) == 50 and most > 1
    assert "software" not in "".join(texts["val"]) and "SOFTWARE" in "".join(texts["val"])
    assert "--block_size=10: key, question and answer take" in error_of(
        prepare, [f"--data_dir={data_dir}", "--block_size=10"], capsys)
    assert "run python data/text/prepare.py" in error_of(
        prepare, [f"--data_dir={data_dir}", "--filler=nothing"], capsys)


# ---- score

class Stub:
    """A model whose likeliest next token is answer(ids): identity as head, one-hot hidden states.
    """

    def __init__(self, answer):
        self.answer, self.wte = answer, SimpleNamespace(weight=torch.zeros(1))
        self.head_weight = torch.eye(BPE.n_vocab)

    def hidden(self, idx):
        return torch.nn.functional.one_hot(self.answer(idx), BPE.n_vocab).float(), []


def copied(idx):
    """Predict the stated key at the two positions of the answer."""
    out = torch.zeros_like(idx)
    for row, seen in zip(idx.tolist(), out):
        stated = BPE.decode(row[1:]).split("The pass key of the ")[1]
        seen[-2:] = torch.tensor(BPE.encode(key_of(stated)))
    return out


def test_a_model_that_finds_every_key_scores_1_and_one_that_repeats_a_word_scores_0():
    filler = np.array(BPE.encode(TEXT))
    ask = lambda answer: passkey.retrieval(Stub(answer), BPE, filler, (64, 100), (0, 1), 12, 1, 512)
    assert ask(copied) == {64: [1, 1], 100: [1, 1]}
    word = BPE.encode(passkeys.KEYS["val"][0])[0]
    shares = ask(lambda idx: torch.full_like(idx, word))
    assert max(map(max, shares.values())) == 0
    # the first word alone
    half = ask(lambda idx: torch.where(torch.arange(idx.shape[1]) == idx.shape[1] - 2, copied(idx),
                                       0))
    assert half == {64: [0, 0], 100: [0, 0]}


def test_evaluate_prints_a_table_a_figure_and_loss_by_position_and_refuses_bad_options(
        data_dir, tmp_path, capsys):
    run(data_dir, tmp_path / "a")
    common = [f"--ckpt={tmp_path / 'a'}", f"--data_dir={data_dir}", "--data=speeches"]
    evaluate.main([*common, "--task=passkey", "--lengths=32,64", "--depths=0,1", "--questions=2",
                   f"--figure={tmp_path / 'map.png'}"])
    assert (tmp_path / "map.png").stat().st_size > 1000 and "chance 0.02" in capsys.readouterr().out
    evaluate.main([*common, "--task=positions", "--block_size=64", "--json=True"])
    plain = json.loads(capsys.readouterr().out)
    evaluate.main([*common, "--task=positions", "--block_size=64", "--json=True",
                   "--rope_scaling=dynamic", "--max_position=16", "--rope_factor=4"])
    scaled = json.loads(capsys.readouterr().out)
    assert [row[:2] for row in plain["positions"]] == [[0, 32], [32, 64]]
    assert plain["positions"] != scaled["positions"]
    evaluate.main([*common, "--task=bpb", "--block_size=64", "--json=True"])
    whole = json.loads(capsys.readouterr().out)["loss"]
    assert abs(np.mean([row[2] for row in plain["positions"]]) - whole) < 0.1
    for options, said in ((["--task=passkey", "--lengths=8"], "8 tokens: keys and questions alone"),
                          (["--task=passkey", "--lengths=99999"], "name a larger corpus"),
                          (["--task=passkey", "--depths=2"], "--depths"),
                          (["--task=passkey", "--figure=x.txt"], "--figure=x.txt"),
                          (["--task=positions", "--block_size=16", "--rope_factor=2"],
                           "--rope_factor=2.0: only with"),
                          (["--task=positions", "--block_size=2033"], "has only 2033 tokens")):
        assert said in error_of(evaluate, [*common, *options], capsys)


# ---- parts of a corpus by length

def test_a_part_by_length_stands_beside_the_whole(tmp_path, capsys):
    prepare_corpus = script("speeches").prepare.__globals__
    options = prepare_corpus["PrepareOptions"]
    documents = [(split, "word " * n) for split in ("train", "val") for n in (10, 100, 1000)]
    lengths = [len(BPE.encode(text)) for _, text in documents[:3]]
    prepare = prepare_corpus["prepare"]
    prepare("some", documents, options(data_dir=tmp_path))
    prepare("some", documents,
            options(data_dir=tmp_path, min_doc_tokens=lengths[1], suffix="_long"))
    prepare("some", documents,
            options(data_dir=tmp_path, max_doc_tokens=lengths[1] - 1, suffix="_short"))
    count = {name: open_corpus(tmp_path, name, BPE, "train").n_tokens
             for name in ("some", "some_long", "some_short")}
    assert count["some_short"] == lengths[0] + 2 and count["some_long"] == sum(lengths[1:]) + 4
    assert count["some"] == count["some_long"] + count["some_short"]
    assert "give --suffix" in error_of(script("speeches"), ["--min_doc_tokens=5"], capsys)


# ---- extension

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--n_ff=48", "--dim_model_base=16",
        "--data=speeches", "--batch_size=2", "--max_steps=2", "--block_size=32",
        "--sample_tokens=0", "--compile=False", "--quiet=True", "--eval_tokens=64"]


def run(data_dir, out, *options):
    main([*TINY, f"--data_dir={data_dir}", f"--out_dir={out}", *options])
    return MiniCPM.from_pretrained(out)


def test_the_next_step_unties_the_head_as_a_copy_and_changes_the_base(data_dir, tmp_path):
    before = run(data_dir, tmp_path / "a")
    after = run(data_dir, tmp_path / "b", f"--init_from={tmp_path / 'a'}",
                "--tie_word_embeddings=False", "--rope_theta=50000", "--rope_scaling=dynamic",
                "--rope_factor=4", "--max_position=64", "--block_size=64", "--doc_mask=True",
                "--learning_rate=1e-9", "--min_lr=0", "--schedule=constant")
    assert torch.allclose(after.lm_head.weight, before.wte.weight, atol=1e-6)
    assert after.lm_head.weight is not after.wte.weight
    assert (after.config.rope_theta, after.config.max_position, after.config.rope_factor) == (
        50000, 64, 4)
    assert sample.context_length(after) == 256


def test_generation_and_cache_beyond_the_context_are_refused_in_one_line(
        data_dir, tmp_path, capsys):
    run(data_dir, tmp_path / "a", "--max_position=32", "--rope_scaling=dynamic", "--rope_factor=2")
    # beyond the trained length, not beyond the scaled one
    sample.main([f"--ckpt={tmp_path / 'a'}", "--max_new_tokens=63"])
    assert "exceed the context of 64 tokens" in error_of(
        sample, [f"--ckpt={tmp_path / 'a'}", "--max_new_tokens=64"], capsys)
    model = MiniCPM.from_pretrained(tmp_path / "a")
    with pytest.raises(BadInput, match="the cache holds 64 tokens, but 65 are needed"):
        model(torch.zeros(1, 65, dtype=torch.long),
              cache=KVCache(model.config, 1, 64, torch.float32, "cpu"))


# ---- configs

STEPS = [path.name for pattern in ("*_long_*.py", "*_128k*.py")
         for path in sorted((ROOT / "config").glob(pattern))]


@pytest.mark.parametrize("name", STEPS)
def test_the_configs_parse_and_each_starts_from_the_result_of_another(name):
    (train_config, model), given = configure([f"config/{name}"], TrainConfig, MiniCPMConfig,
                                             usage="")
    starts = {"laptop_long_256.py": "out/laptop",
              "minicpm_128k_32k.py": "out/minicpm_2b/step-00261000"}
    # of other options
    out_dirs = {configure([str(path)], TrainConfig, MiniCPMConfig, usage="")[0][0].out_dir
                for path in (ROOT / "config").glob("*.py") if not path.stem.endswith("dpo")}
    assert train_config.init_from == starts.get(name, train_config.init_from)
    assert train_config.doc_mask
    assert train_config.init_from in out_dirs | set(starts.values())
    assert not model.tie_word_embeddings
    assert train_config.block_size <= model.max_position * model.rope_factor


def test_a_128k_sequence_of_the_2b_fits_a_gpu_of_80_gb(capsys):
    plan.main(["config/minicpm_128k.py", "--init_from=None", "--gpus=64", "--gpu=h100",
               "--recompute=1", "--micro_batch_size=1", "--json=True"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["block_size"] == 131072 and found["micro_batch_size"] == 1


def test_a_missing_part_of_a_corpus_names_the_script_that_makes_it(tmp_path):
    for name, maker in (("speeches_long", "data/speeches/prepare.py --tokenizer=bpe4096 (with"),
                        ("passkey_512", "data/passkey/prepare.py --tokenizer=bpe4096 (with"),
                        ("mine_long", "data/text/prepare.py --input=PATH --name=mine_long"),
                        ("plays", "data/plays/prepare.py --tokenizer")):
        with pytest.raises(BadInput, match=re.escape(maker)):
            Split(tmp_path / name / "bpe4096", "train")
