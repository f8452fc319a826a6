"""Direct preference optimisation (DPO) on train.py's loop.

    python -m family.dpo config/laptop_dpo.py [--init_from=CHECKPOINT] [--pairs=FILE] [--key=value]
    torchrun --nproc_per_node=8 -m family.dpo config/minicpm_dpo.py --init_from=CKPT --pairs=FILE

Rafailov et al. 2023, arXiv 2305.18290; MiniCPM paper, section 7.1. A line of the file of pairs is
{"prompt": ..., "chosen": ..., "rejected": ...}; data/packing.py says what else is accepted.

The reference is the model that the run starts from, so a second model is never loaded. The first
call of the loss, before any update, computes its log-probabilities of all answers with the forward
and the batches of training, so that only training makes policy and reference differ. They are kept
in out_dir/reference.safetensors for resumed runs.

metrics.jsonl holds means over pairs, in nats:
chosen_logp, rejected_logp      log-probability of a whole answer under the policy
chosen_reward, rejected_reward  beta * (log policy - log reference) of a whole answer
margin                          chosen_reward - rejected_reward
accuracy                        share of pairs with a positive margin; a tie counts half
chosen_nll                      nll of the chosen answer per token
kl                              log reference - log policy, mean over both answers. It estimates
                                KL(reference || policy) if the answers are typical of the reference,
                                and may be negative if they are not
"""
import dataclasses
import hashlib
import json
import math
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

from configurator import (
    BadInput,
    configure,
    exits_cleanly,
    must_be_positive,
    must_not_be_negative,
    no_output,
)
from data import packing
from data.corpus import hold_out_limit
from data.dataset import Source, permute
from data.tokenizer import chat_ids
from engine import checkpoint
from engine.device import pick_dtype
from engine.run import new_state
from model import MiniCPMConfig
from train import (
    TrainConfig,
    batch_size_at,
    from_checkpoint,
    launch,
    open_tokenizer,
    run_training,
    set_micro_batch,
    split_batch,
)

HELD_OUT = 0.05                 # share of the prompts, if no file of held-out pairs is given
REFERENCE = "reference.safetensors"
CHOSEN, REJECTED = 0, 1         # positions of the two answers in tensors (P, 2, ...)


@dataclass
class DPOConfig(TrainConfig):
    pairs: str | None = None            # file of preference pairs (.jsonl, .json); a relative path
                                        # starts here, or else at the project
    val_pairs: str | None = None        # held-out pairs; unset: those of a twentieth of the prompts
    max_pairs: int | None = None        # use only the first max_pairs of the file; unset: all
    skip_bad: bool = False              # True: leave out pairs that cannot be used, and count them
    beta: float = 0.1                   # pull towards the reference (not stated in the paper)
    label_smoothing: float = 0.0        # share of pairs that are assumed to be labelled wrongly
    sft_coef: float = 0.0               # weight of the chosen answer's nll per token in the loss
    epochs: int = 1                     # passes over the pairs; max_steps takes precedence
    reference: str | None = None        # set by the run: hash of the weights that it started from

    out_dir: str = "out/dpo"            # the run's folder
    data: str = "pairs"                 # corpus on which tools/evaluate.py measures the result by
                                        # default; training uses the pairs
    batch_size: int = 64                # pairs per update (not stated in the paper)
    batch_schedule: str | None = None   # 'STEP:PAIRS,...': batch_size from each step on
    micro_batch_size: int = 0           # pairs per forward; 0: chosen automatically. A pair is two
                                        # rows of block_size
    block_size: int = 1024              # most tokens of a prompt and its answer; longer pairs are
                                        # left out, and counted
    learning_rate: float = 1e-5         # peak, as in the paper; the same for all parameters, since
                                        # --mup_lr=False is the default here
    schedule: Literal['wsd', 'cosine', 'cosine_loop', 'constant'] = 'cosine'    # as in the paper
    sample_tokens: int = 0              # sample.py --chat=True talks to the result instead

    def needs_horizon(self):
        """Return whether max_steps or minutes must be given; here epochs set the horizon."""
        return False

    def problems(self):
        out = super().problems()
        if self.init_from is None:
            out.append("--init_from: needed: the checkpoint to start from, after SFT")
        if self.pairs is None:
            out.append("--pairs: needed: a file of preference pairs")
        out += must_be_positive(self, "beta epochs max_pairs")
        out += must_not_be_negative(self, "sft_coef")
        if not 0 <= self.label_smoothing < 0.5:
            out.append(f"--label_smoothing={self.label_smoothing}: must be from 0 to below 0.5")
        if self.reference is not None:
            out.append("--reference: is set by the run")
        unused = ("branch_from", "minutes", "decay_data", "doc_mask", "answers_only")
        out += [f"--{name}: not used by DPO" for name in unused
                if getattr(self, name) != getattr(DPOConfig, name)]
        return out


