"""128K in small, first rung: the laptop model learns to retrieve, at the length it was trained at."""
init_from = "out/laptop"
out_dir = "out/laptop-long-256"
data = "passkey_256:0.44,speeches:0.28,pytorch:0.28"
doc_mask = True
tie_word_embeddings = False
max_position = 256
block_size = 256
batch_size = 8
learning_rate = 0.003
min_lr = 0.0003
max_steps = 1000
eval_interval = 0
save_interval = 0
