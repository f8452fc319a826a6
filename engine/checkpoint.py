"""Checkpoints: tensors in safetensors, all else in readable JSON, and nothing that could run code.

    out_dir/step-00001000/      meta.json, model.safetensors, optimizer.safetensors, the tokenizer
                                several ranks: model-00001-of-00004.safetensors, ..., index.json

A checkpoint is written to a folder beside its final place and renamed when it is complete, so a
killed run leaves the last good one. Its meta.json lists every file with its sha256. This file knows
no model. resolve, read_meta and read_weights take the folders of released models too (released.py).
"""
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import ROOT, BadInput
from engine import distributed
from engine.released import (
    is_released,
    open_released,
    read_json,
    read_released_config,
    refuse_adapter,
)
from engine.stored import StoredTensor, stored_tensors

STEP = re.compile(r"step-(\d{8,})")


# ---- writing

class CheckpointWriter:
    """Writes the checkpoints of a run: save() at a step, finish() before the run ends.

    save() writes this rank's shards. With config.async_save it copies them, and a thread writes the
    copies while training continues.
    """

    def __init__(self, config, state, model, optimizer, scaler, tokenizer, world, log):
        """tokenizer: saved in every checkpoint; None: nothing is ever written."""
        self.config, self.state, self.world, self.tokenizer = config, state, world, tokenizer
        self.model, self.optimizer, self.scaler, self.log = model, optimizer, scaler, log
        self.out_dir = Path(config.out_dir)
        self.thread, self.pending = ThreadPoolExecutor(1), None
        exists = tokenizer and step_folder(self.out_dir, state.step).exists()
        self.saved_step = state.step if exists else None

    def save(self, keep=False):
        """Save the run as it is now, unless it is saved. keep: never delete this checkpoint."""
        if self.tokenizer is None or self.saved_step == self.state.step and not keep:
            return
        start = time.monotonic()
        self.finish()
        if self.saved_step == self.state.step:             # by save_interval
            if self.world.rank == 0:
                amend_meta(self.out_dir, self.state.step, run=asdict(self.state), keep=True)
            return
        self.saved_step = self.state.step
        self.state.seconds = self.log.run_seconds()
        self.state.scaler = self.scaler.state_dict() or None
        write = self.snapshot(keep)
        if self.config.async_save:
            self.pending = self.thread.submit(write)
        else:
            write()
        self.log.write(step=self.state.step, save_pause_s=round(time.monotonic() - start, 3))

    def finish(self):
        """Wait for the checkpoint that is being written. Raises what went wrong meanwhile."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def snapshot(self, keep):
        """Return a function that writes this rank's part of the run as it is now."""
        config, world = self.config, self.world
        meta = {"run": asdict(self.state), "train": asdict(config),
                "model": asdict(self.model.config), "keep": keep,
                "tokenizer_hash": self.tokenizer.hash, "provenance": provenance()}
        meta = json.loads(json.dumps(meta))                # a copy: the state goes on changing
        if world.replica_rank > 0:
            return lambda: None                            # replicas are equal: one of them writes
        parts = {"model": self.model.state_dict(), "optimizer": optimizer_state(self.optimizer)}
        shards, placements = {}, {}
        for part, tensors in parts.items():
            local = {name: distributed.local_shard(tensor) for name, tensor in tensors.items()}
            shards[part] = {name: shard.detach() for name, (shard, _, _) in local.items()}
            placements[part] = {name: (offset, shape) for name, (_, offset, shape) in local.items()}
            if config.async_save:
                shards[part] = {name: shard.to("cpu", copy=True)
                                for name, shard in shards[part].items()}
        sharding = {}
        if world.mesh:
            sharding = {"placements": placements, "rank": world.shard_rank,
                        "ranks": world.shards, "attempt": world.attempt,
                        "timeout": 60 * config.timeout}

        def write():
            save_checkpoint(self.out_dir, meta["run"]["step"], shards, meta, self.tokenizer.save,
                            **sharding)
            if world.rank == 0:
                prune(self.out_dir, config.keep_last, config.keep_every)
                marker = self.out_dir / "nonfinite.json"
                seen = meta["run"]["samples_seen"]
                if marker.exists() and read_json(marker)["samples_seen"] < seen:
                    marker.unlink()                        # the run is past that batch
        return write

    def close(self):
        self.thread.shutdown(wait=False)                   # do not block on a dead peer


