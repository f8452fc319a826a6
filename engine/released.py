"""Folders of released models (Hugging Face: config.json and weights) in our terms.

read_released_config turns config.json into values of MiniCPMConfig, released_names says which released tensors make up one
of ours, and read_released reads them. checkpoint.py calls these, so every script that takes a checkpoint takes a released
folder; convert.py uses the same names to write one.
"""
import itertools
import json
import math
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from configurator import BadInput

BLOCK = 2 ** 24         # elements of a tensor copied at a time
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


def is_released(folder):
    """Whether a folder is a released model rather than a checkpoint of ours (whose run folder has another config.json)."""
    path = Path(folder) / "config.json"
    if (path.parent / "meta.json").is_file() or not path.is_file():
        return False
    config = read_json(path)
    return isinstance(config, dict) and "train" not in config


def read_released_config(folder):
    """config.json of a released folder as (form, values of MiniCPMConfig); form is minicpm, granite or llama.

    What model.py does not compute is refused by name: other architectures and activations, biases, quantised weights,
    other RoPE forms.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    name = (raw.get("architectures") or ["(none named)"])[0]
    if name not in ARCHITECTURES:
        raise BadInput(f"{path}: architecture {name}: " + REFUSED.get(name, f"not one of {', '.join(ARCHITECTURES)}"))
    form = ARCHITECTURES[name]
    config = {**DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
    wrong = [f"{path}: {key}={config[key]!r}: not a number above 0" for key, usual in DEFAULTS.items()
             if isinstance(usual, (int, float)) and key != "num_experts" and not (type(config[key]) in (int, float) and config[key] > 0)]
    if wrong:
        raise BadInput(*wrong)
    width, n_layer, n_head = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    values = {
        "vocab_size": config["vocab_size"], "n_layer": n_layer, "n_head": n_head, "n_kv_head": config.get("num_key_value_heads", n_head),
        "n_embd": width, "head_dim": config.get("head_dim", width // n_head), "n_ff": config["intermediate_size"],
        "tie_word_embeddings": config.get("tie_word_embeddings", form == "minicpm"), "rms_norm_eps": config["rms_norm_eps"],
        "max_position": config["max_position_embeddings"],
    }
    experts = config.get("num_local_experts", 8) if name == "GraniteMoeForCausalLM" else config["num_experts"]
    if experts:
        values |= {"num_experts": experts, "num_experts_per_tok": config.get("num_experts_per_tok", 2)}
    rope, problems = rope_values(config, form, path)
    if "quantization_config" in config:
        problems.append(f"{path}: weights are quantised ({config['quantization_config'].get('quant_method', 'unknown')}); "
                        "take the folder with the full ones")
    if config["hidden_act"] != "silu":
        problems.append(f"{path}: hidden_act={config['hidden_act']!r}: only silu is computed here")
    problems += [f"{path}: {bias}=true: no layer here has a bias" for bias in ("attention_bias", "mlp_bias") if config.get(bias)]
    if form == "granite" and not math.isclose(config["attention_multiplier"], values["head_dim"] ** -0.5, rel_tol=1e-6):
        problems.append(f"{path}: attention_multiplier={config['attention_multiplier']}: only 1 / sqrt(head_dim) is computed here")
    scales = scale_values(config, form)
    if form == "granite" and not math.isclose(width / scales["dim_model_base"], config["logits_scaling"], rel_tol=1e-6):
        problems.append(f"{path}: logits_scaling={config['logits_scaling']}: hidden_size / logits_scaling is not a whole number")
    if problems:
        raise BadInput(*problems)
    return form, {**values, **rope, **scales}


def scale_values(config, form):
    """The scalings of a config.json in MiniCPM's terms; mup=False where all of them are 1."""
    width, root = config["hidden_size"], math.sqrt(config["num_hidden_layers"])
    if form == "llama":
        return {"mup": False}
    if form == "granite":
        depth = config["residual_multiplier"] * root                     # was written as scale_depth / root: undo it to the last bit
        depth = next((x for x in (round(depth, 12), depth) if x / root == config["residual_multiplier"]), depth)
        scales = config["embedding_multiplier"], depth, max(1, round(width / config["logits_scaling"]))
    else:
        scales = config["scale_emb"], config["scale_depth"], config["dim_model_base"]
    if scales == (1, root, width):
        return {"mup": False, "dim_model_base": width}
    return {"scale_emb": float(scales[0]), "scale_depth": float(scales[1]), "dim_model_base": scales[2]}


def rope_values(config, form, path):
    """(RoPE's values of MiniCPMConfig, problems) of a config.json."""
    rope = {**config.get("rope_scaling", {}), **config.get("rope_parameters", {})}         # the older and the newer place
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = {"rope_theta": float(rope.get("rope_theta", config["rope_theta"])), "rope_scaling": "none" if kind == "default" else kind}
    if kind in ("linear", "dynamic"):
        return {**values, "rope_factor": float(rope.get("factor", 1.0))}, []
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        values |= {"rope_short_factor": rope.get("short_factor", []), "rope_long_factor": rope.get("long_factor", []),
                   "original_max_position": original}
        extended = config["max_position_embeddings"] > (original or config["max_position_embeddings"])
        if form != "minicpm" and extended and values["rope_short_factor"] != values["rope_long_factor"]:
            return values, [f"{path}: longrope with short factors for short inputs: MiniCPM, and so this model, takes one list for all"]
    elif kind != "default":
        return values, [f"{path}: RoPE scaling {kind!r}: only linear, dynamic and longrope are computed here"]
    return values, []


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


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: damaged ({error})") from None
