"""labs/preferences.py: the quick run, and checks that fail when they should."""
import dataclasses
import math
from dataclasses import asdict

import pytest
import torch

from data.tokenizer import load_tokenizer
from engine import checkpoint, metrics
from family import dpo
from labs import preferences, runs
from model import MiniCPM, MiniCPMConfig, init_weights

SETTINGS = dataclasses.replace(preferences.Settings(), betas=(0.1, 1.0), seeds=(0, 1))


@pytest.mark.slow
def test_the_quick_run_draws_and_reuses_its_results(lab_files, monkeypatch, capsys):
    # one figure per run takes long
    monkeypatch.setattr(metrics, "draw", lambda folder: None)
    preferences.main(["--quick=True", "--workers=1"])
    results, said = (lab_files / "preferences.jsonl").read_text(), capsys.readouterr().out
    lines = metrics.read_jsonl(lab_files / "preferences.jsonl")
    assert len(lines) == 1 + 3 * 2 + 1 and (lab_files / "preferences.png").stat().st_size > 10_000
    assert (lab_files / "preferences_slide.png").exists()
    assert all(line["result"]["kl"] > 0 and "short" in line["result"] for line in lines[1:])
    assert said.count(" | ") == 10 and str(lab_files) not in results
    preferences.main(["--quick=True", "--workers=1"])                   # nothing is run again
    assert (lab_files / "preferences.jsonl").read_text() == results


def test_a_given_checkpoint_is_identified_by_its_weights(lab_files):
    config = MiniCPMConfig(vocab_size=load_tokenizer("bytes").n_vocab, n_layer=1, n_head=1,
                           n_embd=8, n_ff=8)
    model, starts = MiniCPM(config), []
    for name, seed in (("one", 0), ("the same", 0), ("other", 1)):
        init_weights(model, seed)
        checkpoint.save_checkpoint(lab_files / name, 0, {"model": model.state_dict()},
                                   {"model": asdict(config)}, load_tokenizer("bytes").save)
        starts.append(preferences.keep_copy(str(lab_files / name)))
    assert starts[0] == starts[1] != starts[2]
    assert MiniCPM.from_pretrained(preferences.start_folder(starts[2])).config == config


def test_fresh_pairs_are_new_and_a_share_of_their_labels_is_wrong(lab_files):
    runs.prepare(runs.LabConfig(), data="instruct", tokenizer="bytes")
    fresh = metrics.read_jsonl(preferences.fresh_pairs(200))
    prompts = {pair["prompt"] for pair in fresh}
    known = [line["messages"][0]["content"] for name in ("train", "test")
             for line in metrics.read_jsonl(preferences.TRAIN.with_name(f"{name}.jsonl"))]
    assert len(prompts) == 200 and not prompts & set(known)
    assert all(pair["rejected"] == f"The answer is {pair['chosen']}." for pair in fresh)
    preferences.label_pairs(200, 0.2, 0, lab_files / "labelled.jsonl")
    labelled = metrics.read_jsonl(lab_files / "labelled.jsonl")
    wrong = [pair for pair, other in zip(fresh, labelled) if pair != other]
    assert len(wrong) == 40
    assert all(other in fresh
               or {**other, "chosen": other["rejected"], "rejected": other["chosen"]} in wrong
               for other in labelled)


def test_the_optimum_of_flipped_labels():
    best = preferences.optimum(dataclasses.replace(SETTINGS, betas=(1.0, 1e9)), {"short": 0.5})
    assert best["margin"] == pytest.approx(math.log(4))
    assert best["short"] == pytest.approx([0.8, 0.5])
    assert best["kl"] == pytest.approx([0.8 * math.log(1.6) + 0.2 * math.log(0.4), 0])
    # the loss of a pair with label noise is lowest there, whatever beta
    ratios = torch.linspace(0, 20, 20001)
    pairs = torch.stack([ratios, torch.zeros_like(ratios)], 1)
    for beta in (0.1, 1.0):
        # a fifth of the labels wrong
        losses = dpo.dpo_loss(pairs, torch.zeros_like(pairs), beta, label_smoothing=0.2)
        assert beta * float(ratios[losses.argmin()]) == pytest.approx(math.log(4), rel=1e-2)


def test_the_sft_term_asks_for_the_share_at_which_the_loss_of_dpo_is_lowest():
    """With short answers of 3 tokens and long ones of 10, whose first token decides."""
    config = dpo.DPOConfig(init_from="", pairs="", beta=1e-6, sft_coef=1.0)
    shares, losses = torch.linspace(0.01, 0.99, 99), []
    for p in shares:
        short, long = p.log(), (1 - p).log()
        policy = torch.stack([torch.stack([short, long]), torch.stack([long, short])])
        each, _ = dpo.dpo_metrics(policy, torch.zeros(2, 2), torch.tensor([3, 10]), config)
        losses.append(0.8 * each[0] + 0.2 * each[1])
    asked = preferences.copied_share(SETTINGS, {"chosen": 1 / 3, "rejected": 1 / 10})
    assert asked == pytest.approx(float(shares[torch.stack(losses).argmin()]), abs=0.006)


BEFORE = {"exact": 0.62, "short": 0.5, "chosen": 0.2, "rejected": 0.2}


def best_share(arm, beta):
    return 0.8 if arm == preferences.ALONE else float(
        preferences.optimum(SETTINGS, BEFORE)["short"][SETTINGS.betas.index(beta)])


GOOD = {"accuracy": 1.0, "kl": lambda arm, beta: 1 / beta, "short": best_share,
        "margin": lambda arm, beta: 3 if arm == "all labels right" else 1.3,
        "exact": lambda arm, beta: 0.65 if arm == preferences.ALONE else 0.6 if "SFT" in arm
        or beta == 1 else 0.5}


def made_up(**changes):
    """Return results of all runs; changes: {measure: value of every run, or a function of (arm,
    beta)}. The second of two seeds is 0.1 % off."""
    values = {**GOOD, **changes}
    def run(arm, beta, scale):
        return {name: scale * (value(arm, beta) if callable(value) else value)
                for name, value in values.items()}
    arms = {**dict.fromkeys(SETTINGS.arms, SETTINGS.betas),
            preferences.ALONE: [preferences.BETA_ALONE]}
    return {arm: {beta: [run(arm, beta, 1), run(arm, beta, 0.999)] for beta in betas}
            for arm, betas in arms.items()}


@pytest.mark.parametrize("changes, fails", [
    ({}, []),
    ({"accuracy": lambda arm, beta: 0.79 if beta == 1 else 1}, [0]),
    ({"margin": lambda arm, beta: 3 if arm == "all labels right" else 1.3 * beta}, [1]),
    ({"margin": 1.3}, [2]),
    ({"short": lambda arm, beta: 1.0}, [3, 9]),
    ({"kl": lambda arm, beta: beta}, [4]),
    ({"exact": lambda arm, beta: 0.6 if "SFT" in arm or beta < 1 else 0.5}, [5, 6, 8]),
    ({"exact": 0.5}, [5, 6, 7, 8]),
])
def test_checks_fail_when_they_should(changes, fails):
    checks = preferences.checks((BEFORE, made_up(**changes)), SETTINGS)
    assert [n for n, check in enumerate(checks) if not check.holds] == fails


def test_a_diverged_run_fails_its_checks():
    after = made_up()
    for found in after.values():
        found[min(found)] = [None, found[min(found)][0]]
    assert not any(check.holds for check in preferences.checks((BEFORE, after), SETTINGS))
