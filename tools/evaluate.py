"""Measure a checkpoint on held-out text, or on questions.

    python -m tools.evaluate --ckpt=out/laptop [--data=plays] [--task=bpb|cloze|exact|all]
    python -m tools.evaluate --ckpt=... --data=speeches --task=passkey [--lengths=256,1024]
    python -m tools.evaluate --ckpt=... --data=speeches --task=positions --block_size=2048

bpb        bits per byte, which compares across tokenizers: the loss of all targets over the number
           of bytes they stand for. In packed rows (conversations) the targets are the answers. In a
           mixture each corpus has its share. It is train.py's val_bpb of the same tokens
cloze      as in HellaSwag: a passage of a held-out document, and its true continuation among three
           from other documents. The model chooses the one with the fewest nats per byte; chance is
           25 %
exact      greedy answers to the questions of DATA_DIR/DATA/test.jsonl, or to the last question of
           any conversations. An answer is right if it equals the given one; "The answer is 7." and
           "7" are equal. In all and by family, with the number of tokens per answer
passkey    share of held-out keys that are found in running text, by length of the text and depth of
           the key (see data/passkeys.py)
positions  nats per token by position in a window, in held-out documents longer than a window
all        those of the first three that suit the corpus

In a mixture the other tasks take its first corpus that suits them. Attention stays within documents
if it did so in training (--doc_mask); for a released model or after DPO, in packed rows. Only bpb
depends on it: in the other tasks every row is one document.

The first three have a standard error, over windows of text or over questions. --rope_theta,
--rope_scaling, --rope_factor and --max_position replace the checkpoint's own values, to see the
effect without training.
"""
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configurator import ROOT, BadInput, build, configure, exits_cleanly, must_be_positive
from data import packing, passkeys
from data.dataset import check_block_size, measure, open_corpus, parse_mixture
from data.files import find_file
from data.tokenizer import chat_ids, load_for_model
from engine import checkpoint
from engine.device import pick_device
from engine.run import with_changed_rope
from family import passkey
from model import MiniCPM, MiniCPMConfig

MAX_TOKENS = 20_000_000                 # read from a corpus for the cloze at most
TEXT_TASKS = ("cloze", "passkey", "positions")      # which cannot use packed rows


@dataclass
class EvaluateConfig:
    ckpt: str = "out/laptop"            # checkpoint, run folder (its latest), or released folder
    tokenizer: str | None = None        # unset: the checkpoint's own
    data: str | None = None             # prepared corpus, or NAME:WEIGHT,NAME:WEIGHT; unset: that
                                        # of the checkpoint's training
    data_dir: str = "data"              # folder of the corpora, relative to the project
    task: Literal['bpb', 'cloze', 'exact', 'passkey', 'positions', 'all'] = 'all'
    block_size: int | None = None       # tokens of context; unset: as in training, for a released
                                        # model at most 1024
    eval_tokens: int | None = None      # held-out tokens for bpb; unset: all
    batch_size: int = 16                # windows, or questions, per forward
    questions: int | None = None        # at most; unset: 500 for cloze, all for exact, 40 for each
                                        # length and depth of passkey
    questions_file: str | None = None   # conversations (.jsonl, .json) for the exact task, instead
                                        # of the corpus's test.jsonl
    answer_tokens: int = 32             # exact: an answer that is longer is wrong
    context: int = 64                   # cloze: tokens of the passage
    continuation: int = 24              # cloze: tokens to choose between
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)   # passkey: tokens, with question and answer
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)     # passkey: place of the key, from 0,
                                        # the start, to 1, the question
    figure: str | None = None           # passkey: file for a heat map (.png, .pdf, .svg)
    rope_scaling: Literal['unchanged', 'none', 'linear', 'dynamic'] = 'unchanged'   # see model.py
    rope_theta: float | None = None     # unset: unchanged; also for the next two
    rope_factor: float | None = None
    max_position: int | None = None
    seed: int = 1337                    # of the questions
    quant: Literal['none', 'int8'] = 'none'     # int8: 8-bit weights, as sample.py's
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    json: bool = False                  # True: print one JSON line instead of text

    def problems(self):
        out = must_be_positive(self, "block_size eval_tokens batch_size questions answer_tokens "
                                     "context continuation")
        if not self.lengths or min(self.lengths) < 1:
            out.append("--lengths: numbers of tokens above 0, separated by commas")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            out.append("--depths: numbers from 0 to 1, separated by commas")
        if self.figure and not self.figure.endswith((".png", ".pdf", ".svg")):
            out.append(f"--figure={self.figure}: must end in .png, .pdf or .svg")
        return out


