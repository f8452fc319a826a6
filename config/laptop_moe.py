"""Experts from the laptop run (paper section 7.3): eight of them, two per token.

About three minutes on two CPU cores. First write out/laptop-moe-start from the last checkpoint of
out/laptop before its decay:

    python -m family.upcycle
"""
init_from = "out/laptop-moe-start"
out_dir = "out/laptop-moe"
block_size = 256                # as in the laptop run
batch_size = 8
max_steps = 2500                # the last fifth decays; it beats the dense model after some 1,300
learning_rate = 0.01
min_lr = 0.0003
eval_interval = 0               # only at the end
