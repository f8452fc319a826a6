"""Wind-tunnel model 30M (paper, appendix table 8).

The paper states neither batch size nor sequence length; those here are our choice.
Prepare one epoch of data (one corpus of the largest number serves all of these models):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --tokens=729_000_000
"""
out_dir = "out/tunnel_30m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 12
n_head = 8
n_embd = 512
n_ff = 1280

block_size = 1024
batch_size = 64             # 64 sequences * 1,024 tokens = 65,536 tokens per update
max_steps = 11_000          # 20 tokens for each of 36,188,672 parameters without the embedding
decay_share = 0.1           # as the paper advises
save_interval = 1000
