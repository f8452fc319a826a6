"""Passkey documents: keys are stated in running text, and asked for at the end.

    ... running text ... The pass key of the king is cost faith. ... running text ...
    What is it? The pass key of the king is cost faith.

A key is two words. A hash of the key decides whether it belongs to training or is held out, and the
running text comes from the same split, so that nothing used in the evaluation was seen in training.
data/passkey/prepare.py writes such documents as a corpus; family/passkey.py measures models.
"""
import hashlib

import numpy as np

from configurator import BadInput
from data.dataset import open_corpus

# With the space before it each word is one token of bpe4096: a model that was trained for a minute
# does not have to learn any spelling.
NAMES = """
    record plan root duty trade king nation body port friend frame string thread rule word father
    land message store money fund course ship stage bear branch month tree field home child world
""".split()
WORDS = """
    peace power system service place point step copy base reason purpose love head life action
    length heart change pattern control cost item progress program claim side strength treaty
    product care level bucket period death question health matter template commerce turn spirit
    authority faith security session issue justice debt labor property character honour hope cause
    mark number memory order interest class event guard sign path
""".split()
END = ".\n"                                 # what follows an answer
HELD_OUT_KEYS = 0.1                         # share of the keys
MAX_TOKENS = 20_000_000                     # read from a corpus at most


def keys_of(split):
    """Return the keys of "train" or "val": pairs of words, chosen by a hash of their text."""
    pairs = [f" {first} {second}" for first in WORDS for second in WORDS]
    held_out = {key for key in pairs
                if hashlib.sha256(key.encode()).digest()[0] < 256 * HELD_OUT_KEYS}
    return [key for key in pairs if (key in held_out) == (split == "val")]


KEYS = {split: keys_of(split) for split in ("train", "val")}
CHANCE = 1 / len(WORDS) ** 2                # of naming a key without having read it


def open_filler(data_dir, name, tokenizer, split):
    """Return the running text of a prepared corpus: its tokens (n,) without document marks."""
    corpus = open_corpus(data_dir, name, tokenizer, split)
    tokens = corpus.read(0, min(corpus.n_tokens, MAX_TOKENS))
    return tokens[(tokens != tokenizer.bos) & (tokens != tokenizer.eos)]


def sentences(tokenizer, name, key):
    """Return the ids of the statement, of the question, and of the answer (the key)."""
    begin = f"The pass key of the {name} is"
    texts = (f"{begin}{key}.\n", f"What is it? {begin}", key)
    return [tokenizer.encode(text) for text in texts]


def make_document(rng, split, filler, tokenizer, length, depths):
    """Make one document, up to the end of its last answer.

    split    "train" or "val": whose keys
    filler   tokens (n,) of running text
    length   number of tokens
    depths   where each key is stated: 0 before all running text, 1 after it. The questions come in
             this order. Training documents have several keys: more answers per token to learn from
    returns  (ids (length,), is_answer (length,) bool)
    raises   BadInput if length is too short for the keys, or the filler too short for length
    """
    statements, questions = [], tokenizer.encode("\n")
    is_answer = [False] * len(questions)
    for name in rng.permutation(NAMES)[:len(depths)]:
        key = KEYS[split][rng.integers(len(KEYS[split]))]
        statement, question, answer = sentences(tokenizer, name, key)
        if statements:
            question = tokenizer.encode(END) + question
        statements.append(statement)
        questions += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)

    room = length - 1 - len(questions) - sum(map(len, statements))
    if room < 0:
        raise BadInput(f"a document of {length} tokens: keys and questions alone take "
                       f"{length - room}")
    if room >= len(filler):
        raise BadInput(f"a document of {length} tokens: its filler has only {len(filler)}; "
                       "name a larger corpus")
    first = rng.integers(len(filler) - room)
    text, ids, used = filler[first:first + room].tolist(), [tokenizer.bos], 0
    for depth, statement in sorted(zip(depths, statements)):
        place = round(depth * room)
        if place > used:                    # end the line, so that the statement has its own
            ids += text[used:place - 1] + tokenizer.encode("\n")
            used = place
        ids += statement
    ids += text[used:]
    return np.array(ids + questions), np.array([False] * len(ids) + is_answer)


def longest(tokenizer, texts):
    """Return the text that takes the most tokens."""
    return max(texts, key=lambda text: len(tokenizer.encode(text)))


def shortest(tokenizer):
    """Return how many tokens a document of one key takes without running text, for any key."""
    name = longest(tokenizer, [f" {name}" for name in NAMES]).strip()
    key = longest(tokenizer, KEYS["train"] + KEYS["val"])
    parts = [tokenizer.encode("\n"), *sentences(tokenizer, name, key)]
    return 1 + sum(map(len, parts))
