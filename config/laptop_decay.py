"""A decay branched from the laptop run's stable checkpoint: under two minutes on two CPU cores."""
branch_from = "out/laptop"  # a run folder: its latest checkpoint before the decay
out_dir = "out/laptop-decay"
decay_steps = 600           # from there to min_lr
eval_interval = 0           # only at the end
