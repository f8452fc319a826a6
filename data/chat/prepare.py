"""A corpus of your own conversations: .jsonl, .json or .parquet files in the common shapes.

    python data/chat/prepare.py --input=PATH[,PATH ...] --name=NAME [--block_size=256]

Train on it with --data=NAME --doc_mask=True. data/packing.py describes the shapes that are read.

Whole conversations are packed into rows of block_size + 1 tokens, so a model is trained on them
with that block_size. A conversation that is longer loses exchanges from its end; it is dropped if
its first exchange is longer. Both are counted. Conversations are held out by a hash of the user's
first turn, so that all answers to one question are in the same split; by a hash of the whole
conversation if all begin with the same question.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))    # the project

from configurator import (  # noqa: E402
    BadInput,
    configure,
    exits_cleanly,
    must_be_positive,
    no_output,
)
from data import packing  # noqa: E402
from data.corpus import (  # noqa: E402
    PrepareOptions,
    hash_fraction,
    hold_out_limit,
    input_problems,
)
from data.files import RECORD_SUFFIXES, find_files  # noqa: E402


@dataclass
class ChatOptions:
    input: str = ""             # .jsonl, .json and .parquet files, or folders of them, separated by
                                # commas
    name: str = ""              # the corpus is DATA_DIR/NAME/TOKENIZER; use it with --data=NAME
    block_size: int = 256       # the block_size of the training that it is for
    val_share: float = 0.05     # share of the conversations to hold out
    skip_bad: bool = False      # True: leave out and count records that are not conversations;
                                # False: stop at the first one

    def problems(self):
        lines = input_problems(self.input, self.name)
        lines += must_be_positive(self, "block_size")
        if not 0 < self.val_share < 1:
            lines.append(f"--val_share={self.val_share}: must be above 0 and below 1")
        return lines


def read_all(options, say):
    """Yield (place in the files, messages) of all conversations; see packing.read_records."""
    for file in find_files(options.input, RECORD_SUFFIXES):
        yield from packing.read_records(file, packing.parse_conversation, options.skip_bad, say)


def first_question(messages):
    """Return the text of the user's first turn, or of the first one if there is no user."""
    questions = [turn for turn in messages if turn["role"] == "user"] or messages
    return questions[0]["content"]


def conversations(options):
    """Yield (split, messages, place in the files) of all conversations.

    Reads the files twice, to make sure that no split is empty. BadInput if that cannot be.
    """
    for identity, say in ((first_question, print), (json.dumps, no_output)):
        fractions = [hash_fraction(identity(messages).encode("utf-8"))
                     for _, messages in read_all(options, say)]
        if not fractions:
            raise BadInput(f"--input={options.input}: holds no conversations")
        if len(set(fractions)) > 1:
            break
    else:
        raise BadInput(f"--input={options.input}: holds {len(fractions)} conversations, no two of "
                       "them different; a corpus needs one for training and one to hold out")
    limit = hold_out_limit(fractions, options.val_share)
    for (place, messages), fraction in zip(read_all(options, no_output), fractions):
        yield "val" if fraction < limit else "train", messages, place


@exits_cleanly
def main(argv):
    (options, chat), _ = configure(argv, PrepareOptions, ChatOptions, usage=__doc__)
    packing.prepare(chat.name, conversations(chat), chat.block_size, options,
                    skip_bad=chat.skip_bad)


if __name__ == "__main__":
    main()
