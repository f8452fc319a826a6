"""Assignment 1: the table of muP (paper section 3.1 and appendix A.1, table 7).

Question    A learning rate of 0.01 was found on a model of width 320. Which init, which learning
            rate and which multiplier must each tensor of a model of width 2304 have, so that 0.01
            is right again?
Formula     Table 7, with the width multiplier m = width / base:
                embedding    its output is multiplied by scale_emb
                matrix       init std = init_std / sqrt(m), learning rate = lr / m; the output of
                             each residual branch is multiplied by scale_depth / sqrt(layers)
                head         the logits are multiplied by 1 / m
                norm         learning rate lr, multiplier 1
            The embedding and the head are one tied tensor. Table 7 scales "two-dimensional"
            tensors, and does not say whether this is one. Here it is not: it has the std init_std
            and the learning rate lr at every width. All weights of a norm start at 1: their std
            is 0.
Shapes,     width, base, layers: numbers above 0. base (d_base in the paper) is the width at which
units       the constants are used as they are. A std is that of a normal distribution with mean 0.
            Learning rates are for Adam.
Given       nothing but this page. `layers` counts the layers, not the branches (there are two per
            layer).
Passes      when the numbers of MiniCPM-2.4B and 1.2B are right (to 1e-6), nothing is scaled at the
            base width, other constants are used as given, and model.py has the same table.
Think       1. A matrix adds up `width` products. By how much does one update of Adam (about lr per
               weight, all with the sign of the gradient) change its output, with lr / m, and with
               lr? Why is it sqrt(m) for the std, but m for the learning rate?
            2. What would happen to the tied embedding if it counted as a matrix: to the size of its
               output, and to the logits, at width 2304?
            3. Why is it sqrt(layers) and not layers? What do you assume about the branches, and
               when is that wrong?
"""


def mup_table(width, layers, base=256, init_std=0.1, lr=0.01, scale_emb=12.0, scale_depth=1.4):
    """Return {role: (std, learning rate, multiplier)}, three floats for each of the four roles
    "embedding", "matrix", "head" and "norm"."""
    raise NotImplementedError("assignment 1: write mup_table")