def save_checkpoint(out_dir, step, tensors, meta, write_more=None, placements=None, rank=0, ranks=1,
         attempt=None, timeout=600):
    """Write out_dir/step-N and return its path.

    tensors     {"model": {name: tensor}, "optimizer": {...}}: one file per part
    meta        JSON dict; "step" and "files" are added
    write_more  called with the hidden folder: writes further files (the tokenizer's)

    Several ranks write together, each its own shards, into a folder that all of them see. Rank 0
    then writes index.json, which says where each shard belongs, and makes the checkpoint visible.

    placements  {"model": {name: (offset of the shard, shape of the whole)}, ...}; None: not sharded
    attempt     the same text on every rank, and another one after a restart
    timeout     seconds that rank 0 waits for the files of the others
    """
    final = step_folder(out_dir, step)
    attempt = attempt or f"{os.getpid()}-{time.time_ns()}"
    hidden = final.with_name(f".{final.name}.{attempt}.tmp")
    if rank == 0:
        for leftover in final.parent.glob(".step-*.tmp"):  # of a run killed while saving or pruning
            if leftover.suffixes[-2:-1] != [f".{attempt}"]:
                shutil.rmtree(leftover, ignore_errors=True)
    hidden.mkdir(parents=True, exist_ok=ranks > 1)
    try:
        written, index = write_tensors(hidden, tensors, placements, rank, ranks)
        if write_more and rank == 0:
            (hidden / "more").mkdir()
            write_more(hidden / "more")
            written += [path.rename(hidden / path.name) for path in (hidden / "more").iterdir()]
            (hidden / "more").rmdir()
        for path in written:                               # on the disk before the rename is
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        files = {path.name: sha256(path) for path in sorted(written)}
        if placements:
            write_json(hidden / f"rank-{rank}.json", {"files": files, "index": index})
            if rank > 0:
                return final
            files |= merge_ranks(hidden, ranks, timeout)
        write_json(hidden / "meta.json", {**meta, "step": step, "files": files})
        if final.exists():                                 # an incomplete or damaged one
            shutil.rmtree(final)
        os.rename(hidden, final)                           # from here on the checkpoint is visible
    except SafetensorError as error:                       # how the library reports a full disk
        message = f"could not be written ({error}); the last good checkpoint is untouched"
        raise OSError(None, message, str(final)) from None
    finally:
        if rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
    return final


def step_folder(out_dir, step):
    return Path(out_dir) / f"step-{step:08d}"


def write_tensors(folder, tensors, placements, rank, ranks):
    """Write one safetensors file per part. Returns (paths, their entries for index.json)."""
    paths, index = [], {}
    for part, named in tensors.items():
        file = f"{part}.safetensors"
        if placements:
            file = f"{part}-{rank + 1:05d}-of-{ranks:05d}.safetensors"
            named = {name: tensor for name, tensor in named.items()     # a scalar is on all ranks
                     if tensor.numel() and (tensor.dim() or rank == 0)}
            index[part] = {name: {"shape": shape, "pieces": [[file, offset]]}
                           for name, (offset, shape) in placements[part].items() if name in named}
        named = {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}
        save_file(named, folder / file)
        paths.append(folder / file)
    return paths, index


def merge_ranks(folder, ranks, timeout):
    """Wait until all ranks have written, and merge their indexes. Returns {file: sha256}."""
    missing = {folder / f"rank-{rank}.json" for rank in range(ranks)}
    deadline = time.monotonic() + timeout
    while missing := {path for path in missing if not path.exists()}:
        if time.monotonic() > deadline:
            raise OSError(None, f"{len(missing)} of {ranks} ranks did not write their files within "
                          f"{timeout:.0f} s", str(folder))
        time.sleep(0.02)
    files, index = {}, {}
    for path in sorted(folder.glob("rank-*.json")):
        rank = read_json(path)
        files |= rank["files"]
        for part, named in rank["index"].items():
            for name, entry in named.items():
                empty = {"shape": entry["shape"], "pieces": []}
                merged = index.setdefault(part, {}).setdefault(name, empty)
                merged["pieces"] += entry["pieces"]
        path.unlink()
    write_json(folder / "index.json", index)
    return {**files, "index.json": sha256(folder / "index.json")}


def amend_meta(out_dir, step, **changes):
    """Change entries of the meta.json of a checkpoint."""
    path = step_folder(out_dir, step) / "meta.json"
    write_json(path, {**read_json(path), **changes})


