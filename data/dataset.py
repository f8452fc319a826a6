"""Token shards to batches: stateless, mixed, exact on resume.

A corpus is a folder data/NAME/TOKENIZER/ with shards {train,val}_*.bin and a meta.json that lists them. A batch is a pure
function of (seed, data plan, index of its first sample): nothing is consumed, so a resume needs one number, evaluation cannot
disturb training, and the number of processes may change.

A data plan is a list of segments [first sample, mixture], as in [[0, "pytorch"], [8192, "pytorch:0.7,speeches:0.3"]]: from
its first sample on, a segment draws from its mixture. Each source is read without repeats within an epoch.

Documents are stored as <s> text </s>, back to back, and samples are cut without regard to them. What attention does at a
boundary is the flag doc_mask of train.py: it hides the other documents of a sample by their doc_ids. Conversations are packed
in rows instead (chat.py), a row is a sample, and a mask says which tokens of it are targets.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, BadInput
from data.tokenizer import BUILT_IN

HEADER = struct.Struct("<8sIIQQ")                # magic, version, bytes per token, vocabulary size, number of tokens
MAGIC, VERSION = b"nanoCPM\0", 1
PATTERN = 1000                                   # samples after which a mixture has met its shares exactly
EVAL_TOKENS_AT_ONCE = 8192                       # tokens per forward of an evaluation, at most
PADDING, TEXT, ANSWER = 0, 1, 2                  # classes of the tokens of packed rows (chat.py writes them)


# ---- writing a corpus (data/NAME/prepare.py)

@contextlib.contextmanager
def complete_or_nothing(folder, overwrite=False):
    """A folder to write in, renamed to `folder` when the block ends well: a reader sees all of it or nothing. What is there
    already, or another process finished first, stays unless it is to be overwritten; then it stays until that moment."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    made = [parent for parent in folder.parents if not parent.exists()]  # nearest first
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.exists():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):                               # not empty: the corpus is there
            for parent in made:
                parent.rmdir()


def token_dtype(vocab_size):
    """Of the tokens in a shard."""
    return np.dtype("<u2" if vocab_size <= 2 ** 16 else "<u4")


def write_shard(path, tokens, vocab_size):
    """Write tokens (n,) with the header. The file is whole from the moment that it has its name."""
    dtype, temporary = token_dtype(vocab_size), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        f.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, len(tokens)))
        f.write(np.ascontiguousarray(tokens, dtype))
    os.replace(temporary, path)


def write_shards(folder, tokenizer, documents, shard_tokens=100_000_000, label=""):
    """Tokenise documents into shards {train,val}_LABEL000000.bin in a folder. One shard a split is in memory at a time.

    documents  iterable of (split, text), split "train" or "val"
    returns    (sha256 of the documents, {split: {"documents", "bytes", "tokens", "shards": names, "counts": tokens in each}})
    """
    sha = hashlib.sha256()
    splits = {split: {"documents": 0, "bytes": 0, "tokens": 0, "shards": [], "counts": []} for split in ("train", "val")}
    shard = {split: np.empty(shard_tokens, token_dtype(tokenizer.n_vocab)) for split in splits}       # the one being filled
    filled = dict.fromkeys(splits, 0)
    texts = {split: [] for split in splits}                              # documents not yet tokenised

    def tokenise(split):
        for ids in tokenizer.encode_batch(texts[split]):
            tokens = np.array([tokenizer.bos, *ids, tokenizer.eos], shard[split].dtype)
            while len(tokens):
                taken, tokens = np.split(tokens, [shard_tokens - filled[split]])
                shard[split][filled[split]:filled[split] + len(taken)] = taken
                filled[split] += len(taken)
                if filled[split] == shard_tokens:
                    finish_shard(split)
        texts[split].clear()

    def finish_shard(split):
        about, n = splits[split], filled[split]
        name = f"{split}_{label}{len(about['shards']):06d}.bin"
        write_shard(folder / name, shard[split][:n], tokenizer.n_vocab)
        about["shards"].append(name)
        about["counts"].append(n)
        about["tokens"] += n
        filled[split] = 0

    for split, text in documents:
        raw = text.encode("utf-8")
        sha.update(f"{split} {len(raw)}\n".encode() + raw)
        splits[split]["documents"] += 1
        splits[split]["bytes"] += len(raw)
        texts[split].append(text)
        if sum(map(len, texts[split])) > 4_000_000 or len(texts[split]) >= 256:
            tokenise(split)
    for split in splits:
        tokenise(split)
        if filled[split]:
            finish_shard(split)
    return sha.hexdigest(), splits


