"""Wind-tunnel model 0.5B (paper, appendix table 8). Batch and length are ours: the paper gives none."""
out_dir = "out/tunnel_500m"
data = "fineweb_edu"
tokenizer = "gpt2"

n_layer = 24
n_head = 21
n_embd = 1344
n_ff = 3360

block_size = 1024
batch_size = 256             # 256 sequences * 1,024 tokens = 262,144 tokens an update
max_steps = 38_000          # 20 tokens for each of the 498,614,592 parameters without the embedding
decay_share = 0.1           # the paper's advice
save_interval = 1000
