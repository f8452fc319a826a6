"""Your own text as a corpus: local .txt, .md, .jsonl (field text) and .parquet (column text) files.

    python data/text/prepare.py --input=PATH[,PATH ...] --name=NAME [--val_share=0.05]
    python train.py --data=NAME

A document is a file; in .jsonl and .parquet files it is a row. Documents are held out by a hash of
their text, so copies of a document are in the same split. If there are fewer than 1 / val_share
documents, the last val_share of each document is held out instead.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import BadInput, configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, hash_fraction, prepare  # noqa: E402
from data.dataset import shipped_corpora  # noqa: E402

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass
class TextOptions:
    input: str = ""             # files or folders (with their subfolders), separated by commas
    name: str = ""              # write to DATA_DIR/NAME/TOKENIZER; train with --data=NAME
    val_share: float = 0.05     # share of the documents that is held out, above 0, at most 0.5

    def problems(self):
        required = ("input", "name")
        lines = [f"--{option}=... is required" for option in required if not getattr(self, option)]
        shipped = shipped_corpora()
        if self.name and (not re.fullmatch(r"[\w-]+", self.name) or self.name.lower() in shipped):
            lines.append(f"--name={self.name}: letters, digits, '_' and '-', and none of the "
                         f"shipped {', '.join(shipped)}")
        if not 0 < self.val_share <= 0.5:
            lines.append(f"--val_share={self.val_share}: above 0, at most 0.5")
        return lines


def find_files(inputs):
    """Return the files of a comma-separated list of files and folders, in order.

    Raises BadInput if one of them has none.
    """
    files = []
    for path in (Path(part.strip()) for part in inputs.split(",")):
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        found = [p for p in found if p.suffix.lower() in SUFFIXES]
        if not found:
            raise BadInput(f"--input: {path}: no {', '.join(SUFFIXES)} file there")
        files += found
    return files


def read(file):
    """Yield the texts of one file."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from read_parquet(file)
        return
    try:
        if suffix != ".jsonl":
            yield file.read_text(encoding="utf-8-sig")
            return
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield jsonl_text(line, f"{file}:{number}")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 text ({error.reason}); convert it or leave it "
                       "out") from None


def jsonl_text(line, where):
    """Return the field text of one line; BadInput names the place if there is none."""
    try:
        text = json.loads(line)["text"]
        text.encode("utf-8")            # a JSON escape can be half of a surrogate pair
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{where}: not a JSON object with a field 'text' of valid text") from None
    return text


def read_parquet(file):
    """Yield the column text of a .parquet file, row by row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{file}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text)
    except (pyarrow.ArrowException, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{file}: cannot read a column 'text': {reason}") from None


def read_all(files):
    """Yield the texts of all files, without empty ones."""
    for file in files:
        yield from (text for text in read(file) if text.strip())


def documents(inputs, val_share=0.05):
    """Yield (split, text) of all files; reads them twice, to make sure that no split is empty."""
    files = find_files(inputs)
    fractions = [hash_fraction(text.encode("utf-8")) for text in read_all(files)]
    if not fractions:
        raise BadInput(f"--input={inputs}: the files hold no text")
    lowest, highest = min(fractions), max(fractions)
    cut_each = len(fractions) < 1 / val_share or lowest == highest
    for text, fraction in zip(read_all(files), fractions):
        if cut_each:
            cut = int(len(text) * (1 - val_share))
            line_end = text.rfind("\n", cut - len(text) // 100, cut) + 1
            cut = line_end or cut       # at a line end, if there is one nearby
            parts = [("train", text[:cut]), ("val", text[cut:])]
            yield from (part for part in parts if part[1])
        else:                           # the lowest is always held out, the highest never
            is_held_out = fraction != highest and (fraction < val_share or fraction == lowest)
            yield "val" if is_held_out else "train", text


@exits_cleanly
def main(argv):
    (options, text), _ = configure(argv, PrepareOptions, TextOptions, usage=__doc__)
    prepare(text.name, documents(text.input, text.val_share), options)


if __name__ == "__main__":
    main()
