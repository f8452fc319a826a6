"""Wind-tunnel model 0.5B (paper, appendix table 8).

The paper states neither batch size nor sequence length; those here are our choice.
Prepare one epoch of data (one corpus of the largest number serves all of these models):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --sample=100BT --tokens=10_070_000_000
"""
out_dir = "out/tunnel_500m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 24
n_head = 21
n_embd = 1344
n_ff = 3360

block_size = 1024
batch_size = 256            # 256 sequences * 1,024 tokens = 262,144 tokens per update
max_steps = 38_000          # 20 tokens for each of 498,614,592 parameters without the embedding
decay_share = 0.1           # as the paper advises
save_interval = 1000
