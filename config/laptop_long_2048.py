"""Long contexts, third step: 1,024 to 2,048 tokens.

First prepare the data:

    python data/speeches/prepare.py --min_doc_tokens=2048 --suffix=_long
    python data/passkey/prepare.py --block_size=2048 --documents=4000
"""
init_from = "out/laptop-long-1024"
out_dir = "out/laptop-long-2048"
# 44 % long, 56 % short (paper section 7.2)
data = "passkey_2048:0.36,speeches_long:0.08,pytorch:0.56"
answers_only = False
doc_mask = True

tie_word_embeddings = False
rope_theta = 100_000.0
max_position = 2048

block_size = 2048
batch_size = 1              # 1 sequence * 2,048 tokens = 2,048 tokens per update, as before
max_steps = 1000
learning_rate = 0.0025
min_lr = 0.0003
eval_interval = 0
save_interval = 0
