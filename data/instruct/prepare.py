"""Instructions whose answers can be checked: conversations of eight families, without a download.

    python data/instruct/prepare.py [--block_size=256] [--tokenizer=bpe4096] [--overwrite=True]

Writes packed shards as data/chat/prepare.py does, with the test questions as the val split, and
beside them in data/instruct/:

train.jsonl, test.jsonl              conversations of one exchange, with a field family
pairs_train.jsonl, pairs_test.jsonl  for DPO: two correct answers, of which the short one is chosen
                                     ("7") and the long one rejected ("The answer is 7."). The
                                     conversations use either at random, so SFT prefers neither

No test question shares its content (the numbers, the word, the passage) with a training question,
in any order or wording: a hash of the content decides the split. Passages are from the source of
the torch package; those of the test split are from its held-out files. Letters and digits are
separated by spaces, so that byte pairs do not hide them.
"""
import importlib
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))    # the project

from configurator import ROOT, configure, exits_cleanly  # noqa: E402
from data import packing  # noqa: E402
from data.corpus import PrepareOptions, held_out  # noqa: E402

TEST_SHARE = 0.1                # of the contents
# Six plain words in a row, as in comments and docstrings.
PASSAGE = re.compile(r"\b[a-z]{2,9}(?: [a-z]{2,9}){5}\b")
NOUNS = (
    "air arm art bag bank bell bird boat body book box boy bus car cat city coat cup day dog door "
    "ear egg end eye face fish food foot game girl hand hat home hour king lake land line map milk "
    "moon name night oil park pen rain road sea ship song star sun town tree wall water way wind "
    "year").split()


@dataclass
class InstructOptions:
    block_size: int = 256       # the block_size of the training that it is for
    train: int = 32000          # training conversations
    test: int = 800             # test questions

    def problems(self):
        least = {"block_size": 64, "train": len(FAMILIES), "test": len(FAMILIES)}
        return [f"--{name}={getattr(self, name)}: must be at least {value}"
                for name, value in least.items() if getattr(self, name) < value]


# ---- the families
#
# Each is a function (rng, material) -> (content, wordings of the question, answer). The content is
# what training and test questions never share.

def add(rng, material):
    digits = [rng.randrange(10) for _ in range(3)]
    terms = " + ".join(map(str, digits))
    wordings = [f"What is {terms}?", f"Add up {terms}.", f"{terms} = ?"]
    return sorted(digits), wordings, str(sum(digits))


def larger(rng, material):
    a, b = rng.sample(range(100), 2)
    wordings = [f"Which is larger, {a} or {b}?", f"Take the greater of {a} and {b}.",
                f"The maximum of {a} and {b}?"]
    return sorted([a, b]), wordings, str(max(a, b))


def sort(rng, material):
    digits = [rng.randrange(10) for _ in range(6)]
    listed = " ".join(map(str, digits))
    wordings = [f"Sort {listed}.", f"Put in order: {listed}", f"What is {listed} in rising order?"]
    return sorted(digits), wordings, " ".join(map(str, sorted(digits)))


def count(rng, material):
    (letter, other), often = rng.sample("abcdefghijklmnopqrst", 2), rng.randrange(1, 6)
    listed = " ".join(rng.sample([letter] * often + [other] * (6 - often), 6))
    wordings = [f"How many {letter} are in {listed}?", f"Count the {letter} in {listed}.",
                f"How often does {letter} occur in {listed}?"]
    return [letter, other, often], wordings, str(often)


def backwards(rng, material):
    word = rng.choice(material["words"])
    letters = " ".join(word)
    wordings = [f"Spell {letters} backwards.", f"Reverse {letters}.",
                f"What is {letters} from right to left?"]
    return word, wordings, letters[::-1]


def copy(rng, material):
    words = rng.sample(NOUNS, 5)
    listed = " ".join(words)
    wordings = [f"Repeat: {listed}", f"Say {listed}.", f"Copy the words {listed}."]
    return sorted(words), wordings, listed


