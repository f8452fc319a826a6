"""Corpora and batches: an epoch reads every token once, a batch depends on its index alone, damage
is reported."""
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

import train as train_module
from configurator import ROOT, BadInput, build
from data.corpus import write_corpus, write_shard
from data.dataset import (
    HEADER,
    MAGIC,
    PADDING,
    TEXT,
    VERSION,
    Prefetch,
    Source,
    Split,
    check_block_size,
    count_epochs,
    held_out_loss,
    held_out_windows,
    locate,
    make_batches,
    open_corpus,
    open_data,
    parse_mixture,
    permute,
    samples_drawn,
)
from data.packing import write_rows
from data.tokenizer import load_tokenizer
from engine import metrics
from engine.distributed import World
from engine.run import new_state
from train import TrainConfig


class Numbers:
    """A tokenizer for which "5 6" is [5, 6], so that a token tells its position."""
    name, hash, n_vocab, bos, eos = "numbers", "0123456789abcdef", 60_000, 0, 1

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def corpus(data_dir, name="a", n_tokens=203, shard_tokens=50):
    """data_dir/NAME/numbers: <s> 3 4 5 ... </s>, so that the token at position p is p + 2."""
    texts = [(split, " ".join(map(str, range(3, n + 1))))
             for split, n in (("train", n_tokens), ("val", 102))]
    write_corpus(data_dir / name / "numbers", Numbers(), texts, shard_tokens)
    return open_corpus(data_dir, name, Numbers(), "train")


def test_reads_cross_shards_and_large_vocabularies_take_four_bytes(tmp_path):
    split, whole, tok = corpus(tmp_path), np.array([0, *range(3, 204), 1]), Numbers()
    assert np.diff(split.starts).tolist() == [50, 50, 50, 50, 3]
    assert split.read(0, 203).dtype == np.int64
    assert all((split.read(at, n) == whole[at:at + n]).all() for at in range(203)
               for n in (1, 60, 203) if at + n <= 203)
    for tok.n_vocab, itemsize in ((2 ** 16, 2), (2 ** 16 + 1, 4)):
        write_corpus(folder := tmp_path / str(itemsize), tok,
                     [("train", str(tok.n_vocab - 1)), ("val", "5")])
        assert Split(folder, "train").read(0, 3).tolist() == [0, tok.n_vocab - 1, 1]
        assert (folder / "train_000000.bin").stat().st_size == HEADER.size + 3 * itemsize


def test_permute_is_a_bijection():
    for n in (1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000):
        orders = [tuple(permute(i, n, key) for i in range(n)) for key in (0, 7, 2 ** 64 - 1)]
        assert all(sorted(order) == list(range(n)) for order in orders)
        assert n < 16 or len({*orders, tuple(range(n))}) == 4


def test_an_epoch_reads_every_block_once_and_the_next_epoch_has_another_order(tmp_path):
    # (203 - 1) // 8 - 1: one block is left over, so that the phase can shift the others
    split, n_blocks = corpus(tmp_path), 24
    batches, orders, phases = make_batches(lambda name: split, 1, 8), set(), set()
    for epoch in range(8):
        batch, n = batches([[0, "a"]], n_blocks * epoch, n_blocks)
        assert n == n_blocks * 8 and (batch["targets"][:, :-1] == batch["idx"][:, 1:]).all()
        # positions of the first tokens of the samples
        phase = int((positions := batch["idx"][:, 1] - 3).min())
        assert (positions.sort().values == phase + 8 * torch.arange(n_blocks)).all()
        assert 0 <= phase < 203 - n_blocks * 8
        orders, phases = orders | {tuple((positions - phase).tolist())}, phases | {phase}
    assert len(orders) == 8 and len(phases) > 3


