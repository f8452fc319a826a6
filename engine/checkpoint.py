"""Checkpoints: tensors in safetensors, everything readable in JSON, and nothing that could run code. Knows no model.

    out_dir/step-00001000/      meta.json, model.safetensors, optimizer.safetensors, the tokenizer's files
                                from several ranks: model-00001-of-00004.safetensors, ..., and index.json

A checkpoint is written into a folder beside its place and renamed when complete, so whatever stops a run leaves the last
good one. Its meta.json names every file with its sha256.

resolve, read_meta and read_weights take the folders of released models too (released.py).
"""
import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import ROOT, BadInput
from engine.released import is_released, read_json, read_released, read_released_config

STEP = re.compile(r"step-(\d{8,})")


def save(out_dir, step, tensors, meta, write_more=None, places=None, rank=0, ranks=1, attempt=None, timeout=600):
    """Write out_dir/step-N and return its path.

    tensors     {"model": {name: tensor}, "optimizer": {...}}: one file each
    meta        JSON dict; "step" and "files" are added
    write_more  called with the folder while it is still out of sight: writes further files (the tokenizer's)

    Several ranks write together, each the pieces that it holds, into a folder that all of them see. Rank 0 then writes
    index.json, which says where each piece belongs, and makes the checkpoint visible.
    places      {"model": {name: (offset of the piece, shape of the whole)}, ...}; None: tensors are whole
    attempt     the same word on every rank, and another one after a restart
    timeout     seconds that rank 0 waits for the others' files
    """
    final = Path(out_dir) / f"step-{step:08d}"
    attempt = attempt or str(os.getpid())
    temporary = final.with_name(f".{final.name}.{attempt}.tmp")
    if rank == 0:
        for left_over in final.parent.glob(".step-*.tmp"):               # of a run that was killed while saving or pruning
            if left_over.suffixes[-2:-1] != [f".{attempt}"]:
                shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=ranks > 1)
    try:
        pieces = {}
        for part, named in tensors.items():
            file = f"{part}.safetensors" if places is None else f"{part}-{rank + 1:05d}-of-{ranks:05d}.safetensors"
            here = {name: t.detach().contiguous().cpu() for name, t in named.items()       # a scalar is the same on all ranks
                    if places is None or (t.numel() and (t.dim() or rank == 0))}
            save_file(here, temporary / file)
            if places:
                where = {name: places[part][name] for name in here}
                pieces[part] = {name: {"shape": shape, "pieces": [[file, offset]]} for name, (offset, shape) in where.items()}
        if write_more and rank == 0:
            write_more(temporary)
        own = [path for path in temporary.iterdir() if f"-{rank + 1:05d}-of-" in path.name
               or rank == 0 and "-of-" not in path.name and not path.name.startswith((".", "rank-"))]
        for path in own:                                                 # on the disk before the rename is: power can fail too
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        files = {path.name: sha256(path) for path in sorted(own)}
        if places:
            write_json(temporary / f"rank-{rank}.json", {"files": files, "index": pieces})
            if rank > 0:
                return final
            files |= merge_ranks(temporary, ranks, timeout)
        write_json(temporary / "meta.json", {**meta, "step": step, "files": files})
        if final.exists():                                               # damaged or left over: a good one is never rewritten
            shutil.rmtree(final)
        os.rename(temporary, final)
    except SafetensorError as error:                                     # how the library reports a full disk
        raise OSError(None, f"could not be written ({error}); the last good checkpoint is untouched", str(final)) from None
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def merge_ranks(temporary, ranks, timeout):
    """Wait until all ranks have written their files, and make one index.json of what they say. Returns {file: sha256}."""
    waiting, until = {temporary / f"rank-{rank}.json" for rank in range(ranks)}, time.monotonic() + timeout
    while waiting := {path for path in waiting if not path.exists()}:
        if time.monotonic() > until:
            raise OSError(None, f"{len(waiting)} of {ranks} ranks did not write their files within {timeout:.0f} s", str(temporary))
        time.sleep(0.02)
    files, index = {}, {}
    for path in sorted(temporary.glob("rank-*.json")):
        said = read_json(path)
        files |= said["files"]
        for part, named in said["index"].items():
            for name, entry in named.items():
                index.setdefault(part, {}).setdefault(name, {"shape": entry["shape"], "pieces": []})["pieces"] += entry["pieces"]
        path.unlink()
    write_json(temporary / "index.json", index)
    return {**files, "index.json": sha256(temporary / "index.json")}