# ---- the tasks

def bits_per_byte(model, sources, tokenizer, config, block_size, doc_mask=None):
    """Return data.dataset.measure of held-out splits, and whether all documents were masked.

    sources   {Split: share} of a mixture
    doc_mask  whether the model was trained with it; None: unknown, so in packed rows only
    """
    found = measure(model, sources, tokenizer.token_bytes(), block_size, config.eval_tokens,
                    config.batch_size, None if doc_mask is False else tokenizer.bos,
                    rows_only=doc_mask is None)
    if doc_mask is None:
        doc_mask = all(source.row for source in sources)
    return {**found, "doc_mask": doc_mask}


def make_questions(corpus, tokenizer, config):
    """Return the cloze's questions: [(context (c,), endings (4, e), index of the true one)].

    Raises BadInput if the held-out split has too few documents.
    """
    tokens = corpus.read(0, min(corpus.n_tokens, MAX_TOKENS))
    starts = np.flatnonzero(tokens == tokenizer.bos)
    spans = zip(starts + 1, [*starts[1:] - 1, len(tokens) - 1])     # without <s> and </s>
    needed = config.context + config.continuation
    spans = [(start, end) for start, end in spans if end - start >= needed]
    if len(spans) < 4:
        raise BadInput(f"{corpus.folder}: a cloze needs 4 held-out documents of {needed} tokens, "
                       f"it has {len(spans)}; lower --context")
    rng, questions = np.random.default_rng(config.seed), []
    for _ in range(config.questions or 500):
        chosen = rng.choice(len(spans), 4, replace=False)
        true = int(rng.integers(4))
        cuts = []                           # where the continuations begin, the true one's first
        for start, end in (spans[i] for i in chosen):
            cuts.append(int(rng.integers(start + config.context, end - config.continuation + 1)))
        endings = np.stack([tokens[cut:cut + config.continuation] for cut in cuts])
        endings[[0, true]] = endings[[true, 0]]
        questions.append((tokens[cuts[0] - config.context:cuts[0]], endings, true))
    return questions


@torch.no_grad()
def cloze(model, corpus, tokenizer, config):
    """Return {"cloze", "cloze_se", "questions"}: share of questions with the right choice."""
    device, token_bytes, right = model.wte.weight.device, tokenizer.token_bytes(), []
    questions = make_questions(corpus, tokenizer, config)
    for i in range(0, len(questions), config.batch_size):
        group = questions[i:i + config.batch_size]
        rows = [[tokenizer.bos, *context, *ending] for context, endings, _ in group
                for ending in endings]
        rows = torch.tensor(rows, device=device)            # (4 * questions, 1 + context + ending)
        targets = rows[:, 1:].clone()
        targets[:, :config.context] = -100
        nll, _ = model(rows[:, :-1].contiguous(), targets)
        n_bytes = token_bytes[rows[:, -config.continuation:].cpu().numpy()].sum(1).clip(1)
        nats_per_byte = nll.sum(1).cpu().numpy() / n_bytes
        choices = nats_per_byte.reshape(-1, 4).argmin(1)
        right += [choice == true for choice, (_, _, true) in zip(choices, group)]
    share, error, count = share_of(right)
    return {"cloze": share, "cloze_se": error, "questions": count}


def normalise(answer):
    """Return what an answer says: "7" for "The answer is 7." as for "7"."""
    return answer.strip().removeprefix("The answer is ").removesuffix(".").strip()


