"""Read the folder of a released model (Hugging Face: config.json and weights) as a MiniCPM.

The tables of names below are the centre: CONFIG_NAMES for the fields of config.json, the others for
tensors. `read_released_config` turns config.json into values of MiniCPMConfig, `released_names`
fills the tensor tables in for one model, and `open_released` yields its tensors under our names.
checkpoint.py calls these, so every script that takes a checkpoint also takes a released folder;
tools/convert.py writes such folders from the same tables.
"""
import json
import math
from pathlib import Path

from configurator import BadInput, refuse_lfs_pointer
from engine.stored import StoredTensor, same_content, stored_tensors

FORMS = {"MiniCPMForCausalLM": "minicpm", "GraniteForCausalLM": "granite",
         "GraniteMoeForCausalLM": "granite", "LlamaForCausalLM": "llama"}
REFUSED = {"MiniCPM3ForCausalLM": "it uses multi-head latent attention (MLA), a different model",
           "MiniCPMVForConditionalGeneration": "it is a vision model"}
# What the released model code assumes for fields that config.json leaves out.
DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_theta": 10000.0,
    "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1, "num_experts": 0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
}
CONFIG_NAMES = {        # our field: the released one
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_ff": "intermediate_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps",
    "max_position": "max_position_embeddings", "tie_word_embeddings": "tie_word_embeddings",
}

# {our tensor: {released tensor: its shape}}. Stacked along their rows, in this order, the released
# tensors make up ours. V vocab_size, C n_embd, F n_ff, E num_experts, H n_head * head_dim,
# K n_kv_head * head_dim.
MODEL_NAMES = {
    "wte.weight": {"model.embed_tokens.weight": "V C"},
    "norm.weight": {"model.norm.weight": "C"},
    "lm_head.weight": {"lm_head.weight": "V C"},
}
BLOCK_NAMES = {         # after blocks.N. and model.layers.N.
    "attn_norm.weight": {"input_layernorm.weight": "C"},
    "attn.wqkv.weight": {"self_attn.q_proj.weight": "H C", "self_attn.k_proj.weight": "K C",
                         "self_attn.v_proj.weight": "K C"},
    "attn.wo.weight": {"self_attn.o_proj.weight": "C H"},
    "mlp_norm.weight": {"post_attention_layernorm.weight": "C"},
}
DENSE_NAMES = {
    "mlp.w_in.weight": {"mlp.gate_proj.weight": "F C", "mlp.up_proj.weight": "F C"},
    "mlp.w_out.weight": {"mlp.down_proj.weight": "C F"},
}
EXPERT_NAMES = {        # once for each expert {e}: w1 is the gate, w3 up, w2 down
    "mlp.router.weight": {"mlp.gate.weight": "E C"},
    "mlp.experts.w_in": {"mlp.experts.{e}.w1.weight": "F C", "mlp.experts.{e}.w3.weight": "F C"},
    "mlp.experts.w_out": {"mlp.experts.{e}.w2.weight": "C F"},
}
GRANITE_EXPERT_NAMES = {
    "mlp.router.weight": {"block_sparse_moe.router.layer.weight": "E C"},
    "mlp.experts.w_in": {"block_sparse_moe.input_linear.weight": "E 2F C"},
    "mlp.experts.w_out": {"block_sparse_moe.output_linear.weight": "E C F"},
}


def released_names(form, model):
    """Return {our name: {released name: shape}} for the tensors of one model.

    form   minicpm, granite or llama; they differ in the names of experts only
    model  dict of MiniCPMConfig's values, none of them unset
    """
    n_experts, head_dim = model.get("num_experts", 0), model["head_dim"]
    sizes = {"V": model["vocab_size"], "C": model["n_embd"], "E": n_experts,
             "F": model["n_ff"], "2F": 2 * model["n_ff"],
             "H": model["n_head"] * head_dim, "K": model["n_kv_head"] * head_dim}
    names = {ours: with_shapes(released, sizes) for ours, released in MODEL_NAMES.items()}
    if model["tie_word_embeddings"]:
        del names["lm_head.weight"]
    feed_forward = DENSE_NAMES
    if n_experts:
        feed_forward = GRANITE_EXPERT_NAMES if form == "granite" else EXPERT_NAMES
    for layer in range(model["n_layer"]):
        for ours, released in {**BLOCK_NAMES, **feed_forward}.items():
            names[f"blocks.{layer}.{ours}"] = with_shapes(released, sizes, f"model.layers.{layer}.")
    return names


def with_shapes(released, sizes, prefix=""):
    """Return {prefix + released name: shape} for one entry of the tables of tensors."""
    shapes = {}
    for expert in range(max(1, sizes["E"])):        # names without {e} are merely set again
        for name, letters in released.items():
            shape = tuple(sizes[letter] for letter in letters.split())
            shapes[prefix + name.format(e=expert)] = shape
    return shapes


