"""Wind-tunnel model 0.1B (paper, appendix table 8).

The paper states neither batch size nor sequence length; those here are our choice.
Prepare one epoch of data (one corpus of the largest number serves all of these models):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --tokens=2_200_000_000
"""
out_dir = "out/tunnel_100m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 16
n_head = 12
n_embd = 768
n_ff = 1920

block_size = 1024
batch_size = 128            # 128 sequences * 1,024 tokens = 131,072 tokens per update
max_steps = 16_600          # 20 tokens for each of 108,552,960 parameters without the embedding
decay_share = 0.1           # as the paper advises
save_interval = 1000
