"""Long contexts, fourth step: 2,048 to 8,192 tokens by NTK-aware RoPE.

The released 128K model uses it too. First prepare the data:

    python data/speeches/prepare.py --min_doc_tokens=2048 --suffix=_long
    python data/passkey/prepare.py --block_size=8192 --documents=1000
"""
init_from = "out/laptop-long-2048"
out_dir = "out/laptop-long-8192"
data = "passkey_8192:0.36,speeches_long:0.08,pytorch:0.56"
answers_only = False
doc_mask = True             # doubles the time of a step on a CPU at this length

tie_word_embeddings = False
rope_theta = 100_000.0
rope_scaling = "dynamic"    # the RoPE base grows with the length of the input
rope_factor = 4.0
max_position = 2048         # length trained so far; the base grows up to 4 times this length

block_size = 8192
batch_size = 1              # 1 sequence * 8,192 tokens = 8,192 tokens per update
max_steps = 60
learning_rate = 0.002
min_lr = 0.0002
recompute = 1               # activation checkpointing of every block
eval_interval = 0
save_interval = 0
eval_tokens = 65536
