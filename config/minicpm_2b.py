"""MiniCPM-2.4B (paper sections 6.1 and 6.2, table 2).

2,442,057,984 parameters without the embedding.

First prepare one epoch of data, of which 1 % is held out (4.4 TB: an id takes 4 bytes):

    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-2B-sft-bf16 --sample=all \
        --tokens=1_111_000_000_000

A quarter of it, read in four epochs, costs little: --sample=350BT --tokens=278_000_000_000. The
default number of tokens would be read 11,000 times.
"""
out_dir = "out/minicpm_2b"
data = "fineweb_edu"            # in place of the paper's mix (figure 11), which is not public
tokenizer = "openbmb/MiniCPM-2B-sft-bf16"   # on the Hugging Face hub; needs transformers
# The paper adds high-quality and SFT data in the decay; name corpora of your own:
# decay_data = "fineweb_edu:0.8,mine:0.2"

vocab_size = 122753
n_layer = 40
n_head = 36                     # 36 heads of 64, and as many key/value heads
n_embd = 2304
n_ff = 5760

block_size = 4096
micro_batch_size = 3            # fits GPUs of 80 GB, from 8 of them on (tools.plan)
batch_size = 960                # 960 sequences * 4,096 tokens = 3,932,160 tokens per update
learning_rate = 0.01
max_steps = 279_500             # * 3,932,160 tokens = 1.1T tokens
decay_steps = 18_500            # the last ones, from step 261,000
half_life = 5000.0              # 20B tokens: from 0.01 to 0.00077 at the end
min_lr = 0.0
warmup_steps = 2000             # not stated in the paper
eval_interval = 1000
eval_tokens = 10_000_000
save_interval = 500
keep_every = 10_000
async_save = True               # a checkpoint has 33 GB
