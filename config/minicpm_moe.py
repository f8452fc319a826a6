"""MiniCPM-MoE-8x2B (paper section 7.3): the 2.4B, upcycled.

13,590,468,864 parameters without the embedding, 4,035,320,064 of them active. First upcycle:

    python -m family.upcycle --ckpt=out/minicpm_2b --out=out/minicpm_moe_start

The data of config/minicpm_2b.py serves. One epoch for this run alone, of which 1 % is held out:

    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-2B-sft-bf16 --sample=all \
        --tokens=517_000_000_000
"""
init_from = "out/minicpm_moe_start"
out_dir = "out/minicpm_moe"
data = "fineweb_edu"            # in place of the 2.4B's data, which is not public
# As in minicpm_2b.py, name corpora of your own for the decay:
# decay_data = "fineweb_edu:0.8,mine:0.2"

vocab_size = 122753
n_layer = 40
n_head = 36
n_embd = 2304
n_ff = 5760                     # of each expert, as in the dense model
num_experts = 8
num_experts_per_tok = 2
balance_coef = 0.01

block_size = 4096
batch_size = 960                # 960 sequences * 4,096 tokens = 3,932,160 tokens per update
learning_rate = 0.01            # not stated in the paper; as in the 2.4B
max_steps = 130_000             # * 3,932,160 tokens = 511B tokens, with the decay
decay_steps = 18_500            # not stated in the paper; as in the 2.4B, with its half_life
half_life = 5000.0
min_lr = 0.0
warmup_steps = 2000             # not stated in the paper
recompute = 1                   # then 64 H100 take 15 sequences each at a time (tools.plan)
micro_batch_size = 15
eval_interval = 1000
eval_tokens = 10_000_000
save_interval = 500
keep_every = 10_000
async_save = True               # a checkpoint has 166 GB