def prune(out_dir, keep_last, keep_every):
    """Delete all checkpoints but the last few, every keep_every-th step, and those marked keep."""
    for path in checkpoints(out_dir)[:-keep_last]:
        step = int(STEP.fullmatch(path.name)[1])
        try:
            kept = keep_every and step % keep_every == 0 or read_meta(path).get("keep")
        except BadInput:                                   # damaged: not ours to delete
            kept = True
        if not kept:                                       # renamed: never half a checkpoint
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path, value):
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


# ---- reading

def checkpoints(out_dir):
    """Return the complete checkpoints of a run folder, oldest first."""
    found = [path for path in Path(out_dir).glob("step-*")
             if STEP.fullmatch(path.name) and (path / "meta.json").is_file()]
    return sorted(found, key=lambda path: int(STEP.fullmatch(path.name)[1]))


def resolve(path):
    """Return the checkpoint that a path means: itself, a released folder, or the latest of a run.

    Raises BadInput if there is none.
    """
    path = Path(path)
    if (path / "meta.json").is_file() or is_released(path):
        return path
    if checkpoints(path):
        return checkpoints(path)[-1]
    if path.is_file():
        raise BadInput(f"{path}: a checkpoint is a folder step-NNNNNNNN with meta.json; single "
                       "files (pickles) are never read")
    if not path.exists():
        raise BadInput(f"{path}: no such checkpoint or run folder")
    refuse_adapter(path)
    raise BadInput(f"{path}: holds no complete checkpoint (a folder step-NNNNNNNN with meta.json), "
                   "and no config.json of a model")


def read_meta(folder):
    """Return the meta.json of a checkpoint; for a released folder what is known: its model."""
    if is_released(folder):
        return {"step": 0, "files": {}, "model": read_released_config(folder)[1]}
    meta = read_json(Path(folder) / "meta.json")
    valid = (isinstance(meta, dict) and isinstance(meta.get("files"), dict)
             and isinstance(meta.get("step"), int))
    if not valid:
        raise BadInput(f"{folder}/meta.json: not the meta.json of a checkpoint")
    return meta


def model_config_of(cls, meta, where):
    """Return cls(...) from a checkpoint's meta. Raises BadInput if its model config is unusable."""
    model = meta.get("model")
    if isinstance(model, dict):         # JSON has no tuples
        model = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in model.items()}
    return from_meta(cls, {"model": model}, "model", where)


def from_meta(cls, meta, part, where):
    """Return cls(**meta[part]). Raises BadInput if another version of the project wrote it."""
    try:
        return cls(**meta[part])
    except (KeyError, TypeError) as error:
        raise BadInput(f"{where}: no usable {part} config ({error}); it was written by another "
                       "version") from None


def read_weights(folder, dtype=None):
    """Yield (our name, tensor) of a checkpoint or a released folder, in `dtype` or as stored."""
    for name, stored in open_weights(folder):
        yield name, stored.read(dtype=dtype)


def read_tensors(folder, part):
    """Yield (name, tensor) of part "model" or "optimizer", one whole tensor at a time."""
    for name, stored in open_tensors(folder, part):
        yield name, stored.read()


def open_weights(folder, share=(0, 1)):
    """Yield (our name, StoredTensor) of a checkpoint or a released folder. share: see
    open_tensors."""
    return open_released(folder) if is_released(folder) else open_tensors(folder, "model", share)


def open_tensors(folder, part, share=(0, 1)):
    """Yield (name, StoredTensor) of part "model" or "optimizer": nothing but the regions that the
    caller takes is read, from the pieces of as many ranks as wrote them.

    share: (rank, number of ranks): each rank verifies the sha256 of its part of the files only,
    which are those that it reads if as many ranks wrote them. Raises BadInput that names the
    damaged file.
    """
    folder, meta = Path(folder), read_meta(folder)
    names, index = [f"{part}.safetensors"], None
    if "index.json" in meta["files"]:
        check_file(folder / "index.json", meta)
        index = read_json(folder / "index.json").get(part, {})
        names = sorted({file for entry in index.values() for file, _ in entry["pieces"]})
    found = {name: check_file(folder / name, meta, verify=i % share[1] == share[0])
             for i, name in enumerate(names)}
    if index is None:
        yield from found[names[0]].items()
        return
    for name, entry in index.items():
        parts = [found[file][name] for file, _ in entry["pieces"] if name in found[file]]
        if sum(math.prod(part.shape) for part in parts) != math.prod(entry["shape"]):
            raise BadInput(f"{folder}: index.json lacks shards of {name}; {remedy(folder)}")
        pieces = [part.pieces[0]._replace(offset=tuple(offset))
                  for part, (_, offset) in zip(parts, entry["pieces"])]
        yield name, StoredTensor(tuple(entry["shape"]), parts[0].dtype, pieces)


