"""A free cloud T4 (16 GB, float16 by itself): the 30M wind-tunnel model for half an hour, without a download."""
out_dir = "out/colab_t4"
data = "pytorch"
tokenizer = "bpe4096"

n_layer = 12
n_head = 8
n_embd = 512
n_ff = 1280

minutes = 30
block_size = 512
batch_size = 32             # 32 sequences * 512 tokens = 16,384 tokens an update
min_lr = 0.0003
