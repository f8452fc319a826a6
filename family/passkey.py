"""How well a model finds keys in long texts, and its loss by position (paper section 7.2).

data/passkeys.py makes the documents. `python -m tools.evaluate --task=passkey` asks for keys at
chosen lengths and depths. Every row here is (part of) one document, so there is nothing to mask for
a model that was trained with doc_mask.
"""
import numpy as np
import torch
import torch.nn.functional as F

from configurator import BadInput
from data.passkeys import MAX_TOKENS, make_document


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
