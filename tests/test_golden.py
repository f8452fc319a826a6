"""Golden numbers: tests/golden.json holds the results of tiny runs over every path that the labs
use.

A change of initialization, data order, model, loss, optimizer, or generation shows here. The digest
of golden.json is part of
the key of every lab result (labs/runs.py), so rewrite the file only when a change of the numbers is
meant:

    python tests/test_golden.py
"""
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from configurator import ROOT
from data import packing
from data.corpus import write_corpus
from data.dataset import open_corpus
from data.tokenizer import load_tokenizer
from engine import metrics
from family import dpo
from model import MiniCPM
from tools import evaluate

GOLDEN = ROOT / "tests" / "golden.json"
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")
TINY = """
tokenizer = "bytes"
n_layer = 2
n_head = 2
n_kv_head = 1
n_embd = 32
n_ff = 48
dim_model_base = 16
block_size = 16
batch_size = 4
min_lr = 0.001
log_interval = 1
eval_interval = 0
eval_tokens = 200
sample_tokens = 0
dtype = "float32"
device = "cpu"
quiet = True
"""


def conversations(n):
    """[(split, messages)] for packed rows: short questions with short answers."""
    return [("train" if i % 4 else "val",
             [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i * 7}."}])
            for i in range(n)]


def prepare(folder):
    """Write two corpora of running text, one of packed conversations, preference pairs, and the
    config file."""
    tokenizer = load_tokenizer("bytes")
    for name, text in (("one", TEXT * 4), ("two", TEXT[::-1] * 4)):
        write_corpus(folder / name / "bytes", tokenizer, [("train", text), ("val", TEXT[:700])])
    packing.write_rows(folder / "talks" / "bytes", tokenizer, conversations(60), 16)
    pairs = [{"prompt": f"{i}?", "chosen": f"{i * 7}.", "rejected": f"{i * 3}"}
             for i in range(1, 40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "tiny.py").write_text(TINY + f"data_dir = {str(folder)!r}\n", encoding="utf-8")


def measure(folder):
    """Run every path in a folder. Returns {path: {name: list of numbers, or a number}}."""
    prepare(folder)
    tokenizer = load_tokenizer("bytes")
    threads = torch.get_num_threads()
    # sums round alike on every machine, and tiny tensors gain nothing from more
    torch.set_num_threads(1)

    def run(main, out, *options):
        main([str(folder / "tiny.py"), f"--out_dir={folder / out}", *options])
        training, held_out = metrics.read(folder / out)
        return training, held_out[-1]

    def losses(out, *options):
        training, last = run(train.main, out, *options)
        return {"loss": [line["loss"] for line in training], "val_bpb": last["val_bpb"]}

    golden = {}
    training, last = run(train.main, "dense", "--data=one", "--max_steps=10", "--decay_share=0.2")
    golden["dense"] = {"loss": [x["loss"] for x in training], "lr": [x["lr"] for x in training],
                       "val_bpb": last["val_bpb"]}
    golden["bfloat16"] = losses("bfloat16", "--data=one", "--max_steps=10", "--dtype=bfloat16")
    golden["experts"] = losses("experts", "--data=one", "--max_steps=6", "--num_experts=4",
                               "--router_z_coef=0.001")
    golden["decay_data"] = losses("decay_data", "--data=one", "--decay_data=two:0.5,one:0.5",
                                  "--max_steps=8", "--decay_steps=4")
    golden["packed_rows"] = losses("packed_rows", "--data=talks", "--doc_mask=True",
                                   "--max_steps=6")
    training, last = run(dpo.main, "dpo", f"--init_from={folder / 'dense'}",
                         f"--pairs={folder / 'pairs.jsonl'}",
                         f"--val_pairs={folder / 'pairs.jsonl'}", "--learning_rate=0.001",
                         "--sft_coef=0.1", "--max_steps=4")
    golden["dpo"] = {"loss": [x["loss"] for x in training],
                     "margin": [x["margin"] for x in training], "val_loss": last["val_loss"]}

    losses("memorized", "--data=one", "--max_steps=100", "--batch_size=16")
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in ("Permission is", "THE SOFT")]
    for dtype in ("float32", "bfloat16"):
        model = MiniCPM.from_pretrained(folder / "memorized", dtype=getattr(torch, dtype)).eval()
        greedy = model.generate(prompts, 24, temperature=0)
        drawn = model.generate(prompts, 24, temperature=0.5, top_k=5, seed=3)
        golden[f"generate_{dtype}"] = {"greedy": [ids.tolist() for ids in greedy],
                                       "drawn": [ids.tolist() for ids in drawn]}
    model = MiniCPM.from_pretrained(folder / "memorized").eval()
    held_out = open_corpus(folder, "two", tokenizer, "val")
    config = evaluate.EvaluateConfig(context=16, continuation=8, questions=20)
    golden["evaluate"] = {"bpb": evaluate.bits_per_byte(model, {held_out: 1.0}, tokenizer, config,
                                                        16)["bpb"]}
    torch.set_num_threads(threads)
    return golden


def test_every_path_gives_its_golden_numbers(tmp_path):
    golden, measured = json.loads(GOLDEN.read_text()), measure(tmp_path)
    assert measured.keys() == golden.keys()
    for path, numbers in golden.items():
        tolerance = 2e-3 if path == "bfloat16" else 2e-4
        for name, wanted in numbers.items():
            got = measured[path][name]
            assert got == (wanted if path.startswith("generate")
                           else pytest.approx(wanted, abs=tolerance)), f"{path}: {name}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(measure(Path(temporary)), indent=1) + "\n")
