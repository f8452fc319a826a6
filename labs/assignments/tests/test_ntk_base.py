"""Assignment 7. Bases by hand, the two ends of the spectrum, the 128K model, and model.py."""
import numpy as np
import torch

from labs.assignments.tests.expect import near_ratio, plain
from model import MiniCPMConfig, rope_tables


def test_bases_by_hand(student):
    near_ratio(student.ntk_base(10_000, 4, 4), 160_000, "base for theta 10,000, D 4, s 4", 1e-6,
               "the exponent is 4 / 2: 10,000 * 4^2")
    near_ratio(student.ntk_base(10_000, 64, 4), 41_829.3, "base for theta 10,000, D 64, s 4", 1e-4,
               "10,000 * 4^(64 / 62)")
    near_ratio(student.frequencies(10_000, 4), [1, 0.01], "frequencies for theta 10,000, D 4", 1e-6,
               "theta^0 and theta^(-2 / 4)")


def test_the_slowest_pair_is_stretched_and_the_fastest_kept(student):
    for theta, dim, s in ((10_000, 64, 4), (10_000, 128, 8), (500_000, 16, 2.5)):
        before = plain(student.frequencies(theta, dim))
        after = plain(student.frequencies(student.ntk_base(theta, dim, s), dim))
        assert np.shape(before) == (dim // 2,), (
            f"frequencies of D {dim}: expected {dim // 2}, got the shape {np.shape(before)}")
        near_ratio(before[0] / after[0], 1, f"fastest frequency, before / after, D {dim}", 1e-6,
                   "neighbors must be told apart as before")
        near_ratio(before[-1] / after[-1], s, f"slowest frequency, before / after, D {dim}, s {s}",
                   1e-6, "the whole stretched length must lie within the trained angles")


def test_the_dynamic_form_starts_at_the_trained_length(student):
    short = [student.dynamic_base(10_000, 64, 4, length, 4096) for length in (1, 100, 3500, 4096)]
    near_ratio(short, [10_000.0] * 4, "dynamic base up to max_position", hint="unchanged")
    near_ratio(student.dynamic_base(10_000, 64, 4, 4097, 4096), 10_010.08, "one token later", 1e-6,
               "s = 4 * 4097 / 4096 - 3: no jump")
    near_ratio(student.dynamic_base(10_000, 64, 1, 8192, 4096), 10_000 * 2 ** (64 / 62),
               "dynamic base at twice the length, factor 1", hint="s = 2")


def test_the_128k_model(student):
    """Base 1e6, factor 4, 65,536 positions, head dimension 64, read at 131,072 tokens: s = 5."""
    near_ratio(student.dynamic_base(1e6, 64, 4, 131_072, 65_536), 5.2664e6,
               "MiniCPM-2B-128k's base at 131,072 tokens", 1e-4, "1e6 * 5^(64 / 62)")


def test_model_py_turns_by_the_same_angles(student):
    for factor, limit, length in ((1.0, 32, 32), (4.0, 32, 48), (2.0, 32, 128)):
        config = MiniCPMConfig(n_embd=96, n_head=2, head_dim=48, max_position=limit,
                               rope_scaling="dynamic", rope_factor=factor)
        cos, signed_sin = rope_tables(config, length, "cpu")
        base = student.dynamic_base(config.rope_theta, 48, factor, length, limit)
        angles = torch.outer(torch.arange(length).double(),
                             torch.as_tensor(plain(student.frequencies(base, 48))))
        worst = max((angles.cos() - cos[:, :24]).abs().max(),
                    (angles.sin() - signed_sin[:, 24:]).abs().max())
        assert worst < 1e-4, (f"cosines and sines at {length} tokens, trained on {limit}, factor "
                              f"{factor}: expected those of model.rope_tables, off by {worst:.2g}")
