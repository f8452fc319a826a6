"""Retrieval documents: keys are stated in running text, and asked for at the end.

    ... running text ... The pass key of the king is cost faith. ... running text ...
    What is it? The pass key of the king is cost faith.

data/passkey/prepare.py writes such documents as a corpus, `python -m tools.evaluate --task=passkey`
asks for keys at chosen lengths and depths. A key is two words. A hash of the key decides whether it
belongs to training or is held out, and the running text comes from the same split, so that nothing
used in the evaluation was seen in training.
"""
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

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


@torch.no_grad()
def share_right(model, documents, batch_size):
    """Return the share of documents whose answer greedy decoding would get right.

    An answer is right if each of its tokens is the likeliest one given the text before it.
    documents: list of (ids, is_answer), all of one length
    """
    device, right = model.wte.weight.device, 0
    for i in range(0, len(documents), batch_size):
        group = zip(*documents[i:i + batch_size])           # to (B, T) each
        ids, is_answer = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in group)
        first = int(is_answer.any(0).nonzero()[0])      # no logits are needed before it
        hidden, _ = model.hidden(ids[:, :-1])
        hidden = hidden[:, first - 1:]                  # (B, T - first, C)
        likeliest = F.linear(hidden, model.head_weight.to(hidden.dtype)).argmax(-1)
        wrong = (likeliest != ids[:, first:]) & is_answer[:, first:]
        right += int((~wrong.any(1)).sum())
    return right / len(documents)


def retrieval(model, tokenizer, filler, lengths, depths, questions, seed, batch_tokens):
    """Return {length: [share of held-out keys found at each depth]}.

    Every model is asked the same questions, `questions` of them at each length and depth.
    batch_tokens: tokens per forward
    """
    table = {}
    for length in lengths:
        table[length] = []
        for place, depth in enumerate(depths):
            rngs = (np.random.default_rng([seed, length, place, i]) for i in range(questions))
            documents = [make_document(rng, "val", filler, tokenizer, length, [depth])
                         for rng in rngs]
            table[length].append(share_right(model, documents, max(1, batch_tokens // length)))
    return table


@torch.no_grad()
def loss_by_position(model, corpus, tokenizer, block_size, max_tokens):
    """Return [(first, end, nats per token)] by position in a window of block_size tokens.

    Positions are grouped by powers of two; end is exclusive. Every window lies within one held-out
    document. Raises BadInput if no document is that long.
    """
    tokens = corpus.read(0, min(corpus.n_tokens, MAX_TOKENS))
    starts = [*np.flatnonzero(tokens == tokenizer.bos), len(tokens)]
    windows = []
    for start, end in zip(starts, starts[1:]):
        windows += range(start, end - block_size, block_size)
    if not windows:
        raise BadInput(f"{corpus.folder}: no held-out document has more than {block_size} tokens; "
                       "lower --block_size")
    n_windows = max(1, min(len(windows), max_tokens // block_size))
    chosen = np.unique(np.linspace(0, len(windows) - 1, n_windows)).astype(int)
    nats, device = np.zeros(block_size), model.wte.weight.device
    for i in chosen:
        window = tokens[windows[i]:windows[i] + block_size + 1]
        ids = torch.from_numpy(window)[None].to(device)                     # (1, T + 1)
        nll, _ = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        nats += nll[0].cpu().double().numpy()
    edges = [0, *(2 ** k for k in range(5, 30) if 2 ** k < block_size), block_size]
    return [(first, end, float(nats[first:end].mean() / len(chosen)))
            for first, end in zip(edges, edges[1:])]


def draw(table, depths, path, title):
    """Draw the table of `retrieval` as a heat map: lengths across, depths down, green is found."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(2.5 + 0.8 * len(table), 1.5 + 0.5 * len(depths)))
    shares = 100 * np.array(list(table.values())).T                         # (depths, lengths)
    axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(table)), [f"{length:,}" for length in table])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the key", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
