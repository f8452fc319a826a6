"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290; MiniCPM paper section 7.1) on train.py's loop.

    python -m family.dpo config/laptop_dpo.py [--init_from=CHECKPOINT] [--pairs=FILE] [--key=value ...]
    torchrun --nproc_per_node=8 -m family.dpo config/minicpm_dpo.py --init_from=CHECKPOINT --pairs=FILE

A line of a file of pairs is {"prompt": ..., "chosen": ..., "rejected": ...}: see chat.py. The reference is the model that the
run starts from. The first call of the loss, before any update, takes its log-probabilities of all answers, with the forward
that trains and in the batches of the first epoch, so that policy and reference differ by training alone. They are kept in
out_dir/reference.safetensors, which a resumed run reads: there is never a second model.

metrics.jsonl, each a mean over pairs, in nats: chosen_logp and rejected_logp are log-probabilities of whole answers;
chosen_reward and rejected_reward beta times what they gained on the reference; margin is the difference of the two, and accuracy the
share of pairs where it is positive (a tie counts half). kl is the mean of log reference - log policy over both answers: an
estimate of KL(reference || policy) as far as the answers are such as the reference gives, and may be negative where not.
"""
import dataclasses
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from configurator import ROOT, BadInput, configure, exits_cleanly
from data import packing
from data.dataset import permute
from data.tokenizer import chat_ids
from engine import checkpoint
from engine.device import choose_micro_batch, pick_dtype
from engine.run import new_state
from model import MiniCPMConfig
from train import TrainConfig, batch_size_at, launch, open_tokenizer, run_training

HELD_OUT = 0.05                             # of the prompts, where no file of held-out pairs is given
CHOSEN, REJECTED = 0, 1                     # places on the dimension of 2 of all tensors here


@dataclass
class DPOConfig(TrainConfig):
    pairs: str | None = None            # file of preference pairs (.jsonl, .json); relative to where you are, then to the project
    val_pairs: str | None = None        # held-out pairs; unset: the pairs of a twentieth of the prompts
    max_pairs: int | None = None        # take so many pairs from the start of the file; unset: all
    skip_bad: bool = False              # True: leave out pairs that cannot be used, and count them
    beta: float = 0.1                   # pull towards the reference (the paper does not state its own)
    label_smoothing: float = 0.0        # share of pairs taken to be labelled the wrong way round
    sft_coef: float = 0.0               # weight of the chosen answer's nll per token beside the preference loss
    epochs: int = 1                     # passes over the pairs; max_steps wins
    reference: str | None = None        # not to be given: hash of the weights that the run started from

    out_dir: str = "out/dpo"            # the run's folder
    data: str = "pairs"                 # corpus that evaluate.py measures the result on by default; training takes the pairs
    batch_size: int = 64                # pairs per update (the paper does not state its own)
    batch_schedule: str | None = None   # 'STEP:PAIRS,...': batch_size from a step on
    micro_batch_size: int = 0           # pairs per forward; 0: chosen
    block_size: int = 1024              # tokens of a prompt with its answer at most; longer pairs are left out, and counted
    learning_rate: float = 1e-5         # peak; the paper's, for matrices and all else alike (--mup_lr=False is the default here)
    schedule: Literal['wsd', 'cosine', 'cosine_loop', 'constant'] = 'cosine'   # the paper's; see wsd.py
    sample_tokens: int = 0              # python sample.py --ckpt=OUT_DIR --chat=True talks to the result

    def problems(self):
        out = [line for line in super().problems() if not line.startswith("--max_steps or --minutes")]   # epochs say it
        out += [f"--{name}: needed: {what}" for name, what in
                (("init_from", "the checkpoint to start from, after SFT"), ("pairs", "a file of preference pairs"))
                if getattr(self, name) is None]
        out += [f"--{name}={getattr(self, name)}: must be above 0" for name in ("beta", "epochs", "max_pairs")
                if getattr(self, name) is not None and getattr(self, name) <= 0]
        if not 0 <= self.label_smoothing < 0.5:
            out.append(f"--label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5")
        if self.sft_coef < 0:
            out.append(f"--sft_coef={self.sft_coef}: must not be negative")
        without = ("branch_from", "minutes", "decay_data", "doc_mask", "answers_only", "reference")
        out += [f"--{name}: has no meaning here" for name in without if getattr(self, name) != getattr(DPOConfig, name)]
        return out


# ---- the loss

def dpo_loss(policy, reference, beta, label_smoothing=0.0):
    """Loss of each pair, (P,), in nats: Rafailov et al. 2023, equation 7, before the mean.

    policy, reference  (P, 2) log-probabilities of the chosen and of the rejected answer, each summed over its tokens
    label_smoothing    of so many pairs the labels are taken to be wrong: conservative DPO (Mitchell 2023), equation 3
    """
    h = beta * ((policy - reference)[:, CHOSEN] - (policy - reference)[:, REJECTED])
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def answer_logp(forward, idx, targets):
    """log pi(answer | prompt) as (P, 2), from idx and targets (P, 2, T), and what else the model reports."""
    nll, aux = forward(idx.flatten(0, 1), targets.flatten(0, 1))           # (2P, T)
    return -nll.view(idx.shape).sum(-1), aux


def dpo_metrics(policy, reference, targets, config):
    """(loss of each pair (P,), {name: measure of each pair (P,)}), from (P, 2) log-probabilities and targets (P, 2, T).

    The SFT term is the chosen answer's nll per token, so that long answers don't outweigh: Pang et al. 2024, equation 2.
    """
    chosen_nll = -policy[:, CHOSEN] / (targets[:, CHOSEN] >= 0).sum(-1)
    losses = dpo_loss(policy, reference, config.beta, config.label_smoothing) + config.sft_coef * chosen_nll
    logp = policy.detach()
    rewards = config.beta * (logp - reference)
    margin = rewards[:, CHOSEN] - rewards[:, REJECTED]
    return losses, {"margin": margin, "accuracy": (margin.sign() + 1) / 2, "kl": (reference - logp).mean(1),
                    "chosen_reward": rewards[:, CHOSEN], "rejected_reward": rewards[:, REJECTED],
                    "chosen_logp": logp[:, CHOSEN], "rejected_logp": logp[:, REJECTED], "chosen_nll": chosen_nll.detach()}


# ---- pairs

def encode(tokenizer, messages, answers, length):
    """((idx, targets) of the chosen, (idx, targets) of the rejected), (t,) int32 each, targets -100 up to the answer; None
    where one of them takes more than `length` tokens."""
    rows = []
    for answer in answers:
        ids, learn = map(np.array, chat_ids(tokenizer, [*messages, {"role": "assistant", "content": answer}]))
        learn[:np.flatnonzero(~learn[:np.flatnonzero(learn)[-1]])[-1]] = False           # answers of earlier turns are prompt
        rows.append((ids[:-1].astype(np.int32), np.where(learn, ids, -100)[1:].astype(np.int32)))
    return tuple(rows) if max(len(idx) for idx, _ in rows) <= length else None


def read_pairs(config, tokenizer, say):
    """{"train": [pair, ...], "val": [...]}, pairs as encode gives them; BadInput where a file has none that can be used."""
    splits = {"train": [], "val": []}
    for split, name in (("train", config.pairs), ("val", config.val_pairs)):
        too_long = 0
        for messages, *answers in packing.read_pairs(find(name), config.skip_bad) if name else ():
            pair = encode(tokenizer, messages, answers, config.block_size)
            too_long += pair is None
            if pair:
                splits["val" if config.val_pairs is None and is_held_out(messages) else split].append(pair)
            if split == "train" and len(splits["train"]) == config.max_pairs:
                break
        if too_long:
            say(f"{name}: {too_long:,} pairs left out, longer than --block_size={config.block_size} tokens")
    for split, pairs in splits.items():
        if not pairs:
            raise BadInput(f"{config.val_pairs if split == 'val' and config.val_pairs else config.pairs}: no pair for "
                           + ("training" if split == "train" else "validation") + f" of at most --block_size={config.block_size} tokens"
                           + ("; give --val_pairs" if split == "val" and not config.val_pairs else ""))
    return splits


def find(name):
    return next((path for path in (Path(name), ROOT / name) if path.is_file()), Path(name))


def is_held_out(messages):
    """By the prompt, so that none has pairs on both sides."""
    return int.from_bytes(hashlib.sha256(json.dumps(messages).encode()).digest()[:4], "little") < HELD_OUT * 2 ** 32


def stack(pairs, block_size):
    """{"idx", "targets"}: (P, 2, T) int64 each, T the longest rounded up to a quarter of block_size, so that shapes are few.

    Padded on the right, with targets -100: nothing attends to what comes later.
    """
    longest, step = max(len(idx) for pair in pairs for idx, _ in pair), -(-block_size // 4)
    batch = {name: torch.full((len(pairs), 2, -(-longest // step) * step), fill) for name, fill in (("idx", 0), ("targets", -100))}
    for i, pair in enumerate(pairs):
        for side, (idx, targets) in enumerate(pair):
            batch["idx"][i, side, :len(idx)] = torch.from_numpy(idx)
            batch["targets"][i, side, :len(targets)] = torch.from_numpy(targets)
    return batch


def make_batches(pairs, config):
    """The batch source: batches(plan, first, count) -> ({"idx", "targets": (count, 2, T), "index": (count,)}, count). Each
    epoch has its own order; the plan, of corpora, is not asked."""
    def batches(plan, first, count):
        index = []
        for sample in range(first, first + count):
            epoch, position = divmod(sample, len(pairs))
            key = int.from_bytes(hashlib.sha256(f"pairs {config.seed} {epoch}".encode()).digest()[:8], "little")
            index.append(permute(position, len(pairs), key))
        return {**stack([pairs[i] for i in index], config.block_size), "index": torch.tensor(index)}, count
    return batches


def steps_of(config, n_pairs):
    """Updates in the epochs that are asked for; the pairs that fill no last batch are left out."""
    seen = steps = 0
    while seen + batch_size_at(config, steps) <= config.epochs * n_pairs:
        seen, steps = seen + batch_size_at(config, steps), steps + 1
    if not steps:
        raise BadInput(f"--batch_size={batch_size_at(config, 0)}: {config.pairs} has only {n_pairs} pairs to train on")
    return steps


# ---- the reference's log-probabilities

def reference_fingerprint(start, config, pairs, tokenizer, device):
    """What the reference's log-probabilities follow from, as JSON."""
    digest = hashlib.sha256()
    for array in (array for split in pairs.values() for pair in split for row in pair for array in row):
        digest.update(len(array).to_bytes(4, "little") + array.tobytes())
    numerics = f"{device.type} {pick_dtype(config.dtype, device)}, flash {config.flash}"
    return {"model": hash_of([config.reference, asdict(start.model_config)]), "pairs": digest.hexdigest(),
            "tokenizer": tokenizer.hash, "numerics": numerics}


