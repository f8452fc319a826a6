"""Your own text as a corpus: local .txt, .md, .jsonl (field text) and .parquet (column text) files.

    python data/text/prepare.py --input=PATH[,PATH ...] --name=NAME [--val_share=0.05]
    python train.py --data=NAME

A document is a file; in .jsonl and .parquet files it is a row, of which only the text is read.
Documents are held out by a hash of their text, so copies of a document are in the same split. If
there are fewer than 1 / val_share documents, the last val_share of each document is held out
instead.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import BadInput, configure, exits_cleanly  # noqa: E402
from data.corpus import (  # noqa: E402
    PrepareOptions,
    hash_fraction,
    hold_out_limit,
    input_problems,
    prepare,
)
from data.files import TEXT_SUFFIXES, find_files, read_texts  # noqa: E402


@dataclass
class TextOptions:
    input: str = ""             # files or folders (with their subfolders), separated by commas
    name: str = ""              # write to DATA_DIR/NAME/TOKENIZER; train with --data=NAME
    val_share: float = 0.05     # share of the documents that is held out, above 0, at most 0.5

    def problems(self):
        lines = input_problems(self.input, self.name)
        if not 0 < self.val_share <= 0.5:
            lines.append(f"--val_share={self.val_share}: above 0, at most 0.5")
        return lines


def read_all(files):
    """Yield the texts of all files, without empty ones."""
    for file in files:
        yield from read_texts(file)


def documents(inputs, val_share=0.05):
    """Yield (split, text) of all files; reads them twice, to make sure that no split is empty."""
    files = find_files(inputs, TEXT_SUFFIXES)
    fractions = [hash_fraction(text.encode("utf-8")) for text in read_all(files)]
    if not fractions:
        raise BadInput(f"--input={inputs}: the files hold no text")
    cut_each = len(fractions) < 1 / val_share or len(set(fractions)) == 1
    limit = hold_out_limit(fractions, val_share)
    for text, fraction in zip(read_all(files), fractions):
        if cut_each:
            cut = int(len(text) * (1 - val_share))
            line_end = text.rfind("\n", cut - len(text) // 100, cut) + 1
            cut = line_end or cut       # at a line end, if there is one nearby
            parts = [("train", text[:cut]), ("val", text[cut:])]
            yield from (part for part in parts if part[1])
        else:
            yield "val" if fraction < limit else "train", text


@exits_cleanly
def main(argv):
    (options, text), _ = configure(argv, PrepareOptions, TextOptions, usage=__doc__)
    prepare(text.name, documents(text.input, text.val_share), options)


if __name__ == "__main__":
    main()
