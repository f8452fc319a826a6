"""Experts from the laptop run (paper section 7.3): eight of them, two a token, trained on: some three minutes on two CPU cores.

    python -m family.upcycle           writes out/laptop-moe-start from out/laptop's last checkpoint before the decay
"""
init_from = "out/laptop-moe-start"
out_dir = "out/laptop-moe"
block_size = 256                # as the laptop run
batch_size = 8
max_steps = 2500                # of which the last fifth decays; the dense model is passed after some 1,300
learning_rate = 0.01
min_lr = 0.0003
eval_interval = 0               # only at the end
