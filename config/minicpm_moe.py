"""MiniCPM-MoE-8x2B (paper section 7.3): the 2.4B upcycled. 13,590,468,864 parameters without the embedding, 4,035,320,064 active.

    python -m family.upcycle --ckpt=out/minicpm_2b --out=out/minicpm_moe_start
"""
init_from = "out/minicpm_moe_start"
out_dir = "out/minicpm_moe"
data = "fineweb_edu"            # stands for the paper's data, "the same as for the 2.4B", which is not public
# decay_data = "fineweb_edu:0.8,mine:0.2"   # as in minicpm_2b.py: name your own corpora

vocab_size = 122753
n_layer = 40
n_head = 36
n_embd = 2304
n_ff = 5760                     # of each expert: the dense model's
num_experts = 8
num_experts_per_tok = 2
balance_coef = 0.01

block_size = 4096
batch_size = 960                # 960 sequences * 4,096 tokens = 3,932,160 tokens an update
learning_rate = 0.01            # not stated in the paper: the 2.4B's
max_steps = 130_000             # * 3,932,160 tokens = 511B tokens, decay included
decay_steps = 18_500            # not stated in the paper: the 2.4B's, with its half_life
half_life = 5000.0
min_lr = 0.0
warmup_steps = 2000             # not stated in the paper
recompute = 1                   # makes room for all 15 sequences of a GPU (of 64 H100) in one micro-step: plan.py
eval_interval = 1000
eval_tokens = 10_000_000
save_interval = 500
keep_every = 10_000
async_save = True               # 166 GB a checkpoint