def write_meta(folder, tokenizer, sha, splits):
    """Write a corpus's meta.json, which its shards have to be there for, and return it as a dict."""
    meta = {"tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.n_vocab, "corpus_sha256": sha, "splits": splits}
    (folder / "meta.tmp").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    os.replace(folder / "meta.tmp", folder / "meta.json")
    return meta


def need_both(folder, splits):
    """BadInput where a split of a new corpus is empty."""
    for split in splits:
        if not splits[split]["tokens"]:
            raise BadInput(f"{folder}: no {split} documents; a corpus needs both train and val")


def write_corpus(folder, tokenizer, documents, shard_tokens=100_000_000, overwrite=False):
    """Tokenise documents into shards and meta.json, all or nothing.

    folder     data/NAME/TOKENIZER
    documents  iterable of (split, text), split "train" or "val"
    returns    the meta.json as a dict
    """
    with complete_or_nothing(folder, overwrite) as temporary:
        sha, splits = write_shards(temporary, tokenizer, documents, shard_tokens)
        need_both(folder, splits)
        return write_meta(temporary, tokenizer, sha, splits)


# ---- reading it

class Split:
    """The tokens of one split of one corpus, as if its shards were one array.

    Shards are opened, and checked, when they are first read: thousands of them on shared storage cost a start nothing but
    one listing of the folder. That listing is there so that a shard missing on one node ends all ranks before they begin.
    """

    def __init__(self, folder, split):
        """folder: data/NAME/TOKENIZER; raises BadInput where the folder or its meta.json cannot be used, or a shard is missing."""
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            entry = self.meta["splits"][split]
            self.tokenizer_hash, self.shards, self.n_tokens = self.meta["tokenizer_hash"], entry["shards"], entry["tokens"]
            self.vocab_size, self.split = int(self.meta["vocab_size"]), split
            self.row = self.meta.get("row")                              # tokens of a packed row of conversations or documents; None: running text
            if not all(isinstance(text, str) for text in (self.tokenizer_hash, *self.shards)):
                raise TypeError("tokenizer_hash or shards")
            counts = entry.get("counts")                                 # tokens in each shard
            if counts is not None and (len(counts) != len(self.shards) or not all(isinstance(n, int) for n in counts)):
                raise TypeError("counts")
        except FileNotFoundError:
            name = self.folder.parent.name
            shipped = [path.parent.name for path in (ROOT / "data").glob("*/prepare.py")]
            owner = max((s for s in shipped if f"{name}_".startswith(f"{s}_")), key=len, default=None)   # of speeches_long: speeches
            script = f"text/prepare.py --input=PATH --name={name}" if owner is None else f"{owner}/prepare.py" + \
                ("" if owner == name else f" (with the --suffix or --block_size that makes it {name})")
            tokenizer = self.folder.name if self.folder.name in BUILT_IN else f"FOLDER (that of tokenizer {self.folder.name!r})"
            raise BadInput(f"{self.folder}: no corpus here; run python data/{script} --tokenizer={tokenizer}"
                           + (" --overwrite=True" if self.folder.exists() else "")) from None
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.folder}/meta.json: damaged ({error!r}); delete the folder and prepare it again") from None
        there = set(os.listdir(self.folder))
        for name in self.shards:
            if name not in there:
                raise BadInput(f"{self.folder / name}: shard is missing; delete the folder and prepare it again")
        # Where each shard starts, in tokens. A meta.json written before counts were in it leaves them to the headers.
        self.starts = np.cumsum([0, *([self.header(name)[0] for name in self.shards] if counts is None else counts)])
        if self.starts[-1] != self.n_tokens:
            raise BadInput(f"{self.folder}: shards hold {self.starts[-1]} tokens, meta.json says {self.n_tokens}; prepare it again")
        self.open_shard = functools.lru_cache(maxsize=64)(self.map_shard)

    def header(self, name):
        """(number of tokens, bytes per token) of a shard, after checking its header and its size."""
        path, remedy = self.folder / name, "delete the folder and prepare it again"
        try:
            with open(path, "rb") as f:
                head = f.read(HEADER.size)
            size = path.stat().st_size
        except FileNotFoundError:
            raise BadInput(f"{path}: shard is missing; {remedy}") from None
        if len(head) < HEADER.size:
            raise BadInput(f"{path}: truncated header; {remedy}")
        magic, version, itemsize, vocab_size, count = HEADER.unpack(head)
        if magic != MAGIC or version != VERSION or itemsize not in (2, 4):
            raise BadInput(f"{path}: not a token shard of this project (magic {magic!r}, version {version}); {remedy}")
        if vocab_size != self.vocab_size:
            raise BadInput(f"{path}: vocabulary of {vocab_size}, meta.json says {self.vocab_size}; {remedy}")
        if size != HEADER.size + count * itemsize:
            raise BadInput(f"{path}: {size} bytes where {HEADER.size + count * itemsize} are due (truncated?); {remedy}")
        return count, itemsize

    def map_shard(self, i):
        """The tokens of shard i: an array (n,) that the system reads from the disk as it is indexed."""
        path, due, (count, itemsize) = self.folder / self.shards[i], self.starts[i + 1] - self.starts[i], self.header(self.shards[i])
        if count != due:
            raise BadInput(f"{path}: holds {count} tokens, meta.json says {due}; delete the folder and prepare it again")
        return np.memmap(path, f"<u{itemsize}", "r", offset=HEADER.size)

    @functools.cached_property
    def classes(self):
        """Of packed rows: a Split of equal length with the class of every token."""
        return Split(self.folder, f"{self.split}_mask")

    def read(self, offset, length):
        """Tokens [offset, offset + length) as int64 (length,), across shards where need be."""
        out, filled = np.empty(length, np.int64), 0
        while filled < length:
            i = int(np.searchsorted(self.starts, offset + filled, side="right")) - 1
            at = offset + filled - self.starts[i]
            part = self.open_shard(i)[at:at + length - filled]
            out[filled:filled + len(part)] = part
            filled += len(part)
        if out.max() >= self.vocab_size:
            raise BadInput(f"{self.folder}: token id {out.max()} near token {offset} is above the vocabulary of "
                           f"{self.vocab_size}; delete the folder and prepare it again")
        return out


