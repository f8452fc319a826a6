"""Checkpoints: tensors in safetensors, everything readable in JSON, and nothing that could run code. Knows no model.

    out_dir/step-00001000/      meta.json, model.safetensors, optimizer.safetensors, the tokenizer's files

A checkpoint is written into a folder beside its place and renamed when complete, so whatever stops a run leaves the last
good one. Its meta.json names every file with its sha256.

Folders of released models (Hugging Face: config.json and weights) are read as checkpoints too: resolve, read_meta and
read_weights take either, and `released_names` says which of their tensors make up one of ours.
"""
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configurator import ROOT, BadInput

STEP = re.compile(r"step-(\d{8,})")
BLOCK = 2 ** 24                     # elements of a released tensor copied at a time


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


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: damaged ({error})") from None


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


def is_released(folder):
    """Whether a folder is a released model rather than a checkpoint of ours (whose run folder has another config.json)."""
    path = Path(folder) / "config.json"
    if (path.parent / "meta.json").is_file() or not path.is_file():
        return False
    config = read_json(path)
    return isinstance(config, dict) and "asked" not in config


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


# ---- folders of released models

ARCHITECTURES = {"MiniCPMForCausalLM": "minicpm", "GraniteForCausalLM": "granite", "GraniteMoeForCausalLM": "granite",
                 "LlamaForCausalLM": "llama"}
REFUSED = {"MiniCPM3ForCausalLM": "it uses multi-head latent attention (MLA), which is another model",
           "MiniCPMVForConditionalGeneration": "it is a vision model"}
# What the released model code takes where config.json does not say.
DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
    "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1, "num_experts": 0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 1.0,
}


