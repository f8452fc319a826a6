"""Each process of a run reads only its own part of a checkpoint, however many processes wrote it.

This file is also the program of the processes: torchrun test_loading.py JOBS.json, a list of
[function below, arguments].
"""
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import finish, launch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from configurator import ROOT, BadInput
from data.corpus import write_corpus
from data.tokenizer import load_tokenizer
from engine import checkpoint, released, stored
from tools import convert

TINY = """
data = "one"
tokenizer = "bytes"
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 64
n_ff = 96
dim_model_base = 32
block_size = 16
batch_size = 4
max_steps = 4
schedule = "constant"
eval_interval = 0
eval_tokens = 100
sample_tokens = 0
dtype = "float32"
device = "cpu"
quiet = True
"""


# ---- what the processes do

class Counted:
    """safe_open that counts the bytes of tensors that are taken from its files."""
    taken = 0

    def __init__(self, path, framework):
        self.file = OPEN(path, framework)
        self.keys = self.file.keys

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def get_tensor(self, name):
        return count(self.file.get_tensor(name))

    def get_slice(self, name):
        return CountedSlice(self.file.get_slice(name))


class CountedSlice:
    def __init__(self, stored):
        self.stored, self.get_shape = stored, stored.get_shape

    def __getitem__(self, region):
        return count(self.stored[region])


OPEN = stored.safe_open


def count(tensor):
    Counted.taken += tensor.nbytes
    return tensor


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def dump(out, config, batches, loss_fn, model, state, optimizer_tensors, validate, tokenizer,
         should_stop, world):
    """In the place of train.train: save weights and moments as loaded, and what was read."""
    optimizer = train.make_optimizer(config, model, optimizer_tensors)
    tensors = {**model.state_dict(), **checkpoint.optimizer_state(optimizer)}
    tensors = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    Path(f"{out}-{world.rank}.json").write_text(str(Counted.taken))
    if world.rank == 0:
        save_file(tensors, f"{out}.safetensors")
    yield from ()


def load(out, *argv):
    """Continue a run as train.py does, but for its updates; see dump."""
    plain, stored.safe_open, Counted.taken = train.train, Counted, 0
    train.train = lambda *args: dump(out, *args)
    train.main([*argv, "--max_steps=9"])
    train.train, stored.safe_open = plain, OPEN


def update(*argv):
    train.main(list(argv))


def work(**functions):
    """Do the jobs of the file that the command names."""
    torch.set_num_threads(1)
    for job, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        functions[job](*arguments)


# ---- the tests

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    write_corpus(folder / "data" / "one" / "bytes", load_tokenizer("bytes"),
                 [("train", text * 4), ("val", text[:700])])
    (folder / "tiny.py").write_text(TINY + f"data_dir = {str(folder / 'data')!r}\n")
    return folder


def options(place, name, *more):
    return [str(place / "tiny.py"), f"--out_dir={place / name}", *more]


def together(place, processes, *jobs, program=__file__):
    """Do jobs in one group of processes."""
    path = place / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    finish(launch(processes, program, path))


def state_of(folder):
    """All tensors of a checkpoint, read whole."""
    return {**dict(checkpoint.read_tensors(folder, "model")),
            **dict(checkpoint.read_tensors(folder, "optimizer"))}


def same(a, b):
    equal = all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    return a.keys() == b.keys() and equal


def shares(place, out, processes, expected):
    """The part of a checkpoint that each process has read."""
    total = sum(tensor.nbytes for tensor in expected.values())
    return [int((place / f"{out}-{rank}.json").read_text()) / total for rank in range(processes)]


EXPERTS = ["--num_experts=3"]               # on 4 ranks one has no row of the router
needs_gloo = pytest.mark.skipif(sys.platform == "win32", reason="gloo: tried on Linux and macOS")


def check(place, out, processes, part, expected):
    """What was loaded is what was saved, to the bit, and each process has read this part of it."""
    assert same(load_file(place / f"{out}.safetensors"), expected), out
    read = shares(place, out, processes, expected)
    assert read == pytest.approx([part] * processes, abs=0.02), out


@needs_gloo
def test_each_process_reads_its_part_of_a_checkpoint(place):
    """Every process read the whole: 8 ranks of a 2.4B model read 33 GB each."""
    update(*options(place, "one"))
    hf = place / "hf"
    convert.main([f"--ckpt={place / 'one'}", f"--to_hf={hf}"])
    for path in hf.glob("tokenizer*"):                                   # is not the corpus's
        path.unlink()
    together(place, 2, ["update", *options(place, "two")],
             ["load", str(place / "2to2"), *options(place, "two")],
             ["load", str(place / "1to2"), *options(place, "one")],
             ["load", str(place / "hf2"), *options(place, "init", f"--init_from={hf}")])
    load(str(place / "2to1"), *options(place, "two"))
    one, two = (state_of(checkpoint.resolve(place / name)) for name in ("one", "two"))
    check(place, "2to2", 2, 1 / 2, two)
    check(place, "1to2", 2, 1 / 2, one)
    check(place, "2to1", 1, 1, two)
    check(place, "hf2", 2, 1 / 2, dict(checkpoint.read_weights(hf)))


