"""Measure a checkpoint on held-out text.

    python evaluate.py --ckpt=out/laptop [--data=plays] [--task=bpb|cloze|all]
    python evaluate.py --ckpt=... --data=speeches --task=passkey [--lengths=256,1024] [--figure=passkey.png]
    python evaluate.py --ckpt=... --data=speeches --task=positions --block_size=2048

bpb    bits per byte, comparable across tokenizers: the nats of all targets over the bytes that they stand for
cloze  HellaSwag-shaped: a passage of a held-out document, its true continuation against three from other documents; the
       choice is the continuation with the fewest nats per byte. Chance is 25 %.
Both come with a standard error: over windows of text, and over questions.
passkey    share of held-out keys found in so many tokens of running text, by length and depth (see passkey.py)
positions  nats per token by position in a window, over the held-out documents that are longer than it
--rope_theta, --rope_scaling, --rope_factor and --max_position replace the checkpoint's own: a change without training.
"""
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

import checkpoint
import passkey
import tokenizer as tokenizers
from configurator import BadInput, build, configure, exits_cleanly
from dataset import held_out_loss, open_corpus
from device import pick_device
from model import MiniCPM, MiniCPMConfig


@dataclass
class EvaluateConfig:
    ckpt: str = "out/laptop"            # checkpoint, run folder (its latest), or the folder of a released model
    tokenizer: str | None = None        # unset: the checkpoint's own
    data: str | None = None             # prepared corpus; unset: the first of the checkpoint's own
    data_dir: str = "data"              # where the corpora are; relative to the project
    task: Literal['bpb', 'cloze', 'all', 'passkey', 'positions'] = 'all'  # all: bpb and cloze
    block_size: int | None = None       # tokens of context; unset: as trained, a released model at most 1024
    eval_tokens: int | None = None      # held-out tokens for bpb; unset: all
    batch_size: int = 16                # windows, or questions, per forward
    questions: int | None = None        # unset: 500 of the cloze, 40 for each length and depth of the passkey task
    context: int = 64                   # tokens of a passage
    continuation: int = 24              # tokens to choose between
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)        # passkey: tokens of a document, question and answer included
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # passkey: where the key is, from the start (0) to the question (1)
    figure: str | None = None           # passkey: a heat map of length and depth (.png, .pdf, .svg)
    rope_scaling: Literal['unchanged', 'none', 'linear', 'dynamic'] = 'unchanged'   # in place of the checkpoint's (see model.py)
    rope_theta: float | None = None     # the same; unset, like the next two: unchanged
    rope_factor: float | None = None
    max_position: int | None = None
    seed: int = 1337                    # of the questions
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    json: bool = False                  # True: one JSON line instead of text

    def problems(self):
        out = [f"--{name}={getattr(self, name)}: must be above 0" for name in
               ("block_size", "eval_tokens", "batch_size", "questions", "context", "continuation")
               if getattr(self, name) is not None and getattr(self, name) <= 0]
        if not self.lengths or min(self.lengths) < 1:
            out.append("--lengths: numbers of tokens above 0, separated by commas")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            out.append("--depths: numbers from 0 to 1, separated by commas")
        if self.figure and not self.figure.endswith((".png", ".pdf", ".svg")):
            out.append(f"--figure={self.figure}: must end in .png, .pdf or .svg")
        return out


def bits_per_byte(model, corpus, tokenizer, config, block_size):
    """{"bpb", "bpb_se", "loss", "targets"} over the windows of a held-out split."""
    nats, targets, n_bytes = held_out_loss(model, corpus, tokenizer.token_bytes(), block_size, config.eval_tokens or corpus.n_tokens,
                                           config.batch_size, model.wte.weight.device)
    bpb = nats.sum() / math.log(2) / n_bytes.sum()
    # A ratio of sums: its error from the residuals of the windows.
    residuals = nats / math.log(2) - bpb * n_bytes
    error = math.sqrt((residuals ** 2).sum() / max(1, len(nats) - 1) * len(nats)) / n_bytes.sum()
    return {"bpb": float(bpb), "bpb_se": float(error), "loss": float(nats.sum() / targets.sum()), "targets": int(targets.sum())}


def make_questions(corpus, tokenizer, config):
    """[(context (c,), endings (4, e), place of the true one)] from documents of a held-out split; BadInput where it has too few."""
    tokens = corpus.read(0, min(corpus.n_tokens, 20_000_000))
    starts = np.flatnonzero(tokens == tokenizer.bos)
    spans = [(a + 1, b - 1) for a, b in zip(starts, [*starts[1:], len(tokens)])]           # without <s> and </s>
    long_enough = [span for span in spans if span[1] - span[0] >= config.context + config.continuation]
    if len(long_enough) < 4:
        raise BadInput(f"{corpus.folder}: a cloze needs 4 held-out documents of {config.context + config.continuation} tokens, "
                       f"it has {len(long_enough)}; lower --context")
    rng, questions = np.random.default_rng(config.seed), []
    for _ in range(config.questions or 500):
        chosen = rng.choice(len(long_enough), 4, replace=False)
        place = int(rng.integers(4))
        at = [int(rng.integers(long_enough[i][0] + config.context, long_enough[i][1] - config.continuation + 1)) for i in chosen]
        endings = np.stack([tokens[a:a + config.continuation] for a in at])                # the first is the true one
        endings[[0, place]] = endings[[place, 0]]
        questions.append((tokens[at[0] - config.context:at[0]], endings, place))
    return questions


