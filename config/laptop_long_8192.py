"""Long contexts, fourth rung: 2,048 to 8,192 tokens by NTK-aware RoPE, as the released 128K model has it.

    python data/speeches/prepare.py --min_doc_tokens=2048 --suffix=_long
    python data/passkey/prepare.py --block_size=8192 --documents=1000
"""
init_from = "out/laptop-long-2048"
out_dir = "out/laptop-long-8192"
data = "passkey_8192:0.36,speeches_long:0.08,pytorch:0.56"
answers_only = False
doc_mask = True             # its mask doubles a step's time at this length on a CPU; samples within one document would not need it

tie_word_embeddings = False
rope_theta = 100_000.0
rope_scaling = "dynamic"    # the base grows with the length of the input
rope_factor = 4.0
max_position = 2048         # the length trained so far: from here on the base grows, up to four times that length

block_size = 8192
batch_size = 1              # 8,192 tokens an update
max_steps = 60
learning_rate = 0.002
min_lr = 0.0002
recompute = 1               # a sequence's activations, block by block
eval_interval = 0
save_interval = 0
eval_tokens = 65536
