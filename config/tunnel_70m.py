"""Wind-tunnel model 70M (paper, appendix table 8).

The paper states neither batch size nor sequence length; those here are our choice.
Prepare one epoch of data (one corpus of the largest number serves all of these models):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --tokens=1_331_000_000
"""
out_dir = "out/tunnel_70m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 14
n_head = 10
n_embd = 640
n_ff = 1600

block_size = 1024
batch_size = 64             # 64 sequences * 1,024 tokens = 65,536 tokens per update
max_steps = 20_100          # 20 tokens for each of 65,964,160 parameters without the embedding
decay_share = 0.1           # as the paper advises
save_interval = 1000
