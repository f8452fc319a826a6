"""Retrieval documents: keys are stated somewhere in running text and asked for at the end.

    ... running text ... The pass key of the king is cost faith. ... running text ...
    What is it? The pass key of the king is cost faith.

data/passkey/prepare.py writes such documents as a corpus; `python -m tools.evaluate --task=passkey` asks for keys at chosen lengths
and depths. A key is two words; whether it is met in training or held out follows from the key alone, and the running text is
that of the same split, so nothing of what is measured was seen in training.
"""
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from configurator import BadInput
from data.dataset import open_corpus

# Each is one token of bpe4096, with the space before it: a model of a minute's training has no spelling to learn.
NAMES = ("record plan root duty trade king nation body port friend frame string thread rule word father land message store money "
         "fund course ship stage bear branch month tree field home child world").split()
WORDS = ("peace power system service place point step copy base reason purpose love head life action length heart change pattern "
         "control cost item progress program claim side strength treaty product care level bucket period death question health "
         "matter template commerce turn spirit authority faith security session issue justice debt labor property character honour "
         "hope cause mark number memory order interest class event guard sign path").split()
END = ".\n"                                 # of an answer that another question or nothing follows
HELD_OUT_KEYS = 0.1                         # share of the keys


def keys_of(split):
    """The keys of a split: pairs of words, by a hash of their text."""
    pairs = [f" {first} {second}" for first in WORDS for second in WORDS]
    return [key for key in pairs if (hashlib.sha256(key.encode()).digest()[0] < 256 * HELD_OUT_KEYS) == (split == "val")]


KEYS = {split: keys_of(split) for split in ("train", "val")}
CHANCE = 1 / (len(KEYS["train"]) + len(KEYS["val"]))     # of naming a key without having read it


def open_filler(data_dir, name, tokenizer, split):
    """Tokens (n,) of a split of a prepared corpus without the marks of its documents: the running text."""
    corpus = open_corpus(data_dir, name, tokenizer, split)
    tokens = corpus.read(0, min(corpus.n_tokens, 20_000_000))
    return tokens[(tokens != tokenizer.bos) & (tokens != tokenizer.eos)]


def sentences(tokenizer, name, key):
    """Ids of the statement, the question and the answer."""
    states = f"The pass key of the {name} is"
    return [tokenizer.encode(text) for text in (f"{states}{key}.\n", f"What is it? {states}", key)]


def make_document(rng, split, filler, tokenizer, length, depths):
    """One document up to the end of its last answer. In training it has several keys, so that there are more answers to learn
    from in so many tokens.

    depths   for each key, where it is stated: 0 before all running text, 1 after it. The questions are in the same order
    returns  (ids (length,), answer (length,) bool: the tokens of the answers). BadInput where length is too short or the filler is
    """
    end = tokenizer.encode(END)
    names = rng.permutation(NAMES)[:len(depths)]
    stated, asked, answers = zip(*[sentences(tokenizer, name, KEYS[split][rng.integers(len(KEYS[split]))]) for name in names])
    pairs = sum(([(i, False) for i in q] + [(i, True) for i in a] + [(i, False) for i in end] for q, a in zip(asked, answers)), [])
    questions, answer = zip(*[(i, False) for i in tokenizer.encode("\n")], *pairs[:-len(end)])
    room = length - 1 - len(questions) - sum(map(len, stated))
    if room < 0:
        raise BadInput(f"a document of {length} tokens: keys and questions alone take {length - room}")
    if room >= len(filler):
        raise BadInput(f"a document of {length} tokens: its filler has only {len(filler)}; name a larger corpus")
    first = rng.integers(len(filler) - room)
    text, ids, done = filler[first:first + room].tolist(), [tokenizer.bos], 0
    for depth, statement in sorted(zip(depths, stated)):
        at = max(done, round(depth * room))
        if at > done:                                                    # the key has a line of its own
            ids += [*text[done:at - 1], *tokenizer.encode("\n")]
        ids, done = ids + statement, at
    ids += text[done:]
    return np.array([*ids, *questions]), np.array([False] * len(ids) + list(answer))


def shortest(tokenizer):
    """Tokens that a document of one key takes without any running text, whatever its key."""
    longest = lambda texts: max(texts, key=lambda text: len(tokenizer.encode(text)))       # noqa: E731
    parts = sentences(tokenizer, longest(f" {name}" for name in NAMES)[1:], longest(KEYS["train"] + KEYS["val"]))
    return 1 + len(tokenizer.encode("\n")) + sum(map(len, parts))


@torch.no_grad()
def share_right(model, documents, batch_size):
    """Share of (ids, answer) documents, all of one length, whose every answer token is the model's likeliest one: what greedy
    decoding gets right."""
    device, right = model.wte.weight.device, []
    for i in range(0, len(documents), batch_size):
        group = documents[i:i + batch_size]
        ids, answer = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*group))        # (B, T) each
        first = int(answer.any(0).nonzero()[0])                                                # no logits before it are needed
        hidden = model.hidden(ids[:, :-1])[0][:, first - 1:]                                   # (B, T - first, C)
        wrong = F.linear(hidden, model.head_weight.to(hidden.dtype)).argmax(-1) != ids[:, first:]
        right += (~(wrong & answer[:, first:]).any(1)).tolist()
    return sum(right) / len(right)


def retrieval(model, tokenizer, filler, lengths, depths, questions, seed, batch_tokens):
    """{length: [share right at each depth]} over held-out keys; the same questions whatever the model."""
    table = {}
    for length in lengths:
        rngs = [[np.random.default_rng([seed, length, place, i]) for i in range(questions)] for place in range(len(depths))]
        table[length] = [share_right(model, [make_document(rng, "val", filler, tokenizer, length, [depth]) for rng in row],
                                     max(1, batch_tokens // length)) for depth, row in zip(depths, rngs)]
    return table


@torch.no_grad()
def loss_by_position(model, corpus, tokenizer, block_size, max_tokens):
    """[(first, last, nats per token)] by position in a window, over windows that lie within one held-out document each.

    Positions are grouped by powers of two. BadInput where no document is that long.
    """
    tokens = corpus.read(0, min(corpus.n_tokens, 20_000_000))
    starts = [*np.flatnonzero(tokens == tokenizer.bos), len(tokens)]
    windows = [at for a, b in zip(starts, starts[1:]) for at in range(a, b - block_size, block_size)]
    if not windows:
        raise BadInput(f"{corpus.folder}: no held-out document has more than {block_size} tokens; lower --block_size")
    chosen = np.unique(np.linspace(0, len(windows) - 1, max(1, min(len(windows), max_tokens // block_size))).astype(int))
    total, device = np.zeros(block_size), model.wte.weight.device
    for i in chosen:
        ids = torch.from_numpy(tokens[windows[i]:windows[i] + block_size + 1])[None].to(device)       # (1, T + 1)
        nll, _ = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        total += nll[0].cpu().double().numpy()
    edges = [0, *(2 ** k for k in range(5, 30) if 2 ** k < block_size), block_size]
    return [(a, b, float(total[a:b].mean() / len(chosen))) for a, b in zip(edges, edges[1:])]


def draw(table, depths, path, title):
    """The heat map: depth down, length across, green where every key is found."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(2.5 + 0.8 * len(table), 1.5 + 0.5 * len(depths)))
    shares = 100 * np.array([table[length] for length in table]).T           # (depths, lengths)
    axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(table)), [f"{length:,}" for length in table])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the key", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
