"""Your own conversations as a corpus: local .jsonl or .json files in the common shapes, which chat.py describes.

    python data/chat/prepare.py --input=PATH[,PATH ...] --name=NAME [--block_size=256]         then --data=NAME --doc_mask=True

Whole conversations are packed into rows of block_size + 1 tokens, so a model is trained on them with that block_size. One that
is longer loses exchanges from its end, one whose first exchange is longer is dropped; both are counted. Conversations are held
out by a hash of the user's first turn, so that the answers to one question stay on one side.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import ROOT, BadInput, configure, exits_cleanly  # noqa: E402
from data import packing  # noqa: E402
from data.corpus import PrepareOptions, held_out  # noqa: E402


@dataclass
class ChatOptions:
    input: str = ""             # files, or folders with .jsonl and .json files, separated by commas
    name: str = ""              # the corpus goes to DATA_DIR/NAME/TOKENIZER and is used as --data=NAME
    block_size: int = 256       # that of the training it is for
    val_share: float = 0.05     # share of the conversations that is held out
    skip_bad: bool = False      # True: leave out what is no conversation, and count it; False: stop there

    def problems(self):
        lines = [f"--{option}=... is required" for option in ("input", "name") if not getattr(self, option)]
        shipped = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        if self.name and (not re.fullmatch(r"[\w-]+", self.name) or self.name.lower() in shipped):
            lines.append(f"--name={self.name}: letters, digits, '_' and '-', and none of the shipped {', '.join(shipped)}")
        if self.block_size <= 0:
            lines.append(f"--block_size={self.block_size}: must be above 0")
        if not 0 < self.val_share < 1:
            lines.append(f"--val_share={self.val_share}: above 0, below 1")
        return lines


def conversations(options):
    """Yield (split, messages) of all files."""
    for path in (Path(part.strip()) for part in options.input.split(",")):
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".json")) if path.is_dir() else [path]
        if not files:
            raise BadInput(f"--input: {path}: no .jsonl or .json file there")
        for file in files:
            for messages in packing.read_conversations(file, options.skip_bad):
                question = next((turn for turn in messages if turn["role"] == "user"), messages[0])["content"]
                yield "val" if held_out(question, options.val_share) else "train", messages


@exits_cleanly
def main(argv):
    (options, chosen), _ = configure(argv, PrepareOptions, ChatOptions, usage=__doc__)
    packing.prepare(chosen.name, conversations(chosen), chosen.block_size, options)


if __name__ == "__main__":
    main()
