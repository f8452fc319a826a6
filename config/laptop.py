"""The laptop run, what plain `python train.py` does: five minutes on two CPU cores."""
out_dir = "out/laptop"
data = "pytorch"            # the Python source of the installed torch package: real text without a download
tokenizer = "bpe4096"

# 2.5M parameters: 1.8M in four layers, 0.8M in the embedding
n_layer = 4
n_head = 3                  # 3 heads of 64
n_embd = 192
n_ff = 512
dim_model_base = 64         # the learning rate was tuned at this width; muP carries it to 192
embd_init_std = 0.05        # worth about 0.03 nats in runs this short

minutes = 5                 # the stable stage takes four fifths of the time, the decay the rest
block_size = 256
batch_size = 8              # 8 sequences * 256 tokens = 2,048 tokens an update
learning_rate = 0.01
min_lr = 0.0003             # a short run gains by decaying to 3 %
eval_interval = 1000
save_interval = 1000
