"""Checkpoints: tensors in safetensors, everything readable in JSON, and nothing that could run code. Knows no model.

    out_dir/step-00001000/      meta.json, model.safetensors, optimizer.safetensors, the tokenizer's files

A checkpoint is written into a folder beside its place and renamed when complete, so whatever stops a run leaves the last
good one. Its meta.json names every file with its sha256.

resolve, read_meta and read_weights take the folders of released models too (released.py).
"""
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import ROOT, BadInput
from released import is_released, read_json, read_released, read_released_config

STEP = re.compile(r"step-(\d{8,})")


def save(out_dir, step, tensors, meta, write_more=None):
    """Write out_dir/step-N and return its path.

    tensors     {"model": {name: tensor}, "optimizer": {...}}: one file each
    meta        JSON dict; "step" and "files" are added
    write_more  called with the folder while it is still out of sight: writes further files (the tokenizer's)
    """
    final = Path(out_dir) / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    for left_over in final.parent.glob(".step-*.tmp"):                   # of a run that was killed while saving or pruning
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for part, named in tensors.items():
            save_file({name: t.detach().contiguous().cpu() for name, t in named.items()}, temporary / f"{part}.safetensors")
        if write_more:
            write_more(temporary)
        for path in temporary.iterdir():                                 # on the disk before the rename is: power can fail too
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / "meta.json", {**meta, "step": step, "files": files})
        if final.exists():                                               # damaged or left over: a good one is never rewritten
            shutil.rmtree(final)
        os.rename(temporary, final)
    except SafetensorError as error:                                     # how the library reports a full disk
        raise OSError(None, f"could not be written ({error}); the last good checkpoint is untouched", str(final)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


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


def read_tensors(folder, part):
    """{name: tensor} of part "model" or "optimizer", after checking its sha256; BadInput names what is wrong."""
    path = Path(folder) / f"{part}.safetensors"
    recorded = read_meta(folder)["files"].get(path.name)
    remedy = f"delete {folder} to go on from the checkpoint before it, or name another one"
    if recorded is None or not path.is_file():
        raise BadInput(f"{path}: missing; {remedy}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); {remedy}") from None
    if sha256(path) != recorded:
        raise BadInput(f"{path}: changed since it was saved (sha256 differs); {remedy}")
    return tensors


def read_weights(folder, dtype=None):
    """{our name: tensor} of a checkpoint or released folder, in `dtype` or as stored."""
    if is_released(folder):
        return dict(read_released(folder, dtype))
    return {name: t if dtype is None else t.to(dtype) for name, t in read_tensors(folder, "model").items()}


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
    """Hold a run folder for this process; BadInput where another one has it. The system frees it however we end."""
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
            raise BadInput(f"{out_dir}: can't be locked ({error.strerror}); give an --out_dir on a file system that has locks") from None
        raise BadInput(f"{out_dir}: in use by another process; wait for it, or give another --out_dir") from None
    return handle


# ---- the rest of a run folder

def provenance():
    """Where and by what a file was made: enough to say why two runs differ."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    return {"git": git.stdout.strip() if git else "", "code": code_hash(), "torch": torch.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}


def code_hash():
    """sha256 over the project's own modules, so that an edited rule is not mistaken for the run that was made before."""
    files = sorted(ROOT.glob("*.py"))
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes().replace(b"\r\n", b"\n") for p in files)).hexdigest()[:16]


def clear(out_dir):
    """Remove a run's own files, and nothing else, from its folder."""
    for path in [*Path(out_dir).glob("step-*"), *Path(out_dir).glob(".step-*.tmp")]:
        shutil.rmtree(path)
    for name in ("metrics.jsonl", "config.json", "loss.png", "nonfinite.json"):
        (Path(out_dir) / name).unlink(missing_ok=True)


def rewind_metrics(out_dir, step):
    """Drop the lines of metrics.jsonl that a killed run wrote after the checkpoint it resumes from."""
    path = Path(out_dir) / "metrics.jsonl"
    kept = [line for line in metrics_lines(out_dir) if line["step"] <= step]
    path.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def metrics_lines(out_dir):
    """Lines of metrics.jsonl as dicts; the last one may be the half line in which a run was killed, and is left out then."""
    path = Path(out_dir) / "metrics.jsonl"
    raw = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = []
    for number, line in enumerate(raw, 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            if number < len(raw):
                raise BadInput(f"{path}:{number}: not JSON; mend or delete the line") from None
    return lines


def read_metrics(out_dir):
    """metrics.jsonl of a run as (training lines, evaluation lines)."""
    lines = metrics_lines(out_dir)
    return [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