@torch.no_grad()
def cloze(model, corpus, tokenizer, config):
    """{"cloze", "cloze_se", "questions"}: share of questions whose true continuation has the fewest nats per byte."""
    device, sizes, right = model.wte.weight.device, tokenizer.token_bytes(), []
    questions = make_questions(corpus, tokenizer, config)
    for i in range(0, len(questions), config.batch_size):
        group = questions[i:i + config.batch_size]
        rows = np.concatenate([np.concatenate([np.tile([tokenizer.bos, *context], (4, 1)), endings], 1) for context, endings, _ in group])
        rows = torch.from_numpy(rows).to(device)                           # (4 * questions, 1 + context + continuation)
        targets = rows[:, 1:].clone()
        targets[:, :config.context] = -100
        nll, _ = model(rows[:, :-1].contiguous(), targets)
        per_byte = nll.sum(1).cpu().numpy() / sizes[rows[:, -config.continuation:].cpu().numpy()].sum(1).clip(1)
        right += [int(np.argmin(four)) == place for four, (_, _, place) in zip(per_byte.reshape(-1, 4), group)]
    share = float(np.mean(right))
    return {"cloze": share, "cloze_se": math.sqrt(share * (1 - share) / len(right)), "questions": len(right)}


# ---- long contexts

def change_rope(model, config):
    """Give a model the RoPE that the options ask for, its weights as they are; BadInput where they do not go together."""
    names = ("rope_theta", "rope_scaling", "rope_factor", "max_position")
    asked = {name: getattr(config, name) for name in names if getattr(config, name) not in (None, "unchanged")}
    (model.config,) = build([MiniCPMConfig], {**asdict(model.config), **asked})


def find_keys(model, corpus, tokenizer, config):
    """{"passkey": {length: [share at each depth]}, ...}: how often a held-out key is found; the figure where one is asked for."""
    filler = passkey.open_filler(config.data_dir, corpus.folder.parent.name, tokenizer, "val")
    table = passkey.retrieval(model, tokenizer, filler, config.lengths, config.depths, config.questions or 40, config.seed,
                              config.batch_size * 256)
    if config.figure:
        passkey.draw(table, config.depths, config.figure, f"keys found (%), {config.ckpt}")
    return {"passkey": table, "depths": config.depths, "questions": config.questions or 40}


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, EvaluateConfig, usage=__doc__)
    folder = checkpoint.resolve(config.ckpt)
    meta = checkpoint.read_meta(folder)
    trained = meta.get("train") or {"data": "", "block_size": min(1024, meta["model"]["max_position"])}    # a released model
    name = config.data or trained["data"].split(",")[0].split(":")[0]
    if not name:
        raise BadInput(f"--data: {folder} does not say on what it was trained; name a prepared corpus "
                       f"(python data/pytorch/prepare.py --tokenizer={folder} prepares one)")
    tokenizer = tokenizers.of_model(folder, config.tokenizer, meta["model"]["vocab_size"])
    corpus = open_corpus(config.data_dir, name, tokenizer, "val")
    block_size = config.block_size or trained["block_size"]
    if corpus.n_tokens <= block_size:
        raise BadInput(f"--block_size={block_size}: the val split of {name} has only {corpus.n_tokens} tokens")
    model = MiniCPM.from_pretrained(folder, pick_device(config.device)).eval()
    change_rope(model, config)
    result = {"ckpt": str(folder), "data": name, "block_size": block_size}
    if config.task in ("bpb", "all"):
        result |= bits_per_byte(model, corpus, tokenizer, config, block_size)
    if config.task in ("cloze", "all"):
        result |= cloze(model, corpus, tokenizer, config)
    if config.task == "passkey":
        result |= find_keys(model, corpus, tokenizer, config)
    if config.task == "positions":
        result["positions"] = passkey.loss_by_position(model, corpus, tokenizer, block_size, config.eval_tokens or corpus.n_tokens)
    if config.json:
        print(json.dumps(result))
        return
    print(f"{folder} on held-out {name}:")
    if "bpb" in result:
        print(f"  {result['bpb']:.4f} +- {result['bpb_se']:.4f} bits per byte, {result['loss']:.4f} nats per token, "
              f"{result['targets']:,} targets with up to {block_size} tokens of context")
    if "cloze" in result:
        print(f"  cloze {100 * result['cloze']:.1f} +- {100 * result['cloze_se']:.1f} % of {result['questions']} questions (chance 25 %)")
    if "passkey" in result:
        print(f"  keys found (%) by length and depth, {result['questions']} questions each (chance {100 * passkey.CHANCE:.2f})\n"
              f"  {'tokens':>10}  " + "".join(f"{depth:>7g}" for depth in config.depths))
        for length, shares in result["passkey"].items():
            print(f"  {length:>10,}  " + "".join(f"{100 * share:7.1f}" for share in shares))
    for first, last, nats in result.get("positions", []):
        print(f"  {nats:.4f} nats per token at positions {first:,} to {last - 1:,}")


if __name__ == "__main__":
    main()
