"""A decay that branches off from the laptop run: about a minute on two CPU cores."""
branch_from = "out/laptop"  # the latest checkpoint of this run before its decay
out_dir = "out/laptop-decay"
decay_steps = 600           # down to min_lr
eval_interval = 0           # only at the end