def amend(out_dir, step, **changes):
    """Change entries of the meta.json of a checkpoint that is there."""
    path = Path(out_dir) / f"step-{step:08d}" / "meta.json"
    write_json(path, {**read_json(path), **changes})


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path, value):
    """Write JSON so that a reader finds the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def checkpoints(out_dir):
    """Complete checkpoints of a run folder, oldest first."""
    found = [path for path in Path(out_dir).glob("step-*") if STEP.fullmatch(path.name) and (path / "meta.json").is_file()]
    return sorted(found, key=lambda path: int(STEP.fullmatch(path.name)[1]))


def resolve(path):
    """The checkpoint meant by a path: itself, a released folder, or the latest of a run folder. BadInput where there is none."""
    path = Path(path)
    if (path / "meta.json").is_file() or is_released(path):
        return path
    if checkpoints(path):
        return checkpoints(path)[-1]
    if path.is_file():
        raise BadInput(f"{path}: a checkpoint is a folder step-NNNNNNNN with meta.json; single files (pickles) are never read")
    if not path.exists():
        raise BadInput(f"{path}: no such checkpoint or run folder")
    raise BadInput(f"{path}: holds no complete checkpoint (a folder step-NNNNNNNN with meta.json), and no config.json of a model")


def read_meta(folder):
    """meta.json of a checkpoint folder; of a released one what can be said: its model."""
    if is_released(folder):
        return {"step": 0, "files": {}, "model": read_released_config(folder)[1]}
    meta = read_json(Path(folder) / "meta.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict) or not isinstance(meta.get("step"), int):
        raise BadInput(f"{folder}/meta.json: not the meta.json of a checkpoint")
    return meta


def read_tensors(folder, part, share=(0, 1)):
    """Yield (name, tensor) of part "model" or "optimizer", one whole tensor at a time, whoever wrote its pieces.

    share: (i, n): check the sha256 of every n-th file only, from the i-th on, where n ranks read the same checkpoint.
    BadInput names what is wrong.
    """
    folder, meta = Path(folder), read_meta(folder)
    remedy = f"delete {folder} to go on from the checkpoint before it, or name another one"
    sharded = "index.json" in meta["files"]
    names = [f"{part}.safetensors"]
    if sharded:
        check(folder / "index.json", meta, remedy)
        index = read_json(folder / "index.json").get(part, {})
        names = sorted({file for entry in index.values() for file, _ in entry["pieces"]})
    for i, name in enumerate(names):
        check(folder / name, meta, remedy, i % share[1] == share[0])
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(safe_open(folder / name, "pt")) for name in names}
        if not sharded:
            yield from ((name, opened[names[0]].get_tensor(name)) for name in opened[names[0]].keys())
            return
        for name, entry in index.items():
            if len(entry["pieces"]) == 1:
                yield name, opened[entry["pieces"][0][0]].get_tensor(name)
                continue
            pieces = [(opened[file].get_tensor(name), offset) for file, offset in entry["pieces"]]
            whole = torch.empty(entry["shape"], dtype=pieces[0][0].dtype)
            for piece, offset in pieces:
                whole[tuple(slice(first, first + n) for first, n in zip(offset, piece.shape))] = piece
            if sum(piece.numel() for piece, _ in pieces) != whole.numel():
                raise BadInput(f"{folder}: index.json has not all pieces of {name}; {remedy}")
            yield name, whole


def check(path, meta, remedy, hashed=True):
    """BadInput where a file of a checkpoint is missing or not the one that was saved."""
    recorded = meta["files"].get(path.name)
    if recorded is None or not path.is_file():
        raise BadInput(f"{path}: missing; {remedy}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); {remedy}") from None
    if hashed and sha256(path) != recorded:
        raise BadInput(f"{path}: changed since it was saved (sha256 differs); {remedy}")


def read_weights(folder, dtype=None, share=(0, 1)):
    """Yield (our name, tensor) of a checkpoint or released folder, in `dtype` or as stored; share: see read_tensors."""
    if is_released(folder):
        yield from read_released(folder, dtype)
    else:
        yield from ((name, t if dtype is None else t.to(dtype)) for name, t in read_tensors(folder, "model", share))


def prune(out_dir, keep_last, keep_every):
    """Delete all but the last few checkpoints, every keep_every-th step, and those whose meta says keep."""
    for path in checkpoints(out_dir)[:-keep_last or None]:
        step = int(STEP.fullmatch(path.name)[1])
        try:
            kept = keep_every and step % keep_every == 0 or read_meta(path).get("keep")
        except BadInput:                                                 # damaged: no reason to stop a run, nor ours to delete
            kept = True
        if not kept:
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))      # never half a checkpoint under its name


def lock(out_dir):
    """Hold a folder for this process; BadInput where another one has it. The system frees it however we end."""
    path = Path(out_dir) / ".lock"
    handle = open(path, "a+")
    try:
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:                                              # Windows
            import msvcrt
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        handle.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BadInput(f"{out_dir}: can't be locked ({error.strerror}); give a folder on a file system that has locks") from None
        raise BadInput(f"{out_dir}: in use by another process; wait for it, or give another folder") from None
    return handle


# ---- the rest of a run folder

def provenance():
    """Where and by what a file was made: enough to say why two runs differ."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    return {"git": git.stdout.strip() if git else "", "code": code_hash(), "torch": torch.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}


def code_hash():
    """sha256 over the project's own modules, so that an edited rule is not mistaken for the run that was made before."""
    files = sorted(path for pattern in ("*.py", "data/*.py", "engine/*.py", "family/*.py") for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(p.relative_to(ROOT).as_posix().encode() + p.read_bytes().replace(b"\r\n", b"\n") for p in files)).hexdigest()[:16]


def clear(out_dir):
    """Remove a run's own files, and nothing else, from its folder."""
    for path in [*Path(out_dir).glob("step-*"), *Path(out_dir).glob(".step-*.tmp")]:
        shutil.rmtree(path)
    for name in ("metrics.jsonl", "config.json", "loss.png", "nonfinite.json"):
        (Path(out_dir) / name).unlink(missing_ok=True)


