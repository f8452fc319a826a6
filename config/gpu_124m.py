"""A model of GPT-2 small's shape, 120M parameters, on one GPU: 10B tokens of FineWeb-Edu.

First prepare them; 1 % is held out, so this is one epoch of the run's 9.83B tokens (20 GB):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --tokens=9_930_000_000
"""
out_dir = "out/gpu_124m"
data = "fineweb_edu"
tokenizer = "gpt2"

vocab_size = 50304              # 50,257 rounded up to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768
n_ff = 1920                     # 81M parameters in the layers, 39M in the embedding

block_size = 1024
batch_size = 480                # 480 sequences * 1,024 tokens = 491,520 tokens per update
max_steps = 20_000              # * 491,520 tokens = 9.8B tokens
decay_share = 0.1               # as the paper advises
save_interval = 1000
