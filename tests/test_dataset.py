"""Corpora and batches: every token once an epoch, the same batch whoever asks, and damage that is named."""
import json
import time
from collections import Counter

import numpy as np
import pytest
import torch

import tokenizer
from configurator import BadInput
from dataset import HEADER, Split, drawn, held_out_windows, locate, make_batches, open_corpus, parse_mixture, permute, write_corpus


class Numbers:
    """A tokenizer for which "5 6" is [5, 6]: a token tells where it stood."""
    name, hash, bos, eos = "numbers", "0123456789abcdef", 0, 1

    def __init__(self, n_vocab=60_000):
        self.n_vocab = n_vocab

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def counting(first, n):
    return " ".join(map(str, range(first, first + n)))


def corpus(data_dir, name="a", n_tokens=203, shard_tokens=50, tok=Numbers()):
    """data_dir/NAME/numbers; the token at place p of a split is p + 2, but for <s> at its start and </s> at its end."""
    write_corpus(data_dir / name / "numbers", tok, [("train", counting(3, n_tokens - 2)), ("val", counting(3, 98))], shard_tokens)
    return open_corpus(data_dir, name, tok, "train")


def source(tmp_path, seed=1, block_size=8, bos=None, n_tokens={"a": 203, "b": 411}):
    splits = {name: corpus(tmp_path, name, n) for name, n in n_tokens.items() if not (tmp_path / name).exists()}
    return make_batches(lambda name: splits.get(name) or Split(tmp_path / name / "numbers", "train"), seed, block_size, bos)


def test_reads_cross_shards(tmp_path):
    split = corpus(tmp_path)
    whole = np.array([0, *range(3, 204), 1])
    assert len(split.shards) == 5 and split.n_tokens == 203 and split.read(0, 203).dtype == np.int64
    for offset in range(203):
        for length in (1, 9, 60, 203 - offset):
            assert (split.read(offset, length) == whole[offset:offset + length]).all() or offset + length > 203