def end(rng, material):
    words = rng.sample(NOUNS, 4)
    name, place = rng.choice((("first", 0), ("last", -1)))
    listed = " ".join(words)
    wordings = [f"What is the {name} word of {listed}?",
                f"Give the {name} of these words: {listed}",
                f"Here are words: {listed}. Which is {name}?"]
    return sorted(words), wordings, words[place]


def follows(rng, material):
    passage = rng.choice(material["passages"])
    words = passage.split()
    unique = [i for i in range(len(words) - 1) if words.count(words[i]) == 1]
    at = rng.choice(unique or [0])
    wordings = [f"Which word follows {words[at]} in this text: {passage}",
                f"In the text: {passage}. What comes after {words[at]}?",
                f"Find the word after {words[at]}. {passage}"]
    return passage, wordings, words[at + 1]


FAMILIES = (add, larger, sort, count, backwards, copy, end, follows)


def materials(documents):
    """Return {split: {"words", "passages"}} of (split, text) pairs: the frequent short words of all
    texts, and the passages of the split's own texts."""
    passages, words = {"train": {}, "test": {}}, Counter()
    for split, text in documents:
        found = dict.fromkeys(PASSAGE.findall(text))
        passages["train" if split == "train" else "test"].update(found)
        words.update(re.findall(r"\b[a-z]{3,5}\b", text))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:1500]
    return {split: {"words": frequent, "passages": [*found]} for split, found in passages.items()}


def examples(split, size, material):
    """Yield (family, question, answer), one family after another. The same material gives the same
    examples, and no test question comes twice."""
    rng, asked = random.Random(split), set()
    for n in range(size):
        family = FAMILIES[n % len(FAMILIES)]
        question = None
        while question is None or (split == "test" and question in asked):
            question, answer = draw(family, split, rng, material)
        asked.add(question)
        yield family.__name__, question, answer


def draw(family, split, rng, material):
    """Return (question, answer) of a family with a content that belongs to a split."""
    while True:
        content, wordings, answer = family(rng, material)
        question = rng.choice(wordings)
        if held_out(f"{family.__name__} {content}", TEST_SHARE) == (split == "test"):
            return question, answer


def styled(answer, long):
    return f"The answer is {answer}." if long else answer


def write_jsonl(path, records):
    """Write one JSON object per line, all of them or no file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    lines = [json.dumps(record) + "\n" for record in records]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def write_instructions(folder, documents, sizes):
    """Write the four .jsonl files.

    documents  (split, text) pairs, split "train" or "val"
    sizes      {"train": examples, "test": examples}
    """
    folder.mkdir(parents=True, exist_ok=True)
    material = materials(documents)
    for split, size in sizes.items():
        style, conversations, pairs = random.Random(f"style {split}"), [], []
        for family, question, answer in examples(split, size, material[split]):
            messages = [{"role": "user", "content": question},
                        {"role": "assistant", "content": styled(answer, style.random() < 0.5)}]
            conversations.append({"family": family, "messages": messages})
            pairs.append({"family": family, "prompt": question, "chosen": answer,
                          "rejected": styled(answer, True)})
        write_jsonl(folder / f"{split}.jsonl", conversations)
        write_jsonl(folder / f"pairs_{split}.jsonl", pairs)


def conversations(folder, sizes):
    """Write the files, then yield (split, messages) of their conversations."""
    documents = importlib.import_module("data.pytorch.prepare").documents()
    write_instructions(folder, documents, sizes)
    for split, name in (("train", "train"), ("val", "test")):
        for messages in packing.read_conversations(folder / f"{name}.jsonl"):
            yield split, messages


@exits_cleanly
def main(argv):
    (options, instruct), _ = configure(argv, PrepareOptions, InstructOptions, usage=__doc__)
    sizes = {"train": instruct.train, "test": instruct.test}
    made = conversations(ROOT / options.data_dir / "instruct", sizes)
    packing.prepare("instruct", made, instruct.block_size, options)


if __name__ == "__main__":
    main()
