"""Wind-tunnel model 9M (paper, appendix table 8).

The paper states neither batch size nor sequence length; those here are our choice.
Prepare one epoch of data (one corpus of the largest number serves all of these models):

    python data/fineweb_edu/prepare.py --tokenizer=gpt2 --tokens=192_000_000
"""
out_dir = "out/tunnel_9m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 8
n_head = 5
n_embd = 320
n_ff = 800

block_size = 1024
batch_size = 64             # 64 sequences * 1,024 tokens = 65,536 tokens per update
max_steps = 2_900           # 20 tokens for each of 9,426,240 parameters without the embedding
decay_share = 0.1           # as the paper advises
save_interval = 1000
