"""Retrieval documents (see passkey.py): a key somewhere in running text, and the question at the end.

    python data/passkey/prepare.py --length=256 [--documents=8000] [--filler=speeches]         then --data=passkey_256

Lengths are spread evenly over their logarithm up to --length tokens: the short ones are where retrieval is learned, the long
ones where it is stretched. Keys stand near both ends more often than between. The running text is that of a prepared corpus, split by
split.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]   # the project, data/

import numpy as np                                                       # noqa: E402

import passkey                                                           # noqa: E402
import tokenizer as tokenizers                                           # noqa: E402
from configurator import BadInput, configure, exits_cleanly              # noqa: E402
from prepare_corpus import PrepareOptions, prepare                       # noqa: E402

VAL_DOCUMENTS = 200
MOST_KEYS = 16              # in a document


@dataclass
class PasskeyOptions:
    length: int = 256           # tokens of the longest document; the corpus goes to DATA_DIR/passkey_LENGTH/TOKENIZER
    documents: int = 8000       # to train on
    filler: str = "speeches"    # prepared corpus whose text surrounds the keys
    seed: int = 1337            # of lengths, depths, keys and places in the filler

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be above 0" for name in ("length", "documents") if getattr(self, name) <= 0]


def documents(options, passkeys):
    """Yield (split, text)."""
    tokenizer = tokenizers.load(options.tokenizer)
    least = passkey.shortest(tokenizer)
    if passkeys.length < least:
        raise BadInput(f"--length={passkeys.length}: key and question take up to {least} tokens of {tokenizer.name}")
    for split, count in (("train", passkeys.documents), ("val", VAL_DOCUMENTS)):
        filler = passkey.open_filler(options.data_dir, passkeys.filler, tokenizer, split)
        rng = np.random.default_rng([passkeys.seed, split == "val"])
        for _ in range(count):
            length = math.exp(rng.uniform(math.log(least), math.log(passkeys.length)))
            n_keys = int(rng.integers(1, 1 + max(1, min(MOST_KEYS, length // (3 * least)))))
            ids, _ = passkey.make_document(rng, split, filler, tokenizer, round(length), rng.beta(0.5, 0.5, n_keys))
            yield split, tokenizer.decode(ids[1:].tolist()) + ".\n"


@exits_cleanly
def main(argv):
    (options, passkeys), _ = configure(argv, PrepareOptions, PasskeyOptions, usage=__doc__)
    prepare(f"passkey_{passkeys.length}", documents(options, passkeys), options)


if __name__ == "__main__":
    main()
