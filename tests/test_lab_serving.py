"""labs/serving.py: the quick run, the bytes read, and checks that can fail."""
import copy
from dataclasses import replace

import numpy as np
import pytest
from test_prepare import error_of

from labs import serving
from model import KVCache, MiniCPM


def test_the_quick_run_draws_and_reuses_its_results(lab_files, monkeypatch, capsys):
    serving.main(["--quick=True"])
    first = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert len(first) == 5 and (lab_files / "serving.png").exists()
    monkeypatch.setattr(serving, "generation", lambda *a: pytest.fail("measured again"))
    monkeypatch.setattr(serving, "draw", lambda *a: None)
    serving.main(["--quick=True", "--draw=True"])
    assert [line for line in capsys.readouterr().out.splitlines() if " | " in line] == first


@pytest.mark.parametrize("words, says",
                         [(["--batches=2,4"], "--batches=(2, 4): needs 1 first, and one of 2 to 8"),
                          (["--expert_batches=4"], "--expert_batches=(4,): needs 1 among them"),
                          (["--rounds=0"], "--rounds=0: needs 1 or more")])
def test_settings_that_leave_nothing_to_compare_are_refused(words, says, capsys):
    assert says in error_of(serving, ["--quick=True", *words], capsys)


def test_bytes_read_are_those_of_the_tensors():
    for kind in serving.KINDS:
        shape = replace(serving.shape_of("lab", kind), n_kv_head=1)
        model = MiniCPM(shape)
        stored = 4 * sum(p.numel() for p in model.parameters())
        weights, cache = serving.bytes_read(shape, 1, 10, 4)
        experts = 4 * sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert weights == pytest.approx(stored - experts * 6 / 8)        # two of eight
        held = KVCache(shape, 3, 12, model.numerics.dtype, "cpu")
        assert serving.bytes_read(shape, 3, 10,
                                  4)[1] == 4 * (held.k.numel() + held.v.numel()) == 3 * cache
        assert weights <= serving.bytes_read(
            shape, 4, 10, 4)[0] < serving.bytes_read(shape, 64, 10, 4)[0] + 1 <= stored + 1
    of_two, of_eight, held = (serving.shape_of("lab", kind)
                              for kind in ("dense, size of 2", "dense, size of 8",
                                           "8 experts, 2 a token"))
    routers = held.n_layer * 8 * held.n_embd
    assert held.n_params_active == of_two.n_params_non_embedding + routers
    assert held.n_params_non_embedding == of_eight.n_params_non_embedding + routers


def ideal(settings, bandwidth=2e10, prefill=1e4):
    """Return the results of a machine that is limited only by its memory bandwidth."""
    found = {}
    for name, points in serving.series(settings).items():
        rates, read = [], []
        for p in points:
            weights, cache = serving.bytes_read(serving.shape_of(p["model"], p["kind"]), p["batch"],
                                                p["context"], settings.tokens)
            rates.append(p["batch"] * bandwidth / (weights + cache) if p["use_cache"]
                         else prefill / p["context"])
            read.append(weights + cache)
        found[name] = {"processor": "ideal", "bandwidth": bandwidth, "bytes": np.array(read),
                       "prefill": np.full(len(points), prefill), "decode": np.array([rates])}
    return found


def test_checks_hold_on_an_ideal_machine_and_each_fails_without_its_condition():
    settings = serving.Settings()
    found = ideal(settings)
    assert [check.holds for check in serving.checks(found, settings)] == [True] * 5
    assert "power -1.00" in serving.checks(found, settings)[0].ours
    assert "could write 3.7 tokens/s" in serving.checks(found, settings)[1].ours

    def slow(part, places, by):
        def change(found):
            for i in places:
                found[part]["decode"][:, i] *= by
        return change
    for i, change in enumerate((slow("sizes", [-3], 0.5),
                                lambda found: found["sizes"].update(bandwidth=5e10),
                                slow("batches", [3], 0.4), slow("contexts", [3], 0.01),
                                slow("experts", [0], 0.35))):
        broken = copy.deepcopy(found)
        change(broken)
        assert [
            check.holds for check in serving.checks(broken, settings)] == [j != i for j in range(5)]
