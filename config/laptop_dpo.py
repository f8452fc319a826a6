"""DPO of the laptop's SFT run: of two correct answers the short one ("7") over the long one ("The answer is 7.")."""
init_from = "out/laptop-sft"
out_dir = "out/laptop-dpo"
data = "instruct"           # for evaluate.py
pairs = "data/instruct/pairs_train.jsonl"
max_pairs = 3200            # of 32,000: one epoch over a tenth of them, 100 updates
val_pairs = "data/instruct/pairs_test.jsonl"
mup_lr = False              # one learning rate for all, as in the paper
learning_rate = 1e-4        # a third of where SFT ended; the paper's 1e-5 is for 2.4B
sft_coef = 1.0              # without it the short answers come, but fewer of them are right
block_size = 128
batch_size = 32
eval_interval = 50
save_interval = 0
