"""Solution 3: the learning rate of WSD.

Think       1. s - S = -18,500, so f = 0.5^-3.7 = 13: the rate would jump to 0.13.
            2. 0.5^(18,500 / 5,000) = 7.7 %; 10 % after 5,000 log2(10) = 16,610 steps, at step
               277,610. SFT starts at the rate at which the decay ended, about 0.001 (0.00077 by the
               formula; section 6.2 says "aligned"), not at 0.01: a higher rate would undo a part of
               the decay.
            3. A trunk of 3.6 (the longest run is 4, its last tenth a decay), and decays of 0.1,
               0.2, 0.3 and 0.4: 4.6 in all. If the decays come on top of stable stages of 1 to 4
               units, the trunk costs 4 and all of it 5. The rate depends on the step alone and is
               constant in the stable stage, so no run has to know how long it will be.
"""


def lr_at(step, peak, floor, warmup, decay_start, half_life):
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < decay_start:
        return peak
    return max(floor, peak * 0.5 ** ((step - decay_start) / half_life))
