"""Learning-rate schedules: pure functions of the step.

    python wsd.py [--out=schedules.png]        draws them all

Step s means that s updates are done: update s + 1 uses lr_at(s). A run of max_steps updates uses steps 0 to max_steps - 1,
and its last update uses the floor.
"""
import math
from dataclasses import dataclass

from configurator import BadInput, configure, exits_cleanly

DECAYS = ("exponential", "linear", "cosine", "1-sqrt")


def lr_at(step, *, peak, floor, warmup, max_steps, decay_steps, schedule="wsd", decay="exponential", half_life=None, start=0):
    """Learning rate of the update after `step` updates.

    peak, floor  highest and last learning rate
    warmup       updates of linear warm-up, counted from `start` (a branch that warms up again starts late)
    max_steps    updates in all; math.inf where the horizon is not settled yet
    decay_steps  last updates of a WSD run, spent decaying; 0: none
    half_life    updates in which an exponential decay halves the rate; None: whatever ends exactly at the floor
    """
    if step - start < warmup:
        return peak * (step - start + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return cosine(step, peak, floor, max_steps)
    if schedule == "cosine_loop":
        return cosine_loop(step, peak, floor, max_steps)
    return peak if step < max_steps - decay_steps else wsd_decay(
        step - (max_steps - decay_steps), peak, floor, decay_steps, decay, half_life)


def wsd_decay(k, peak, floor, decay_steps, decay, half_life=None):
    """The decay stage of WSD (paper section 4.2), k updates into it: peak at k = 0, floor at k = decay_steps - 1.

    exponential  peak * 0.5 ** (k / half_life). Section 6.2 prints the start of the decay nowhere in its exponent and
                 so exceeds 1; this is the consistent reading, with the paper's half-life of 5,000 steps. A half-life that
                 is given wins over the length of the decay: the floor is then only a lower bound.
    """
    if decay == "exponential" and half_life is not None:
        return max(floor, peak * 0.5 ** (k / half_life))
    if k >= decay_steps - 1:
        return floor
    share = k / (decay_steps - 1)
    if decay == "exponential":
        return peak * (floor / peak) ** share
    falling = {"linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share)), "1-sqrt": 1 - math.sqrt(share)}[decay]
    return floor + (peak - floor) * falling


def cosine(step, peak, floor, max_steps):
    """Cosine(T) of appendix B.1 with T = max_steps: from peak to floor, and floor after that.

    The paper prints 0.9 cos(pi s / T) + 0.1, which turns negative; this is the usual form with the same ends.
    """
    if step >= max_steps - 1:
        return floor
    return cosine_loop(step, peak, floor, max_steps)


def cosine_loop(step, peak, floor, max_steps):
    """CosineLoop(T) of appendix B.1: as cosine, but it rises again after T."""
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * step / max(1, max_steps - 1)))


@dataclass
class DrawConfig:
    out: str = "schedules.png"  # where the figure goes


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, DrawConfig, usage=__doc__)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not config.out.endswith((".png", ".pdf", ".svg")):
        raise BadInput(f"--out={config.out}: must end in .png, .pdf or .svg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    common = dict(peak=1e-2, floor=1e-3, warmup=50)
    styles = iter(("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3))))
    for decay in DECAYS:
        rates = [lr_at(s, **common, max_steps=1000, decay_steps=200, decay=decay) for s in range(1000)]
        left.plot(rates, linestyle=next(styles), label=f"WSD, {decay} decay")
    for schedule, horizon in (("cosine", 1000), ("cosine_loop", 500), ("constant", 1000)):
        rates = [lr_at(s, **common, max_steps=horizon, decay_steps=0, schedule=schedule) for s in range(1000)]
        left.plot(rates, linestyle=next(styles), label=f"{schedule}, T = {horizon}")
    left.set(title="1,000 steps, decay 20 %", xlabel="step", ylabel="learning rate")
    steps = range(0, 279_501, 100)
    right.plot(steps, [lr_at(s, peak=1e-2, floor=0, warmup=2000, max_steps=279_500, decay_steps=18_500, half_life=5000)
                       for s in steps], label="halved every 5,000 steps from step 261,000")
    right.set(title="MiniCPM-2.4B (warm-up is not stated: 2,000 drawn)", xlabel="step", ylabel="learning rate")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(config.out, dpi=120)
    print(f"drew {config.out}")


if __name__ == "__main__":
    main()
