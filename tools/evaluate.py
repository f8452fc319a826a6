"""Measure a checkpoint on held-out text, or on questions.

    python -m tools.evaluate --ckpt=out/laptop [--data=plays] [--task=bpb|cloze|exact|all]
    python -m tools.evaluate --ckpt=... --data=speeches --task=passkey [--lengths=256,1024] [--figure=passkey.png]
    python -m tools.evaluate --ckpt=... --data=speeches --task=positions --block_size=2048

bpb    bits per byte, comparable across tokenizers: the nats of all targets over the bytes that they stand for; in
       packed rows (conversations, say) the targets are the answers
cloze  HellaSwag-shaped: a passage of a held-out document, its true continuation against three from other documents; the
       choice is the continuation with the fewest nats per byte. Chance is 25 %.
exact  the likeliest answer, token by token, to each question of DATA_DIR/DATA/test.jsonl (or of any conversations: their last
       answer is the one asked for) against the one given there: right if it is the same, also where either is put as "The answer
       is ANSWER."; in all and by family, and how many tokens an answer takes
passkey    share of held-out keys found in so many tokens of running text, by length and depth (see passkey.py)
positions  nats per token by position in a window, over the held-out documents that are longer than it
The first three come with a standard error: over windows of text, or over questions; all: those of them that go with the corpus.
--rope_theta, --rope_scaling, --rope_factor and --max_position replace the checkpoint's own: a change without training.
"""
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configurator import ROOT, BadInput, build, configure, exits_cleanly
from data import packing
from data.dataset import check_block_size, held_out_loss, open_corpus
from data.tokenizer import chat_ids, load_for_model
from engine import checkpoint
from engine.device import pick_device
from family import passkey
from model import MiniCPM, MiniCPMConfig


@dataclass
class EvaluateConfig:
    ckpt: str = "out/laptop"            # checkpoint, run folder (its latest), or the folder of a released model
    tokenizer: str | None = None        # unset: the checkpoint's own
    data: str | None = None             # prepared corpus; unset: the first of the checkpoint's own
    data_dir: str = "data"              # where the corpora are; relative to the project
    task: Literal['bpb', 'cloze', 'exact', 'passkey', 'positions', 'all'] = 'all'
    block_size: int | None = None       # tokens of context; unset: as trained, a released model at most 1024
    eval_tokens: int | None = None      # held-out tokens for bpb; unset: all
    batch_size: int = 16                # windows, or questions, per forward
    questions: int | None = None        # at most; unset: 500 of the cloze, all of the exact task, 40 for each length and depth of a key
    questions_file: str | None = None   # conversations (.jsonl, .json) for the exact task instead of the corpus's test.jsonl
    answer_tokens: int = 32             # of the exact task: an answer that has not ended by then is wrong
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
               ("block_size", "eval_tokens", "batch_size", "questions", "answer_tokens", "context", "continuation")
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
                                           config.batch_size, model.wte.weight.device, tokenizer.bos if corpus.row else None)
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
    share, error, count = share_of(right)
    return {"cloze": share, "cloze_se": error, "questions": count}


def normalise(answer):
    """What an answer says: "The answer is 7." and "7" are the same."""
    return answer.strip().removeprefix("The answer is ").removesuffix(".").strip()


def exact(model, tokenizer, config, file):
    """{"exact", "exact_se", "exact_questions", "answer_tokens", "families": {family: (share, standard error, questions)}} of greedy
    answers to the questions of a file."""
    asked = list(itertools.islice(packing.read_questions(file), config.questions))
    if not asked:
        raise BadInput(f"{file}: holds no questions")
    right, lengths = [], []
    for at in range(0, len(asked), config.batch_size):
        group = asked[at:at + config.batch_size]
        prompts = [chat_ids(tokenizer, messages, generate=True)[0] for messages, _, _ in group]
        answers = torch.stack(list(model.generate(prompts, config.answer_tokens, temperature=0, stop_ids=tokenizer.stop_ids,
                                                  never_ids=[tokenizer.bos])), dim=1).tolist()     # (questions, tokens)
        for (_, wanted, _), ids in zip(group, answers):
            end = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))
            right.append(end < len(ids) and normalise(tokenizer.decode(ids[:end])) == normalise(wanted))
            lengths.append(end)
    by_family = {}
    for (_, _, family), hit in zip(asked, right):
        by_family.setdefault(family, []).append(hit)
    share, error, count = share_of(right)
    return {"exact": share, "exact_se": error, "exact_questions": count, "answer_tokens": float(np.mean(lengths)),
            "families": {name: share_of(hits) for name, hits in by_family.items() if name}}