def hash_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_hash(folder):
    """Of a checkpoint, from the hashes in its meta.json; a released folder's files are read."""
    files = checkpoint.read_meta(folder)["files"] or {path.name: checkpoint.sha256(path) for path in Path(folder).iterdir()
                                                      if path.suffix in (".safetensors", ".bin")}
    return hash_of({name: sha for name, sha in files.items() if name.startswith(("model", "pytorch_model", "index.json"))})


def read_reference(path, origin, start):
    """{split: (n, 2) log-probabilities} of the run's folder, or {} where they are to be computed; BadInput where they are not
    of this model, these pairs, this tokenizer and these numerics."""
    if not path.exists():
        if start.kind == "resume":
            raise BadInput(f"{path}: missing, and the model that it was made from is gone on; --overwrite=True starts the run again")
        return {}
    try:
        with safe_open(path, "pt") as f:
            said = json.loads(f.metadata()["reference_fingerprint"])
            tables = {name: f.get_tensor(name) for name in ("train", "val")}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a reference's log-probabilities ({error}); delete it") from None
    other = [name for name in origin if said.get(name) != origin[name]]
    if other and start.kind == "init" and start.config.overwrite:
        return {}
    if other:
        raise BadInput(f"{path}: was made from another {' and other '.join(other)}; --overwrite=True starts the run again, "
                       f"--out_dir=FOLDER makes another one")
    return tables