# ---- config.json

def is_released(folder):
    """Whether a folder holds a released model. (The config.json of a run has an entry "train".)"""
    path = Path(folder) / "config.json"
    if (path.parent / "meta.json").is_file() or not path.is_file():
        return False
    config = read_json(path)
    return isinstance(config, dict) and "train" not in config


def refuse_adapter(folder):
    """Raise BadInput if a folder holds a LoRA adapter and no model."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    if any((Path(folder) / name).is_file() for name in names):
        raise BadInput(f"{folder}: holds a LoRA adapter, not a whole model; merge it into its base "
                       "model (peft: merge_and_unload, then save_pretrained) and name that folder")


def read_released_config(folder):
    """Return (form, dict of MiniCPMConfig's values) from config.json; form is a value of FORMS.

    Raises BadInput with one line for everything that model.py does not compute: other architectures
    and activations, biases, quantised weights, other RoPE scalings.
    """
    path = Path(folder) / "config.json"
    stated = {key: value for key, value in read_json(path).items() if value is not None}
    architecture = (stated.get("architectures") or ["(none named)"])[0]
    if architecture not in FORMS:
        reason = REFUSED.get(architecture, f"not one of {', '.join(FORMS)}")
        raise BadInput(f"{path}: architecture {architecture}: {reason}")
    form, config = FORMS[architecture], {**DEFAULTS, **stated}
    numbers = [key for key in DEFAULTS if key not in ("hidden_act", "num_experts")]
    wrong = [key for key in numbers if type(config[key]) not in (int, float) or config[key] <= 0]
    if wrong:
        raise BadInput(*[f"{path}: {key}={config[key]!r}: not a number above 0" for key in wrong])

    n_head = config["num_attention_heads"]
    config = {"num_key_value_heads": n_head, "head_dim": config["hidden_size"] // n_head,
              "tie_word_embeddings": form == "minicpm", **config}
    values = {ours: config[theirs] for ours, theirs in CONFIG_NAMES.items()}
    n_experts = config["num_experts"]
    if architecture == "GraniteMoeForCausalLM":
        n_experts = config.get("num_local_experts", 8)
    if n_experts:
        values["num_experts"] = n_experts
        values["num_experts_per_tok"] = config.get("num_experts_per_tok", 2)
    values |= {**rope_values(config), **scale_values(config, form)}
    problems = unsupported(config, form, values)
    if problems:
        raise BadInput(*[f"{path}: {problem}" for problem in problems])
    return form, values


def rope_values(config):
    """Return MiniCPMConfig's RoPE fields from the fields of a config.json."""
    # transformers 5 renamed rope_scaling to rope_parameters.
    rope = {**config, **config.get("rope_scaling", {}), **config.get("rope_parameters", {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = {"rope_theta": float(rope["rope_theta"]),
              "rope_scaling": "none" if kind == "default" else kind}
    if kind in ("linear", "dynamic"):
        values["rope_factor"] = float(rope.get("factor", 1.0))
    if kind == "longrope":
        values["rope_short_factor"] = rope.get("short_factor", [])
        values["rope_long_factor"] = rope.get("long_factor", [])
        values["original_max_position"] = rope.get("original_max_position_embeddings")
    return values


def scale_values(config, form):
    """Return MiniCPMConfig's scalings from the fields of a config.json; mup=False if all are 1."""
    if form == "llama":
        return {"mup": False}
    width, root = config["hidden_size"], math.sqrt(config["num_hidden_layers"])
    if form == "granite":
        residual = config["residual_multiplier"]        # scale_depth / root
        depth = round(residual * root, 12)              # 1.4, not 1.3999999999999997 ...
        if depth / root != residual:                    # ... provided that it gives the same bits
            depth = residual * root
        base = max(1, round(width / config["logits_scaling"]))
        scales = config["embedding_multiplier"], depth, base
    else:
        scales = config["scale_emb"], config["scale_depth"], config["dim_model_base"]
    emb, depth, base = scales
    if scales == (1, root, width):
        return {"mup": False, "dim_model_base": width}
    return {"scale_emb": float(emb), "scale_depth": float(depth), "dim_model_base": base}


def unsupported(config, form, values):
    """Return one line for everything in a config.json that model.py does not compute.

    values: the dict of MiniCPMConfig's values read from it
    """
    problems, kind = [], values["rope_scaling"]
    if kind not in ("none", "linear", "dynamic", "longrope"):
        problems.append(f"RoPE scaling {kind!r}: only linear, dynamic and longrope are supported")
    if kind == "longrope" and form != "minicpm":
        original = values["original_max_position"] or math.inf
        differ = values["rope_short_factor"] != values["rope_long_factor"]
        if values["max_position"] > original and differ:
            problems.append("longrope with short factors for short inputs: MiniCPM uses one list "
                            "for all lengths")
    if values.get("num_experts_per_tok") == 1 < values["num_experts"]:
        problems.append("num_experts_per_tok=1: its code gives the only expert of a token the "
                        "weight 1, here that is its probability")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        problems.append(f"weights are quantised ({method}); take the folder with the full weights")
    if config["hidden_act"] != "silu":
        problems.append(f"hidden_act={config['hidden_act']!r}: only silu is supported")
    problems += [f"{bias}=true: biases are not supported" for bias in ("attention_bias", "mlp_bias")
                 if config.get(bias)]
    if form == "granite":
        attention, logits = config["attention_multiplier"], config["logits_scaling"]
        if not math.isclose(attention, values["head_dim"] ** -0.5, rel_tol=1e-6):
            problems.append(f"attention_multiplier={attention}: must be 1 / sqrt(head_dim)")
        if not math.isclose(values["n_embd"] / values["dim_model_base"], logits, rel_tol=1e-6):
            problems.append(f"logits_scaling={logits}: hidden_size divided by it must be a "
                            "whole number")
    return problems


# ---- weights

def open_released(folder):
    """Yield (our name, StoredTensor) for every tensor of a released model.

    Before the first one it raises BadInput that lists every missing, unexpected or misshapen
    tensor.
    """
    form, model = read_released_config(folder)
    names, found = released_names(form, model), released_tensors(Path(folder))
    expected = {name: shape for released in names.values() for name, shape in released.items()}
    tied_head = model["tie_word_embeddings"] and "lm_head.weight" in found      # stored needlessly
    if tied_head:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    check_tensors(folder, expected, found)
    if tied_head and not same_content(found["lm_head.weight"], found["model.embed_tokens.weight"]):
        raise BadInput(f"{folder}: lm_head.weight is not the embedding but config.json ties "
                       'the two; set "tie_word_embeddings" to false')
    for ours, released in names.items():
        parts = [found[name] for name in released]
        one_per_expert = ".experts." in ours and len(parts[0].shape) == 2
        yield ours, stack_rows(parts, model["num_experts"] if one_per_expert else 0)


def check_tensors(folder, expected, found):
    """Raise BadInput unless exactly the expected tensors were found, with the expected shapes.

    expected {name: shape}, found {name: StoredTensor}
    """
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"{folder}: tensor {name} is missing")
        elif name not in expected:
            if not name.endswith("rotary_emb.inv_freq"):    # a table that old versions stored
                problems.append(f"{folder}: tensor {name} is not part of the model of config.json")
        elif found[name].shape != expected[name]:
            problems.append(f"{folder}: tensor {name} is {found[name].shape}, "
                            f"config.json needs {expected[name]}")
    if problems:
        raise BadInput(*problems)


def stack_rows(parts, n_experts):
    """Return the StoredTensor (rows, columns) that has the rows of all parts, in order; with
    n_experts above 0 these are the rows of so many experts: (experts, rows, columns)."""
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1:]
    origin, pieces, first = (0,) * len(columns), [], 0
    for part in parts:
        row = divmod(first, rows // n_experts) if n_experts else (first,)
        pieces.append(part.pieces[0]._replace(offset=(*row, *origin)))
        first += part.shape[0]
    shape = (n_experts, rows // n_experts) if n_experts else (rows,)
    return StoredTensor((*shape, *columns), parts[0].dtype, pieces)


def released_tensors(folder):
    """Return {released name: StoredTensor}.

    Raises BadInput if a file is missing or damaged.
    """
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = Path(f"{whole}.index.json")
        if index.is_file():
            weight_map = read_json(index)["weight_map"]
            paths = {file: folder / Path(file).name for file in sorted(set(weight_map.values()))}
            missing = [path for path in paths.values() if not path.is_file()]
            if missing:
                raise BadInput(*[f"{path}: missing, though {index.name} names it"
                                 for path in missing])
            files = {file: stored_tensors(path) for file, path in paths.items()}
            return {name: files[file][name] for name, file in weight_map.items()
                    if name in files[file]}
        if whole.is_file():
            return stored_tensors(whole)
    raise BadInput(f"{folder}: has a config.json but no weights (model.safetensors, "
                   "pytorch_model.bin, or an index of shards)")


def read_json(path):
    """Return the content of a JSON file. Raises BadInput if it is damaged."""
    refuse_lfs_pointer(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:                             # also text that is not UTF-8
        raise BadInput(f"{path}: damaged ({error})") from None
