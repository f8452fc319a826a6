"""MiniCPM.pack: weights in the form that generates fastest on a CPU give what the plain ones do."""
import dataclasses
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F

import sample
from configurator import BadInput
from engine import ops
from model import MiniCPM, MiniCPMConfig, init_weights
from tools import evaluate

SMALL = MiniCPMConfig(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ff=96,
                      max_position=32)
EXPERTS = dataclasses.replace(SMALL, num_experts=4)
UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False)
SHAPES = {"dense": SMALL, "experts": EXPERTS, "untied": UNTIED,
          "dynamic": dataclasses.replace(SMALL, rope_scaling="dynamic", rope_factor=4.0)}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]

needs_onednn = pytest.mark.skipif(not ops.ONEDNN, reason="PyTorch without oneDNN")


def make(shape, dtype=torch.float32):
    model = MiniCPM(shape).eval()
    init_weights(model, 0)
    model.to(dtype)
    model.numerics.dtype = dtype
    return model


def generated(model, **options):
    return [row.tolist() for row in model.generate(PROMPTS, 20, top_k=20, seed=3, **options)]


def ids(*shape):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(0))


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_packed_weights_generate_the_plain_tokens_with_and_without_a_cache(shape, temperature):
    plain = generated(make(shape), temperature=temperature)
    packed = make(shape)
    packed.pack()
    assert generated(packed, temperature=temperature) == plain
    assert generated(packed, temperature=temperature, use_cache=False) == plain


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_losses_of_packed_weights_are_the_plain_ones(shape, monkeypatch):
    monkeypatch.setattr("model.PACKED_ROWS", 7)             # the last slice is shorter
    idx, targets = ids(3, 12), ids(3, 12)
    targets[0, :5] = -100
    plain, packed = make(shape), make(shape)
    packed.pack()
    with torch.no_grad():
        assert (packed(idx) - plain(idx)).abs().max() < 5e-5
        found, expected = packed(idx, targets)[0], plain(idx, targets)[0]
    assert (found - expected).abs().max() < 5e-5 and (found[0, :5] == 0).all()


@pytest.mark.skipif(not ops.can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no bfloat16")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed_bfloat16_is_nearer_to_float32_than_plain_bfloat16(shape):
    """All of them have the same weights, rounded to bfloat16."""
    exact, plain, packed = make(shape), make(shape, torch.bfloat16), make(shape, torch.bfloat16)
    exact.load_state_dict({name: w.float() for name, w in plain.state_dict().items()})
    packed.pack()
    idx = ids(4, 20)
    with torch.no_grad():
        errors = [(model(idx) - exact(idx)).square().mean().sqrt() for model in (packed, plain)]
    # With experts a choice may change.
    assert 0 < errors[0] < errors[1] < (0.2 if shape.num_experts else 0.05) * exact(idx).std()


def test_rows_of_8_bits_are_within_half_a_step_and_keep_the_largest_number():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-9, 9, 5)[:, None]
    x[2] = 0
    rows, scale = ops.quantize_rows(x)
    assert rows.dtype == torch.int8 and ((rows * scale - x).abs() <= 0.501 * scale).all()
    largest = rows.abs().amax(1)
    assert (largest[[0, 1, 3, 4]] == 127).all() and largest[2] == 0


def test_the_product_of_8_bits_is_the_one_of_the_rounded_numbers():
    """And a row of it does not depend on the others."""
    x, weight = torch.randn(3, 2, 64), torch.randn(40, 64)
    rows, scale = ops.quantize_rows(weight)
    x8, x_scale = ops.quantize_rows(x)
    found = ops.int8_linear(x, rows, scale)
    assert (found - F.linear(x8 * x_scale, rows * scale)).abs().max() < 1e-4
    assert torch.equal(ops.int8_linear(x[1:2, :1], rows, scale), found[1:2, :1])
    assert 0.001 < (found - F.linear(x, weight)).std() / found.std() < 0.02


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_int8_keeps_the_logits_to_a_few_percent(shape):
    """The routers keep their weights, but see rounded inputs: with experts a choice may change."""
    plain, packed = make(shape), make(shape)
    packed.pack("int8")
    idx = ids(4, 20)
    with torch.no_grad():
        error = (packed(idx) - plain(idx)).square().mean().sqrt() / plain(idx).std()
    assert 0 < error < (0.2 if shape.num_experts else 0.05)
    assert len(generated(packed)) == 20


@needs_onednn
@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("shape", [EXPERTS, UNTIED])
def test_plain_weights_are_freed(shape, quant):
    """All but the embedding and the routers."""
    model = make(shape)
    plain = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    model.pack(quant)
    gc.collect()
    routers = {f"blocks.{i}.mlp.router.weight" for i in range(2)} if shape.num_experts else set()
    assert {name for name, ref in plain.items() if ref() is not None} == {"wte.weight"} | routers


def test_where_nothing_can_be_packed_the_model_stays_as_it_is_and_int8_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "ONEDNN", False)
    model = make(SMALL)
    before = model.state_dict()
    model.pack()
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(BadInput, match="--quant=int8: needs --device=cpu"):
        model.pack("int8")


def test_float16_stays_plain():
    model = make(SMALL, torch.float16)
    model.pack()
    assert model.numerics.dtype == torch.float16 and model.packed_head is None


@needs_onednn
def test_a_trained_model_keeps_its_loss_and_its_choices_in_int8(train_tiny, data_dir, capsys):
    run = train_tiny("run", "--max_steps=40", "--learning_rate=0.02")
    bits = {}
    for quant in ("none", "int8"):
        capsys.readouterr()
        evaluate.main([f"--ckpt={run}", f"--data_dir={data_dir}", "--task=bpb", "--json=True",
                       f"--quant={quant}"])
        bits[quant] = json.loads(capsys.readouterr().out)["bpb"]
    assert bits["int8"] != bits["none"] and bits["int8"] == pytest.approx(bits["none"], rel=0.005)
    plain, packed = (MiniCPM.from_pretrained(run).eval() for _ in range(2))
    packed.pack("int8")
    idx = torch.randint(0, plain.config.vocab_size, (8, 30))
    with torch.no_grad():
        assert (plain(idx).argmax(-1) == packed(idx).argmax(-1)).float().mean() > 0.95


@needs_onednn
def test_sample_takes_8_bits(train_tiny, capsys):
    run = train_tiny("run", "--max_steps=2")
    capsys.readouterr()
    sample.main([f"--ckpt={run}", "--max_new_tokens=5", "--quant=int8"])
    assert capsys.readouterr().out
