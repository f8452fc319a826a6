"""Instructions whose answers can be checked, in eight families: a corpus of conversations made here, without a download.

    python data/instruct/prepare.py [--block_size=256] [--tokenizer=bpe4096] [--overwrite=True]

Writes, beside the packed shards of data/chat/prepare.py's kind (the test questions are their val split), in data/instruct/:

train.jsonl, test.jsonl              conversations of one exchange, with the field family
pairs_train.jsonl, pairs_test.jsonl  for DPO: two correct answers, the short one chosen ("7"), the long one ("The answer is 7.")
                                     rejected. The conversations use either at random, so that SFT leaves the choice open

No test question shares its content (the numbers, the word, the passage) with a training question, in whatever order or
wording: a hash of the content decides the side. Passages are of the torch package's source, those of the test of its held-out
files. Letters and digits stand apart, so that byte pairs do not hide them.
"""
import importlib.util
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))             # the project

from configurator import ROOT, configure, exits_cleanly  # noqa: E402
from data import packing  # noqa: E402
from data.corpus import PrepareOptions, held_out  # noqa: E402

TEST_SHARE = 0.1                        # of the contents
PASSAGE = re.compile(r"\b[a-z]{2,9}(?: [a-z]{2,9}){5}\b")               # six plain words in a row: comments and docstrings
NOUNS = ("air arm art bag bank bell bird boat body book box boy bus car cat city coat cup day dog door ear egg end eye face fish "
         "food foot game girl hand hat home hour king lake land line map milk moon name night oil park pen rain road sea ship "
         "song star sun town tree wall water way wind year").split()


@dataclass
class InstructOptions:
    block_size: int = 256       # that of the training it is for
    train: int = 32000          # training conversations
    test: int = 800             # test questions

    def problems(self):
        return [f"--{name}={getattr(self, name)}: must be at least {least}" for name, least in
                (("block_size", 64), ("train", len(FAMILIES)), ("test", len(FAMILIES))) if getattr(self, name) < least]


# ---- the families: (rng, material) -> (content, wordings of the question, answer); the content is what no two sides share

def add(rng, material):
    digits = [rng.randrange(10) for _ in range(3)]
    said = " + ".join(map(str, digits))
    return sorted(digits), [f"What is {said}?", f"Add up {said}.", f"{said} = ?"], str(sum(digits))


def larger(rng, material):
    a, b = rng.sample(range(100), 2)
    return sorted([a, b]), [f"Which is larger, {a} or {b}?", f"Take the greater of {a} and {b}.", f"The maximum of {a} and {b}?"], str(max(a, b))


def sort(rng, material):
    digits = [rng.randrange(10) for _ in range(6)]
    said = " ".join(map(str, digits))
    return sorted(digits), [f"Sort {said}.", f"Put in order: {said}", f"What is {said} in rising order?"], " ".join(map(str, sorted(digits)))


def count(rng, material):
    (letter, other), often = rng.sample("abcdefghijklmnopqrst", 2), rng.randrange(1, 6)
    said = " ".join(rng.sample([letter] * often + [other] * (6 - often), 6))
    return [letter, other, often], [f"How many {letter} are in {said}?", f"Count the {letter} in {said}.",
                                    f"How often does {letter} occur in {said}?"], str(often)


def backwards(rng, material):
    word = rng.choice(material["words"])
    said = " ".join(word)
    return word, [f"Spell {said} backwards.", f"Reverse {said}.", f"What is {said} from right to left?"], said[::-1]


def copy(rng, material):
    words = rng.sample(NOUNS, 5)
    said = " ".join(words)
    return sorted(words), [f"Repeat: {said}", f"Say {said}.", f"Copy the words {said}."], said


def end(rng, material):
    words, (name, place) = rng.sample(NOUNS, 4), rng.choice((("first", 0), ("last", -1)))
    said = " ".join(words)
    return sorted(words), [f"What is the {name} word of {said}?", f"Give the {name} of these words: {said}",
                           f"Here are words: {said}. Which is {name}?"], words[place]


def follows(rng, material):
    passage = rng.choice(material["passages"])
    words = passage.split()
    at = rng.choice([i for i in range(len(words) - 1) if words.count(words[i]) == 1] or [0])
    return passage, [f"Which word follows {words[at]} in this text: {passage}", f"In the text: {passage}. What comes after {words[at]}?",
                     f"Find the word after {words[at]}. {passage}"], words[at + 1]


FAMILIES = (add, larger, sort, count, backwards, copy, end, follows)


def materials(documents):
    """{split: {"words", "passages"}} from (split, text) pairs: short words of all, and passages of the split's own documents."""
    passages, words = {"train": {}, "test": {}}, Counter()
    for split, text in documents:
        passages["train" if split == "train" else "test"].update(dict.fromkeys(PASSAGE.findall(text)))
        words.update(re.findall(r"\b[a-z]{3,5}\b", text))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:1500]
    return {split: {"words": frequent, "passages": [*found]} for split, found in passages.items()}


def examples(split, size, material):
    """Yield (family, question, answer) in turn from every family: the same for the same material, no test question twice."""
    rng, asked = random.Random(split), set()
    for n in range(size):
        family = FAMILIES[n % len(FAMILIES)]
        while True:
            content, wordings, answer = family(rng, material)
            question = rng.choice(wordings)
            if held_out(f"{family.__name__} {content}", TEST_SHARE) == (split == "test") and not (split == "test" and question in asked):
                break
        asked.add(question)
        yield family.__name__, question, answer


def styled(answer, long):
    return f"The answer is {answer}." if long else answer


def write_jsonl(path, records):
    """All or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


def torch_documents():
    """(split, text) of the corpus data/pytorch."""
    spec = importlib.util.spec_from_file_location("prepare_pytorch", ROOT / "data" / "pytorch" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.documents()


def write_instructions(folder, documents, sizes):
    """The four files. documents: (split, text) pairs, split "train" or "val"; sizes: {"train": n, "test": n}."""
    folder.mkdir(parents=True, exist_ok=True)
    material = materials(documents)
    for split, size in sizes.items():
        made, style = list(examples(split, size, material[split])), random.Random(f"style {split}")
        write_jsonl(folder / f"{split}.jsonl", (
            {"family": family, "messages": [{"role": "user", "content": question},
                                            {"role": "assistant", "content": styled(answer, style.random() < 0.5)}]}
            for family, question, answer in made))
        write_jsonl(folder / f"pairs_{split}.jsonl", (
            {"family": family, "prompt": question, "chosen": answer, "rejected": styled(answer, True)} for family, question, answer in made))


@exits_cleanly
def main(argv):
    (options, sizes), _ = configure(argv, PrepareOptions, InstructOptions, usage=__doc__)
    folder = ROOT / options.data_dir / "instruct"

    def conversations():
        write_instructions(folder, torch_documents(), {"train": sizes.train, "test": sizes.test})
        for split, name in (("train", "train"), ("val", "test")):
            for messages in packing.read_conversations(folder / f"{name}.jsonl"):
                yield split, messages
    packing.prepare("instruct", conversations(), sizes.block_size, options)


if __name__ == "__main__":
    main()