def share_of(hits):
    """(share, its standard error, how many) of a list of bool."""
    share = float(np.mean(hits))
    return share, math.sqrt(share * (1 - share) / len(hits)), len(hits)


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
    if not name and not (config.task == "exact" and config.questions_file):
        raise BadInput(f"--data: {folder} does not say on what it was trained; name a prepared corpus "
                       f"(python data/pytorch/prepare.py --tokenizer={folder} prepares one)")
    tokenizer = load_for_model(folder, config.tokenizer, meta["model"]["vocab_size"])
    file = Path(config.questions_file) if config.questions_file else ROOT / config.data_dir / name / "test.jsonl"
    tasks, block_size = {config.task}, config.block_size
    if config.task == "exact" and not file.is_file():
        raise BadInput(f"--task=exact: no {file}; name conversations with --questions_file=FILE, or a corpus that has them "
                       f"(--data=instruct after python data/instruct/prepare.py)")
    if config.task != "exact":
        corpus = open_corpus(config.data_dir, name, tokenizer, "val")
        block_size = block_size or (corpus.row - 1 if corpus.row else trained["block_size"])
        check_block_size(corpus, block_size)
        if config.task == "all":
            tasks = {"bpb"} | (set() if corpus.row else {"cloze"}) | ({"exact"} if config.questions_file or file.is_file() else set())
        if "cloze" in tasks and corpus.row:
            raise BadInput(f"--task=cloze: {name} is packed in rows; a cloze needs running text (--task=bpb or exact goes with rows)")
    model = MiniCPM.from_pretrained(folder, pick_device(config.device)).eval()
    change_rope(model, config)
    result = {"ckpt": str(folder), "data": config.questions_file or name, "block_size": block_size}
    if "bpb" in tasks:
        result |= bits_per_byte(model, corpus, tokenizer, config, block_size)
    if "cloze" in tasks:
        result |= cloze(model, corpus, tokenizer, config)
    if "exact" in tasks:
        result |= exact(model, tokenizer, config, file)
    if config.task == "passkey":
        result |= find_keys(model, corpus, tokenizer, config)
    if config.task == "positions":
        result["positions"] = passkey.loss_by_position(model, corpus, tokenizer, block_size, config.eval_tokens or corpus.n_tokens)
    if config.json:
        print(json.dumps(result))
        return
    print(f"{folder} on held-out {result['data']}:")
    if "bpb" in result:
        print(f"  {result['bpb']:.4f} +- {result['bpb_se']:.4f} bits per byte, {result['loss']:.4f} nats per token, "
              f"{result['targets']:,} targets with up to {block_size} tokens of context")
    if "cloze" in result:
        print(f"  cloze {100 * result['cloze']:.1f} +- {100 * result['cloze_se']:.1f} % of {result['questions']} questions (chance 25 %)")
    if "exact" in result:
        print(f"  exact {100 * result['exact']:.1f} +- {100 * result['exact_se']:.1f} % of {result['exact_questions']} questions, "
              f"{result['answer_tokens']:.1f} tokens an answer")
        for family, (share, error, count) in result["families"].items():
            print(f"    {family:12}{100 * share:6.1f} +- {100 * error:.1f} % of {count}")
    if "passkey" in result:
        print(f"  keys found (%) by length and depth, {result['questions']} questions each (chance {100 * passkey.CHANCE:.2f})\n"
              f"  {'tokens':>10}  " + "".join(f"{depth:>7g}" for depth in config.depths))
        for length, shares in result["passkey"].items():
            print(f"  {length:>10,}  " + "".join(f"{100 * share:7.1f}" for share in shares))
    for first, last, nats in result.get("positions", []):
        print(f"  {nats:.4f} nats per token at positions {first:,} to {last - 1:,}")


if __name__ == "__main__":
    main()
