"""Retrieval documents (see passkey.py): a key somewhere in running text, and the question at the end.

    python data/passkey/prepare.py --block_size=256 [--documents=8000] [--filler=speeches]         then --data=passkey_256

Whole documents are packed into rows of block_size + 1 tokens (chat.py), so that a question never loses its key; a model is trained
on them with that block_size. Lengths are spread evenly over their logarithm: the short ones are where retrieval is learned, the
long ones where it is stretched. Keys stand near both ends more often than between. The running text is that of a prepared corpus,
split by split.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

import numpy as np  # noqa: E402

from configurator import BadInput, configure, exits_cleanly  # noqa: E402
from data import packing  # noqa: E402
from data.corpus import PrepareOptions  # noqa: E402
from data.dataset import ANSWER, PADDING, TEXT  # noqa: E402
from data.tokenizer import load_tokenizer
from family import passkey  # noqa: E402

VAL_DOCUMENTS = 200
MOST_KEYS = 16              # in a document


@dataclass
class PasskeyOptions:
    block_size: int = 256       # that of the training it is for; the corpus goes to DATA_DIR/passkey_BLOCK_SIZE/TOKENIZER
    documents: int = 8000       # to train on
    filler: str = "speeches"    # prepared corpus whose text surrounds the keys
    seed: int = 1337            # of lengths, depths, keys and places in the filler

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be above 0" for name in ("block_size", "documents") if getattr(self, name) <= 0]


def documents(options, passkeys):
    """Yield (split, [(id, class), ...]): everything is to be predicted, answers are marked as such."""
    tokenizer = load_tokenizer(options.tokenizer)
    end = tokenizer.encode(passkey.END) + [tokenizer.eos]
    least, most = passkey.shortest(tokenizer), passkeys.block_size + 1 - len(end)
    if most < least:
        raise BadInput(f"--block_size={passkeys.block_size}: key, question and answer take up to {least + len(end)} tokens of {tokenizer.name}")
    for split, count in (("train", passkeys.documents), ("val", VAL_DOCUMENTS)):
        filler = passkey.open_filler(options.data_dir, passkeys.filler, tokenizer, split)
        rng = np.random.default_rng([passkeys.seed, split == "val"])
        for _ in range(count):
            length = math.exp(rng.uniform(math.log(least), math.log(most)))
            n_keys = int(rng.integers(1, 1 + max(1, min(MOST_KEYS, length // (3 * least)))))
            ids, answer = passkey.make_document(rng, split, filler, tokenizer, round(length), rng.beta(0.5, 0.5, n_keys))
            classes = [PADDING, *(ANSWER if a else TEXT for a in answer[1:]), *[TEXT] * len(end)]      # what opens a document is chance
            yield split, list(zip(ids.tolist() + end, classes))


@exits_cleanly
def main(argv):
    (options, passkeys), _ = configure(argv, PrepareOptions, PasskeyOptions, usage=__doc__)
    packing.prepare(f"passkey_{passkeys.block_size}", documents(options, passkeys), passkeys.block_size, options,
                 fit=lambda tokenizer, pairs, row: (pairs, 0))


if __name__ == "__main__":
    main()
