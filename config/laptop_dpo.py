"""DPO of the laptop's SFT run: of two correct answers the short one ("7") over the long one ("The answer is 7.")."""
init_from = "out/laptop-sft"
out_dir = "out/laptop-dpo"
pairs = "data/instruct/pairs_train.jsonl"
max_pairs = 6400            # of 32,000: one epoch over a fifth of them, 200 updates
val_pairs = "data/instruct/pairs_test.jsonl"
mup_lr = False              # one learning rate for all, as in the paper
learning_rate = 0.0001      # the paper's 1e-5 is for a model of 18 times this width
block_size = 128
batch_size = 32
eval_interval = 50
save_interval = 0
