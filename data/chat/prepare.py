"""A corpus of your own conversations: local .jsonl or .json files in the common shapes.

    python data/chat/prepare.py --input=PATH[,PATH ...] --name=NAME [--block_size=256]

Train on it with --data=NAME --doc_mask=True. data/packing.py describes the shapes that are read.

Whole conversations are packed into rows of block_size + 1 tokens, so a model is trained on them
with that block_size. A conversation that is longer loses exchanges from its end; it is dropped if
its first exchange is longer. Both are counted. Conversations are held out by a hash of the user's
first turn, so that all answers to one question are in the same split.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))    # the project

from configurator import ROOT, BadInput, configure, exits_cleanly, must_be_positive  # noqa: E402
from data import packing  # noqa: E402
from data.corpus import PrepareOptions, held_out  # noqa: E402


@dataclass
class ChatOptions:
    input: str = ""             # files, or folders with .jsonl and .json files, separated by commas
    name: str = ""              # the corpus is DATA_DIR/NAME/TOKENIZER; use it with --data=NAME
    block_size: int = 256       # the block_size of the training that it is for
    val_share: float = 0.05     # share of the conversations to hold out
    skip_bad: bool = False      # True: leave out and count records that are not conversations;
                                # False: stop at the first one

    def problems(self):
        lines = [f"--{option}=... is required" for option in ("input", "name")
                 if not getattr(self, option)]
        shipped = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        if self.name and (not re.fullmatch(r"[\w-]+", self.name) or self.name.lower() in shipped):
            lines.append(f"--name={self.name}: letters, digits, '_' and '-', and none of the "
                         f"shipped {', '.join(shipped)}")
        lines += must_be_positive(self, "block_size")
        if not 0 < self.val_share < 1:
            lines.append(f"--val_share={self.val_share}: must be above 0 and below 1")
        return lines


def conversation_files(paths):
    """Return the files of a comma-separated list of files and folders."""
    files = []
    for path in (Path(part.strip()) for part in paths.split(",")):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".json"))
        if not found:
            raise BadInput(f"--input: {path}: no .jsonl or .json file there")
        files += found
    return files


def conversations(options):
    """Yield (split, messages) of all files."""
    for file in conversation_files(options.input):
        for messages in packing.read_conversations(file, options.skip_bad):
            questions = [turn for turn in messages if turn["role"] == "user"] or messages
            held = held_out(questions[0]["content"], options.val_share)
            yield "val" if held else "train", messages


@exits_cleanly
def main(argv):
    (options, chat), _ = configure(argv, PrepareOptions, ChatOptions, usage=__doc__)
    packing.prepare(chat.name, conversations(chat), chat.block_size, options)


if __name__ == "__main__":
    main()