def test_large_vocabularies_take_four_bytes(tmp_path):
    for n_vocab, itemsize in ((2 ** 16, 2), (2 ** 16 + 1, 4)):
        top = str(n_vocab - 1)
        write_corpus(tmp_path / str(n_vocab), Numbers(n_vocab), [("train", top), ("val", top)])
        split = Split(tmp_path / str(n_vocab), "train")
        assert split.read(0, 3).tolist() == [0, n_vocab - 1, 1]
        assert (tmp_path / str(n_vocab) / split.shards[0]).stat().st_size == HEADER.size + 3 * itemsize


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(n):
    orders = [[permute(i, n, key) for i in range(n)] for key in (0, 7, 2 ** 64 - 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 16 or len(set(map(tuple, orders))) == 3 and orders[0] != list(range(n))


def test_an_epoch_reads_every_block_once_and_the_next_in_another_order(tmp_path):
    batches, n_blocks = source(tmp_path), 24                             # (203 - 1) // 8 - 1: one block is left to shift by
    epochs = [batches([[0, "a"]], n_blocks * epoch, n_blocks)[0] for epoch in range(8)]
    orders, phases = [], set()
    for epoch in epochs:
        places = epoch["idx"][:, 1].sub(3)                               # of a sample's first token
        phase = places.min()
        assert 0 <= phase and places.max() <= 203 - 9
        assert (places.sort().values == phase + 8 * torch.arange(n_blocks)).all()
        inside = epoch["targets"] != 1
        assert (epoch["targets"][:, :-1] == epoch["idx"][:, 1:]).all() and (epoch["targets"] == epoch["idx"] + 1)[inside & (epoch["idx"] > 0)].all()
        orders.append(tuple((places - phase).tolist()))
        phases.add(int(phase))
    assert len(set(orders)) == 8 and len(phases) > 3


def test_mixtures_keep_their_shares_exactly_and_segments_go_on_where_the_last_stopped():
    plan = [[0, "a"], [1300, "a:0.7,b:0.29,c:0.01"], [1300, "b:3,c:1"], [3456, "c"], [4000, "a:1,b:2"]]
    seen = [locate(plan, 5, i) for i in range(7000)]
    assert Counter(name for name, _ in seen[1300:2300]) == Counter(name for name, _ in seen[2300:3300]) == {"b": 750, "c": 250}
    assert Counter(name for name, _ in seen[4000:5000]) == {"a": 333, "b": 667}
    for name in "abc":
        indices = [index for n, index in seen if n == name]
        assert indices == list(range(len(indices))), f"{name}: samples repeated or left out"
    for mixture in ("a:0.7,b:0.29,c:0.01", "a:0.9999,b:0.0001", "a:1,b:1,c:1"):
        assert sum(drawn(mixture, 5, 1000).values()) == 1000 and min(drawn(mixture, 5, 1000).values()) > 0
        assert drawn(mixture, 5, 1234) == Counter(locate([[0, mixture]], 5, i)[0] for i in range(1234))
    assert drawn("a:0.7,b:0.29,c:0.01", 5, 3000) == {"a": 2100, "b": 870, "c": 30}


def test_a_batch_depends_on_seed_plan_and_index_alone(tmp_path):
    """Resume, and any number of processes: however samples are asked for, in whatever order, they are the same."""
    plan = [[0, "a:0.7,b:0.3"], [20, "b"]]
    whole, n = source(tmp_path)(plan, 16, 8)
    assert n == 8 * 8 and whole["idx"].shape == whole["targets"].shape == (8, 8) and whole["idx"].dtype == torch.int64
    fresh = source(tmp_path)
    for parts in ([(20, 4), (16, 4)], [(i, 1) for i in range(23, 15, -1)]):
        rows = torch.cat([fresh(plan, first, count)[0]["idx"] for first, count in sorted(parts)])
        assert (rows == whole["idx"]).all()
    for seed in (2, -1):                                                 # a negative seed raised ValueError once
        assert (source(tmp_path, seed)(plan, 16, 8)[0]["idx"] != whole["idx"]).any()
    later = [[0, "a:0.7,b:0.3"], [20, "b"], [24, "a"]]
    assert (fresh(later, 16, 8)[0]["idx"] == whole["idx"]).all(), "a segment to come changes nothing before it"


def test_doc_ids_count_the_documents(tmp_path):
    write_corpus(tmp_path / "numbers", Numbers(), [("train", "5 6 7")] * 40 + [("val", "5")])
    batch, _ = make_batches(lambda name: Split(tmp_path / "numbers", "train"), 1, 12, bos=0)([[0, "a"]], 0, 10)
    for idx, ids in zip(batch["idx"].tolist(), batch["doc_ids"].tolist()):
        assert ids == [idx[:i + 1].count(0) for i in range(12)] and max(ids) >= 2
    assert "doc_ids" not in source(tmp_path)([[0, "a"]], 0, 2)[0]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def patch(path, at, data):
    raw = bytearray(path.read_bytes())
    raw[at:at + len(data)] = data
    path.write_bytes(raw)


def test_damage_is_one_line_that_names_the_file(tmp_path):
    """A meta.json without vocab_size once came through as a KeyError."""
    def meta(**changes):
        return lambda folder: (folder / "meta.json").write_text(json.dumps(json.loads((folder / "meta.json").read_text()) | changes))

    shard = "train_000002.bin"
    for number, (named, says, damage) in enumerate([
        (shard, "truncated", lambda f: cut(f / shard, -1)), (shard, "truncated header", lambda f: cut(f / shard, 5)),
        (shard, "not a token shard", lambda f: patch(f / shard, 0, b"GGUF")), (shard, "not a token shard", lambda f: patch(f / shard, 8, b"\2")),
        (shard, "vocabulary of", lambda f: patch(f / shard, 16, b"\1")), (shard, "missing", lambda f: (f / shard).unlink()),
        ("", "token id 65535", lambda f: patch(f / shard, HEADER.size + 40, b"\xff\xff")),
        ("", "no corpus here", lambda f: (f / "meta.json").unlink()), ("", "another 'numbers' tokenizer", meta(tokenizer_hash="f" * 16)),
        ("meta.json", "damaged", lambda f: cut(f / "meta.json", 100)), ("meta.json", "damaged", lambda f: patch(f / "meta.json", 5, b"\xff")),
        ("meta.json", "damaged", meta(splits=[])), ("meta.json", "damaged", meta(vocab_size=None)), ("meta.json", "damaged", meta(tokenizer_hash=5)),
        ("meta.json", "damaged", meta(splits={"train": {"shards": 5, "tokens": 3}})),
        ("meta.json", "shards hold 0 tokens", meta(splits={"train": {"shards": [], "tokens": 3}})),
    ]):
        corpus(tmp_path, f"a{number}")
        damage(folder := tmp_path / f"a{number}" / "numbers")
        with pytest.raises(BadInput) as caught:
            open_corpus(tmp_path, f"a{number}", Numbers(), "train").read(0, 203)
        line = str(caught.value)
        assert "\n" not in line and str(folder / named) in line and says in line, line
    with pytest.raises(BadInput, match=r"nowhere.numbers: no corpus here; run python data/text/prepare.py --input=PATH --name=nowhere "):
        open_corpus(tmp_path, "nowhere", Numbers(), "train")