def open_corpus(data_dir, name, tokenizer, split):
    """A Split of data_dir/NAME/TOKENIZER, whose tokenizer must be this one (by hash: equal size is not identity)."""
    corpus = Split(Path(ROOT, data_dir, name, tokenizer.name), split)
    if corpus.tokenizer_hash != tokenizer.hash:
        raise BadInput(f"{corpus.folder}: was prepared with another {tokenizer.name!r} tokenizer (hash "
                       f"{corpus.tokenizer_hash[:12]}, here {tokenizer.hash[:12]}); delete the folder and prepare it again")
    return corpus


def parse_mixture(text):
    """"pytorch:0.7,speeches:0.3" to {"pytorch": 0.7, "speeches": 0.3}; weights are normalised, one name needs none."""
    shares = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            share = float(weight) if colon else 1.0
        except ValueError:
            share = 0.0
        if not name or not 0 < share < math.inf or name in shares or (not colon and "," in text):
            raise BadInput(f"data={text!r}: give NAME or NAME:WEIGHT,NAME:WEIGHT with distinct names and weights above 0")
        shares[name] = share
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


@functools.lru_cache(maxsize=64)
def quotas(mixture):
    """Samples of each source in every PATTERN samples: {name: n}, by largest remainder, at least one each."""
    exact = {name: share * PATTERN for name, share in parse_mixture(mixture).items()}
    out = {name: max(1, math.floor(x)) for name, x in exact.items()}
    for name in sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name])[:max(0, PATTERN - sum(out.values()))]:
        out[name] += 1
    out[max(out, key=out.get)] += PATTERN - sum(out.values())
    return out


