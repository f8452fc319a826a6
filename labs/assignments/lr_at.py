"""Assignment 3: the learning rate of WSD (paper section 4.2, equation 1, and section 6.2).

Question    What is the learning rate of the next update after `step` updates?
Formula     Equation 1: with the peak eta, the warm-up W, the end T of the stable stage,
                WSD(s) = s / W * eta        s < W
                         eta                W <= s < T
                         f(s - T) * eta     T <= s        0 < f <= 1, falling
            Section 6.2 prints f = 0.5^((s - S) / T), which is a misprint: it is above 1 in the
            whole decay. Use the reading that fits the released checkpoints: the rate halves every
            `half_life` updates, counted from the start of the decay, and never falls below the
            floor.
            One change to equation 1: the update after s updates is number s + 1, so use (s + 1) / W
            in the warm-up. Then the first update is not wasted on a rate of 0.
Shapes,     step, warmup, decay_start, half_life: counts of updates; step and warmup may be 0.
units       peak and floor are learning rates. decay_start is T, with warmup <= decay_start; it is
            math.inf as long as nobody knows when the run will end.
Given       nothing but this page. No state: the rate depends on the arguments alone, so that a run
            can be continued, and a decay can branch from any stable step.
Passes      when a short schedule has the rates worked out by hand, the ends are right (no warm-up,
            last warm-up update, first and last of the decay), MiniCPM-2.4B's rates come out, no
            rate is above the peak or, after the warm-up, below the floor, and wsd.py agrees at
            every step. (In the warm-up a rate may be below the floor.)
Think       1. In the formula that section 6.2 prints, T is 5,000, the half-life, and not the end of
               the stable stage. Evaluate it where the decay starts, s = 261,000, with S = 279,500,
               the last step of the released checkpoints. How large is the learning rate?
            2. MiniCPM-2.4B decays from step 261,000 to 279,500. Which share of the peak is left,
               and after which step is it 10 %? At which rate should fine-tuning begin?
            3. Runs of 1, 2, 3 and 4 units of tokens from scratch, each with a cosine, cost 10
               units. What do one trunk and four decays of 10 % cost? Which property of lr_at makes
               that possible?
"""


def lr_at(step, peak, floor, warmup, decay_start, half_life):
    """Return the learning rate, a float, of the update after `step` updates."""
    raise NotImplementedError("assignment 3: write lr_at")