def exact(model, tokenizer, config, file):
    """Return how many greedy answers to a file's questions are right.

    {"exact", "exact_se", "exact_questions", "answer_tokens",
     "families": {family: (share, standard error, questions)}}
    """
    questions = list(itertools.islice(packing.read_questions(file), config.questions))
    if not questions:
        raise BadInput(f"{file}: holds no questions")
    right, lengths, families = [], [], {}
    for i in range(0, len(questions), config.batch_size):
        group = questions[i:i + config.batch_size]
        prompts = [chat_ids(tokenizer, messages, generate=True)[0] for messages, _, _ in group]
        steps = model.generate(prompts, config.answer_tokens, temperature=0,
                               stop_ids=tokenizer.stop_ids, never_ids=[tokenizer.bos])
        answers = torch.stack(list(steps), dim=1).tolist()              # (questions, tokens)
        for (_, wanted, family), ids in zip(group, answers):
            stops = [n for n, token in enumerate(ids) if token in tokenizer.stop_ids]
            length = stops[0] if stops else len(ids)
            answer = tokenizer.decode(ids[:length])
            right.append(bool(stops) and normalise(answer) == normalise(wanted))
            lengths.append(length)
            if family:
                families.setdefault(family, []).append(right[-1])
    share, error, count = share_of(right)
    return {"exact": share, "exact_se": error, "exact_questions": count,
            "answer_tokens": float(np.mean(lengths)),
            "families": {family: share_of(hits) for family, hits in families.items()}}


def share_of(hits):
    """Return (share, its standard error, number) of a list of bool."""
    share = float(np.mean(hits))
    return share, math.sqrt(share * (1 - share) / len(hits)), len(hits)


def find_keys(model, corpus, tokenizer, config):
    """Return {"passkey": {length: [share found at each depth]}, "depths", "questions"}.

    Draws the figure if one is asked for.
    """
    questions = config.questions or 40
    filler = passkeys.open_filler(config.data_dir, corpus.folder.parent.name, tokenizer, "val")
    table = passkey.retrieval(model, tokenizer, filler, config.lengths, config.depths, questions,
                              config.seed, config.batch_size * 256)
    if config.figure:
        passkey.draw(table, config.depths, config.figure, f"keys found (%), {config.ckpt}")
    return {"passkey": table, "depths": config.depths, "questions": questions}


# ---- from the command to the result

def change_rope(model, config):
    """Give a model the RoPE that the options ask for, without changing its weights.

    What only the scaling before used is dropped. Raises BadInput if the options contradict each
    other.
    """
    names = ("rope_theta", "rope_scaling", "rope_factor", "max_position")
    options = {name: getattr(config, name) for name in names}
    changed = {name: value for name, value in options.items() if value not in (None, "unchanged")}
    (model.config,) = build([MiniCPMConfig], with_changed_rope(asdict(model.config), changed))


def open_sources(config, data, tokenizer, meta):
    """Return ({Split: share} of the held-out splits of a mixture, tokens of context).

    Packed rows are left out if the task cannot use them. Raises BadInput if a corpus is missing, or
    cannot be read in such windows.
    """
    sources = {open_corpus(config.data_dir, name, tokenizer, "val"): share
               for name, share in parse_mixture(data).items()}
    if config.task in TEXT_TASKS:
        sources = {corpus: share for corpus, share in sources.items() if not corpus.row}
    block_size, rows = config.block_size, [corpus.row for corpus in sources if corpus.row]
    if block_size is None:
        longest = min(1024, meta["model"]["max_position"])
        block_size = rows[0] - 1 if rows else meta.get("train", {}).get("block_size", longest)
    for corpus in sources:
        check_block_size(corpus, block_size)
    return sources, block_size


def choose_tasks(config, data, texts, file):
    """Return the names of the tasks to run. Raises BadInput if one does not suit the data.

    data: the mixture; texts: its corpora of running text; file: questions for the exact task
    """
    task = config.task
    if task == "exact" and not file.is_file():
        raise BadInput(f"--task=exact: no {file}; name conversations with --questions_file=FILE, "
                       "or a corpus that has them (--data=instruct after python "
                       "data/instruct/prepare.py)")
    if task in TEXT_TASKS and not texts:
        raise BadInput(f"--task={task}: {data} is packed in rows, {task} needs running text; name "
                       "some with --data (--task=bpb or exact goes with rows)")
    if task != "all":
        return [task]
    has_questions = config.questions_file or file.is_file()
    return ["bpb", *(["cloze"] if texts else []), *(["exact"] if has_questions else [])]


