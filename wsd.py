"""Learning-rate schedules: pure functions of the step.

    python wsd.py [--out=schedules.png]        draws all of them

Step s means that s updates are done: update s + 1 uses lr_at(s). A run of max_steps updates uses
steps 0 to max_steps - 1. If the run decays, its last update uses the floor (with half_life or
period: at least the floor); engine/run.py refuses a warm-up that leaves no room for that.
"""
import math
from dataclasses import dataclass

from configurator import configure, exits_cleanly

DECAYS = ("exponential", "linear", "cosine", "1-sqrt")


def lr_at(step, *, peak, floor, warmup, max_steps, decay_steps, schedule="wsd",
          decay="exponential", half_life=None, period=None, start=0):
    """Return the learning rate of the update after `step` updates.

    peak, floor  highest and last learning rate
    warmup       updates of linear warm-up, counted from `start` (a branch that warms up again
                 starts late)
    max_steps    updates in all; math.inf if the horizon is not known yet
    decay_steps  updates of the decay at the end of a WSD run; 0: none
    decay        form of that decay, see wsd_decay
    half_life    updates in which an exponential decay halves the rate; None: it ends at the floor
    period       T of a cosine, in updates from `start`; None: all updates of the run
    """
    if step - start < warmup:
        return peak * (step - start + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule in ("cosine", "cosine_loop"):
        curve = cosine if schedule == "cosine" else cosine_loop
        return curve(step - start, peak, floor, period or max_steps - start)
    decay_start = max_steps - decay_steps
    if step < decay_start:
        return peak
    return wsd_decay(step - decay_start, peak, floor, decay_steps, decay, half_life)


def falls_from(warmup, max_steps, decay_steps, schedule="wsd", start=0):
    """Return the step from which the rate falls: it has fallen after more than so many updates.

    Between warm-up and this step a run is stable: it can be continued, branched and given another
    horizon. math.inf if the rate never falls. A cosine falls as soon as its warm-up ends.
    """
    if schedule in ("cosine", "cosine_loop"):
        return start + warmup
    return max_steps - decay_steps if schedule == "wsd" and decay_steps else math.inf


def wsd_decay(k, peak, floor, decay_steps, decay, half_life=None):
    """Return the rate k updates into the decay of WSD (paper section 4.2).

    Without half_life the rate is the peak at k = 0 and the floor at k = decay_steps - 1 (one step:
    the floor).

    exponential  peak * 0.5 ** (k / half_life). The formula of section 6.2 does not subtract the
                 start of the decay in its exponent, so it would exceed 1; this is the consistent
                 reading, with the paper's half-life of 5,000 steps. A half-life that is given wins
                 over decay_steps: the floor is then only a lower bound.
    """
    if decay == "exponential" and half_life is not None:
        return max(floor, peak * 0.5 ** (k / half_life))
    if k >= decay_steps - 1:
        return floor
    share = k / (decay_steps - 1)
    if decay == "exponential":
        return peak * (floor / peak) ** share
    remaining = {"linear": 1 - share,
                 "cosine": 0.5 * (1 + math.cos(math.pi * share)),
                 "1-sqrt": 1 - math.sqrt(share)}[decay]
    return floor + (peak - floor) * remaining


def cosine(step, peak, floor, period):
    """Return Cosine(T) of appendix B.1 with T = period: from peak to floor, then the floor.

    The paper prints 0.9 cos(pi s / T) + 0.1, which becomes negative; this is the usual form with
    the same ends. Like the paper's it counts from the first update, not from the end of the
    warm-up: after a warm-up of a share w of T it starts below the peak, at cosine(w T).
    """
    if step >= period - 1:
        return floor
    return cosine_loop(step, peak, floor, period)


def cosine_loop(step, peak, floor, period):
    """Return CosineLoop(T) of appendix B.1: like cosine, but it rises again after T."""
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * step / max(1, period - 1)))


# ---- the figure

@dataclass
class DrawConfig:
    out: str = "schedules.png"          # where the figure goes

    def problems(self):
        if self.out.endswith((".png", ".pdf", ".svg")):
            return []
        return [f"--out={self.out}: must end in .png, .pdf or .svg"]


def draw(path):
    """Draw every schedule over 1,000 steps, and the one of MiniCPM-2.4B."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    common = dict(peak=1e-2, floor=1e-3, warmup=50)
    curves = {f"WSD, {decay} decay": dict(max_steps=1000, decay_steps=200, decay=decay)
              for decay in DECAYS}
    for schedule, period in (("cosine", 1000), ("cosine_loop", 500)):
        curves[f"{schedule}, T = {period}"] = dict(max_steps=1000, decay_steps=0,
                                                   schedule=schedule, period=period)
    curves["constant"] = dict(max_steps=1000, decay_steps=0, schedule="constant")
    styles = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)))
    for (label, options), style in zip(curves.items(), styles):
        left.plot([lr_at(step, **common, **options) for step in range(1000)], linestyle=style,
                  label=label)
    left.set(title="1,000 steps, decay 20 %", xlabel="step", ylabel="learning rate")
    steps = range(0, 279_501, 100)
    right.plot(steps, [lr_at(step, peak=1e-2, floor=0, warmup=2000, max_steps=279_500,
                             decay_steps=18_500, half_life=5000) for step in steps],
               label="halved every 5,000 steps from step 261,000")
    right.set(title="MiniCPM-2.4B (the paper does not state the warm-up: 2,000 drawn)",
              xlabel="step", ylabel="learning rate")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@exits_cleanly
def main(argv):
    (config,), _ = configure(argv, DrawConfig, usage=__doc__)
    draw(config.out)
    print(f"drew {config.out}")


if __name__ == "__main__":
    main()
