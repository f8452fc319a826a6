"""The 30M wind-tunnel model on a free cloud T4: half an hour, without a download.

A T4 has 16 GB of memory and runs in float16, which is chosen automatically.
"""
out_dir = "out/colab_t4"
data = "pytorch"
tokenizer = "bpe4096"

n_layer = 12
n_head = 8
n_embd = 512
n_ff = 1280

minutes = 30
block_size = 512
batch_size = 32             # 32 sequences * 512 tokens = 16,384 tokens per update
min_lr = 0.0003