def test_mixtures_keep_their_shares_exactly_and_segments_continue_where_the_last_one_stopped():
    plan = [[0, "a"], [1300, "a:0.7,b:0.29,c:0.01"], [1300, "b:3,c:1"], [3456, "c"],
            [4000, "a:1,b:2"]]
    seen, other = [[locate(plan, seed, i) for i in range(7000)] for seed in (5, 6)]
    assert all(Counter(name for name, _ in seen[i:i + 1000]) == {"b": 750, "c": 250}
               for i in (1300, 2300))
    assert seen != other
    for name in "abc":
        assert [index for n, index in seen if n == name] == list(
            range(sum(n == name for n, _ in seen))), "repeated or left out"
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()
    assert digest.startswith("ca1e8c00c3fcfce5"), "the order of runs that exist has changed"
    for mixture in ("a:0.7,b:0.29,c:0.01", "a:1,b:1,c:1"):
        names = parse_mixture(mixture)
        located = Counter(locate([[0, mixture]], 5, i)[0] for i in range(1234))
        assert located == {name: samples_drawn(name, mixture, 5, 1234) for name in names}
    assert [samples_drawn(name, "a:0.7,b:0.29,c:0.01", 5, 3000)
            for name in "abcd"] == [2100, 870, 30, 0]


def test_small_shares_and_many_sources_are_kept_and_the_order_is_found_without_state():
    """A share of 0.01 % was 0.1 % once, and the largest of 1,500 sources had a negative number of
    samples."""
    many = ",".join(f"s{i}:{1 + i % 5}" for i in range(1500))
    for mixture, period in (("a:0.7,b:0.29,c:0.01", 1000), ("a:0.9999,b:0.0001", 10_000),
                            ("a:0.9985,b:0.0015", 10_000), ("a:0.99999,b:0.00001", 100_000),
                            (many, 100_000)):
        drawn = {name: samples_drawn(name, mixture, 5, 3 * period)
                 for name in parse_mixture(mixture)}
        assert sum(drawn.values()) == 3 * period
        for name, share in parse_mixture(mixture).items():
            assert drawn[name] / (3 * period) == pytest.approx(share, rel=0.05), (name, mixture)
        for first in (0, 2 * period - 500):
            seen = [locate([[0, mixture]], 5, i) for i in range(first, first + 1000)]
            # found without what came before
            for name, index in seen[::-97]:
                before = samples_drawn(name, mixture, 5, first) + sum(
                    n == name for n, _ in seen[:seen.index((name, index))])
                assert index == before
    with pytest.raises(BadInput, match=r"--data: the share of b, 1e-05 %, is too small "
                       r"to be kept to 5 % within 1,000,000 samples"):
        parse_mixture("a:1,b:0.0000001")


def test_a_batch_depends_on_seed_plan_and_index_alone(tmp_path):
    """Samples are the same for any order and size of requests: resume and number of processes
    change nothing. A negative seed once raised ValueError."""
    splits = {"a": corpus(tmp_path), "b": corpus(tmp_path, "b", 411)}
    plan = [[0, "a:0.7,b:0.3"], [20, "b"]]
    batches, again, other, negative = [make_batches(splits.get, seed, 8) for seed in (1, 1, 2, -1)]
    whole = batches(plan, 16, 8)[0]["idx"]
    for size in (4, 1):
        # in reverse order
        parts = {first: again(plan, first, size)[0]["idx"] for first in range(24 - size, 15, -size)}
        assert torch.equal(torch.cat([parts[first] for first in sorted(parts)]), whole)
    assert torch.equal(again([*plan, [24, "a"]], 16, 8)[0]["idx"],
                       whole), "a later segment changes nothing before it"
    assert len({str(source([[0, "b"]], 0, 8)[0]["idx"].tolist())
                for source in (batches, again, other, negative)}) == 3


def test_doc_ids_count_the_documents(tmp_path):
    write_corpus(tmp_path / "numbers", Numbers(), [("train", "5 6 7")] * 40 + [("val", "5")])
    batch, _ = make_batches(lambda name: Split(tmp_path / "numbers", "train"), 1, 12,
                            bos=0)([[0, "a"]], 0, 10)
    assert batch["doc_ids"].tolist() == [[row[:i + 1].count(0) for i in range(12)]
                                         for row in batch["idx"].tolist()]
    assert batch["doc_ids"].max() == 3


