"""The architecture against an independent implementation, and against itself by other routes."""
import dataclasses

import pytest
import torch

from configurator import BadInput
from engine import ops
from model import KVCache, MiniCPM, MiniCPMConfig, init_weights, rope_tables, sample_next

SMALL = MiniCPMConfig(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ff=96,
                      max_position=32)


def make(config, seed=0):
    model = MiniCPM(config)
    init_weights(model, seed)
    return model


def ids(*shape, seed=0, vocab=97):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- parity

ROPE_FORMS = {"none": ({}, {"rope_type": "default"}),
              "linear": (dict(rope_scaling="linear", rope_factor=3.0),
                         {"rope_type": "linear", "factor": 3.0}),
              "dynamic": (dict(rope_scaling="dynamic", rope_factor=4.0),
                          {"rope_type": "dynamic", "factor": 4.0}),
              "longrope": (dict(rope_scaling="longrope", original_max_position=16,
                                rope_short_factor=tuple([1.0] * 8),
                                rope_long_factor=tuple(1 + 0.5 * i for i in range(8))),
                           {"rope_type": "longrope", "short_factor": [1.0] * 8,
                            "long_factor": [1 + 0.5 * i for i in range(8)], "factor": 2.0,
                            "original_max_position_embeddings": 16}),}


def granite(config, rope):
    """transformers' Granite with the weights of ours: an independent computation of the same
    function."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_ff,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.kv_heads, max_position_embeddings=config.max_position,
        rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager", rope_parameters={"rope_theta": config.rope_theta, **rope},
        embedding_multiplier=config.scale_emb, residual_multiplier=config.residual_scale,
        logits_scaling=config.width_mult, attention_multiplier=config.head_size ** -0.5))
    return theirs


def granite_names(model):
    """{granite name: (our parameter, slice of its rows)}"""
    config = model.config
    H, K = config.n_head * config.head_size, config.kv_heads * config.head_size
    out = {"model.embed_tokens.weight": (model.wte.weight, slice(None)),
           "model.norm.weight": (model.norm.weight, slice(None))}
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (model.lm_head.weight, slice(None))
    for i, block in enumerate(model.blocks):
        rows = {"input_layernorm": (block.attn_norm, slice(None)),
                "post_attention_layernorm": (block.mlp_norm, slice(None)),
                "self_attn.q_proj": (block.attn.wqkv, slice(0, H)),
                "self_attn.k_proj": (block.attn.wqkv, slice(H, H + K)),
                "self_attn.v_proj": (block.attn.wqkv, slice(H + K, H + 2 * K)),
                "self_attn.o_proj": (block.attn.wo, slice(None)),
                "mlp.gate_proj": (block.mlp.w_in, slice(0, config.n_ff)),
                "mlp.up_proj": (block.mlp.w_in, slice(config.n_ff, None)),
                "mlp.down_proj": (block.mlp.w_out, slice(None))}
        out |= {f"model.layers.{i}.{name}.weight": (module.weight, part)
                for name, (module, part) in rows.items()}
    return out


@pytest.mark.parametrize("form", ROPE_FORMS)
@pytest.mark.parametrize("tied, kv_heads", [(True, 2), (False, 4)])
def test_logits_and_gradients_equal_granite(form, tied, kv_heads):
    ours, rope = ROPE_FORMS[form]
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied, n_kv_head=kv_heads,
                                 dim_model_base=16, **ours)
    model, theirs = make(config), granite(config, rope)
    names = granite_names(model)
    theirs.load_state_dict({name: p.detach()[part].clone() for name, (p, part) in names.items()},
                           strict=tied is False)
    # longer than max_position: dynamic NTK is at work
    idx, targets = ids(2, 48), ids(2, 48, seed=1)
    logits, reference = model(idx), theirs(idx).logits
    assert (logits - reference).abs().max() < 1e-4
    model(idx, targets)[0].mean().backward()
    torch.nn.functional.cross_entropy(reference.flatten(0, 1), targets.flatten()).backward()
    for name, p in theirs.named_parameters():
        ours_p, part = names[name]
        assert (ours_p.grad[part] - p.grad).abs().max() < 1e-4, name


def test_longrope_short_factors_within_the_original_length():
    factors = tuple(1 + 0.5 * i for i in range(8))
    config = dataclasses.replace(SMALL, rope_scaling="longrope", rope_short_factor=factors,
                                 rope_long_factor=tuple([9.0] * 8))
    rope = {"rope_type": "longrope", "short_factor": list(factors), "long_factor": [9.0] * 8,
            "factor": 1.0, "original_max_position_embeddings": 32}
    model, theirs = make(config), granite(config, rope)
    theirs.load_state_dict({name: p.detach()[part].clone()
                            for name, (p, part) in granite_names(model).items()}, strict=False)
    assert (model(ids(1, 20)) - theirs(ids(1, 20)).logits).abs().max() < 1e-4


def longrope(max_position, original, **changes):
    return dataclasses.replace(
        SMALL, rope_scaling="longrope", max_position=max_position, original_max_position=original,
        rope_short_factor=tuple(1 + 0.5 * i for i in range(8)), rope_long_factor=(9.0,) * 8,
        **changes)


@pytest.mark.parametrize("max_position, original", [(16, 32), (32, 32)])
def test_longrope_below_the_original_length_has_an_attention_factor_of_one(max_position, original):
    """max_position 16 of 32 made every cosine smaller than 1, where transformers' are not."""
    config = longrope(max_position, original)
    rope = {"rope_type": "longrope", "short_factor": list(config.rope_short_factor),
            "long_factor": list(config.rope_long_factor), "factor": max_position / original,
            "original_max_position_embeddings": original}
    model, theirs = make(config), granite(config, rope)
    theirs.load_state_dict({name: p.detach()[part].clone()
                            for name, (p, part) in granite_names(model).items()}, strict=False)
    for length in (20, 40):                             # short factors, and long ones
        found = model(ids(1, length)) - theirs(ids(1, length)).logits
        assert found.abs().max() < 1e-4
    assert rope_tables(config, 4, "cpu")[0][0].tolist() == [1.0] * 16


