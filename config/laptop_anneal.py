"""Annealing (paper section 5): the laptop run's decay again, with instructions in its data. Under two minutes on two CPU cores."""
branch_from = "out/laptop"      # a run folder: its latest checkpoint before the decay
out_dir = "out/laptop-anneal"
decay_data = "pytorch:0.7,instruct:0.3"     # from the first decay step on; of conversations the answers are targets
decay_steps = 1000
eval_interval = 0               # only at the end
