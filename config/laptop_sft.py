"""SFT of the laptop run on instructions whose answers can be checked.

Two and a half minutes on one CPU core.
"""
init_from = "out/laptop-anneal"  # weights only: a new run from step 0; out/laptop works too
out_dir = "out/laptop-sft"
data = "instruct"           # conversations in rows of the default block_size, loss on answers
doc_mask = True             # attention stays within a conversation
max_steps = 1200
# The paper (section 6.2) starts at the rate at which annealing ended. A run as short as this learns
# more from a higher one.
learning_rate = 0.003
warmup_steps = 0
decay_share = 0.5           # WSD, exponential decay to min_lr
sample_tokens = 0           # sample.py --ckpt=out/laptop-sft --chat=True talks to it
eval_interval = 300
save_interval = 0
