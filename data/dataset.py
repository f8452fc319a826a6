"""Token shards to batches. A batch is a pure function of (seed, data plan, global sample index).

The global sample index counts the samples of a whole training run: 0, 1, 2, ... Nothing is consumed
and no iterator has a position, so a resumed run needs only the number of samples it has seen,
evaluation cannot disturb training, and the number of processes may change.

The way from an index to a batch, in the order of this file:

    plan      [[first sample, mixture], ...], as in [[0, "pytorch"], [8192, "pytorch:7,plays:3"]]:
              the mixture of sources changes at sample 8192
    locate    (plan, seed, index) -> (source name, index within that source)
    offset    (name, seed, index within that source) -> first token; no repeats within an epoch
    sample    block_size tokens from there on, and the same shifted by one: the targets
    batch     consecutive samples, stacked

Because a batch is a pure function, the next one can be prepared while the device computes
(Prefetch), and the held-out windows can be shared among processes (held_out_windows).

A corpus is a folder data/NAME/TOKENIZER/ with token files ("shards") {train,val}_*.bin and a
meta.json that lists them; data/corpus.py writes it. There are two kinds:

running text   documents <s> text </s>, back to back. A sample begins and ends anywhere; the doc_ids
               of a batch let attention stay within documents (doc_mask in train.py)
packed rows    rows of block_size + 1 tokens, each holding whole conversations (data/packing.py).
               A row is a sample; a second split, SPLIT_mask, gives the class of every token
"""
import functools
import hashlib
import json
import math
import os
import struct
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, BadInput
from data.tokenizer import BUILT_IN
from engine.distributed import World

# The header of a shard: magic, version, bytes per token, vocabulary size, number of tokens.
HEADER = struct.Struct("<8sIIQQ")
MAGIC, VERSION = b"nanoCPM\0", 1
EVAL_TOKENS_PER_FORWARD = 8192          # at most
PADDING, TEXT, ANSWER = 0, 1, 2         # classes of the tokens of packed rows
PERIODS = (1000, 10_000, 100_000, 1_000_000)    # see samples_per_period
SHARE_ERROR = 0.05          # a source's share differs from the one asked for by at most this part
PREPARE_AGAIN = "delete the folder and prepare it again"
# Repeating data up to about 4 times costs little against as much new data, and ever more after that
# (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"). MiniCPM read 1.1T tokens,
# 1T of them in the stable stage, of de-duplicated text (sections 5 and 6); the paper does not say
# how often any of it was repeated.
MAX_EPOCHS = 4

# What a run reads: hash of the documents of a corpus (or None), samples that an epoch of it has.
Source = namedtuple("Source", "sha256 samples")


# ---- plan -> source: which corpus does sample `index` come from?

def parse_mixture(text, option="data"):
    """Turn "pytorch:0.7,speeches:0.3" into {"pytorch": 0.7, "speeches": 0.3}.

    Weights are normalized to sum to 1. A single name needs no weight. Raises BadInput, which names
    the option that the text is from; also if a share is too small to be kept.
    """
    shares = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            share = float(weight) if colon else 1.0
        except ValueError:
            share = 0.0
        weight_missing = not colon and "," in text
        if not name or name in shares or weight_missing or not 0 < share < math.inf:
            raise BadInput(f"--{option}={text!r}: give NAME or NAME:WEIGHT,NAME:WEIGHT with "
                           "distinct names and weights above 0")
        shares[name] = share
    total = sum(shares.values())
    shares = {name: share / total for name, share in shares.items()}
    if not samples_per_period(tuple(shares.values())):
        name = min(shares, key=shares.get)
        raise BadInput(f"--{option}: the share of {name}, {100 * shares[name]:.2g} %, is too small "
                       f"to be kept to {100 * SHARE_ERROR:.0f} % within {PERIODS[-1]:,} samples; "
                       "raise it or leave it out")
    return shares


