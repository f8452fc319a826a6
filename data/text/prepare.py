"""Your own text as a corpus: local .txt, .md, .jsonl (field text) and .parquet (column text) files.

    python data/text/prepare.py --input=PATH[,PATH ...] --name=NAME [--val_share=0.05]         then --data=NAME

A file is a document; in .jsonl and .parquet a row is. Documents are held out by a hash of their text, so copies stay on
one side. With fewer documents than 1 / val_share that is too coarse: the last val_share of each is held out instead.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import ROOT, BadInput, configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, prepare, unit_hash  # noqa: E402

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass
class TextOptions:
    input: str = ""             # files or folders, separated by commas; folders are searched in depth
    name: str = ""              # the corpus goes to DATA_DIR/NAME/TOKENIZER and is used as --data=NAME
    val_share: float = 0.05     # share of the documents that is held out, above 0, at most 0.5

    def problems(self):
        lines = [f"--{option}=... is required" for option in ("input", "name") if not getattr(self, option)]
        shipped = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        if self.name and (not re.fullmatch(r"[\w-]+", self.name) or self.name.lower() in shipped):
            lines.append(f"--name={self.name}: letters, digits, '_' and '-', and none of the shipped {', '.join(shipped)}")
        if not 0 < self.val_share <= 0.5:
            lines.append(f"--val_share={self.val_share}: above 0, at most 0.5")
        return lines


def find_files(inputs):
    """Files of a comma-separated list of files and folders, in order; BadInput where one of them holds none."""
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
    if file.suffix.lower() == ".parquet":
        yield from read_parquet(file)
        return
    try:
        text = file.read_text(encoding="utf-8-sig") if file.suffix.lower() != ".jsonl" else None
        if text is not None:
            yield text
            return
        with open(file, encoding="utf-8-sig") as lines:
            for n, line in enumerate(lines, 1):
                if line.strip():
                    yield jsonl_text(line, f"{file}:{n}")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 text ({error.reason}); convert it or leave it out") from None


def jsonl_text(line, where):
    """The field text of one line; BadInput, naming the place, where there is none."""
    try:
        text = json.loads(line)["text"]
        text.encode("utf-8")                                             # escapes can spell half a character
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{where}: not a JSON object with a field 'text' of valid text") from None
    return text


def read_parquet(file):
    """Yield column text, row by row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{file}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text)
    except (pyarrow.ArrowException, KeyError) as error:
        raise BadInput(f"{file}: cannot read a column 'text': {str(error).splitlines()[0]}") from None


def documents(inputs, val_share=0.05):
    """Yield (split, text). Reads everything twice: the first time to count, so that neither split is left empty."""
    files = find_files(inputs)

    def texts():
        return (text for file in files for text in read(file) if text.strip())

    hashes = [unit_hash(text.encode("utf-8")) for text in texts()]
    if not hashes:
        raise BadInput(f"--input={inputs}: the files hold no text")
    few, lowest, highest = len(hashes) < 1 / val_share, min(hashes), max(hashes)
    for text, place in zip(texts(), hashes):
        if few or lowest == highest:
            cut = int(len(text) * (1 - val_share))
            cut = text.rfind("\n", cut - len(text) // 100, cut) + 1 or cut     # at the end of a line where one is near
            yield from (pair for pair in (("train", text[:cut]), ("val", text[cut:])) if pair[1])
        else:
            yield "val" if place != highest and (place < val_share or place == lowest) else "train", text


@exits_cleanly
def main(argv):
    (options, text), _ = configure(argv, PrepareOptions, TextOptions, usage=__doc__)
    prepare(text.name, documents(text.input, text.val_share), options)


if __name__ == "__main__":
    main()
