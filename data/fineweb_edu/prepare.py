"""FineWeb-Edu, sample-10BT: web pages picked for their educational value, streamed from the Hugging Face hub.

    python data/fineweb_edu/prepare.py --tokens=100000000 [--tokenizer=bpe4096] [--processes=8] [--overwrite=True]
    python data/fineweb_edu/prepare.py --input=FOLDER ...          parquet files that are here already, for nodes without a network

Needs pip install pyarrow, and huggingface_hub without --input. A document is a page; 1 % is held out by a hash of its id.
However it ends, the same command goes on with what is not finished yet, and nothing is doubled or lost.
"""
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import BadInput, configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, held_out, prepare  # noqa: E402

HUB, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample/10BT"
VAL_SHARE = 0.01
BYTES_PER_TOKEN = 4             # about, of English text: settles nothing but how large the units of work are


@dataclass
class FinewebOptions:
    tokens: int = 100_000_000       # stop after about so many; at least 1 million, the whole sample has about 10 billion
    input: str = ""                 # a folder of parquet files with the columns id and text; empty: stream from the hub
    processes: int = 0              # processes that read and tokenise, the latter with threads; 0: half as many as there are cores

    def problems(self):
        lines = [] if self.tokens >= 10 ** 6 else [f"--tokens={self.tokens}: at least 1,000,000"]
        return lines + ([] if self.processes >= 0 else [f"--processes={self.processes}: at least 1, or 0 for half the cores"])


def files(folder):
    """Names of the parquet files, in order, of a folder or else of the hub, there at the revision that is now its latest."""
    if folder:
        found = sorted(str(path) for path in Path(folder).resolve().rglob("*.parquet"))
    else:
        with one_line(HUB):
            import huggingface_hub
            place = f"datasets/{HUB}@{huggingface_hub.HfApi().dataset_info(HUB).sha}/{SAMPLE}"
            found = sorted(f"hf://{path}" for path in huggingface_hub.HfFileSystem().glob(f"{place}/*.parquet"))
    if not found:
        raise BadInput(f"--input={folder}: no .parquet file there" if folder else f"{place}: no .parquet file there any more")
    return found


def units(folder, tokens):
    """Yield the units of work [file, first row group, behind the last, bytes of text]: row groups of one file, with about a
    hundredth of the tokens asked for, but no more than fill a shard."""
    enough = min(tokens // 100, 10 ** 8) * BYTES_PER_TOKEN
    for file in files(folder):
        with parquet(file) as opened:
            groups, column = opened.metadata.num_row_groups, opened.schema.names.index("text")
            first = size = 0
            for group in range(groups):
                size += opened.metadata.row_group(group).column(column).total_uncompressed_size
                if size >= enough or group + 1 == groups:
                    yield [file, first, group + 1, size]
                    first, size = group + 1, 0


def documents(unit):
    """Yield (split, text) of the pages of a unit."""
    file, first, end, _ = unit
    with parquet(file) as opened:
        for rows in opened.iter_batches(batch_size=1000, row_groups=range(first, end), columns=["id", "text"]):
            for identity, text in zip(rows.column("id").to_pylist(), rows.column("text").to_pylist()):
                if text:
                    yield "val" if held_out(identity, VAL_SHARE) else "train", text


@contextlib.contextmanager
def parquet(file):
    """An open pyarrow.parquet.ParquetFile with the columns id and text."""
    with one_line(file):
        import pyarrow.parquet
        if file.startswith("hf://"):
            import huggingface_hub
        with (huggingface_hub.HfFileSystem().open(file) if file.startswith("hf://") else open(file, "rb")) as handle, \
                pyarrow.parquet.ParquetFile(handle) as opened:
            missing = {"id", "text"} - set(opened.schema.names)
            if missing:
                raise BadInput(f"{file}: has no column {' and '.join(sorted(missing))}; it has {', '.join(opened.schema.names)}")
            yield opened


@contextlib.contextmanager
def one_line(source):
    """Whatever goes wrong with a source within the block becomes one line that names it."""
    try:
        yield
    except BadInput:
        raise
    except ImportError as error:
        raise BadInput(f"data/fineweb_edu needs the package {error.name}: pip install pyarrow huggingface_hub") from None
    except Exception as error:                                           # of a disk, a network, a format: no common base
        said = (str(error).splitlines() or [""])[0]
        raise BadInput(f"{source}: could not be read ({type(error).__name__}: {said}); what is finished is kept, and the same "
                       "command goes on") from None


@exits_cleanly
def main(argv):
    (options, fineweb), _ = configure(argv, PrepareOptions, FinewebOptions, usage=__doc__)
    prepare("fineweb_edu", documents, options, units(fineweb.input, fineweb.tokens), fineweb.tokens,
            fineweb.processes or max(1, (os.cpu_count() or 2) // 2))


if __name__ == "__main__":
    main()