def test_held_out_windows_have_one_shape(tmp_path):
    # 102 tokens: 12 windows of 8
    split = Split(corpus(tmp_path).folder, "val")
    for tokens, starts in ((96, range(0, 96, 8)), (40, (0, 16, 40, 64, 88)), (1, (0,))):
        batches = list(held_out_windows(split, 8, tokens, 5))
        assert {batch[key].shape for batch in batches for key in batch} == {(5, 8)}
        assert len(batches) == -(-len(starts) // 5)
        idx, targets = (torch.cat([batch[key] for batch in batches]) for key in ("idx", "targets"))
        assert (idx[:len(starts), 1] - 3).tolist() == list(starts)
        assert torch.equal(targets[:len(starts), :-1], idx[:len(starts), 1:])
        assert (targets[len(starts):] == -100).all() and (targets[:len(starts)] >= 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_shares_of_all_ranks_are_the_batches_of_one_process(tmp_path, ranks):
    split = Split(corpus(tmp_path).folder, "val")
    for tokens in (96, 40, 1):
        whole = list(held_out_windows(split, 8, tokens, 5))
        shares = [list(held_out_windows(split, 8, tokens, 5, rank, ranks)) for rank in range(ranks)]
        assert {len(share) for share in shares} == {-(-len(whole) // ranks)}
        batches = [batch for share in shares for batch in share]
        for one, many in zip(whole, batches):
            assert all(torch.equal(one[key], many[key]) for key in one)
        assert all((batch["targets"] == -100).all() for batch in batches[len(whole):])


def test_a_split_that_cannot_be_used_says_what_to_do(tmp_path):
    """A split without a target ended in a ZeroDivisionError; --val_share was not mentioned."""
    check_block_size(val := Split(corpus(tmp_path).folder, "val"), 101)
    with pytest.raises(BadInput, match="--block_size=102: the val split of a has only 102 "
                       "tokens; lower --block_size or .* a larger --val_share"):
        check_block_size(val, 102)
    with pytest.raises(BadInput,
                       match="the train split of a has only 203 tokens; lower --block_size$"):
        check_block_size(Split(val.folder, "train"), 300)

    def model(idx, targets, doc_ids):
        return torch.zeros(idx.shape), {}
    token_bytes = np.zeros(Numbers.n_vocab, np.int64)
    assert not held_out_loss(model, val, token_bytes, 8, 96, 4, "cpu")[2].any()
    tok = load_tokenizer("bytes")
    text = [(split, [(tok.bos, PADDING), (5, TEXT), (tok.eos, TEXT)]) for split in ("train", "val")]
    write_rows(tmp_path / "b" / "bytes", tok, text, 7, fit=lambda tokenizer, pairs, row: (pairs, 0))
    train = open_corpus(tmp_path, "b", tok, "train")
    assert held_out_loss(model, train, tok.token_bytes(), 7, 96, 4, "cpu").shape == (3, 0)
    assert make_batches(lambda name: train, 1, 7)([[0, "b"]], 0, 2)[1] == 0


def test_the_hash_of_a_corpus_tells_whether_it_was_prepared_anew_from_the_same_documents(tmp_path):
    first = {name: corpus(tmp_path, name, n).corpus_sha256 for name, n in (("a", 203), ("b", 211))}
    assert len({*first.values()}) == 2
    assert corpus(tmp_path / "again").corpus_sha256 == first["a"]
    meta = json.loads((path := tmp_path / "a" / "numbers" / "meta.json").read_text())
    # as early versions wrote it
    del meta["corpus_sha256"]
    path.write_text(json.dumps(meta))
    assert open_corpus(tmp_path, "a", Numbers(), "train").corpus_sha256 is None


def test_packed_rows_without_doc_mask_are_noted(tmp_path, capsys):
    tok = load_tokenizer("bytes")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_rows(tmp_path / "talk" / "bytes", tok, [("train", messages), ("val", messages)], 16)
    write_corpus(tmp_path / "text" / "bytes", tok,
                 [(split, "plain words " * 9) for split in ("train", "val")])
    for options, noted in (({}, True), ({"doc_mask": True}, False), ({"quiet": True}, False),
                           ({"data": "text"}, False),
                           ({"data": "text", "decay_data": "text:0.5,talk:0.5"}, True)):
        (config,) = build([TrainConfig],
                          {"data": "talk", "max_steps": 2, "block_size": 16,
                           "data_dir": str(tmp_path)} | options)
        open_data(config, tok)
        said = capsys.readouterr().out
        assert ("of a row of talk attend to each other; --doc_mask=True" in said) == noted
        assert said.count("\n") == noted


def test_a_failing_write_leaves_nothing_behind(tmp_path):
    """An empty folder data/NAME was left once."""
    (tmp_path / "data" / "b").mkdir(parents=True)
    for folder, documents in (("data/a", (("train", str(1 // n)) for n in (1, 0))), ("data/b", []),
                              ("new/a", [("train", "5")])):
        # a document fails; no documents; no held-out documents
        with pytest.raises((BadInput, ZeroDivisionError)):
            write_corpus(tmp_path / folder / "numbers", Numbers(), documents)
    assert [path.relative_to(tmp_path).as_posix()
            for path in sorted(tmp_path.rglob("*"))] == ["data", "data/b"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_write_keeps_the_corpus_that_is_there(tmp_path, overwrite):
    folder = corpus(tmp_path).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def documents():
        yield "train", "5"
        raise OSError("no space left on the device")
    with pytest.raises(OSError, match="no space"):
        write_corpus(folder, Numbers(), documents(), overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_damage_is_one_line_that_names_the_file(tmp_path):
    """A meta.json without vocab_size once came through as a KeyError."""
    shard = "train_000002.bin"

    def patch(name, at, data):
        return lambda f: (f / name).write_bytes((raw := (f / name).read_bytes())[:at] + data
                                                + (raw[at + len(data):] if data else b""))

    def meta(**changes):
        return lambda f: (f / "meta.json").write_text(
            json.dumps(json.loads((f / "meta.json").read_text()) | changes))
    for number, (named, says, damage) in enumerate([
        (shard, "truncated", patch(shard, -1, b"")),
        (shard, "truncated header", patch(shard, 5, b"")),
        (shard, "missing", lambda f: (f / shard).unlink()),
        (shard, "not a token shard", patch(shard, 0, b"GGUF")),
        (shard, "version 2", patch(shard, 8, b"\2")),
        (shard, "vocabulary", patch(shard, 16, b"\1")),
        ("", "token id 65535", patch(shard, HEADER.size + 40, b"\xff\xff")),
        ("", "no corpus here", lambda f: (f / "meta.json").unlink()),
        ("", "another 'numbers' tokenizer", meta(tokenizer_hash="f" * 16)),
        ("", "shards hold 0", meta(splits={"train": {"shards": [], "tokens": 3}})),
        *(("meta.json", "damaged", damage) for damage in (
            patch("meta.json", 100, b""), patch("meta.json", 5, b"\xff"), meta(splits=[]),
            meta(vocab_size=None), meta(tokenizer_hash=5),
            meta(splits={"train": {"shards": 5, "tokens": 3}}))),
    ]):
        damage(folder := corpus(tmp_path, f"a{number}").folder)
        with pytest.raises(BadInput) as caught:
            open_corpus(tmp_path, folder.parent.name, Numbers(), "train").read(0, 203)
        assert "\n" not in str(caught.value) and str(folder / named) in str(caught.value)
        assert says in str(caught.value)
    with pytest.raises(BadInput, match=r"nowhere.numbers: no corpus here; run python "
                       r"data/text/prepare.py --input=PATH --name=nowhere "):
        open_corpus(tmp_path, "nowhere", Numbers(), "train")


def test_shards_are_opened_when_they_are_read_and_old_corpora_still_open(tmp_path):
    folder = corpus(tmp_path).folder
    whole, raw = Split(folder, "train").read(0, 203), (folder / "meta.json").read_text()
    # is not opened at the start...
    (folder / "train_000003.bin").write_bytes(b"")
    split = Split(folder, "train")
    assert (split.read(0, 150) == whole[:150]).all()
    with pytest.raises(BadInput, match="train_000003.bin: truncated header"):
        split.read(149, 2)                                               # ...but when it is read
    write_shard(folder / "train_000003.bin", whole[:49], Numbers.n_vocab)
    with pytest.raises(BadInput, match="train_000003.bin: holds 49 tokens, meta.json says 50"):
        split.read(149, 2)
    write_shard(folder / "train_000003.bin", whole[150:200], Numbers.n_vocab)
    meta = json.loads(raw)
    # as early versions wrote it: without counts
    for about in meta["splits"].values():
        del about["counts"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert (Split(folder, "train").read(0, 203) == whole).all()
    for counts in ([203], [50, 50, 50, 50, "3"], 5):
        meta["splits"]["train"]["counts"] = counts
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(BadInput, match="meta.json: damaged"):
            Split(folder, "train")


READ = """
import json, resource, sys
sys.path.insert(0, {root!r})
from data.dataset import Split
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
headers, plain = [], Split.read_header
Split.read_header = lambda self, name: headers.append(name) or plain(self, name)
split = Split({folder!r}, "train")
tokens = [split.read(at, 5).tolist() for _ in range(3) for at in range(0, split.n_tokens, 5)]
print(json.dumps([len(headers), tokens]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_NOFILE")
def test_shards_stay_open_without_a_file_descriptor_each(tmp_path):
    """Of more than 64 shards all were opened and checked again and again."""
    folder = corpus(tmp_path, n_tokens=1000, shard_tokens=5).folder
    code = READ.format(root=str(ROOT), folder=str(folder))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    headers, tokens = json.loads(said.stdout)
    assert headers == 200 and sum(tokens, []) == 3 * [0, *range(3, 1001), 1]


def test_what_is_written_to_the_array_does_not_reach_the_shard(tmp_path):
    split = corpus(tmp_path)
    split.open_shard(0)[:] = 7
    assert Split(split.folder, "train").read(0, 3).tolist() == [0, 3, 4]


def test_a_trillion_tokens_are_addressed_without_holding_anything(tmp_path):
    """The 1.1T tokens of the paper in 11,000 shards, here hard links to one sparse file."""
    n_shards, per_shard = 11_000, 10 ** 8
    write_shard(tmp_path / "one", np.zeros(0), Numbers.n_vocab)
    with open(tmp_path / "one", "r+b") as f:
        f.write(HEADER.pack(MAGIC, VERSION, 2, Numbers.n_vocab, per_shard))
        # sparse: takes no disk space
        f.truncate(HEADER.size + 2 * per_shard)
    names = [f"train_{n:06d}_000000.bin" for n in range(n_shards)]
    for name in names:
        os.link(tmp_path / "one", tmp_path / name)
    about = {"tokens": n_shards * per_shard, "shards": names, "counts": [per_shard] * n_shards}
    meta = {"tokenizer_hash": "", "vocab_size": Numbers.n_vocab, "splits": {"train": about}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    tracemalloc.start()
    began = time.perf_counter()
    split = Split(tmp_path, "train")
    offsets = []
    read = split.read
    split.read = lambda offset, length: offsets.append(offset) or read(offset, length)
    batches = make_batches(lambda name: split, 1, 4096)
    # 67,000 batches of 4M tokens are a quarter of it
    for step in (0, 10 ** 5, 67_000):
        batches([[0, "a:0.7,b:0.3"]], 1024 * step, 32)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(offsets)) == 96 and max(offsets) > 0.9 * split.n_tokens
    assert min(offsets) < 0.1 * split.n_tokens
    assert seconds < 5 and peak < 20e6, (seconds, peak)
    with pytest.raises(BadInput, match="train_010999_000000.bin: shard is missing"):
        (tmp_path / names[-1]).unlink()
        Split(tmp_path, "train")


def test_malformed_mixtures_are_refused():
    assert parse_mixture("a") == parse_mixture("a:7") == {"a": 1.0}
    assert parse_mixture(" a:3, b:1") == {"a": 0.75, "b": 0.25}
    for text in ("", "a,b", "a:0.5,b", "a:0.5,a:0.5", "a:0,b:1", "a:-1,b:2", "a:x", "a:", ":1",
                 "a:nan", "a:inf", "a:1,,b:1"):
        with pytest.raises(BadInput,
                           match=f"^--data='{text}': give NAME or NAME:WEIGHT,.* above 0$"):
            parse_mixture(text)


def test_the_loader_is_faster_than_training_on_a_laptop(tmp_path):
    """About 20M tokens/s on an idle core; 1M is required, because the machine may be busy."""
    split, times = corpus(tmp_path, n_tokens=50_000, shard_tokens=20_000), []
    batches = make_batches(lambda name: split, 1, 256)
    for step in range(200):
        began = time.perf_counter()
        batches([[0, "a:0.7,b:0.3"]], 8 * step, 8)
        times.append(time.perf_counter() - began)
    print(f"{8 * 256 / np.median(times) / 1e6:.1f}M tokens/s")
    assert 8 * 256 / np.median(times) > 1e6


# ---- the next batch, prepared in a thread

def recorded(requests, batches):
    """batches, which also records the requests and the thread that makes them."""
    def source(plan, first, count):
        requests.append((first, count, threading.current_thread().name))
        return batches(plan, first, count)
    return source


def test_the_next_batch_is_prepared_ahead_and_every_batch_is_the_one_asked_for(tmp_path):
    splits = {"a": corpus(tmp_path), "b": corpus(tmp_path, "b", 411)}
    plain, requests = make_batches(splits.get, 1, 8, bos=0), []
    plan = [[0, "a:0.7,b:0.3"]]
    with Prefetch(recorded(requests, plain), World(1, 2), ahead=True) as batches:
        def same(first, count):
            got, expected = batches(plan, first, count), plain(plan, first, count)
            assert got[1] == expected[1] and got[0].keys() == expected[0].keys()
            assert all(torch.equal(got[0][key], expected[0][key]) for key in got[0])
        for first in (4, 12, 20, 28):       # rank 1 of 2 has 4 of the 8 samples of an update
            same(first, 4)
        batches.future.result()
        assert [first for first, *_ in requests] == [4, 12, 20, 28, 36]
        plan.append([36, "b"])              # the decay begins: the prepared batch is of no use
        same(36, 4)
        same(44, 2)                         # another batch size
        same(300, 2)                        # skipped samples
        same(4, 4)                          # once more from the start
    assert {name for *_, name in requests} == {"next-batch_0"}
    requests.clear()
    with Prefetch(recorded(requests, plain), World(1, 2)) as batches:   # a CPU: no thread
        same(4, 4)
    assert requests == [(4, 4, threading.current_thread().name)]


def test_a_damaged_shard_is_reported_in_the_step_that_reads_it(tmp_path):
    split = corpus(tmp_path)
    batches = make_batches(lambda name: split, 1, 8)
    for damaged in range(24):               # the first sample that reads shard 2, of one epoch
        idx = batches([[0, "a"]], damaged, 1)[0]["idx"]
        if ((idx >= 102) & (idx < 152)).any():
            break
    path = split.folder / "train_000002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    split = Split(split.folder, "train")
    with Prefetch(make_batches(lambda name: split, 1, 8), World(), ahead=True) as batches:
        for first in range(damaged):
            batches([[0, "a"]], first, 1)
        for _ in range(2):                  # nothing is forgotten, whoever asks again
            with pytest.raises(BadInput, match="train_000002.bin: 131 bytes instead of 132"):
                batches([[0, "a"]], damaged, 1)


def test_a_run_with_a_thread_is_the_run_without_one(train_tiny, monkeypatch):
    """Decay data, a batch schedule, a failure and a resume. The thread ends with the run."""
    options = ["--max_steps=12", "--decay_steps=4", "--decay_data=two:0.5,one:0.5",
               "--batch_schedule=0:4,3:8", "--micro_batch_size=4", "--save_interval=5"]
    plain, requests, threads = train_tiny("plain", *options), [], threading.enumerate()
    loop = train_module.train

    def failing(*args, **kwargs):
        for update in loop(*args, **kwargs):
            if update.step == 7:
                raise InterruptedError
            yield update
    monkeypatch.setattr(train_module, "Prefetch", lambda batches, world: Prefetch(
        recorded(requests, batches), world, ahead=True))
    monkeypatch.setattr(train_module, "train", failing)
    with pytest.raises(InterruptedError):
        train_tiny("ahead", *options)
    assert threading.enumerate() == threads
    monkeypatch.setattr(train_module, "train", loop)
    ahead = train_tiny("ahead", *options)
    assert threading.enumerate() == threads
    assert {name for *_, name in requests} == {"next-batch_0"}
    curves = [[(x["step"], x["loss"], x["grad_norm"]) for x in metrics.read(run)[0]]
              for run in (plain, ahead)]
    assert len(curves[0]) == 12 and curves[0] == curves[1]
    assert metrics.read(plain)[1] == metrics.read(ahead)[1]


# ---- epochs

def test_epochs_are_the_samples_drawn_over_the_samples_there_are():
    plan = [[0, "a:0.7,b:0.3"], [1300, "b:3,c:1"], [2345, "c"]]
    sources = {name: Source(None, samples) for name, samples in zip("abc", (100, 250, 7))}
    drawn = Counter(locate(plan, 5, i)[0] for i in range(3000))
    found = count_epochs(plan, 5, 3000, sources)
    assert found == {name: drawn[name] / sources[name].samples for name in "abc"}
    del sources["a"]                        # only the trunk of this branch has read it
    assert set(count_epochs(plan, 5, 3000, sources)) == {"b", "c"}


def test_an_epoch_has_as_many_samples_as_a_run_reads_without_repeats(tmp_path):
    """Also of packed rows."""
    tok = load_tokenizer("bytes")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_rows(tmp_path / "talk" / "bytes", tok, [("train", messages), ("val", messages)] * 9, 16)
    write_corpus(tmp_path / "text" / "bytes", tok,
                 [("train", "".join(map(chr, range(32, 127))) * 2), ("val", "x" * 20)])
    for name in ("text", "talk"):
        (config,) = build([TrainConfig], {"data": name, "max_steps": 2, "block_size": 16,
                                          "doc_mask": True, "data_dir": str(tmp_path)})
        batches, _, sources = open_data(config, tok)
        n = sources[name].samples
        split, offsets = open_corpus(tmp_path, name, tok, "train"), []
        read = split.read
        split.read = lambda offset, length: offsets.append(offset) or read(offset, length)
        batches = make_batches({name: split}.get, config.seed, 16)
        batches([[0, name]], 0, n)
        assert n > 1 and len(set(offsets)) == n == len(offsets)


@pytest.mark.parametrize("steps, one, warns", [(10, 6, False), (24, 20, True)])
def test_a_run_says_how_many_epochs_it_reads_and_warns_above_four(
        train_tiny, capsys, steps, one, warns):
    """Nothing said that a run of 1.1T tokens would read a default corpus 11,000 times."""
    n_tokens = 4 * len((ROOT / "LICENSE").read_text(encoding="utf-8")) + 2
    epoch = (n_tokens - 1) // 16 - 1        # samples of either corpus
    options = ["--batch_schedule=0:64,2:60", f"--max_steps={steps}", "--decay_steps=4"]
    train_tiny("run", *options, "--decay_data=two:0.75,one:0.25")
    said, drawn = capsys.readouterr().out, (one - 2) * 60 + 128
    seen = [float(word.strip(",")) for word in
            re.search(r"epochs of the whole run: one (\S+), two (\S+)\n", said).groups()]
    assert seen == pytest.approx([(drawn + 60) / epoch, 180 / epoch], abs=0.06)
    notes = re.findall("note: (.*): after about 4 epochs, .* prepare more of it", said)
    assert notes == (["one"] if warns else [])
    train_tiny("silent", *options, "--quiet=True")
    assert "epochs" not in capsys.readouterr().out


def test_a_timed_run_says_its_epochs_at_its_end_and_a_resumed_one_the_same_again(
        train_tiny, capsys):
    train_tiny("timed", "--minutes=0.03", "--eval_interval=0")
    said = capsys.readouterr().out
    assert said.count("epochs of the whole run: one ") == 1
    assert said.index("epochs of") > said.index("parameters without the embedding")
    (config,) = build([TrainConfig], {"data": "a", "decay_data": "b", "max_steps": 30,
                                      "batch_schedule": "0:4,3:8", "decay_steps": 10})
    new, lines = new_state(config), []
    sources = {name: Source(None, 9) for name in "ab"}
    resumed = dataclasses.replace(new, step=25, samples_seen=12 + 22 * 8,
                                  plan=[[0, "a"], [12 + 17 * 8, "b"]])
    for state in (new, resumed):
        train_module.say_epochs(config, state, sources, lines.append)
    assert lines[:2] == lines[2:]
    assert lines[0] == f"epochs of the whole run: a {148 / 9:.2f}, b {80 / 9:.2f}"
    assert new.plan == [[0, "a"]]