@functools.lru_cache(maxsize=64)
def samples_per_period(shares):
    """Return the number of samples of each source per period, a tuple whose sum is the period.

    Sources draw their shares of every period of samples, rounded by largest remainder. The period
    is the shortest of PERIODS in which each share is kept to SHARE_ERROR (relative); () if none is.
    shares: tuple of the sources' shares, whose sum is 1
    """
    for period in PERIODS:
        exact = [share * period for share in shares]
        counts = [math.floor(n) for n in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[:period - sum(counts)]:
            counts[i] += 1
        if all(abs(count - n) <= SHARE_ERROR * n for count, n in zip(counts, exact)):
            return tuple(counts)
    return ()


@functools.lru_cache(maxsize=64)
def mixture_sources(mixture):
    """Return (names of the sources of a mixture, their samples per period), two tuples."""
    shares = parse_mixture(mixture)
    return tuple(shares), samples_per_period(tuple(shares.values()))


@functools.lru_cache(maxsize=8)
def source_order(mixture, seed, period):
    """Return the shuffled samples of a period, two arrays of its length.

    The first has the number of each sample's source, the second how many samples of the period
    before it come from the same source.
    """
    _, counts = mixture_sources(mixture)
    rng = np.random.default_rng([seed % 2 ** 64, period])
    sources = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    earlier = np.empty_like(sources)
    earlier[sources.argsort(kind="stable")] = np.concatenate([np.arange(n) for n in counts])
    return sources, earlier


@functools.lru_cache(maxsize=4096)
def samples_drawn(name, mixture, seed, n):
    """Return how many of the first n samples of a mixture come from the source `name`."""
    names, counts = mixture_sources(mixture)
    if name not in names:
        return 0
    source = names.index(name)
    period, rest = divmod(n, sum(counts))
    sources, _ = source_order(mixture, seed, period)
    return period * counts[source] + int(np.count_nonzero(sources[:rest] == source))


def locate(plan, seed, index):
    """Return (source name, index within that source) of the sample with this global index.

    The index within the source is the number of earlier samples of the run, earlier segments
    included, that came from this source.
    """
    current = max(i for i, (first, _) in enumerate(plan) if first <= index)
    first, mixture = plan[current]
    names, counts = mixture_sources(mixture)
    period, position = divmod(index - first, sum(counts))
    sources, earlier = source_order(mixture, seed, period)
    source = sources[position]
    drawn = period * counts[source] + int(earlier[position])
    for (start, past_mixture), (end, _) in zip(plan[:current], plan[1:]):
        drawn += samples_drawn(names[source], past_mixture, seed, end - start)
    return names[source], drawn


def count_epochs(plan, seed, end, sources):
    """Return {name: epochs} of each of the sources that the samples before index `end` read.

    sources: {name: Source}. What is missing there is left out: a branch does not open the corpora
    that only its trunk has read
    """
    drawn = Counter()
    for (first, mixture), (stop, _) in zip(plan, [*plan[1:], (end, None)]):
        for name in mixture_sources(mixture)[0]:
            drawn[name] += samples_drawn(name, mixture, seed, stop - first)
    return {name: n / sources[name].samples for name, n in drawn.items() if name in sources}


# ---- source -> offset: which tokens are sample `index` of a source?

def samples_per_epoch(n_tokens, block_size, row=None):
    """Return the number of blocks that a corpus is cut into: rows of `row` tokens, if it is packed.

    One block of running text is left over, so that the phase can shift the others.
    """
    return n_tokens // row if row else max(1, (n_tokens - 1) // block_size - 1)


def sample_offset(name, seed, index, n_tokens, block_size, row=None):
    """Return the first token of the index-th sample of a source.

    Running text is cut into blocks of block_size tokens, and an epoch reads every block once. Each
    epoch has another order of blocks and another phase: the token at which the first block begins.
    In a packed corpus the blocks are its rows, of `row` tokens, and there is no phase.
    """
    n_blocks = samples_per_epoch(n_tokens, block_size, row)
    epoch, position = divmod(index, n_blocks)
    digest = hashlib.sha256(f"{name} {seed} {epoch}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    block = permute(position, n_blocks, key)
    if row:
        return block * row
    phase = key % (n_tokens - n_blocks * block_size)
    return phase + block * block_size


def permute(index, n, key):
    """Return the image of `index` under a permutation of range(n) that depends on key.

    A Feistel network over the next even power of two, applied until the result is below n
    (cycle walking): constant memory for any n.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + round_number)) & mask)
        index = left << half | right
        if index < n:
            return index


def mix(x):
    """Hash 64 bits to 64 bits (splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


# ---- offset -> sample -> batch

def read_sample(split, offset, block_size, answers_only):
    """Return (idx, targets) of the sample that begins at a token: int64 (block_size,) each.

    In packed rows a target is -100 (no loss) if it is padding or the <s> of a conversation; with
    answers_only, also if it is not part of an answer.
    """
    tokens = split.read(offset, block_size + 1)
    idx, targets = tokens[:-1], tokens[1:].copy()
    if split.row:
        least = ANSWER if answers_only else TEXT
        targets[split.classes.read(offset + 1, block_size) < least] = -100
    return idx, targets


def make_batches(open_source, seed, block_size, bos=None, answers_only=True):
    """Return the batch source of language modelling: batches(plan, first, count) -> (batch, n).

    open_source   function from the name of a source to its Split
    bos           token id that opens a document; if given, the batch has doc_ids
    answers_only  packed rows: True if only answers are targets, False if all text is
    first, count  global sample indices first, first + 1, ..., first + count - 1
    batch         {"idx", "targets"} and with bos "doc_ids" (documents of a sample counted from its
                  start): int64 (count, block_size) each; targets of -100 have no loss
    n             number of targets that are not -100: the divisor of the summed loss. It may be 0,
                  because a packed row need not have a target
    """
    open_source = functools.cache(open_source)

    def batches(plan, first, count):
        idx, targets = np.empty((2, count, block_size), np.int64)
        for i in range(count):
            name, index = locate(plan, seed, first + i)
            split = open_source(name)
            offset = sample_offset(name, seed, index, split.n_tokens, block_size, split.row)
            idx[i], targets[i] = read_sample(split, offset, block_size, answers_only)
        batch = {"idx": torch.from_numpy(idx), "targets": torch.from_numpy(targets)}
        if bos is not None:
            batch["doc_ids"] = (batch["idx"] == bos).cumsum(1)
        return batch, int((targets >= 0).sum())
    return batches


class Prefetch:
    """A batch source that prepares the next batch of another one while the device computes.

    It expects the requests of train.py's loop: after the samples from `first` on, those that follow
    in this rank's next update, from the same plan. Any other request (decay data begins, another
    batch size, skipped samples) is computed when it comes. So batches and their order are those of
    `batches`, and an error is raised in the step that uses the batch. All batches are made by one
    thread; on a CUDA device they lie in pinned memory, from where copies run in the background.

    world  the batch is for this rank and its device
    ahead  False: pass requests on, without a thread. None: False on a CPU, where a batch takes
           0.1 ms of the cores that compute
    """

    def __init__(self, batches, world, ahead=None):
        self.batches, self.world = batches, world
        self.ahead = world.device.type != "cpu" if ahead is None else ahead
        self.thread = ThreadPoolExecutor(1, "next-batch")
        self.expected = self.future = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Wait for the thread to end, and drop the batch that it has prepared."""
        self.thread.shutdown()
        self.future = None

    def __call__(self, plan, first, count):
        if not self.ahead:
            return self.batches(plan, first, count)
        plan = tuple(map(tuple, plan))          # a copy: the run adds to its plan
        if (plan, first, count) != self.expected:
            self.future = self.thread.submit(self.prepare, plan, first, count)
        batch = self.future.result()
        self.expected = plan, first + count * self.world.size, count
        self.future = self.thread.submit(self.prepare, *self.expected)
        return batch

    def prepare(self, plan, first, count):
        batch, n_targets = self.batches(plan, first, count)
        if self.world.device.type == "cuda":
            with torch.cuda.device(self.world.device):      # a new thread is on GPU 0
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch, n_targets


# ---- held-out loss

def held_out_windows(split, block_size, max_tokens, batch_size, rank=0, ranks=1):
    """Yield this rank's batches {"idx", "targets"} of fixed windows, spread evenly over a split.

    In packed rows a window is a row and the targets are the answers. All batches have the shape
    (batch_size, block_size), filled up with samples whose targets are all -100. All ranks have the
    same number of them, because a forward of a sharded model is collective: those of rank 0 come
    first, and together they are the batches of one process, followed by empty ones.
    """
    if split.row:
        n_windows, stride = split.n_tokens // split.row, split.row
    else:
        n_windows, stride = (split.n_tokens - 1) // block_size, block_size
    n_chosen = max(1, min(n_windows, max_tokens // block_size))
    windows = np.unique(np.linspace(0, n_windows - 1, n_chosen).astype(np.int64))
    share = batch_size * math.ceil(len(windows) / (batch_size * ranks))
    for first in range(rank * share, (rank + 1) * share, batch_size):
        idx = np.zeros((batch_size, block_size), np.int64)
        targets = np.full((batch_size, block_size), -100)
        for i, window in enumerate(windows[first:first + batch_size]):
            idx[i], targets[i] = read_sample(split, int(window) * stride, block_size,
                                              answers_only=True)
        yield {"idx": torch.from_numpy(idx), "targets": torch.from_numpy(targets)}


@torch.no_grad()
def held_out_loss(model, split, token_bytes, block_size, max_tokens, batch_size, device, bos=None,
                  world=World()):
    """Return (nats, number of targets, number of bytes) per held-out window: float64 (3, windows).

    Every target counts towards the loss, <s> and </s> included. These two have no bytes, so bits
    per byte are slightly too high rather than too low.

    token_bytes  (vocab_size,) number of bytes of each token
    bos          token id that opens a document, if attention stays within documents
    world        processes that share the windows; each gets the result of all
    """
    rows = [np.empty((0, 3))]
    for batch in held_out_windows(split, block_size, max_tokens, batch_size, world.rank,
                                  world.size):
        idx, targets = batch["idx"].to(device), batch["targets"].to(device)
        doc_ids = None if bos is None else (idx == bos).cumsum(1)
        nll, _ = model(idx, targets, doc_ids=doc_ids)
        targets = batch["targets"].numpy()
        valid = targets >= 0
        n_bytes = (token_bytes[np.where(valid, targets, 0)] * valid).sum(1)
        nats = nll.sum(1).cpu().double().numpy()
        rows.append(np.stack([nats, valid.sum(1), n_bytes], axis=1)[valid.any(1)])
    return np.concatenate(world.all_gather(np.concatenate(rows))).T


def measure(model, sources, token_bytes, block_size, max_tokens, batch_size, bos=None,
            rows_only=False, world=World()):
    """Return the held-out loss of a mixture: what train.py and tools/evaluate.py report, as a dict.

    loss, bpb   nats per token, bits per byte. A source counts by its share, however many windows of
                it there are; not at all if they hold no text and no answer
    bpb_se      standard error of bpb over windows, None if a source has a single one
    targets     number of targets

    sources     {Split: share}; the shares sum to 1
    max_tokens  to read from all sources together; None: all that they have
    bos         token id that opens a document, if attention stays within documents; with rows_only
                it does so in packed rows alone
    world       processes that share the work; the result is that of one, on each of them
    raises      BadInput if no source has anything to predict
    """
    parts, shares = [], []
    for split, share in sources.items():
        tokens = split.n_tokens if max_tokens is None else int(max_tokens * share)
        part = held_out_loss(model, split, token_bytes, block_size, tokens, batch_size,
                             model.wte.weight.device, None if rows_only and not split.row else bos,
                             world)
        if part[2].any():
            parts.append(part)
            shares.append(share)
    if not parts:
        folders = ", ".join(str(split.folder) for split in sources)
        raise BadInput(f"{folders}: held-out data without text and answers, nothing to predict")
    n_windows = sum(part.shape[1] for part in parts)
    weights = [share * n_windows / part.shape[1] for share, part in zip(shares, parts)]
    nats, targets, n_bytes = map(float, sum(weight * part.sum(axis=1)
                                            for weight, part in zip(weights, parts)))
    bpb, error = nats / math.log(2) / n_bytes, None
    if min(part.shape[1] for part in parts) > 1:    # of a ratio of sums, from the residuals
        residuals = [weight * (part[0] / math.log(2) - bpb * part[2])
                     for weight, part in zip(weights, parts)]
        error = math.sqrt(sum(len(each) * each.var(ddof=1) for each in residuals)) / n_bytes
    return {"loss": nats / targets, "bpb": bpb, "bpb_se": error,
            "targets": int(sum(part[1].sum() for part in parts))}


# ---- reading a corpus

class Split:
    """The tokens of one split of a corpus, read as if its shards were one array.

    Shards are opened and checked when they are first read, so thousands of them on shared storage
    cost one listing of the folder at the start. From then on they stay mapped, however many there
    are: a mapping takes no memory of its own and no file descriptor. The listing makes sure that a
    shard that is missing on one node stops all ranks before training begins.

    n_tokens         tokens in all shards
    row              length of a packed row, None if the corpus is running text
    corpus_sha256    hash of the documents of the corpus, None if an early version prepared it
    starts           (shards + 1,) position of the first token of each shard, and n_tokens
    tokenizer_hash, vocab_size    of the tokenizer that the corpus was prepared with
    """

    def __init__(self, folder, split):
        """Open a split ("train", "val", ...) of the corpus in a folder (data/NAME/TOKENIZER).

        Raises BadInput if there is no corpus, its meta.json is damaged, or a shard is missing.
        """
        self.folder, self.split = Path(folder), split
        meta, entry = read_meta(self.folder, split)
        self.tokenizer_hash, self.vocab_size = meta["tokenizer_hash"], meta["vocab_size"]
        self.row, self.corpus_sha256 = meta.get("row"), meta.get("corpus_sha256")
        self.shards, self.n_tokens = entry["shards"], entry["tokens"]
        present = set(os.listdir(folder))
        for name in self.shards:
            if name not in present:
                raise BadInput(f"{self.folder / name}: shard is missing; {PREPARE_AGAIN}")
        counts = entry.get("counts")
        if counts is None:              # the corpora of early versions
            counts = [self.read_header(name)[0] for name in self.shards]
        self.starts = np.cumsum([0, *counts])
        if self.starts[-1] != self.n_tokens:
            raise BadInput(f"{self.folder}: shards hold {self.starts[-1]} tokens, meta.json says "
                           f"{self.n_tokens}; {PREPARE_AGAIN}")
        self.open_shard = functools.cache(self.map_shard)

    @functools.cached_property
    def classes(self):
        """The classes of the tokens of packed rows (PADDING, TEXT, ANSWER), as a Split."""
        return Split(self.folder, f"{self.split}_mask")

    def read(self, offset, length):
        """Return tokens [offset, offset + length), also across shards: int64 (length,)."""
        out, filled = np.empty(length, np.int64), 0
        while filled < length:
            position = offset + filled
            i = int(np.searchsorted(self.starts, position, side="right")) - 1
            within = position - self.starts[i]
            part = self.open_shard(i)[within:within + length - filled]
            out[filled:filled + len(part)] = part
            filled += len(part)
        if out.max() >= self.vocab_size:
            raise BadInput(f"{self.folder}: token id {out.max()} near token {offset} is above the "
                           f"vocabulary of {self.vocab_size}; {PREPARE_AGAIN}")
        return out

    def map_shard(self, i):
        """Return the tokens of shard i, an array (n,) that is read from disk as it is indexed.

        np.memmap would keep a file descriptor per shard, and systems allow 256 or 1,024 of them.
        torch maps privately: what was written to the array would not reach the file.
        """
        path, expected = self.folder / self.shards[i], self.starts[i + 1] - self.starts[i]
        count, itemsize = self.read_header(path.name)
        if count != expected:
            raise BadInput(f"{path}: holds {count} tokens, meta.json says {expected}; "
                           f"{PREPARE_AGAIN}")
        size = HEADER.size + count * itemsize
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        return data[HEADER.size:].view(f"<u{itemsize}")

    def read_header(self, name):
        """Check the header and the size of a shard; return (number of tokens, bytes per token)."""
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                header = file.read(HEADER.size)
            size = path.stat().st_size
        except FileNotFoundError:
            raise BadInput(f"{path}: shard is missing; {PREPARE_AGAIN}") from None
        if len(header) < HEADER.size:
            raise BadInput(f"{path}: truncated header; {PREPARE_AGAIN}")
        magic, version, itemsize, vocab_size, count = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION or itemsize not in (2, 4):
            raise BadInput(f"{path}: not a token shard of this project (magic {magic!r}, version "
                           f"{version}); {PREPARE_AGAIN}")
        if vocab_size != self.vocab_size:
            raise BadInput(f"{path}: vocabulary of {vocab_size}, meta.json says {self.vocab_size}; "
                           f"{PREPARE_AGAIN}")
        expected = HEADER.size + count * itemsize
        if size != expected:
            raise BadInput(f"{path}: {size} bytes instead of {expected} (truncated?); "
                           f"{PREPARE_AGAIN}")
        return count, itemsize


def read_meta(folder, split):
    """Return (meta.json of a corpus, its entry for a split).

    Raises BadInput, with the command that prepares the corpus if there is none.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        entry = meta["splits"][split]
        shards, counts = entry["shards"], entry.get("counts")
        texts, numbers = [meta["tokenizer_hash"], *shards], [meta["vocab_size"], entry["tokens"]]
        if counts is not None:
            numbers += counts
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("tokenizer_hash and shards must be text")
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("vocab_size, tokens and counts must be integers")
        if counts is not None and len(counts) != len(shards):
            raise ValueError("shards and counts differ in length")
    except FileNotFoundError:
        raise BadInput(f"{folder}: no corpus here; run {prepare_command(folder)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}/meta.json: damaged ({error!r}); {PREPARE_AGAIN}") from None
    return meta, entry


def shipped_corpora():
    """Return the names of the corpora that have a data/NAME/prepare.py, in order."""
    return sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))


def prepare_command(folder):
    """Return the command that prepares the corpus of a folder (data/NAME/TOKENIZER).

    Remarks on what the user must fill in follow the command, in brackets.
    """
    name, tokenizer, remarks = folder.parent.name, folder.name, []
    owners = [owner for owner in shipped_corpora() if f"{name}_".startswith(f"{owner}_")]
    if not owners:
        script = f"text/prepare.py --input=PATH --name={name}"
    else:                               # speeches_long is a part of speeches
        owner = max(owners, key=len)
        script = f"{owner}/prepare.py"
        if owner != name:
            remarks.append(f"with the --suffix or --block_size that makes it {name}")
        if owner == "fineweb_edu":
            remarks.append("the comment of the run's config says with how many --tokens")
    if tokenizer not in BUILT_IN:
        remarks.append(f"FOLDER is that of tokenizer {tokenizer!r}")
        tokenizer = "FOLDER"
    overwrite = " --overwrite=True" if folder.exists() else ""
    remark = f" ({'; '.join(remarks)})" if remarks else ""
    return f"python data/{script} --tokenizer={tokenizer}{overwrite}{remark}"


def open_corpus(data_dir, name, tokenizer, split):
    """Return a Split of DATA_DIR/NAME/TOKENIZER.

    Raises BadInput if it was prepared with another tokenizer. Hashes are compared, because two
    tokenizers of the same name and size can differ.
    """
    corpus = Split(Path(ROOT, data_dir, name, tokenizer.name), split)
    if corpus.tokenizer_hash != tokenizer.hash:
        raise BadInput(f"{corpus.folder}: was prepared with another {tokenizer.name!r} tokenizer "
                       f"(hash {corpus.tokenizer_hash[:12]}, not {tokenizer.hash[:12]}); "
                       f"{PREPARE_AGAIN}")
    return corpus


def check_block_size(split, block_size):
    """Raise BadInput if samples of block_size tokens cannot be read from a Split."""
    name = split.folder.parent.name
    if split.row and (split.row != block_size + 1 or split.classes.n_tokens != split.n_tokens):
        raise BadInput(f"--block_size={block_size}: {name} is packed in rows for --block_size="
                       f"{split.row - 1}; use that, or prepare {name} again with "
                       f"--block_size={block_size} --overwrite=True")
    if split.n_tokens <= block_size:
        larger = " or prepare it with a larger --val_share" if split.split == "val" else ""
        raise BadInput(f"--block_size={block_size}: the {split.split} split of {name} has only "
                       f"{split.n_tokens} tokens; lower --block_size{larger}")


def open_data(config, tokenizer, world=World()):
    """Return (batches, validate, sources) for a TrainConfig: its batch source, what measures a
    model, and {corpus: Source} of all that it reads.

    world: the processes that share the work of validate, which all of them call. Prints a note if
    conversations are to be trained on without doc_mask. Raises BadInput if a corpus is missing, too
    short, or of another tokenizer.
    """
    shares, sources, held_out = parse_mixture(config.data), {}, {}
    for name in {**shares, **parse_mixture(config.decay_data or config.data)}:
        train, val = (open_corpus(config.data_dir, name, tokenizer, split)
                      for split in ("train", "val"))
        for split in (train, val):
            check_block_size(split, config.block_size)
        if name in shares:
            held_out[val] = shares[name]
        samples = samples_per_epoch(train.n_tokens, config.block_size, train.row)
        sources[name] = Source(train.corpus_sha256, samples)
        if train.row and not config.doc_mask and not config.quiet:
            print(f"note: the documents of a row of {name} attend to each other; "
                  "--doc_mask=True keeps them apart")
    bos = tokenizer.bos if config.doc_mask else None
    token_bytes = tokenizer.token_bytes()
    at_once = config.micro_batch_size or min(config.batch_size,
                                             max(1, EVAL_TOKENS_PER_FORWARD // config.block_size))

    def validate(model):
        """Return the held-out loss of the mixture, in nats per token and in bits per byte."""
        found = measure(model, held_out, token_bytes, config.block_size, config.eval_tokens,
                        at_once, bos, world=world)
        return {"val_loss": found["loss"], "val_bpb": found["bpb"]}

    open_train = functools.partial(open_corpus, config.data_dir, tokenizer=tokenizer, split="train")
    batches = make_batches(open_train, config.seed, config.block_size, bos, config.answers_only)
    return batches, validate, sources