def compute_reference(forward, pairs, batches, config, micro, device, world, quiet):
    """{split: (n, 2)}: log-probabilities of all answers under the model as it is now, on the CPU.

    forward sees what it will see in training, gradients included, since kernels may differ without. Ranks share the training pairs.
    """
    rank, ranks = world.rank, world.size
    tables = {split: torch.full((len(rows), 2), -torch.inf, device=device) for split, rows in pairs.items()}

    def take(split, batch):
        for i in range(0, len(batch["index"]), micro):
            part = {name: t[i:i + micro].to(device) for name, t in batch.items()}
            tables[split][part["index"]] = answer_logp(forward, part["idx"], part["targets"])[0].detach()
    count = batch_size_at(config, 0)
    for first in tqdm(range(0, len(pairs["train"]), count), desc="reference", leave=False, disable=True if quiet else None):
        take("train", batches(None, first + rank * (count // ranks), count // ranks)[0])
    for index in held_out_indices(len(pairs["val"]), micro):
        take("val", {**stack([pairs["val"][i] for i in index], config.block_size), "index": torch.tensor(index)})
    tables = {split: table.cpu() for split, table in tables.items()}
    tables["train"] = torch.stack(world.all_gather(tables["train"])).amax(0)
    return tables


def held_out_indices(n, size):
    """Batches of one size over n held-out pairs, the last one filled up from the front."""
    return [[i % n for i in range(at, at + size)] for at in range(0, n, size)]


# ---- a run

def train_dpo(start, world):
    """Train a Start on its pairs: train.py's loop, with this batch source and this loss."""
    say = print if not start.config.quiet else (lambda text: None)
    tokenizer = open_tokenizer(start)
    pairs = read_pairs(start.config, tokenizer, say)
    if start.kind == "init":
        n_steps = start.config.max_steps or steps_of(start.config, len(pairs["train"]))
        start.config = dataclasses.replace(start.config, reference=weights_hash(start.folder))
        start.state = new_state(dataclasses.replace(start.config, max_steps=n_steps))
    config, state, device = start.config, start.state, world.device
    two_rows = dataclasses.replace(config, block_size=2 * config.block_size)               # a pair takes the memory of both
    state.micro = config.micro_batch_size or state.micro or world.from_rank0(choose_micro_batch(
        start.model_config, two_rows, batch_size_at(config, 0) // world.size, device, world.shards))
    path, origin = Path(config.out_dir) / "reference.safetensors", reference_fingerprint(start, config, pairs, tokenizer, device)
    reference = {split: table.to(device) for split, table in read_reference(path, origin, start).items()}
    batches = make_batches(pairs["train"], config)
    say(f"{len(pairs['train']):,} pairs, {len(pairs['val']):,} held out; reference: {path if reference else 'to be computed'}")

    def save_reference(tables):
        temporary = path.with_suffix(".tmp")
        save_file(tables, temporary, metadata={"reference_fingerprint": json.dumps(origin)})
        os.replace(temporary, path)

    def loss(forward, part):
        if not reference:                                                # before the first update of all
            clock = time.monotonic()
            tables = compute_reference(forward, pairs, batches, config, state.micro, device, world, config.quiet)
            if world.rank == 0:
                save_reference(tables)
            world.barrier()
            reference.update({split: table.to(device) for split, table in tables.items()})
            if not config.quiet:
                tqdm.write(f"reference: {path}, {time.monotonic() - clock:.0f} s")
        policy, aux = answer_logp(forward, part["idx"], part["targets"])
        losses, measures = dpo_metrics(policy, reference["train"][part["index"]], part["targets"], config)
        return losses.sum(), {**aux, **{name: value.mean() for name, value in measures.items()}}

    @torch.no_grad()
    def validate(model):
        rows = []
        for index in held_out_indices(len(pairs["val"]), state.micro):
            batch = {name: t.to(device) for name, t in stack([pairs["val"][i] for i in index], config.block_size).items()}
            policy, _ = answer_logp(model, batch["idx"], batch["targets"])
            losses, measures = dpo_metrics(policy, reference["val"][index], batch["targets"], config)
            rows.append(torch.stack((losses, *measures.values()), dim=1).cpu())
        means = torch.cat(rows)[:len(pairs["val"])].double().mean(0).tolist()
        return {f"val_{name}": value for name, value in zip(("loss", *measures), means)}

    run_training(start, world, loss, lambda config, tokenizer: (batches, validate))


@exits_cleanly
def main(argv):
    (config, model), given = configure(["--mup_lr=False", *argv], DPOConfig, MiniCPMConfig, usage=__doc__)
    launch(config, model, given, train_dpo)


if __name__ == "__main__":
    main()
