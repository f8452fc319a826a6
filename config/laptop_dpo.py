"""DPO after the laptop's SFT run: prefer a short answer ("7") to a long one ("The answer is 7.").

Both answers of a pair are correct.
"""
init_from = "out/laptop-sft"
out_dir = "out/laptop-dpo"
data = "instruct"           # corpus that tools/evaluate.py measures on
pairs = "data/instruct/pairs_train.jsonl"
max_pairs = 3200            # a tenth of the 32,000: one epoch is 100 updates
val_pairs = "data/instruct/pairs_test.jsonl"
mup_lr = False              # one learning rate for all parameters, as in the paper
learning_rate = 1e-4        # a third of the rate at which SFT ended; the paper's is for 2.4B
sft_coef = 1.0              # without it answers get short, but fewer of them are right
block_size = 128
batch_size = 32
eval_interval = 50
save_interval = 0
