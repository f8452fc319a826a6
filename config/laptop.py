"""The laptop run, what plain `python train.py` does: five minutes on two CPU cores."""
out_dir = "out/laptop"
data = "pytorch"            # the Python source of the installed torch package: real text without a download
tokenizer = "bpe4096"

# 1.3M parameters: 0.75M in four layers, 0.5M in the embedding. In five minutes more steps beat a wider model.
n_layer = 4
n_head = 2                  # 2 heads of 64
n_embd = 128
n_ff = 320
dim_model_base = 64         # the learning rate was tuned at this width; muP carries it to 128
embd_init_std = 0.05        # worth about 0.03 nats in runs this short

minutes = 5                 # the stable stage takes four fifths of the time, the decay the rest
block_size = 256
batch_size = 8              # 8 sequences * 256 tokens = 2,048 tokens an update
learning_rate = 0.01
min_lr = 0.0003             # a short run gains by decaying to 3 %
eval_interval = 1000
save_interval = 1000
