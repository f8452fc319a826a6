"""FineWeb-Edu: educational web pages, streamed from the Hugging Face hub.

    python data/fineweb_edu/prepare.py --tokens=100_000_000 [--tokenizer=bpe4096] [--processes=8]
    python data/fineweb_edu/prepare.py --sample=350BT --tokens=300_000_000_000 ...
    python data/fineweb_edu/prepare.py --input=FOLDER ...    local parquet files, without a network

The comment of a config says how many tokens its run reads. Up to about 4 epochs of fewer cost
little (data/dataset.py: MAX_EPOCHS).

Needs pip install pyarrow, and huggingface_hub without --input. A document is a page; 1 % of the
pages are held out, by a hash of their id. If the command is killed or the network fails, the same
command continues with what is not finished.
"""
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import BadInput, configure, exits_cleanly  # noqa: E402
from data.corpus import PrepareOptions, held_out, prepare_units  # noqa: E402

HUB = "HuggingFaceFW/fineweb-edu"
# Files of each sample on the hub, and about how many tokens of GPT-2's they hold.
SAMPLES = {"10BT": ("sample/10BT/*.parquet", 10 * 10 ** 9),
           "100BT": ("sample/100BT/*.parquet", 100 * 10 ** 9),
           "350BT": ("sample/350BT/*.parquet", 350 * 10 ** 9),
           "all": ("data/*/*.parquet", 1300 * 10 ** 9)}
COLUMNS = ["id", "text"]
VAL_SHARE = 0.01
BYTES_PER_TOKEN = 4             # estimate for English text; affects only the size of the units


@dataclass
class FinewebOptions:
    tokens: int = 100_000_000   # stop after about so many, at least 1 million
    sample: Literal[tuple(SAMPLES)] = '10BT'    # files to read: random samples of 10, 100 and 350
                                # billion tokens, or all the 1.3 trillion
    input: str = ""             # folder of parquet files with columns id and text; empty: the hub
    processes: int = 0          # processes that read and tokenize; 0: half the number of cores

    def problems(self):
        lines = []
        if self.tokens < 10 ** 6:
            lines.append(f"--tokens={self.tokens}: at least 1,000,000")
        if self.input and self.sample != "10BT":
            lines.append(f"--sample={self.sample}: is read from the hub; leave out --input")
        size = SAMPLES[self.sample][1]
        if not self.input and self.tokens > size:
            larger = [name for name, (_, other) in SAMPLES.items() if other >= self.tokens]
            remedy = f"give --sample={larger[0]}" if larger else "train for several epochs of fewer"
            lines.append(f"--tokens={self.tokens}: --sample={self.sample} has about {size:,}; "
                         + remedy)
        if self.processes < 0:
            lines.append(f"--processes={self.processes}: at least 1, or 0 for half the cores")
        return lines


def find_files(folder, sample):
    """Return the names of the parquet files of a folder; if it is empty, of a sample in the latest
    revision on the hub."""
    if folder:
        found = sorted(str(path) for path in Path(folder).resolve().rglob("*.parquet"))
        if not found:
            raise BadInput(f"--input={folder}: no .parquet file there")
        return found
    with errors_name(HUB):
        import huggingface_hub
        revision = huggingface_hub.HfApi().dataset_info(HUB).sha
        pattern = f"datasets/{HUB}@{revision}/{SAMPLES[sample][0]}"
        found = huggingface_hub.HfFileSystem().glob(pattern)
    if not found:
        raise BadInput(f"{pattern}: no such file on the hub")
    return sorted(f"hf://{path}" for path in found)


def units(folder, sample, tokens):
    """Yield the units of work: [file, first row group, end of the row groups, bytes of text].

    A unit has about a hundredth of the tokens wanted, but not more than fill a shard.
    """
    unit_bytes = min(tokens // 100, 10 ** 8) * BYTES_PER_TOKEN
    for file in find_files(folder, sample):
        with open_parquet(file) as parquet:
            n_groups, column = parquet.metadata.num_row_groups, parquet.schema.names.index("text")
            first = size = 0
            for group in range(n_groups):
                size += parquet.metadata.row_group(group).column(column).total_uncompressed_size
                if size >= unit_bytes or group + 1 == n_groups:
                    yield [file, first, group + 1, size]
                    first, size = group + 1, 0


def documents(unit):
    """Yield (split, text) of the pages of a unit."""
    file, first, end, _ = unit
    with open_parquet(file) as parquet:
        groups = range(first, end)
        for rows in parquet.iter_batches(batch_size=1000, row_groups=groups, columns=COLUMNS):
            for page in rows.to_pylist():
                if page["text"]:
                    yield "val" if held_out(page["id"], VAL_SHARE) else "train", page["text"]


@contextlib.contextmanager
def open_parquet(file):
    """Yield a pyarrow.parquet.ParquetFile that has the columns id and text."""
    with errors_name(file), contextlib.ExitStack() as stack:
        import pyarrow.parquet
        if file.startswith("hf://"):
            import huggingface_hub
            handle = stack.enter_context(huggingface_hub.HfFileSystem().open(file))
        else:
            handle = stack.enter_context(open(file, "rb"))
        parquet = stack.enter_context(pyarrow.parquet.ParquetFile(handle))
        names = parquet.schema.names
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise BadInput(f"{file}: has no column {' and '.join(missing)}; it has "
                           f"{', '.join(names)}")
        yield parquet


@contextlib.contextmanager
def errors_name(source):
    """Turn any error inside the block into a BadInput of one line that names the source."""
    try:
        yield
    except BadInput:
        raise
    except ImportError as error:
        raise BadInput(f"data/fineweb_edu needs the package {error.name}: "
                       "pip install pyarrow huggingface_hub") from None
    except Exception as error:          # disk, network and format errors have no common base class
        reason = (str(error).splitlines() or [""])[0]
        raise BadInput(f"{source}: could not be read ({type(error).__name__}: {reason}); what is "
                       "finished is kept, and the same command continues") from None


@exits_cleanly
def main(argv):
    (options, fineweb), _ = configure(argv, PrepareOptions, FinewebOptions, usage=__doc__)
    processes = fineweb.processes or max(1, (os.cpu_count() or 2) // 2)
    work = units(fineweb.input, fineweb.sample, fineweb.tokens)
    prepare_units("fineweb_edu", work, documents, options, fineweb.tokens, processes)


if __name__ == "__main__":
    main()
