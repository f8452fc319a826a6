"""Solution 1: the table of muP.

Think       1. The products of a new matrix have random signs, so their sum grows with
               sqrt(width) x std: a std of 1 / sqrt(m) keeps it. An update of Adam changes all
               `width` weights of a row by about lr, with signs that follow the input: the changes
               add up to about lr x width. With lr / m that is lr x base at every width; with lr
               it is 9 times as much at width 2304.
            2. Its std falls by sqrt(9) = 3, and so do the embedding's output and, because the head
               is the same tensor, the logits at the start. Its learning rate falls by 9, although
               an embedding is looked up and adds up nothing: an update then moves the output 9
               times less than in the small model. labs/mup_coordinates.py measures it.
            3. There are 2 x layers branches. If they are independent, their squares add up: the sum
               grows with sqrt(layers), and 1 / sqrt(layers) keeps it. After many updates branches
               agree (their mean is not 0), the sum grows up to layers times, and 1 / layers would
               be needed (CompleteP, 2505.01618).
"""


def mup_table(width, layers, base=256, init_std=0.1, lr=0.01, scale_emb=12.0, scale_depth=1.4):
    m = width / base
    return {
        "embedding": (init_std, lr, scale_emb),
        "matrix": (init_std / m ** 0.5, lr / m, scale_depth / layers ** 0.5),
        "head": (init_std, lr, 1 / m),
        "norm": (0.0, lr, 1.0),
    }
