"""Long contexts, first rung: the laptop model learns to retrieve at the length it was trained at. Three minutes on one CPU core.

    python data/speeches/prepare.py
    python data/passkey/prepare.py --block_size=256
"""
init_from = "out/laptop"
out_dir = "out/laptop-long-256"
data = "passkey_256:0.44,speeches:0.28,pytorch:0.28"
answers_only = False        # running text around the keys is learned too
doc_mask = True             # a question must not see another document's key

tie_word_embeddings = False # the head starts as a copy of the embedding (paper section 7.2)
max_position = 256          # what RoPE was trained for: dynamic scaling counts from here

block_size = 256
batch_size = 8              # 8 sequences * 256 tokens = 2,048 tokens an update
max_steps = 1500
learning_rate = 0.004
min_lr = 0.0004
eval_interval = 0           # only at the end
save_interval = 0