def test_impossible_rope_is_refused_by_name():
    wrong = {"--original_max_position: longrope needs 2": longrope(32, 1),
             "--rope_short_factor: all of its numbers": dataclasses.replace(
                 longrope(32, 16), rope_short_factor=(0.0,) * 8),
             "--head_dim=2: dynamic RoPE needs 4": dataclasses.replace(
                 SMALL, head_dim=2, rope_scaling="dynamic")}
    for said, config in wrong.items():
        assert [line[:len(said)] for line in config.problems()] == [said]


# ---- counts: the nine sizes of the paper

SIZES = {  # n_layer, n_head, n_kv_head, n_embd, n_ff -> N without the embedding
    (40, 36, 36, 2304, 5760): 2_442_057_984, (52, 24, 8, 1536, 3840): 1_247_442_432,
    (8, 5, 5, 320, 800): 9_426_240,
    (12, 8, 8, 512, 1280): 36_188_672, (14, 10, 10, 640, 1600): 65_964_160,
    (16, 12, 12, 768, 1920): 108_552_960,
    (18, 14, 14, 896, 2240): 166_216_064, (20, 16, 16, 1024, 2560): 241_214_464,
    (24, 21, 21, 1344, 3360): 498_614_592}


@pytest.mark.parametrize("shape, expected", SIZES.items())
def test_parameter_counts_of_the_paper(shape, expected):
    config = MiniCPMConfig(**dict(zip(("n_layer", "n_head", "n_kv_head", "n_embd", "n_ff"), shape)))
    with torch.device("meta"):
        model = MiniCPM(config)
    assert config.n_params_non_embedding == expected
    assert config.n_params == expected + config.vocab_size * config.n_embd
    assert config.n_params == sum(p.numel() for p in model.parameters())


def test_configs_of_the_paper_have_its_sizes():
    from configurator import ROOT, configure
    from train import TrainConfig
    # its model is the one it is given
    found = {configure([str(path)], TrainConfig, MiniCPMConfig,
                       usage="")[0][1].n_params_non_embedding
             for path in (ROOT / "config").glob("*.py")
             if path.name.startswith(("tunnel", "minicpm")) and path.name != "minicpm_dpo.py"}
    assert found == {*SIZES.values(), 13_590_468_864}                      # and the 8x2B


