"""decay_dynamics: its quantities on a loss whose curvature is known, its checks on made-up runs,
and its quick run."""
import numpy as np
import pytest
import torch

from engine import metrics
from labs import decay_dynamics as lab
from labs import runs

NAMES = ("largest update", "norm", "fresh batches", "slope", "curvature", "sharpness is higher",
         "within a factor of 2 of the threshold", "at least 1.5 times",
         "by less than the threshold", "rises nowhere", "convex", "is lower")


@pytest.mark.slow
def test_the_quick_run(lab_files, capsys):
    lab.main(["--quick=True", "--workers=1"])
    out = capsys.readouterr().out
    assert all((lab_files / f"decay_dynamics{page}.png").stat().st_size > 10_000
               for page in ("", "_slide"))
    # p of one seed
    assert all(name in out for name in NAMES) and "nan" not in out.replace("(p = nan)", "")
    lines = metrics.read_jsonl(lab_files / "decay_dynamics.jsonl")
    assert [(line["job"]["batch_size"], line["job"]["seed"]) for line in lines] == [(4, 0), (8, 0)]
    result = lines[0]["result"]
    assert result["steps"][-1] == 39
    assert len({len(result[name]) for name in ("steps", "lr", "cosine", "D1", "curvature")}) == 1
    assert result["lr"][0] == 0.01 and 0.001 < result["lr"][-1] < 0.002
    steps, rates, _ = zip(*result["sharpness"])
    assert len(steps) == 10 and (steps[4], steps[9]) == (32, 40)
    assert (rates[4], rates[9]) == (0.01, pytest.approx(0.001))
    assert result["stable to decayed"][lab.START] == result[
        "stable to stable"][lab.END], "both lines pass through the last stable weights"


def test_directional_derivatives_of_a_parabola():
    """loss = x.H.x / 2: the slope along v at x + v is (x + v).H.v / |v|, its change v.H.v / |v|^2.
    """
    H = torch.diag(torch.tensor([1.0, 10.0]))
    x, v = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    assert lab.directional(H @ x, H @ (x + v), v) == pytest.approx((5.0, 10 / 26 ** 1.5))


def test_sharpness_is_the_largest_eigenvalue_also_if_a_negative_one_is_larger_in_size(monkeypatch):
    H = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))
    H, p = H + H.T - 10 * torch.eye(60), torch.nn.Parameter(torch.ones(60))
    optimizer = torch.optim.AdamW([{"params": [p], "lr_scale": 2.0}], betas=(0.9, 0.95))
    p.grad = torch.linspace(0.1, 1, 60)
    optimizer.step()                            # the first v_hat is the square of the gradient
    scale = (2 / p.grad).sqrt()
    eigenvalues = torch.linalg.eigvalsh(scale[:, None] * H * scale)
    assert -eigenvalues[0] > eigenvalues[-1] > 0
    monkeypatch.setattr(lab, "gradient", lambda model, params, probe, create_graph: H @ p)
    assert lab.sharpness(None, None, optimizer,
                         iterations=30) == pytest.approx(eigenvalues[-1].item(), rel=1e-3)


def test_a_product_with_the_hessian_of_the_model_is_the_change_of_its_gradient():
    model, updates, _ = runs.begin("config/lab.py", **runs.shape(8), batch_size=4, block_size=32,
                                   max_steps=30)
    for update in updates:
        pass
    batch = {"idx": torch.arange(64).view(2, 32), "targets": torch.arange(1, 65).view(2, 32)}
    params = list(model.parameters())
    slope = lab.gradient(model, params, [batch], create_graph=True)
    direction = torch.randn(len(slope), generator=torch.Generator().manual_seed(0))
    product = torch.cat([part.flatten() for part in torch.autograd.grad(slope @ direction, params)])
    x, ends = lab.parameters_to_vector(params).detach(), []
    for sign in (-1, 1):
        lab.vector_to_parameters(x + sign * 1e-3 * direction, params)
        ends.append(lab.gradient(model, params, [batch]).detach())
    assert torch.nn.functional.cosine_similarity(product, ends[1] - ends[0], 0) > 0.99


def made_up(settings):
    """Results as the paper has them, and the sharpness as Cohen et al. have it."""
    steps = np.arange(settings.every + 1, settings.steps, settings.every)
    decayed = steps > settings.steps * (1 - settings.decay_share)
    line, two = np.array(lab.LINE), lambda values: np.array([values, 1.01 * np.array(values)])
    found = {}
    for batch_size, sharp in ((16, 1000), (128, 3000)):
        sharpness = [[10 * i, 0.01 if i < 5 else 0.001, sharp * (1 if i < 5 else 3)]
                     for i in range(10)]
        values = {"lr": (0.01, 0.001), "largest update": (0.1, 0.01), "gradient norm": (1, 0.5),
                  "cosine": (-0.1, 0.3), "D1": (-0.2, 0.01), "curvature": (1, 10)}
        found[batch_size] = {"steps": np.array([steps, steps]),
                             "sharpness": np.array([sharpness, sharpness]),
                             "stable to decayed": two((line - 1) ** 2),
                             "stable to stable": two((line - 0.5) ** 2),
                             **{name: two(np.where(decayed, end, stable))
                                for name, (stable, end) in values.items()}}
    return found


def test_checks_hold_on_the_papers_picture_and_fail_without_it():
    settings = lab.Settings(seeds=(0, 1))

    def failing(spoil=lambda found: None):
        found = made_up(settings)
        spoil(found)
        with np.errstate(divide="ignore", invalid="ignore"):            # the made-up seeds agree
            checks = lab.checks(found, settings)
        assert len(checks) == len(NAMES)
        assert all(name in check.claim for name, check in zip(NAMES, checks))
        return [i for i, check in enumerate(checks) if not check.holds]

    def times(batch_size, name, factor, at=slice(None)):
        def spoil(found):
            found[batch_size][name][:, at] *= factor
        return failing(spoil)
    assert failing() == []
    late = slice(len(made_up(settings)[16]["steps"][0]) * 4 // 5, None)
    assert times(16, "largest update", 3, late) == [0]
    assert times(128, "gradient norm", 3, late) == [1]
    assert times(128, "cosine", -1) == [
        2] and times(16, "cosine", -1) == [], "the check is about the large batches"
    assert times(16, "D1", 20, late) == [3]
    assert times(128, "curvature", 0.05, late) == [4]

    def sharp(batch_size, factor, first):
        def spoil(found):
            found[batch_size]["sharpness"][:, first:, 2] *= factor
        return failing(spoil)
    assert sharp(16, 4, 0) == [5] and sharp(128, 5, 0) == [6]
    assert sharp(16, 0.4, 5) == [7] and sharp(128, 4, 5) == [8]
    assert times(128, "stable to decayed", 10, lab.MIDDLE) == [9, 10], "a hill"
    assert times(16, "stable to stable", 0, lab.END) == [11]


def test_settings_that_leave_nothing_to_compare_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        lab.main(["--every=1", "--decay_share=0.6"])
    assert stop.value.code == 2 and "--every=1" in (said := capsys.readouterr().err)
    assert "--decay_share=0.6" in said
