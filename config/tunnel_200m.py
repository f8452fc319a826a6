"""Wind-tunnel model 0.2B (paper, appendix table 8).

The paper states neither batch size nor sequence length; those here are our choice.
Prepare one epoch of data (one corpus of the largest number serves all of these models):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --tokens=4_880_000_000
"""
out_dir = "out/tunnel_200m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 20
n_head = 16
n_embd = 1024
n_ff = 2560

block_size = 1024
batch_size = 128            # 128 sequences * 1,024 tokens = 131,072 tokens per update
max_steps = 36_800          # 20 tokens for each of 241,214,464 parameters without the embedding
decay_share = 0.1           # as the paper advises
save_interval = 1000
