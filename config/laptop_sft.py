"""SFT of the laptop run: instructions with answers that can be checked. Two and a half minutes on one CPU core."""
init_from = "out/laptop-anneal"    # its weights alone: a run of its own, from step 0; out/laptop would do
out_dir = "out/laptop-sft"
data = "instruct"           # conversations, packed in rows of the default block_size; the loss is on their answers
doc_mask = True             # attention stays within a conversation
max_steps = 1200
learning_rate = 0.003       # above where annealing ended, the rule of the paper (section 6.2): so short a run learns more from it
warmup_steps = 0
decay_share = 0.5           # wsd, exponential to min_lr
sample_tokens = 0           # python sample.py --ckpt=out/laptop-sft --chat=True talks to it
eval_interval = 300
save_interval = 0
