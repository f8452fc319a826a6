"""FineWeb-Edu, sample-10BT: web pages picked for their educational value, streamed from the Hugging Face hub.

    python data/fineweb_edu/prepare.py --tokens=100000000 [--tokenizer=bpe4096] [--overwrite=True]

Needs a network and pip install datasets. A document is a page; 1 % is held out by a hash of its id.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]   # the project, data/

import tokenizer as tokenizers                                           # noqa: E402
from configurator import BadInput, configure, exits_cleanly              # noqa: E402
from prepare_corpus import PrepareOptions, held_out, prepare             # noqa: E402

VAL_SHARE = 0.01


@dataclass
class FinewebOptions:
    tokens: int = 100_000_000       # stop after about so many; at least 1 million, the whole sample has about 10 billion

    def problems(self):
        return [] if self.tokens >= 10 ** 6 else [f"--tokens={self.tokens}: at least 1,000,000"]


def documents(tokens, tokenizer):
    """Yield (split, text) until about so many tokens: their bytes are counted, at the rate that the first pages show."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("data/fineweb_edu needs the package datasets: pip install datasets") from None
    n_bytes, sample_bytes, sample_tokens = 0, 0, 0
    try:
        for n, row in enumerate(load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True)):
            size = len(row["text"].encode("utf-8"))
            if n < 1000:
                sample_bytes, sample_tokens = sample_bytes + size, sample_tokens + len(tokenizer.encode(row["text"])) + 2
            if n_bytes / sample_bytes * sample_tokens >= tokens:
                return
            n_bytes += size
            yield "val" if held_out(row["id"], VAL_SHARE) else "train", row["text"]
    except (OSError, RuntimeError) as error:                             # what its HTTP client raises is among these
        raise BadInput(f"fineweb-edu could not be read from the hub: {type(error).__name__}; nothing was written") from None


@exits_cleanly
def main(argv):
    (options, fineweb), _ = configure(argv, PrepareOptions, FinewebOptions, usage=__doc__)
    prepare("fineweb_edu", documents(fineweb.tokens, tokenizers.load(options.tokenizer)), options)


if __name__ == "__main__":
    main()
