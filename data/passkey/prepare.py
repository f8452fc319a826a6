"""Retrieval documents (data/passkeys.py): keys within running text, and questions at the end.

    python data/speeches/prepare.py
    python data/passkey/prepare.py --block_size=256 [--documents=8000] [--filler=speeches]
    python train.py --data=passkey_256 --block_size=256 --doc_mask=True

Whole documents are packed into rows of block_size + 1 tokens (data/packing.py), so that a question
is never cut off from its key; train with the same block_size. Lengths are uniform in their
logarithm: a model learns to retrieve in short documents and to reach further in long ones. Keys
stand near both ends more often than in the middle. The running text ("filler") is that of a
prepared corpus; train documents use its train split and val documents its val split.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

import numpy as np  # noqa: E402

from configurator import BadInput, configure, exits_cleanly, must_be_positive  # noqa: E402
from data import packing, passkeys  # noqa: E402
from data.corpus import PrepareOptions  # noqa: E402
from data.dataset import ANSWER, PADDING, TEXT  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402

VAL_DOCUMENTS = 200
MAX_KEYS = 16               # per document


@dataclass
class PasskeyOptions:
    block_size: int = 256       # of the training; write DATA_DIR/passkey_BLOCK_SIZE/TOKENIZER
    documents: int = 8000       # number of training documents
    filler: str = "speeches"    # prepared corpus whose text surrounds the keys
    seed: int = 1337            # seed of lengths, depths, keys and places in the filler

    def problems(self):
        return must_be_positive(self, "block_size documents")


def documents(options, sizes):
    """Yield (split, [(id, class), ...]): all tokens are targets, except the <s>."""
    tokenizer = load_tokenizer(options.tokenizer)
    end = tokenizer.encode(passkeys.END) + [tokenizer.eos]
    shortest, longest = passkeys.shortest(tokenizer), sizes.block_size + 1 - len(end)
    if longest < shortest:
        raise BadInput(f"--block_size={sizes.block_size}: key, question and answer take up to "
                       f"{shortest + len(end)} tokens of {tokenizer.name}")
    for split, count in (("train", sizes.documents), ("val", VAL_DOCUMENTS)):
        filler = passkeys.open_filler(options.data_dir, sizes.filler, tokenizer, split)
        rng = np.random.default_rng([sizes.seed, split == "val"])
        for _ in range(count):
            length = math.exp(rng.uniform(math.log(shortest), math.log(longest)))
            max_keys = max(1, min(MAX_KEYS, length // (3 * shortest)))
            depths = rng.beta(0.5, 0.5, int(rng.integers(1, 1 + max_keys)))
            ids, is_answer = passkeys.make_document(rng, split, filler, tokenizer, round(length),
                                                   depths)
            classes = [ANSWER if answer else TEXT for answer in is_answer] + [TEXT] * len(end)
            classes[0] = PADDING        # what precedes a document in its row is random
            yield split, list(zip(ids.tolist() + end, classes))


@exits_cleanly
def main(argv):
    (options, sizes), _ = configure(argv, PrepareOptions, PasskeyOptions, usage=__doc__)
    packing.prepare(f"passkey_{sizes.block_size}", documents(options, sizes),
                    sizes.block_size, options, fit=lambda tokenizer, pairs, row: (pairs, 0))


if __name__ == "__main__":
    main()
