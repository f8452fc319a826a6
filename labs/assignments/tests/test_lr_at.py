"""Assignment 3. Rates worked out by hand, the paper's largest run, and wsd.py."""
import math

import wsd
from labs.assignments.tests.expect import near_ratio

SHORT = dict(peak=0.08, floor=0.005, warmup=4, decay_start=6, half_life=2)


def test_a_short_schedule_by_hand(student):
    """Four updates of warm-up, two stable ones, then half of the rate every two updates."""
    by_hand = [0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.08, 0.0565685, 0.04, 0.0282843, 0.02]
    for step, rate in enumerate(by_hand):
        near_ratio(student.lr_at(step, **SHORT), rate, f"rate after {step} updates", 1e-5,
                   f"peak 0.08, warm-up 4, decay from 6, half-life 2: {by_hand}")


def test_the_ends(student):
    without = dict(SHORT, warmup=0)
    near_ratio(student.lr_at(0, **without), 0.08, "first rate without warm-up", hint="the peak")
    near_ratio(student.lr_at(0, **dict(SHORT, warmup=1)), 0.08, "first rate, warm-up of 1",
               hint="update 1 of 1: the peak")
    near_ratio(student.lr_at(6, **SHORT), 0.08, "rate at the start of the decay", hint="f(0) = 1")
    near_ratio(student.lr_at(14, **SHORT), 0.005, "rate after four half-lives",
               hint="0.08 / 16, which is also the floor")
    near_ratio(student.lr_at(1000, **SHORT), 0.005, "rate after 497 half-lives", hint="the floor")
    near_ratio(student.lr_at(10 ** 9, **dict(SHORT, decay_start=math.inf)), 0.08,
               "rate if the decay never starts", hint="the peak: the run can go on for ever")


def test_minicpm_2b(student):
    """Peak 0.01, decay from step 261,000 with a half-life of 5,000 to step 279,500."""
    run = dict(peak=0.01, floor=0.0, warmup=2000, decay_start=261_000, half_life=5000)
    for step, rate in ((260_999, 0.01), (266_000, 0.005), (271_000, 0.0025),
                       (277_610, 0.001), (279_500, 0.000769)):
        near_ratio(student.lr_at(step, **run), rate, f"MiniCPM-2.4B, rate after {step:,} updates",
                   1e-3, "section 6.2, counted from the start of the decay, step 261,000")


def test_never_above_the_peak_nor_below_the_floor(student):
    for decay_start in (5, 50, 300):
        rates = [student.lr_at(step, peak=0.02, floor=0.003, warmup=5, decay_start=decay_start,
                               half_life=30) for step in range(700)]
        assert max(rates) <= 0.02 * (1 + 1e-9), (
            f"decay from {decay_start}: expected no rate above the peak 0.02, got {max(rates):.6g} "
            f"after {rates.index(max(rates))} updates")
        assert min(rates[5:]) >= 0.003 * (1 - 1e-9), (
            f"decay from {decay_start}: expected no rate below the floor 0.003, got "
            f"{min(rates):.6g}")
        assert all(a >= b for a, b in zip(rates[4:], rates[5:])), (
            f"decay from {decay_start}: expected rates that never rise after the warm-up")


def test_wsd_py_has_the_same_rate_at_every_step(student):
    for warmup, decay_start, half_life in ((0, 10, 3), (7, 7, 11), (20, 90, 40)):
        for step in range(decay_start + 100):
            expected = wsd.lr_at(step, peak=0.01, floor=0.001, warmup=warmup,
                                 max_steps=decay_start + 1000, decay_steps=1000,
                                 half_life=half_life)
            got = student.lr_at(step, 0.01, 0.001, warmup, decay_start, half_life)
            near_ratio(got, expected, f"rate after {step} updates, warm-up {warmup}, decay from "
                       f"{decay_start}, half-life {half_life}", hint="wsd.lr_at")