# ---- the loss

def dpo_loss(policy, reference, beta, label_smoothing=0.0):
    """Return the loss of each pair, (P,), in nats.

    Rafailov et al. 2023, equation 7, for one pair with the answers w (chosen) and l (rejected):

        -log sigmoid(beta * (log(policy(w) / reference(w)) - log(policy(l) / reference(l))))

    policy, reference  (P, 2) log-probabilities of the chosen and of the rejected answer
    label_smoothing    probability that a label is wrong: conservative DPO (Mitchell 2023, eq. 3)
    """
    log_ratio = policy - reference
    margin = beta * (log_ratio[:, CHOSEN] - log_ratio[:, REJECTED])
    return (-(1 - label_smoothing) * F.logsigmoid(margin)
            - label_smoothing * F.logsigmoid(-margin))


def answer_logp(forward, batch):
    """Return the log-probabilities of a batch's answers, (P, 2), and the model's aux.

    batch: dict with idx and targets, (P, 2, T) each
    """
    idx, targets = batch["idx"], batch["targets"]
    nll, aux = forward(idx.flatten(0, 1), targets.flatten(0, 1))            # (2P, T)
    return -nll.view(idx.shape).sum(-1), aux


def dpo_metrics(policy, reference, chosen_tokens, config):
    """Return (loss of each pair (P,), {name: value for each pair (P,)}).

    The SFT term of the loss is the chosen answer's nll per token, so that long answers do not
    outweigh short ones (Pang et al. 2024, equation 2).
    policy, reference: (P, 2) log-probabilities; chosen_tokens: (P,) lengths of the chosen answers
    """
    chosen_nll = -policy[:, CHOSEN] / chosen_tokens
    losses = dpo_loss(policy, reference, config.beta, config.label_smoothing)
    losses = losses + config.sft_coef * chosen_nll
    logp = policy.detach()
    rewards = config.beta * (logp - reference)
    margin = rewards[:, CHOSEN] - rewards[:, REJECTED]
    return losses, {
        "margin": margin, "accuracy": (margin.sign() + 1) / 2, "kl": (reference - logp).mean(1),
        "chosen_reward": rewards[:, CHOSEN], "rejected_reward": rewards[:, REJECTED],
        "chosen_logp": logp[:, CHOSEN], "rejected_logp": logp[:, REJECTED],
        "chosen_nll": chosen_nll.detach()}


# ---- pairs

def encode(tokenizer, messages, answers, block_size):
    """Return ((idx, targets), (idx, targets)) of two answers to the same conversation.

    idx and targets are (t,) int32. Targets are -100 up to the answer; they end with the token that
    ends it, so what a template writes after that has no part in the log-probability. Returns None
    if one of the two takes more than block_size tokens.
    """
    rows = []
    for answer in answers:
        turns = [*messages, {"role": "assistant", "content": answer}]
        ids, is_answer = map(np.array, chat_ids(tokenizer, turns))
        last = np.flatnonzero(is_answer)[-1]
        prompt_end = np.flatnonzero(~is_answer[:last])[-1]
        is_answer[:prompt_end] = False      # the answers of earlier turns belong to the prompt
        ids, is_answer = ids[:last + 1], is_answer[:last + 1]
        targets = np.where(is_answer, ids, -100)
        rows.append((ids[:-1].astype(np.int32), targets[1:].astype(np.int32)))
    if max(len(idx) for idx, _ in rows) > block_size:
        return None
    return tuple(rows)