def print_result(result):
    """Print the result of all tasks as text."""
    print(f"{result['ckpt']} on held-out {result['data']}:")
    if "bpb" in result:
        error = "(one window)" if result["bpb_se"] is None else f"+- {result['bpb_se']:.4f}"
        within = ", of one document" if result["doc_mask"] else ""
        print(f"  {result['bpb']:.4f} {error} bits per byte, "
              f"{result['loss']:.4f} nats per token, {result['targets']:,} targets with up to "
              f"{result['block_size']} tokens of context{within}")
    if "cloze" in result:
        print(f"  cloze {100 * result['cloze']:.1f} +- {100 * result['cloze_se']:.1f} % of "
              f"{result['questions']} questions (chance 25 %)")
    if "exact" in result:
        print(f"  exact {100 * result['exact']:.1f} +- {100 * result['exact_se']:.1f} % of "
              f"{result['exact_questions']} questions, {result['answer_tokens']:.1f} tokens per "
              "answer")
        for family, (share, error, count) in result["families"].items():
            print(f"    {family:12}{100 * share:6.1f} +- {100 * error:.1f} % of {count}")
    if "passkey" in result:
        print(f"  keys found (%) by length and depth, {result['questions']} questions each "
              f"(chance {100 * passkeys.CHANCE:.2f})")
        print(f"  {'tokens':>10}  " + "".join(f"{depth:>7g}" for depth in result["depths"]))
        for length, shares in result["passkey"].items():
            print(f"  {length:>10,}  " + "".join(f"{100 * share:7.1f}" for share in shares))
    for first, end, nats in result.get("positions", []):
        print(f"  {nats:.4f} nats per token at positions {first:,} to {end - 1:,}")


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, EvaluateConfig, usage=__doc__)
    folder = checkpoint.resolve(config.ckpt)
    meta = checkpoint.read_meta(folder)
    trained = meta.get("train", {})             # empty for a released model
    data = config.data or trained.get("data")
    if not data and not (config.task == "exact" and config.questions_file):
        raise BadInput(f"--data: {folder} does not say on what it was trained; name a prepared "
                       f"corpus (python data/pytorch/prepare.py --tokenizer={folder} prepares one)")
    tokenizer = load_for_model(folder, config.tokenizer, meta["model"]["vocab_size"])
    files = [Path(ROOT, config.data_dir, name, "test.jsonl")
             for name in (parse_mixture(data) if data else [])]
    file = find_file(config.questions_file or next(filter(Path.is_file, files), files[0]))
    sources, block_size = {}, config.block_size
    if config.task != "exact":
        sources, block_size = open_sources(config, data, tokenizer, meta)
    texts = [corpus for corpus in sources if not corpus.row]
    tasks = choose_tasks(config, data, texts, file)
    model = MiniCPM.from_pretrained(folder, pick_device(config.device)).eval()
    change_rope(model, config)
    if config.quant != "none":
        model.pack(config.quant)
    # DPO has no rows of several documents, so its doc_mask says nothing.
    doc_mask = None if "pairs" in trained else trained.get("doc_mask")
    run = {
        "bpb": lambda: bits_per_byte(model, sources, tokenizer, config, block_size, doc_mask),
        "cloze": lambda: cloze(model, texts[0], tokenizer, config),
        "exact": lambda: exact(model, tokenizer, config, file),
        "passkey": lambda: find_keys(model, texts[0], tokenizer, config),
        "positions": lambda: {"positions": passkey.loss_by_position(
            model, texts[0], tokenizer, block_size, config.eval_tokens or texts[0].n_tokens)},
    }
    result = {"ckpt": str(folder), "data": config.questions_file or data, "block_size": block_size}
    for task in tasks:
        result |= run[task]()
    if config.json:
        print(json.dumps(result))
    else:
        print_result(result)


if __name__ == "__main__":
    main()
