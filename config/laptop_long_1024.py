"""Long contexts, second step: 256 to 1,024 tokens by a larger RoPE base (ABF).

First prepare the data:

    python data/speeches/prepare.py --min_doc_tokens=2048 --suffix=_long
    python data/passkey/prepare.py --block_size=1024
"""
init_from = "out/laptop-long-256"
out_dir = "out/laptop-long-1024"
# 44 % long, 56 % short (paper section 7.2)
data = "passkey_1024:0.36,speeches_long:0.08,pytorch:0.56"
answers_only = False
doc_mask = True

tie_word_embeddings = False
rope_theta = 100_000.0      # it was 10,000
max_position = 1024

block_size = 1024
batch_size = 2              # 2 sequences * 1,024 tokens = 2,048 tokens per update, as before
max_steps = 2000
learning_rate = 0.0025
min_lr = 0.0003
eval_interval = 0
save_interval = 0