def test_flops_are_six_per_weight_plus_attention():
    config = SMALL
    weights = sum(p.numel() for p in make(config).parameters() if p.dim() == 2)  # no norms
    assert config.flops_per_token(128) == 6 * weights + 12 * 2 * 64 * 128
    experts = dataclasses.replace(config, num_experts=4, num_experts_per_tok=2)
    more = 2 * (3 * 64 * 96 + 4 * 64)                   # another feed-forward, and the router
    assert experts.flops_per_token(128) == config.flops_per_token(128) + 6 * more


# ---- the loss

@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_equals_plain_loss(monkeypatch, tied):
    model = make(dataclasses.replace(SMALL, tie_word_embeddings=tied))
    idx, targets = ids(3, 20), ids(3, 20, seed=1)
    targets[0, :7] = -100
    # DPO and masks weigh tokens differently
    weights = torch.rand(3, 20)
    results = []
    monkeypatch.setattr(ops, "COLUMN_MULTIPLE", 10)
    # 600 logits: ten of the 97 columns at a time
    for at_once in (2 ** 25, 60 * 10):
        monkeypatch.setitem(ops.MAX_LOGITS, "cpu", at_once)
        model.zero_grad()
        nll, aux = model(idx, targets)
        (nll * weights).sum().backward()
        results.append([nll.detach()] + [p.grad.clone() for p in model.parameters()])
        assert nll.dtype == torch.float32 and aux == {} and (nll[0, :7] == 0).all()
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_bfloat16_loss_is_float32_and_close():
    model, idx = make(SMALL), ids(2, 20)
    exact = model(idx, idx)[0]
    model.numerics.dtype = torch.bfloat16
    rounded = model(idx, idx)[0]
    assert rounded.dtype == torch.float32 and (exact - rounded).abs().max() < 0.05 * exact.max()
    # it carries more than bfloat16 can
    assert not torch.equal(rounded, rounded.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_equals_written_out(monkeypatch, dtype):
    model, idx = make(SMALL), ids(2, 20)
    model.numerics.dtype = dtype
    written = model(idx)
    monkeypatch.setattr(ops, "EXPLICIT_ATTENTION_UP_TO", 0)
    assert (model(idx) - written).abs().max() < (1e-5 if dtype == torch.float32
                                                 else 0.05) * written.abs().max()


def test_documents_do_not_see_each_other():
    """Two documents in one sample give the logits of each alone: RoPE is relative, so positions
    need no reset."""
    model, a, b = make(SMALL), ids(1, 9), ids(1, 7, seed=1)
    together = model(torch.cat((a, b), 1), doc_ids=torch.tensor([[1] * 9 + [2] * 7]))
    assert (together[:, :9] - model(a)).abs().max() < 3e-5
    assert (together[:, 9:] - model(b)).abs().max() < 1e-4


def test_right_padding_does_not_change_a_row():
    model, idx = make(SMALL), ids(1, 9)
    padded = torch.cat((idx, torch.zeros(1, 6, dtype=torch.int64)), 1)
    assert torch.equal(model(padded)[:, :9].argmax(-1), model(idx).argmax(-1))
    assert (model(padded)[:, :9] - model(idx)).abs().max() < 3e-5


# ---- generation

@pytest.mark.parametrize("form, length",
                         [("none", 40), ("linear", 40), ("longrope", 40), ("dynamic", 27)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_gives_the_tokens_of_the_plain_forward(form, length, temperature):
    """For every sampled row, with prompts of different lengths, and past max_position (32) except
    for dynamic NTK."""
    model = make(dataclasses.replace(SMALL, **ROPE_FORMS[form][0])).eval()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    cached, plain = ([t.tolist()
                      for t in model.generate(prompts, length, temperature, top_k=20, seed=3,
                                              use_cache=use)] for use in (True, False))
    assert cached == plain and len({tuple(row) for row in zip(*cached)}) == len(prompts)


@pytest.mark.parametrize("form", ["dynamic", "longrope"])
def test_the_cache_rotates_all_keys_at_the_current_length(form):
    """Past the limit (32) RoPE changes with the length. In one layer a cache of unrotated keys is
    then exact; deeper layers saw the earlier tokens otherwise, which no cache can undo."""
    changes = ROPE_FORMS["dynamic"][0]
    model = make(dataclasses.replace(SMALL, n_layer=1, **changes) if form == "dynamic"
                 else longrope(32, None, n_layer=1))
    idx, cache = ids(2, 60), KVCache(model.config, 2, 60, torch.float32, "cpu")
    for t in range(60):
        step = model(idx[:, t:t + 1], cache=cache)
        if t in (20, 31, 32, 45, 59):
            assert (step[:, 0] - model(idx[:, :t + 1])[:, -1]).abs().max() < 1e-4


def test_a_cache_with_room_beyond_the_original_length_is_exact_up_to_it():
    """The room of a cache says nothing of the input: the long factors wait until it is used."""
    model, idx = make(longrope(16, 32)), ids(2, 32)
    cache = KVCache(model.config, 2, 64, torch.float32, "cpu")
    pieces = torch.cat([model(part, cache=cache) for part in idx.split((20, 1, 11), dim=1)], dim=1)
    assert (pieces - model(idx)).abs().max() < 3e-5
    assert not KVCache(model.config, 2, 32, torch.float32, "cpu").keeps_unrotated   # no need to


def test_a_row_of_a_batch_is_the_row_alone():
    model = make(SMALL).eval()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    rows = list(zip(*[t.tolist() for t in model.generate(prompts, 12, 1.0, seed=3)]))
    for i, prompt in enumerate(prompts):
        alone = [int(t) for t in model.generate([prompt], 12, 1.0, seed=3 + i)]
        assert tuple(alone) == rows[i]


def test_prefill_in_pieces_equals_one_forward():
    model, idx = make(SMALL), ids(2, 20)
    cache = KVCache(model.config, 2, 20, torch.float32, "cpu")
    pieces = torch.cat([model(part, cache=cache) for part in idx.split((7, 1, 12), dim=1)], dim=1)
    assert (pieces - model(idx)).abs().max() < 3e-5
    with pytest.raises(BadInput, match="cache holds 20"):
        model(idx[:, :1], cache=cache)


def test_a_cache_keeps_documents_apart_and_is_not_told_of_them_halfway():
    model, idx, doc_ids = make(SMALL), ids(2, 20), torch.tensor([[1] * 9 + [2] * 11] * 2)
    cache = KVCache(model.config, 2, 20, torch.float32, "cpu")
    pieces = torch.cat([model(idx[:, part], doc_ids=doc_ids[:, part], cache=cache)
                        for part in (slice(0, 7), slice(7, 19))], dim=1)
    assert (pieces - model(idx, doc_ids=doc_ids)[:, :19]).abs().max() < 3e-5
    with pytest.raises(BadInput, match="doc_ids: give them with every input"):
        model(idx[:, 19:], cache=cache)


def test_generation_stops_at_a_stop_token_per_row():
    model = make(SMALL).eval()
    free = list(zip(*[t.tolist() for t in model.generate([[1], [2]], 20, 1.0, seed=3)]))
    stop = free[0][4]
    rows = list(zip(*[t.tolist()
                      for t in model.generate([[1], [2]], 20, 1.0, seed=3, stop_ids=[stop])]))
    assert rows[0][:5] == free[0][:5] and set(rows[0][free[0].index(stop):]) == {stop}
    until = free[1].index(stop) if stop in free[1] else len(rows[1])
    assert rows[1][:until] == free[1][:until]


def test_sampling_cuts_what_it_should():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    draw = lambda u, **kw: int(sample_next(logits, torch.tensor([u]), 1.0, **kw))      # noqa: E731
    assert [draw(u) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 0.96)] == [0, 0, 1, 1, 2, 3]
    assert {draw(u / 100, top_k=2) for u in range(100)} == {0, 1}
    assert {draw(u / 100, top_p=0.6) for u in range(100)} == {0, 1}
    assert {draw(u / 100, top_p=0.5) for u in range(100)} == {0}
    assert int(sample_next(logits, torch.tensor([0.99]), 0)) == 0


def test_init_depends_on_seed_and_name_alone():
    a, b = make(SMALL), make(dataclasses.replace(SMALL, n_layer=3))
    shared = dict(b.named_parameters())
    assert all(torch.equal(p, shared[name]) for name, p in a.named_parameters())
    assert not torch.equal(make(SMALL, seed=1).wte.weight, a.wte.weight)
