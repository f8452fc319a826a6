"""Turn a dense model into one with experts that computes the same: sparse upcycling (paper section 7.3).

    python -m family.upcycle --ckpt=out/laptop --out=out/laptop-moe-start
    python train.py config/laptop_moe.py                                 trains it from there

Every expert of a layer starts as a copy of the layer's feed-forward. The weights of a token's experts sum to 1, so whichever it
is sent to, it gets what the dense model gave. The router is drawn at random, and the experts part ways as they are trained on
different tokens.

The paper upcycles a checkpoint of the stable stage: of a run folder the latest such is taken. A released folder, or a checkpoint
that is named itself, is taken as it is. One block is in memory at a time.
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
from engine.run import in_decay, latest_stable
from model import MiniCPM, MiniCPMConfig, mup_table, seeded_normal


@dataclass
class UpcycleConfig:
    ckpt: str = "out/laptop"            # the dense model: run folder, checkpoint, or released folder
    out: str = "out/laptop-moe-start"   # run folder to write, as its step 0
    num_experts: int = 8                # of every layer
    num_experts_per_tok: int = 2        # experts that a token goes through
    seed: int = 1337                    # of the routers
    overwrite: bool = False             # replace what an earlier upcycling wrote to --out


def upcycled(tensors, config, seed):
    """(name, tensor) pairs of a dense model -> those of the model of `config`, which has experts, one at a time."""
    std = mup_table(config)["router"].std
    for name, tensor in tensors:
        layer, mlp, rest = name.partition(".mlp.")
        if not mlp:
            yield name, tensor
            continue
        part = rest.removesuffix(".weight")                              # w_in (2F, C) or w_out (C, F)
        yield f"{layer}.mlp.experts.{part}", tensor.expand(config.num_experts, -1, -1).contiguous()
        if part == "w_in":
            router = f"{layer}.mlp.router.weight"
            yield router, (seeded_normal(seed, router, (config.num_experts, config.n_embd)) * std).to(tensor.dtype)


def write_blocks(folder, tensors):
    """Write (name, tensor) pairs into a checkpoint's folder, a file a block (where its tensors come together), and index.json."""
    index = {}
    for number, (_, block) in enumerate(itertools.groupby(tensors, lambda pair: pair[0].split(".")[:2]), 1):
        file, held = f"model-{number:05d}.safetensors", dict(block)
        save_file(held, folder / file)
        index |= {name: {"shape": list(tensor.shape), "pieces": [[file, [0] * tensor.dim()]]} for name, tensor in held.items()}
        del held, block                                                  # before the next one is made
    checkpoint.write_json(folder / "index.json", {"model": index})
    return index


def upcycle(options):
    """Write the upcycled model to options.out, all of it or nothing. Returns (source, MiniCPMConfig)."""
    out = Path(options.out)
    source = latest_stable(options.ckpt)
    meta = checkpoint.read_meta(source)
    if in_decay(meta) and source != Path(options.ckpt):
        raise BadInput(f"{options.ckpt}: all checkpoints are of the decay; upcycling takes one of the stable stage, or name one itself: "
                       f"--ckpt={source}")
    dense = checkpoint.model_config_of(MiniCPMConfig, meta, source)
    if dense.num_experts:
        raise BadInput(f"--ckpt={options.ckpt}: {source} has {dense.num_experts} experts already; upcycling takes a dense model")
    if options.num_experts < 1:
        raise BadInput(f"--num_experts={options.num_experts}: must be above 0")
    config = replace(dense, num_experts=options.num_experts, num_experts_per_tok=options.num_experts_per_tok)
    if config.problems():
        raise BadInput(*config.problems())
    if (out / "config.json").exists():
        raise BadInput(f"--out={out}: holds a run or a model; give another one")
    if out.exists() and not (options.overwrite and out.is_dir()):
        raise BadInput(f"--out={out}: is there already; --overwrite=True replaces what an earlier upcycling wrote, or give another one")
    tokenizer = load_tokenizer(str(source)) if has_tokenizer(source) else None

    def write(folder):
        written = write_blocks(folder, upcycled(checkpoint.read_weights(source), config, options.seed))
        with torch.device("meta"):
            missing = MiniCPM(config).state_dict().keys() - written.keys()
        if missing:
            raise BadInput(*[f"{source}: what becomes {name} is missing" for name in sorted(missing)])
        if tokenizer:
            tokenizer.save(folder)
    try:
        checkpoint.save(out, 0, {}, {"model": asdict(config), "provenance": checkpoint.provenance(), "keep": True,
                                     "tokenizer_hash": tokenizer.hash if tokenizer else None,
                                     "upcycled": {"from": str(source), "step": meta["step"], "seed": options.seed}}, write)
    finally:
        if out.is_dir() and not any(out.iterdir()):                      # it failed
            os.rmdir(out)
    return source, config


@exits_cleanly
def main(argv):
    (options,), _ = configure(argv, UpcycleConfig, usage=__doc__)
    source, config = upcycle(options)
    print(f"wrote {options.out} from {source}: {config.num_experts} experts, {config.num_experts_per_tok} a token; "
          f"{config.n_params_non_embedding:,} parameters without the embedding, {config.n_params_active:,} of these active")


if __name__ == "__main__":
    main()