def load_pairs(config, tokenizer, say):
    """Return {"train": [pair, ...], "val": [pair, ...]}, each pair as `encode` returns it.

    say(text) prints on rank 0. Raises BadInput if a split has no pair.
    """
    hold_out = config.val_pairs is None
    train, val = read_file(config.pairs, config, tokenizer, say, hold_out, config.max_pairs)
    if not hold_out:
        val, _ = read_file(config.val_pairs, config, tokenizer, say)
    limit = f"of at most --block_size={config.block_size} tokens"
    if not train:
        raise BadInput(f"{config.pairs}: no pair for training {limit}")
    if not val:
        raise BadInput(f"{config.val_pairs}: no pair for validation {limit}")
    return {"train": train, "val": val}


def read_file(name, config, tokenizer, say, hold_out=False, max_pairs=None):
    """Return (pairs, held-out pairs) of a file; the latter only with hold_out.

    Pairs are held out by a hash of their prompt, so all pairs of a prompt are in the same split. It
    stops reading at max_pairs of the former, and prints how many were too long to be used.
    """
    def convert(messages, *answers):
        return prompt_hash(messages), encode(tokenizer, messages, answers, config.block_size)

    limit = HELD_OUT if hold_out else 0
    pairs, hashes, too_long, n_train = [], [], 0, 0
    for fraction, pair in packing.read_pairs(name, config.skip_bad, convert, say):
        if pair is None:
            too_long += 1
            continue
        pairs.append(pair)
        hashes.append(fraction)
        n_train += fraction >= limit
        if n_train == max_pairs:
            break
    if too_long:
        say(f"{name}: {too_long:,} pairs left out, longer than "
            f"--block_size={config.block_size} tokens")
    if hold_out and pairs:
        if len(set(hashes)) == 1:
            raise BadInput(f"{name}: its pairs ({len(pairs)}) all have one prompt, so none can be "
                           "held out; give --val_pairs")
        limit = hold_out_limit(hashes, HELD_OUT)
    train = [pair for pair, fraction in zip(pairs, hashes) if fraction >= limit]
    return train, [pair for pair, fraction in zip(pairs, hashes) if fraction < limit]


