"""Annealing (paper section 5): the decay of the laptop run, with instructions in its data.

Under two minutes on two CPU cores.
"""
branch_from = "out/laptop"      # the latest checkpoint of this run before its decay
out_dir = "out/laptop-anneal"
# From the first decay step on. In conversations, only the answers are targets.
decay_data = "pytorch:0.7,instruct:0.3"
decay_steps = 1000
eval_interval = 0               # only at the end