@pytest.mark.slow
@needs_gloo
def test_checkpoints_of_two_and_four_processes_with_empty_shards_and_replicas(place):
    together(place, 2, ["update", *options(place, "two")],
             ["update", *options(place, "experts", *EXPERTS)])
    two, experts = (state_of(checkpoint.resolve(place / name)) for name in ("two", "experts"))
    together(place, 4, ["load", str(place / "2to4"), *options(place, "experts", *EXPERTS)],
             ["load", str(place / "2to2x2"), *options(place, "two", "--replicate=2")],
             ["update", *options(place, "experts", *EXPERTS, "--max_steps=5")])
    load(str(place / "4to1"), *options(place, "experts", *EXPERTS))
    check(place, "2to4", 4, 1 / 4, experts)
    check(place, "2to2x2", 4, 1 / 2, two)
    check(place, "4to1", 1, 1, state_of(place / "experts" / "step-00000005"))


def test_any_region_is_read_from_the_pieces_that_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK", 40)                             # of a few rows each
    tensor, pieces = torch.arange(6 * 7 * 5.).view(6, 7, 5), []
    for i, (a, b) in enumerate([(0, 3), (3, 3), (3, 7)]):                # shards; one is empty
        save_file({"w": tensor[:, a:b].contiguous()}, tmp_path / f"{i}.safetensors")
        (part,) = stored.stored_tensors(tmp_path / f"{i}.safetensors").values()
        assert (part.shape, part.dtype) == ((6, b - a, 5), torch.float32)
        pieces.append(part.pieces[0]._replace(offset=(0, a, 0)))
    lazy = stored.StoredTensor((6, 7, 5), torch.float32, pieces)
    assert torch.equal(lazy.read(), tensor)
    assert torch.equal(lazy.read(dtype=torch.bfloat16), tensor.bfloat16())
    for region in ((0, 6, 2, 5, 0, 5), (1, 2, 0, 7, 4, 5), (5, 6, 3, 4, 0, 1), (2, 2, 0, 7, 0, 5),
                   (6, 6, 7, 7, 5, 5)):
        slices = tuple(slice(*region[i:i + 2]) for i in (0, 2, 4))
        assert torch.equal(lazy[slices], tensor[slices]), region
    torch.save({"w": tensor, "n": torch.tensor(7)}, tmp_path / "x.bin")
    found = stored.stored_tensors(tmp_path / "x.bin")
    assert torch.equal(found["w"].read(), tensor) and found["n"].read() == 7


def test_the_stacked_tensors_of_a_released_model_are_read_in_parts_too(tmp_path):
    names = ("0.w1", "0.w3", "1.w1", "1.w3")                             # of two experts
    tensors = {name: torch.randn(4, 3) for name in names}
    save_file(tensors, tmp_path / "x.safetensors")
    found = stored.stored_tensors(tmp_path / "x.safetensors")
    rows = torch.cat(list(tensors.values()))
    for experts, whole in ((0, rows), (2, rows.view(2, 8, 3))):
        stack = released.stack_rows([found[name] for name in names], experts)
        assert stack.shape == whole.shape and torch.equal(stack.read(), whole)
        region = tuple(slice(n // 3, n) for n in whole.shape)
        assert torch.equal(stack[region], whole[region])


def test_what_is_missing_or_fits_no_parameter_is_one_line(place, tmp_path):
    index = {"model": {"w": {"shape": [4, 2], "pieces": [["a.safetensors", [0, 0]]]}}}

    def files(folder):
        save_file({"w": torch.ones(2, 2)}, folder / "a.safetensors")
        checkpoint.write_json(folder / "index.json", index)
    folder = checkpoint.save_checkpoint(tmp_path, 1, {}, {}, files)
    with pytest.raises(BadInput, match="index.json lacks shards of w; delete"):
        dict(checkpoint.open_tensors(folder, "model"))
    p = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.AdamW([{"params": [p], "names": ["w"]}])
    for name, shape in (("w/exp_avg", (8, 2)), ("x/exp_avg", (4, 2))):   # was cut; a KeyError
        tensors = [(name, stored.StoredTensor(shape, torch.float32, []))]
        with pytest.raises(BadInput, match=f"optimizer state has {name} .*fits no parameter"):
            checkpoint.restore_optimizer(optimizer, tensors, fused=True)


if __name__ == "__main__":
    work(load=load, update=update)