def hash_int(text):
    """Return a 64-bit hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def prompt_hash(messages):
    """Return a hash of a prompt, from 0 to below 1."""
    return hash_int(json.dumps(messages)) % 2 ** 32 / 2 ** 32


def make_batch(pairs, index, block_size):
    """Return a dict of the indexed pairs: idx and targets (P, 2, T) int64, and index (P,).

    T is the length of the longest rounded up to a quarter of block_size, so that there are few
    shapes. Rows are padded on the right with targets of -100; causal attention never sees padding.
    """
    longest, quarter = max(len(idx) for i in index for idx, _ in pairs[i]), -(-block_size // 4)
    shape = len(index), 2, -(-longest // quarter) * quarter
    batch = {"idx": torch.zeros(shape, dtype=torch.int64), "targets": torch.full(shape, -100),
             "index": torch.tensor(index)}
    for row, i in enumerate(index):
        for side, (idx, targets) in enumerate(pairs[i]):
            batch["idx"][row, side, :len(idx)] = torch.from_numpy(idx)
            batch["targets"][row, side, :len(targets)] = torch.from_numpy(targets)
    return batch


def pair_batches(pairs, config):
    """Return the batch source batches(plan, first, count) -> (batch, count) for train.py's loop.

    Every epoch has its own order of the pairs. The plan, which names corpora, is not used.
    """
    def batches(plan, first, count):
        index = []
        for sample in range(first, first + count):
            epoch, position = divmod(sample, len(pairs))
            key = hash_int(f"pairs {config.seed} {epoch}")
            index.append(permute(position, len(pairs), key))
        return make_batch(pairs, index, config.block_size), count
    return batches


def held_out_batches(pairs, size, block_size, rank, ranks):
    """Yield this rank's batches over all pairs, filled up with the first pairs.

    All have one size, and all ranks the same number of them, because a forward of a sharded model
    is collective. Those of rank 0 come first.
    """
    share = size * math.ceil(len(pairs) / (size * ranks))
    for first in range(rank * share, (rank + 1) * share, size):
        yield make_batch(pairs, [i % len(pairs) for i in range(first, first + size)], block_size)


def count_updates(config, n_pairs):
    """Return the number of updates in config.epochs; the last batch is dropped if incomplete."""
    used = updates = 0
    while used + batch_size_at(config, updates) <= config.epochs * n_pairs:
        used += batch_size_at(config, updates)
        updates += 1
    if not updates:
        raise BadInput(f"--batch_size={batch_size_at(config, 0)}: {config.pairs} has only "
                       f"{n_pairs} pairs to train on")
    return updates


# ---- the reference's log-probabilities

def compute_reference(forward, pairs, config, micro, world):
    """Return {split: (n, 2)} log-probabilities of all answers under the model as it is.

    The forward and the shapes are those of training, with gradients enabled, because kernels may
    differ without. Each rank computes its share.
    """
    batches, batch_size = pair_batches(pairs["train"], config), batch_size_at(config, 0)
    share, quiet = batch_size // world.size, config.quiet or world.rank > 0
    table = torch.full((len(pairs["train"]), 2), -torch.inf, device=world.device)
    for first in tqdm(range(0, len(table), batch_size), desc="reference", leave=False,
                      disable=True if quiet else None):
        batch, _ = batches(None, first + world.rank * share, share)
        for part in split_batch(batch, micro, world.device):
            table[part["index"]] = answer_logp(forward, part)[0].detach()
    table = torch.stack(world.all_gather(table.cpu())).amax(0)      # -inf: pairs of other ranks
    return {"train": table.to(world.device),
            "val": held_out_logp(forward, pairs["val"], micro, config.block_size, world)}


def held_out_logp(forward, pairs, micro, block_size, world):
    """Return (n, 2) log-probabilities of the answers of all pairs; each rank computes its share."""
    rows = []
    for batch in held_out_batches(pairs, micro, block_size, world.rank, world.size):
        (part,) = split_batch(batch, micro, world.device)
        rows.append(answer_logp(forward, part)[0].detach())
    return torch.cat(world.all_gather(torch.cat(rows).cpu()))[:len(pairs)].to(world.device)


def reference_fingerprint(start, pairs, tokenizer, device):
    """Return everything that decides the reference's log-probabilities, as a dict for JSON."""
    config, digest = start.config, hashlib.sha256()
    for pair in pairs["train"] + pairs["val"]:
        for array in (*pair[CHOSEN], *pair[REJECTED]):
            digest.update(len(array).to_bytes(4, "little") + array.tobytes())
    numerics = f"{device.type} {pick_dtype(config.dtype, device)}, flash {config.flash}"
    return {"model": json_hash([config.reference, asdict(start.model_config)]),
            "pairs": digest.hexdigest(), "tokenizer": tokenizer.hash, "numerics": numerics}


def json_hash(value):
    """Return the sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_hash(folder):
    """Return a hash of a checkpoint's weights, from the hashes in its meta.json if it has them."""
    files = checkpoint.read_meta(folder)["files"]
    if not files:                                           # a released folder
        files = {path.name: checkpoint.sha256(path) for path in Path(folder).iterdir()
                 if path.suffix in (".safetensors", ".bin")}
    return json_hash({name: sha for name, sha in files.items()
                      if name.startswith(("model", "pytorch_model", "index.json"))})


