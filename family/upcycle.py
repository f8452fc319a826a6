"""Sparse upcycling: turn a dense model into one with experts (paper section 7.3).

    python -m family.upcycle --ckpt=out/laptop --out=out/laptop-moe-start
    python train.py config/laptop_moe.py                    trains it from there

Every expert of a layer starts as a copy of the layer's dense feed-forward. The weights of a token's
experts sum to 1, so the new model computes what the dense one did, whichever experts are chosen.
The router is drawn at random, and the experts diverge as they are trained on different tokens.

The paper upcycles a checkpoint of the stable stage, so the latest such checkpoint of a run folder
is taken; a checkpoint that is given directly is used unchanged, and so is a released folder. Only
one block at a time is in memory.
"""
import itertools
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from configurator import BadInput, configure, exits_cleanly
from data.tokenizer import has_tokenizer, load_tokenizer
from engine import checkpoint
from engine.run import latest_stable, why_not_stable
from model import MiniCPM, MiniCPMConfig, mup_table, seeded_normal


def upcycled(tensors, config, seed):
    """Yield the (name, tensor) pairs of the model with experts.

    tensors  (name, tensor) pairs of the dense model
    config   MiniCPMConfig of the model with experts
    seed     of the routers
    """
    for name, tensor in tensors:
        block, mlp, matrix = name.removesuffix(".weight").partition(".mlp.")
        if not mlp:                                     # outside the feed-forward
            yield name, tensor
            continue
        # Every expert is a copy of the dense matrix: w_in (2F, C) or w_out (C, F).
        copies = tensor.expand(config.num_experts, -1, -1).contiguous()
        yield f"{block}.mlp.experts.{matrix}", copies
        if matrix == "w_in":
            router = f"{block}.mlp.router.weight"
            std = mup_table(config)["router"].std
            weight = seeded_normal(seed, router, (config.num_experts, config.n_embd)) * std
            yield router, weight.to(tensor.dtype)


@dataclass
class UpcycleConfig:
    ckpt: str = "out/laptop"            # dense model: run folder, checkpoint, or released folder
    out: str = "out/laptop-moe-start"   # run folder to write the result to, as its step 0
    num_experts: int = 8                # experts per layer
    num_experts_per_tok: int = 2        # experts that each token goes through; not 1 (see MoE)
    seed: int = 1337                    # of the routers
    overwrite: bool = False             # replace what an earlier upcycling wrote to --out


def choose_source(ckpt):
    """Return the checkpoint to upcycle. Raises BadInput if a run folder has only decayed ones."""
    source = latest_stable(ckpt)
    reason = why_not_stable(checkpoint.read_meta(source))
    if reason and source != Path(ckpt):
        raise BadInput(f"{ckpt}: has no stable checkpoint, the last one is {reason}; upcycling "
                       f"takes a stable one, or the one you name: --ckpt={source}")
    return source


def expert_config(options, dense, source):
    """Return the MiniCPMConfig of the model with experts. Raises BadInput if it is impossible."""
    if dense.num_experts:
        raise BadInput(f"--ckpt={options.ckpt}: {source} has {dense.num_experts} experts already; "
                       "upcycling takes a dense model")
    if options.num_experts < 1:
        raise BadInput(f"--num_experts={options.num_experts}: must be above 0")
    config = replace(dense, num_experts=options.num_experts,
                     num_experts_per_tok=options.num_experts_per_tok)
    if config.problems():
        raise BadInput(*config.problems())
    if config.num_experts > config.num_experts_per_tok == 1:
        raise BadInput("--num_experts_per_tok=1: a single expert is weighted by its probability, "
                       "so the model would not compute what the dense one does; take 2 or more")
    return config


def check_out(out, overwrite):
    """Raise BadInput if the folder `out` must not be written to."""
    if (out / "config.json").exists():
        raise BadInput(f"--out={out}: holds a run or a model; give another folder")
    if out.exists() and not (overwrite and out.is_dir()):
        raise BadInput(f"--out={out}: exists already; --overwrite=True replaces what an earlier "
                       "upcycling wrote, or give another folder")


def write_blocks(folder, tensors):
    """Write (name, tensor) pairs into a checkpoint's folder, one file per block, and index.json.

    Returns the index: {name: {"shape", "pieces"}}. The tensors of a block must follow each other.
    """
    index = {}
    blocks = itertools.groupby(tensors, lambda pair: pair[0].split(".")[:2])
    for number, (_, pairs) in enumerate(blocks, 1):
        file, block = f"model-{number:05d}.safetensors", dict(pairs)
        save_file(block, folder / file)
        for name, tensor in block.items():
            index[name] = {"shape": list(tensor.shape), "pieces": [[file, [0] * tensor.dim()]]}
        del tensor, block, pairs                        # free memory before the next one
    checkpoint.write_json(folder / "index.json", {"model": index})
    return index


def upcycle(options):
    """Write the upcycled model to options.out, all of it or nothing.

    Returns (folder of the dense checkpoint, MiniCPMConfig of the result).
    """
    out, source = Path(options.out), choose_source(options.ckpt)
    meta = checkpoint.read_meta(source)
    config = expert_config(options, checkpoint.model_config_of(MiniCPMConfig, meta, source), source)
    check_out(out, options.overwrite)
    tokenizer = load_tokenizer(str(source)) if has_tokenizer(source) else None

    def write_files(folder):
        tensors = upcycled(checkpoint.read_weights(source), config, options.seed)
        written = write_blocks(folder, tensors)
        with torch.device("meta"):
            missing = MiniCPM(config).state_dict().keys() - written.keys()
        if missing:
            raise BadInput(*[f"{source}: the tensor that becomes {name} is missing"
                             for name in sorted(missing)])
        if tokenizer:
            tokenizer.save(folder)

    record = {"model": asdict(config), "provenance": checkpoint.provenance(), "keep": True,
              "tokenizer_hash": tokenizer.hash if tokenizer else None,
              "upcycled": {"from": str(source), "step": meta["step"], "seed": options.seed}}
    try:
        checkpoint.save_checkpoint(out, 0, {}, record, write_files)
    finally:
        if out.is_dir() and not any(out.iterdir()):     # nothing was written
            os.rmdir(out)
    return source, config


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, UpcycleConfig, usage=__doc__)
    source, config = upcycle(options)
    print(f"wrote {options.out} from {source}: {config.num_experts} experts, "
          f"{config.num_experts_per_tok} per token; {config.n_params_non_embedding:,} parameters "
          f"without the embedding, {config.n_params_active:,} of these active")


if __name__ == "__main__":
    main()