@functools.lru_cache(maxsize=64)
def pattern(mixture, seed, block):
    """Order of sources in one block of a mixture: (which source, how many of it came before in the block), (PATTERN,) each."""
    counts = quotas(mixture)
    which = np.random.default_rng([seed % 2 ** 64, block]).permutation(np.repeat(np.arange(len(counts)), list(counts.values())))
    rank = np.zeros(PATTERN, np.int64)
    for j in range(len(counts)):
        rank[which == j] = np.arange((which == j).sum())
    return which, rank


def drawn(mixture, seed, n):
    """How many of the first n samples of a mixture came from each source: {name: count}."""
    which, _ = pattern(mixture, seed, n // PATTERN)
    counts = quotas(mixture)
    return {name: n // PATTERN * counts[name] + int((which[:n % PATTERN] == j).sum()) for j, name in enumerate(counts)}


def locate(plan, seed, index):
    """(source name, index within that source) of a sample: what earlier segments drew is not drawn again."""
    current = max(i for i, (first, _) in enumerate(plan) if first <= index)
    first, mixture = plan[current]
    block, at = divmod(index - first, PATTERN)
    which, rank = pattern(mixture, seed, block)
    counts = quotas(mixture)
    name = list(counts)[which[at]]
    before = sum(drawn(plan[i][1], seed, plan[i + 1][0] - plan[i][0]).get(name, 0) for i in range(current))
    return name, before + block * counts[name] + int(rank[at])


def permute(index, n, key):
    """A keyed permutation of range(n) in O(1) memory: a Feistel network over the next even power of two, cycle-walked."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + round_)) & mask)
        index = left << half | right
        if index < n:
            return index


def mix(x):
    """Hash 64 bits to 64 bits (the finaliser of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def check_block_size(split, block_size):
    """BadInput where samples of this length cannot be cut from a Split, or a split of packed rows lacks its mask."""
    name = split.folder.parent.name
    if split.row and (split.row != block_size + 1 or split.classes.n_tokens != split.n_tokens):
        raise BadInput(f"--block_size={block_size}: {name} is packed in rows for --block_size={split.row - 1}; "
                       f"take that, or prepare {name} again with --block_size={block_size} --overwrite=True")
    if split.n_tokens <= block_size:
        raise BadInput(f"--block_size={block_size}: the {split.split} split of {name} has only {split.n_tokens} tokens")


def sample_offset(name, seed, index, n_tokens, block_size, row=None):
    """First token of the index-th sample of a source: blocks in a fresh order, and cut at a fresh phase, every epoch; of
    a packed corpus whole rows, which have no phase."""
    n_blocks = n_tokens // row if row else max(1, (n_tokens - 1) // block_size - 1)     # one block is left to shift by
    epoch, position = divmod(index, n_blocks)
    key = int.from_bytes(hashlib.sha256(f"{name} {seed} {epoch}".encode()).digest()[:8], "little")
    if row:
        return permute(position, n_blocks, key) * row
    return key % (n_tokens - n_blocks * block_size) + permute(position, n_blocks, key) * block_size


def read_sample(split, offset, block_size, answers_only):
    """(idx, targets), (T,) int64 each, from a place on. In packed rows a target is -100 where it is padding or opens the
    next text, and with answers_only where it is no part of an answer."""
    tokens = split.read(offset, block_size + 1)
    targets = tokens[1:].copy()
    if split.row:
        targets[split.classes.read(offset + 1, block_size) < (ANSWER if answers_only else TEXT)] = -100
    return tokens[:-1], targets


def make_batches(open_source, seed, block_size, bos=None, answers_only=True):
    """The batch source of language modelling: batches(plan, first, count) -> (batch, n).

    open_source   name -> Split
    bos           id that opens a document: doc_ids are then part of the batch
    answers_only  of packed rows: whether the answers alone are targets, or all of the text; running text always counts
    batch         {"idx": (count, T), "targets": (count, T)} int64, and "doc_ids" (count, T) with bos; no target is -100
    n             what the summed loss of the batch is divided by: its valid targets
    """
    open_source = functools.cache(open_source)

    def batches(plan, first, count):
        idx, targets = np.empty((2, count, block_size), np.int64)
        for i in range(count):
            name, index = locate(plan, seed, first + i)
            source = open_source(name)
            offset = sample_offset(name, seed, index, source.n_tokens, block_size, source.row)
            idx[i], targets[i] = read_sample(source, offset, block_size, answers_only)
        batch = {"idx": torch.from_numpy(idx), "targets": torch.from_numpy(targets)}
        if bos is not None:
            batch["doc_ids"] = (batch["idx"] == bos).cumsum(1)
        return batch, int((targets >= 0).sum())
    return batches


# ---- measuring on held-out text

def held_out_windows(split, block_size, max_tokens, batch_size):
    """Fixed windows spread evenly over a split (of a packed one: rows, whose targets are the answers): batches {"idx",
    "targets"} of one shape (batch_size, T), the last one filled up with rows whose targets are all -100."""
    n_windows, stride = (split.n_tokens // split.row, split.row) if split.row else ((split.n_tokens - 1) // block_size, block_size)
    chosen = np.unique(np.linspace(0, n_windows - 1, max(1, min(n_windows, max_tokens // block_size))).astype(np.int64))
    for at in range(0, len(chosen), batch_size):
        samples = [read_sample(split, int(w) * stride, block_size, answers_only=True) for w in chosen[at:at + batch_size]]
        samples += [(np.zeros(block_size, np.int64), np.full(block_size, -100))] * (batch_size - len(samples))
        idx, targets = map(np.stack, zip(*samples))
        yield {"idx": torch.from_numpy(idx), "targets": torch.from_numpy(targets)}


@torch.no_grad()
def held_out_loss(model, split, token_bytes, block_size, max_tokens, batch_size, device, bos=None):
    """(nats, number of targets, number of bytes), each (windows,), of the windows of a split.

    Every target counts towards the loss, document marks included; marks have no bytes, so bits per byte err upwards. In
    packed rows the targets are the answers.
    token_bytes: (vocab,) bytes of each token. bos: id that opens a document, where attention stays within documents.
    """
    rows = []
    for batch in held_out_windows(split, block_size, max_tokens, batch_size):
        idx, targets = batch["idx"].to(device), batch["targets"].to(device)
        nll, _ = model(idx, targets, doc_ids=(idx == bos).cumsum(1) if bos is not None else None)
        wanted = batch["targets"].numpy()
        valid = wanted >= 0
        n_bytes = (token_bytes[np.where(valid, wanted, 0)] * valid).sum(1)
        rows.append(np.stack([nll.sum(1).cpu().double().numpy(), valid.sum(1), n_bytes], axis=1)[valid.any(1)])
    return np.concatenate(rows).T


def open_data(config, tokenizer):
    """Return (batches, validate) for a TrainConfig: the batch source of its mixtures, and a function that measures a model.

    Raises BadInput if a corpus is missing, too short, or of another tokenizer.
    """
    shares = parse_mixture(config.data)
    for name in {**shares, **parse_mixture(config.decay_data or config.data)}:
        for split in ("train", "val"):
            check_block_size(open_corpus(config.data_dir, name, tokenizer, split), config.block_size)
    bos = tokenizer.bos if config.doc_mask else None
    held_out = {name: open_corpus(config.data_dir, name, tokenizer, "val") for name in shares}
    token_bytes = tokenizer.token_bytes()
    eval_batch = config.micro_batch_size or min(config.batch_size, max(1, EVAL_TOKENS_AT_ONCE // config.block_size))

    def validate(model):
        """Return the held-out loss of the mixture, in nats per token and in bits per byte."""
        sums = 0                        # nats, targets, bytes
        for name, share in shares.items():
            sums += held_out_loss(model, held_out[name], token_bytes, config.block_size, int(config.eval_tokens * share),
                                  eval_batch, model.wte.weight.device, bos).sum(axis=1)
        nats, targets, n_bytes = map(float, sums)
        return {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / n_bytes}

    open_train = functools.partial(open_corpus, config.data_dir, tokenizer=tokenizer, split="train")
    batches = make_batches(open_train, config.seed, config.block_size, bos, config.answers_only)
    return batches, validate