def read_reference(path, fingerprint, start):
    """Return the saved {split: (n, 2)} log-probabilities, {} if they are to be computed.

    Raises BadInput if they belong to another model, other pairs, another tokenizer or numerics.
    """
    if not path.exists():
        if start.kind == "resume":
            raise BadInput(f"{path}: missing, and the model has changed since it was computed; "
                           "--overwrite=True starts the run again")
        return {}
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()     # runs of early versions: made_from
            saved = json.loads(about.get("reference_fingerprint") or about["made_from"])
            tables = {split: file.get_tensor(split) for split in ("train", "val")}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a table of log-probabilities ({error}); delete it") from None
    different = [name for name in fingerprint if saved.get(name) != fingerprint[name]]
    if not different:
        return tables
    if start.kind == "init" and start.config.overwrite:
        return {}
    raise BadInput(f"{path}: does not match this run's {' and '.join(different)}; "
                   "--overwrite=True starts the run again, --out_dir=FOLDER starts another one")


def write_reference(path, tables, fingerprint):
    """Write the log-probabilities so that a reader finds the whole file or none."""
    temporary = path.with_suffix(".tmp")
    tables = {split: table.cpu() for split, table in tables.items()}
    save_file(tables, temporary, metadata={"reference_fingerprint": json.dumps(fingerprint)})
    os.replace(temporary, path)


# ---- a run

def new_run(start, n_pairs):
    """Return the Start of a new run, with its horizon and the hash of its initial weights."""
    config = start.config
    max_steps = config.max_steps or count_updates(config, n_pairs)
    state = new_state(dataclasses.replace(config, max_steps=max_steps))
    state.skips = start.state.skips
    config = dataclasses.replace(config, reference=weights_hash(start.folder))
    return dataclasses.replace(start, config=config, state=state)


def train_dpo(start, world):
    """Train a Start on its pairs: train.py's loop with this batch source, loss and validation."""
    say = no_output if start.config.quiet else print
    tokenizer = open_tokenizer(start)
    pairs = load_pairs(start.config, tokenizer, say)
    if start.kind == "init":
        start = new_run(start, len(pairs["train"]))
    config, state, device = start.config, start.state, world.device
    state.plan = [[0, "pairs"]]             # a plan of corpora is not used, but counts the epochs
    path = Path(config.out_dir, REFERENCE)
    two_rows = dataclasses.replace(config, block_size=2 * config.block_size)    # memory of a pair
    set_micro_batch(two_rows, state, start.model_config, world)
    fingerprint = reference_fingerprint(start, pairs, tokenizer, device)
    saved = read_reference(path, fingerprint, start)
    reference = {split: table.to(device) for split, table in saved.items()}
    val_tokens = torch.tensor([(targets >= 0).sum() for (_, targets), _ in pairs["val"]],
                              device=device)
    say(f"{len(pairs['train']):,} pairs, {len(pairs['val']):,} held out; "
        f"reference: {path if reference else 'to be computed'}")

    def loss(forward, part):
        if not reference:                                   # before the first update
            clock = time.monotonic()
            reference.update(compute_reference(forward, pairs, config, state.micro, world))
            if world.rank == 0:
                write_reference(path, reference, fingerprint)
            world.barrier()
            if not config.quiet:
                tqdm.write(f"reference: {path}, {time.monotonic() - clock:.0f} s")
        policy, aux = answer_logp(forward, part)
        chosen_tokens = (part["targets"][:, CHOSEN] >= 0).sum(-1)
        losses, values = dpo_metrics(policy, reference["train"][part["index"]], chosen_tokens,
                                     config)
        return losses.sum(), {**aux, **{name: value.mean() for name, value in values.items()}}

    @torch.no_grad()
    def validate(model):
        policy = held_out_logp(model, pairs["val"], state.micro, config.block_size, world)
        losses, values = dpo_metrics(policy, reference["val"], val_tokens, config)
        return {f"val_{name}": value.cpu().double().mean().item()
                for name, value in {"loss": losses, **values}.items()}

    batches = pair_batches(pairs["train"], config)
    sources = {"pairs": Source(fingerprint["pairs"], len(pairs["train"]))}
    run_training(start, world, loss, lambda *options: (batches, validate, sources))


@exits_cleanly
def main(argv):
    argv = ["--mup_lr=False", *argv]                        # the default here
    (config, model), given = configure(argv, DPOConfig, MiniCPMConfig, usage=__doc__,
                                       check_later=from_checkpoint)
    launch(config, model, given, train_dpo)


if __name__ == "__main__":
    main()
