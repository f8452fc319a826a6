"""The laptop run, which `python train.py` starts: five minutes on two CPU cores."""
out_dir = "out/laptop"
data = "pytorch"            # Python source of the installed torch package: no download
tokenizer = "bpe4096"

# 1.3M parameters: 0.75M in four layers, 0.5M in the embedding. In five minutes, more steps beat a
# wider model.
n_layer = 4
n_head = 2                  # 2 heads of 64
n_embd = 128
n_ff = 320
dim_model_base = 64         # width at which the learning rate was tuned; muP scales it to 128
embd_init_std = 0.05        # gains about 0.03 nats in runs this short

minutes = 5                 # four fifths of them stable stage, the rest decay
block_size = 256
batch_size = 8              # 8 sequences * 256 tokens = 2,048 tokens per update
learning_rate = 0.01
min_lr = 0.0003             # 3 % of the peak, which suits a short run
eval_interval = 1000
save_interval = 1000
