"""Lab: four ways to read further than a model was trained for (paper section 7.2), at laptop scale.

    python train.py && python train.py config/laptop_long_256.py     (and the corpora that this config and the next one name)
    python -m labs.long [--figure=assets/long.png] [--results=assets/long.jsonl]

A model trained at 256 tokens meets 1,024: with its RoPE as it is, with a larger base (ABF), and with that and NTK-aware scaling in
the proportions of the released 128K model; each without training and after the training of config/laptop_long_1024.py, which
differs in nothing else. Keys found (depths from start to end) and nats per token by position over held-out speeches.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import evaluate
import passkey
import tokenizer as tokenizers
import train
from configurator import ROOT, configure, exits_cleanly
from dataset import open_corpus
from model import MiniCPM

LENGTH = 1024                               # of config/laptop_long_1024.py
ABF = {"rope_theta": 100_000.0, "max_position": LENGTH}
VARIANTS = {"no change": {"rope_theta": 10_000.0}, "base": ABF,
            "base + NTK": {**ABF, "rope_scaling": "dynamic", "rope_factor": 4.0, "max_position": LENGTH // 2}}


@dataclass
class LongConfig:
    ckpt: str = "out/laptop-long-256"   # the model trained at 256 tokens
    out_dir: str = "out/labs-long"      # the runs; a finished one is not run again
    data_dir: str = "data"              # where the corpora are; relative to the project
    lengths: tuple[int, ...] = (256, 512, LENGTH, 2 * LENGTH)
    questions: int = 20                 # for each length and depth
    eval_tokens: int = 65536            # held-out tokens of the loss by position
    results: str = str(ROOT / "assets" / "long.jsonl")      # a line for each variant, with and without training
    figure: str = str(ROOT / "assets" / "long.png")


def measure(ckpt, rope, config):
    """{"passkey": {length: [share at each depth]}, "positions": [(first, last, nats)]} of a checkpoint whose RoPE is changed."""
    model = MiniCPM.from_pretrained(ckpt).eval()
    options = evaluate.EvaluateConfig(**rope)
    evaluate.change_rope(model, options)
    tokenizer = tokenizers.of_model(checkpoint.resolve(ckpt), None, model.config.vocab_size)
    filler = passkey.open_filler(config.data_dir, "speeches", tokenizer, "val")
    table = passkey.retrieval(model, tokenizer, filler, config.lengths, options.depths, config.questions, options.seed, 4 * LENGTH)
    corpus = open_corpus(config.data_dir, "speeches", tokenizer, "val")
    return {"passkey": table, "positions": passkey.loss_by_position(model, corpus, tokenizer, LENGTH, config.eval_tokens)}


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for line in results:
        style = {"color": f"C{list(VARIANTS).index(line['variant'])}", "linestyle": "-" if line["trained"] else "--", "marker": "o",
                 "label": line["variant"] + (", trained" if line["trained"] else "")}
        left.plot([int(length) for length in line["passkey"]], [100 * sum(s) / len(s) for s in line["passkey"].values()], **style)
        right.plot([last for _, last, _ in line["positions"]], [nats for _, _, nats in line["positions"]], **style)
    left.set(xlabel="tokens", ylabel="keys found (%)", xscale="log", title="passkey, mean over depths")
    right.set(xlabel="position (up to)", ylabel="nats per token", xscale="log", title="held-out speeches")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.axvline(256, color="0.7", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, LongConfig, usage=__doc__)
    results = []
    for trained in (False, True):
        for variant, rope in VARIANTS.items():
            ckpt = config.ckpt
            if trained:
                ckpt = str(Path(config.out_dir) / variant.replace(" + ", "-").replace(" ", "-"))
                train.main(["config/laptop_long_1024.py", f"--init_from={config.ckpt}", f"--out_dir={ckpt}", "--sample_tokens=0",
                            f"--data_dir={config.data_dir}", *[f"--{name}={value}" for name, value in rope.items()]])
            results.append({"variant": variant, "trained": trained, **measure(ckpt, rope, config)})
            means = {length: round(sum(s) / len(s), 3) for length, s in results[-1]["passkey"].items()}
            print(f"{variant}{', trained' if trained else ''}: keys found {means}, nats by position "
                  + " ".join(f"{nats:.3f}" for _, _, nats in results[-1]["positions"]), flush=True)
    Path(config.results).write_text("".join(json.dumps(line) + "\n" for line in results), encoding="utf-8")
    draw(results, config.figure)


if __name__ == "__main__":
    main()