def check_file(path, meta, verify=True):
    """Return {name: StoredTensor} of a file of a checkpoint, {} if it is JSON.

    Raises BadInput if it is missing, damaged or, with verify, not what was saved.
    """
    recorded = meta["files"].get(path.name)
    if recorded is None or not path.is_file():
        raise BadInput(f"{path}: missing; {remedy(path.parent)}")
    try:
        tensors = stored_tensors(path) if path.suffix == ".safetensors" else {}
    except BadInput as error:
        raise BadInput(f"{error}; {remedy(path.parent)}") from None
    if verify and sha256(path) != recorded:
        raise BadInput(f"{path}: changed since it was saved (sha256 differs); "
                       f"{remedy(path.parent)}")
    return tensors


def remedy(folder):
    return f"delete {folder} to continue from the checkpoint before it, or name another one"


# ---- the optimizer's state

def optimizer_state(optimizer):
    """Return {"NAME/exp_avg": tensor, ...}: AdamW's state by parameter name, not by position."""
    state = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            state |= {f"{name}/{key}": value for key, value in optimizer.state[p].items()}
    return state


def restore_optimizer(optimizer, tensors, fused):
    """Load (name, StoredTensor or tensor) pairs of optimizer_state, the part that this rank holds.

    Raises BadInput if one is missing or fits no parameter.
    """
    params = {name: p for group in optimizer.param_groups
              for name, p in zip(group["names"], group["params"])}
    for full_name, stored in tensors:
        name, _, key = full_name.rpartition("/")
        p = params.get(name)
        if p is None or key != "step" and stored.shape != p.shape:
            raise BadInput(f"the checkpoint's optimizer state has {full_name} {stored.shape}, "
                           "which fits no parameter; use --init_from to take the weights only")
        if key == "step":
            optimizer.state[p][key] = stored[()].to(p.device if fused else "cpu")
        else:
            optimizer.state[p][key] = torch.zeros_like(p)
            distributed.copy_local_shard(optimizer.state[p][key], stored)
    if not optimizer.state:                                # saved before the first update
        return
    for name, p in params.items():
        missing = {"step", "exp_avg", "exp_avg_sq"} - optimizer.state[p].keys()
        if missing:
            raise BadInput(f"the checkpoint's optimizer state lacks {name}/{sorted(missing)[0]}; "
                           "use --init_from to take the weights only")


# ---- the rest of a run folder

def lock(folder):
    """Lock a folder for this process: `with lock(folder):`. The lock ends with the process.

    Raises BadInput if another process has it.
    """
    try:
        return FileLock(Path(folder) / ".lock").acquire(timeout=0)
    except Timeout:
        raise BadInput(f"{folder}: in use by another process; wait for it, or give another "
                       "folder") from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
            raise
        raise BadInput(f"{folder}: can't be locked ({error}); give a folder on a file system that "
                       "has locks") from None


def provenance():
    """Return code, versions and machine, which explain why two runs differ."""
    git = ""
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True,
                             text=True).stdout.strip()
    return {"git": git, "code": code_hash(), "torch": torch.__version__,
            "python": platform.python_version(), "machine": platform.machine(),
            "threads": torch.get_num_threads()}


def code_hash():
    """Return a hash of the code that trains, to tell an edited rule from the one before."""
    files = sorted(path for pattern in ("*.py", "data/*.py", "engine/*.py", "family/*.py")
                   for path in ROOT.glob(pattern))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def clear(out_dir):
    """Remove the files of a run from its folder, and nothing else."""
    for path in [*Path(out_dir).glob("step-*"), *Path(out_dir).glob(".step-*.tmp")]:
        shutil.rmtree(path)
    for name in ("metrics.jsonl", "config.json", "loss.png", "nonfinite.json", "trace-rank*.json"):
        for path in Path(out_dir).glob(name):
            path.unlink()
