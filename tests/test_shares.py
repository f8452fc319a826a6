"""Two processes share the work of an evaluation, and find what one process finds."""
import functools
import json
import sys

import pytest
from conftest import finish, launch, start
from test_golden import TINY, conversations

import train
from configurator import ROOT
from data import packing
from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32",
                                reason="torchrun with gloo is tried on Linux and macOS")
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")
# Runs a list of commands, and writes how often each evaluated the model on this rank.
RUNS = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from family import dpo
from model import MiniCPM
torch.set_num_threads(1)
plain, counts = MiniCPM.forward, []

def counted(self, *args, **kwargs):
    counts[-1] += not self.training
    return plain(self, *args, **kwargs)

MiniCPM.forward = counted
for script, argv in json.load(open(sys.argv[1])):
    counts.append(0)
    (dpo if script == "dpo" else train).main(argv)
with open(f"{{sys.argv[1]}}.{{os.environ.get('RANK', 'alone')}}", "w") as file:
    json.dump(counts, file)
"""
# Options of each run, and its forwards in one process: 4 windows or pairs at a time, by corpus.
VARIANTS = {
    "text": (["--data=one", "--eval_tokens=272"], [5]),                 # 17 windows
    "rows": (["--data=talks", "--doc_mask=True", "--eval_tokens=176"], [3]),
    "few": (["--data=one", "--eval_tokens=1"], [1]),                    # one rank has none
    "experts": (["--data=one", "--num_experts=4", "--eval_tokens=80"], [2]),
    "mixture": (["--data=one:0.6,talks:0.4", "--doc_mask=True", "--eval_tokens=214"], [2, 2]),
    "dpo": (["--micro_batch_size=4"], [4]),                             # 13 pairs
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus of text, one of packed rows, pairs, and the commands of VARIANTS."""
    folder, tokenizer = tmp_path_factory.mktemp("shares"), load_tokenizer("bytes")
    documents = [("train", TEXT), ("val", TEXT[:700])]
    write_corpus(folder / "one" / "bytes", tokenizer, documents)
    packing.write_rows(folder / "talks" / "bytes", tokenizer, conversations(90), 16)
    for name, first, end in (("train", 0, 40), ("val", 40, 53)):
        pairs = [{"prompt": f"{i}?", "chosen": f"{i * 7}.", "rejected": f"{i * 3}"}
                 for i in range(first, end)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # A learning rate so small that the weights after one step are the initial ones.
    (folder / "tiny.py").write_text(TINY + f"data_dir = {str(folder)!r}\nmax_steps = 1\n"
                                    "learning_rate = 1e-12\nmin_lr = 1e-12\ncompile = False\n")
    (folder / "runs.py").write_text(RUNS)
    train.main([str(folder / "tiny.py"), "--data=one", f"--out_dir={folder / 'start'}"])
    return folder


def commands(place, who):
    for name, (more, _) in VARIANTS.items():
        if name == "dpo":
            more = [*more, f"--init_from={place / 'start'}", f"--pairs={place / 'train.jsonl'}",
                    f"--val_pairs={place / 'val.jsonl'}", "--weight_decay=0"]
        yield name, [str(place / "tiny.py"), f"--out_dir={place / who / name}", *more]


def evaluated(place, who, launcher):
    """Run all variants; return {name: (result, forwards of each rank)}."""
    argv = [[name, argv] for name, argv in commands(place, who)]
    (place / f"{who}.json").write_text(json.dumps(argv))
    finish(launcher(place / "runs.py", place / f"{who}.json"))
    counts = [json.loads(path.read_text()) for path in sorted(place.glob(f"{who}.json.*"))]
    return {name: (metrics.read(place / who / name)[1][-1], list(forwards))
            for name, forwards in zip(VARIANTS, zip(*counts))}


def test_two_processes_share_an_evaluation_and_find_what_one_finds(place):
    """Every rank evaluated all windows. At 480 GPUs that was a third of the wall time.

    The last batch is not full, and with one window a rank has nothing to measure."""
    one = evaluated(place, "one", start)
    two = evaluated(place, "two", functools.partial(launch, 2))
    for name, (_, forwards) in VARIANTS.items():
        assert two[name][0] == {key: pytest.approx(value, abs=1e-6)
                                for key, value in one[name][0].items()}, name
        assert one[name][1] == [sum(forwards)], name
        assert two[name][1] == [sum(-(-n // 2) for n in forwards)] * 2, name
