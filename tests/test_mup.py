"""muP proved: groups by role, and activations that do not grow with width, beside a control that
fails."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from configurator import ROOT
from model import MiniCPM, MiniCPMConfig, init_weights, mup_table, optimizer_groups, role_of

WIDTHS, STEPS = (64, 128, 256), 3


def config_of(width, **changes):
    return MiniCPMConfig(**{**dict(vocab_size=256, n_layer=2, n_head=width // 32, n_embd=width,
                                   n_ff=width * 5 // 2, dim_model_base=64), **changes})


def activations(config, seed, learning_rate, steps=STEPS, text=(8, 129)):
    """Mean |activation| of each probe on one batch at the start, after one update and after all:
    {(probe, step): value}."""
    torch.manual_seed(seed)
    model = MiniCPM(config)
    init_weights(model, seed)
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.1), betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    # real text, as bytes
    idx = torch.tensor(list((ROOT / "LICENSE").read_bytes()[:math.prod(text)])).view(text)
    seen = {}
    block = model.blocks[-1]
    probes = {"qkv": block.attn.wqkv, "attention out": block.attn, "mlp out": block.mlp,
              "residual": block}
    probes |= {
        "experts": block.mlp.experts} if config.num_experts else {"gate and up": block.mlp.w_in}
    hooks = [module.register_forward_hook(lambda m, given, out, name=name: seen.__setitem__(
        name, out[:given[1][-1]] if name == "experts" else out)) for name, module in probes.items()]
    result = {}
    for step in range(steps + 1):
        if step in (0, 1, steps):
            with torch.no_grad():
                seen["logits"] = model(idx[:, :-1])
            # (residual stream, routing)
            seen["residual"] = seen["residual"][0]
            if config.num_experts:
                seen["mlp out"], (seen["router"], _) = seen["mlp out"]
            result |= {(name, step): out.abs().mean().item() for name, out in seen.items()}
        nll, aux = model(idx[:, :-1], idx[:, 1:])
        (nll.mean() + aux.get("balance_loss", 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return result


def slopes(learning_rate, how=(), **changes):
    """Slope of log2 mean |activation| over log2 width, mean of two seeds, by (probe, step)."""
    runs = [[activations(config_of(width, **changes), seed, learning_rate, *how)
             for width in WIDTHS] for seed in (0, 1)]
    return {key: float(np.mean([np.polyfit(np.log2(WIDTHS), np.log2([run[key] for run in seed]),
                                           1)[0] for seed in runs])) for key in runs[0][0]}


def test_activations_are_flat_in_width_under_mup_and_steep_under_the_control():
    mup, control = slopes(0.01), slopes(0.001, mup=False)
    hidden = ("qkv", "attention out", "gate and up", "mlp out", "residual")
    assert all(abs(mup[name, step]) < 0.15 for name in hidden for step in (1, STEPS)), mup
    assert abs(mup["logits", STEPS]) < 0.15, mup
    assert all(control[name, 0] > 0.4
               for name in ("qkv", "gate and up")) and control["mlp out", 0] > 1.2, control


# ten updates on a short text
EXPERTS = dict(how=(10, (2, 65)), num_experts=8)


def test_experts_and_the_logits_of_their_router_are_flat_in_width_too():
    """After ten updates: a wide router is not surer of itself than a narrow one."""
    found = slopes(0.01, **EXPERTS)
    assert {name for name, _ in found} >= {"experts", "router", "mlp out", "residual"}
    flat = {key: power
            for key, power in found.items() if key[1] in (0, 10) and key != ("logits", 0)}
    assert all(abs(power) < 0.25 for power in flat.values()), flat


@pytest.mark.parametrize("wrong", ["lr", "std"])
def test_a_router_outside_mup_is_found(monkeypatch, wrong):
    import model as model_module

    def broken(config):
        table = mup_table(config)
        router = table["router"]
        changed = {"lr": 1.0} if wrong == "lr" else {"std": router.std
                                                     * math.sqrt(config.width_mult)}
        return table | {"router": dataclasses.replace(router, **changed)}
    monkeypatch.setattr(model_module, "mup_table", broken)
    assert slopes(0.01, **EXPERTS)["router", 10] > 0.4


@pytest.mark.parametrize("wrong", ["lr", "std"])
def test_the_check_fails_when_a_rule_is_broken(monkeypatch, wrong):
    """Matrices without their learning-rate or init rule: the flatness above is gone."""
    import model as model_module

    def broken(config):
        table = mup_table(config)
        std = math.sqrt(config.width_mult) * table["matrix"].std
        return table | {"matrix": dataclasses.replace(
            table["matrix"], **({"lr": 1.0} if wrong == "lr" else {"std": std}))}
    monkeypatch.setattr(model_module, "mup_table", broken)
    found = slopes(0.01)
    assert found["mlp out", STEPS] > 0.25, found


@pytest.mark.parametrize("tied", [True, False])
def test_groups_cover_the_model_and_carry_the_rule(tied):
    config = config_of(256, tie_word_embeddings=tied)
    model = MiniCPM(config)
    groups = {group["role"]: group for group in optimizer_groups(model, 0.1)}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert set(groups) == {"embedding", "matrix", "norm"} | (set() if tied else {"head"})
    assert groups["matrix"]["lr_scale"] == 64 / 256 and groups["matrix"]["weight_decay"] == 0.1
    assert all(groups[role]["lr_scale"] == 1 and groups[role]["weight_decay"] == 0
               for role in groups if role != "matrix")
    init_weights(model, 0)
    assert abs(model.blocks[0].mlp.w_in.weight.std() / (0.1 / math.sqrt(256 / 64)) - 1) < 0.02
    assert abs(model.wte.weight.std() / 0.1 - 1) < 0.02


def test_values_of_the_paper_per_width():
    """paper-facts 2.2: std and learning rate of the matrices of the 2.4B and the 1.2B."""
    for width, std, lr in ((2304, 0.0333, 0.00111), (1536, 0.0408, 0.00167)):
        row = mup_table(MiniCPMConfig(n_embd=width, n_head=width // 64))["matrix"]
        assert round(row.std, 4) == std and round(0.01 * row.lr, 5) == lr


def test_switching_off_the_learning_rates_alone():
    table = mup_table(config_of(256, mup_lr=False))
    assert {row.lr for row in table.values()} == {1}
    assert {role: row.std for role, row in table.items()} == {
        role: row.std for role, row in mup_table(config_of(256)).items()}


def test_a_parameter_without_a_role_raises():
    with pytest.raises(KeyError):
        role_of("blocks.0.mlp.mystery.weight")
