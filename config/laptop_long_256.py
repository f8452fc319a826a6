"""Long contexts, first step: the laptop model learns to retrieve, at its training length.

Two and a half minutes on one CPU core. First prepare the data:

    python data/speeches/prepare.py
    python data/passkey/prepare.py --block_size=256
"""
init_from = "out/laptop"
out_dir = "out/laptop-long-256"
data = "passkey_256:0.44,speeches:0.28,pytorch:0.28"
answers_only = False        # learn the running text around the keys too
doc_mask = True             # a question must not see the keys of another document

tie_word_embeddings = False # the head starts as a copy of the embedding (paper section 7.2)
max_position = 256          # length RoPE was trained at; dynamic scaling starts there

block_size = 256
batch_size = 8              # 8 sequences * 256 tokens = 2,048 tokens per update
max_steps = 1500
learning_rate = 0.004
min_lr = 0.0004
eval_interval = 0           # only at the end
save_interval = 0