def read_released_config(folder):
    """config.json of a released folder as (form, values of MiniCPMConfig); form is minicpm, granite or llama.

    Whatever this project's model does not compute is refused by name: other architectures and activations, biases,
    quantised weights, other RoPE forms.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    name = (raw.get("architectures") or ["(none named)"])[0]
    if name not in ARCHITECTURES:
        raise BadInput(f"{path}: architecture {name}: " + REFUSED.get(name, f"not one of {', '.join(ARCHITECTURES)}"))
    form = ARCHITECTURES[name]
    config = {**DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
    rope = {**config.get("rope_scaling", {}), **config.get("rope_parameters", {})}         # the older and the newer place
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "none" if kind == "default" else kind
    problems = []
    if "quantization_config" in config:
        problems.append(f"{path}: weights are quantised ({config['quantization_config'].get('quant_method', 'unknown')}); "
                        "take the folder with the full ones")
    if config["hidden_act"] != "silu":
        problems.append(f"{path}: hidden_act={config['hidden_act']!r}: only silu is computed here")
    problems += [f"{path}: {bias}=true: no layer here has a bias" for bias in ("attention_bias", "mlp_bias") if config.get(bias)]
    if kind not in ("none", "linear", "dynamic", "longrope"):
        problems.append(f"{path}: RoPE scaling {kind!r}: only linear, dynamic and longrope are computed here")
    if kind == "longrope" and form != "minicpm" and rope.get("short_factor") != rope.get("long_factor"):
        problems.append(f"{path}: longrope with short factors of their own: only MiniCPM's rule (one list for all lengths) is "
                        "computed here")
    values = {
        "vocab_size": config["vocab_size"], "n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"],
        "n_kv_head": config.get("num_key_value_heads", config["num_attention_heads"]), "n_embd": config["hidden_size"],
        "head_dim": config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        "n_ff": config["intermediate_size"], "tie_word_embeddings": config.get("tie_word_embeddings", form == "minicpm"),
        "rms_norm_eps": config["rms_norm_eps"], "max_position": config["max_position_embeddings"],
        "rope_theta": float(rope.get("rope_theta", config["rope_theta"])), "rope_scaling": kind,
    }
    if kind in ("linear", "dynamic"):
        values["rope_factor"] = float(rope.get("factor", 1.0))
    if kind == "longrope":
        values |= {"rope_short_factor": rope.get("short_factor", []), "rope_long_factor": rope.get("long_factor", []),
                   "original_max_position": rope.get("original_max_position_embeddings",
                                                     config.get("original_max_position_embeddings"))}
    width, depth = values["n_embd"], math.sqrt(values["n_layer"])
    if form == "minicpm":
        scales = config["scale_emb"], config["scale_depth"], config["dim_model_base"]
    elif form == "granite":
        scale = config["residual_multiplier"] * depth                    # written as scale_depth / depth: undo it to the last bit
        scales = config["embedding_multiplier"], next((x for x in (round(scale, 12), scale) if x / depth == config["residual_multiplier"]),
                                                      scale), round(width / config["logits_scaling"])
        if not math.isclose(config["attention_multiplier"], values["head_dim"] ** -0.5, rel_tol=1e-6):
            problems.append(f"{path}: attention_multiplier={config['attention_multiplier']}: only 1 / sqrt(head_dim) is computed here")
        if not math.isclose(width / scales[2], config["logits_scaling"], rel_tol=1e-6):
            problems.append(f"{path}: logits_scaling={config['logits_scaling']}: hidden_size / logits_scaling is not a whole number")
    else:
        scales = 1, depth, width
    if scales == (1, depth, width):                                      # no scaling at all
        values["mup"] = False
    else:
        values |= dict(zip(("scale_emb", "scale_depth", "dim_model_base"), (float(scales[0]), float(scales[1]), scales[2])))
    experts = config.get("num_local_experts", 8) if name == "GraniteMoeForCausalLM" else config["num_experts"]
    if experts:
        values |= {"num_experts": experts, "num_experts_per_tok": config.get("num_experts_per_tok", 2)}
    if problems:
        raise BadInput(*problems)
    return form, values


def released_names(form, model):
    """{our name: {released name: shape}}: which tensors of a released folder, one below the other, make up one of ours.

    form: minicpm, granite or llama (they differ for experts only). model: values of MiniCPMConfig, none of them unset.
    """
    V, C, F, E = model["vocab_size"], model["n_embd"], model["n_ff"], model.get("num_experts", 0)
    Q, K = model["n_head"] * model["head_dim"], model["n_kv_head"] * model["head_dim"]
    names = {"wte.weight": {"model.embed_tokens.weight": (V, C)}, "norm.weight": {"model.norm.weight": (C,)}}
    if not model["tie_word_embeddings"]:
        names["lm_head.weight"] = {"lm_head.weight": (V, C)}
    for i in range(model["n_layer"]):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        names[ours + "attn_norm.weight"] = {theirs + "input_layernorm.weight": (C,)}
        names[ours + "attn.wqkv.weight"] = {theirs + f"self_attn.{x}_proj.weight": (rows, C) for x, rows in (("q", Q), ("k", K), ("v", K))}
        names[ours + "attn.wo.weight"] = {theirs + "self_attn.o_proj.weight": (C, Q)}
        names[ours + "mlp_norm.weight"] = {theirs + "post_attention_layernorm.weight": (C,)}
        if not E:
            names[ours + "mlp.w_in.weight"] = {theirs + f"mlp.{x}_proj.weight": (F, C) for x in ("gate", "up")}
            names[ours + "mlp.w_out.weight"] = {theirs + "mlp.down_proj.weight": (C, F)}
        elif form == "granite":                                          # stacked there as here
            names[ours + "mlp.router.weight"] = {theirs + "block_sparse_moe.router.layer.weight": (E, C)}
            names[ours + "mlp.experts.w_in"] = {theirs + "block_sparse_moe.input_linear.weight": (E, 2 * F, C)}
            names[ours + "mlp.experts.w_out"] = {theirs + "block_sparse_moe.output_linear.weight": (E, C, F)}
        else:                                                            # w1 gate, w3 up, w2 down
            names[ours + "mlp.router.weight"] = {theirs + "mlp.gate.weight": (E, C)}
            names[ours + "mlp.experts.w_in"] = {theirs + f"mlp.experts.{e}.{x}.weight": (F, C) for e in range(E) for x in ("w1", "w3")}
            names[ours + "mlp.experts.w_out"] = {theirs + f"mlp.experts.{e}.w2.weight": (C, F) for e in range(E)}
    return names


def read_released(folder, dtype=None):
    """Yield (our name, tensor), each assembled from its released tensors some rows at a time.

    Beyond what it has yielded it keeps one block of rows in memory. dtype: as stored where unset. Before any weight is
    read, every missing, unexpected or misshapen tensor and every missing file is listed in one BadInput.
    """
    form, model = read_released_config(folder)
    names, found = released_names(form, model), released_tensors(Path(folder))
    expected = {theirs: shape for pieces in names.values() for theirs, shape in pieces.items()}
    tied_copy = model["tie_word_embeddings"] and "lm_head.weight" in found                 # some tools write it as well
    if tied_copy:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    problems = [f"{folder}: tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{folder}: tensor {name} is not part of the model of config.json" for name in sorted(found.keys() - expected.keys())
                 if not name.endswith("rotary_emb.inv_freq")]            # a table that old versions stored
    problems += [f"{folder}: tensor {name} is {found[name][1]}, config.json needs {expected[name]}"
                 for name in sorted(expected.keys() & found.keys()) if found[name][1] != expected[name]]
    if problems:
        raise BadInput(*problems)

    def rows(name):
        return blocks_of_rows(*found[name], name)

    if tied_copy and not all(map(torch.equal, rows("lm_head.weight"), rows("model.embed_tokens.weight"))):
        raise BadInput(f'{folder}: lm_head.weight is not the embedding, though config.json ties them; set "tie_word_embeddings" to false')
    for ours, pieces in names.items():
        tensor, filled = None, 0
        for block in itertools.chain.from_iterable(map(rows, pieces)):
            if tensor is None:
                tensor = torch.empty(sum(shape[0] for shape in pieces.values()), *block.shape[1:], dtype=dtype or block.dtype)
            tensor[filled:filled + len(block)] = block
            filled += len(block)
        stacked = ".experts." in ours and tensor.dim() == 2              # from one tensor per expert
        yield ours, tensor.view(model["num_experts"], -1, tensor.shape[1]) if stacked else tensor


def released_tensors(folder):
    """{released name: (path of its file, shape)}; BadInput where a file is missing or damaged."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            named = {name: folder / Path(file).name for name, file in read_json(index)["weight_map"].items()}
            lost = sorted(path for path in set(named.values()) if not path.is_file())
            if lost:
                raise BadInput(*[f"{path}: missing, though {index.name} names it" for path in lost])
            return {name: (path, shape) for path in set(named.values()) for name, shape in stored_shapes(path).items()
                    if named.get(name) == path}
        if (folder / single).is_file():
            return {name: (folder / single, shape) for name, shape in stored_shapes(folder / single).items()}
    raise BadInput(f"{folder}: has a config.json but no weights (model.safetensors, pytorch_model.bin, or an index of shards)")


def stored_shapes(path):
    """{name: shape} of a weight file; BadInput where it is damaged."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return {name: tuple(tensor.shape) for name, tensor in load_bin(path).items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise BadInput(f"{path}: not a whole file of tensors ({str(error).splitlines()[0]})") from None


def load_bin(path):
    """The tensors of a torch .bin file, mapped rather than read; weights_only: a pickle of anything else is refused unrun."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def blocks_of_rows(path, shape, name):
    """Yield a stored tensor some rows at a time, opening the file for each block, so that little of it stays mapped."""
    step = max(1, BLOCK * shape[0] // max(1, math.prod(shape)))
    for first in range(0, shape[0], step):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield file.get_slice(name)[first:first + step]
        else:
            yield load_bin(path)[name][first:first + step]
