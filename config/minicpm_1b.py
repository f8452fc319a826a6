"""MiniCPM-1.2B (paper section 6.1, table 2): 1,247,442,432 parameters without the embedding.

First prepare one epoch of data, of which 1 % is held out (4.4 TB: an id takes 4 bytes):

    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-1B-sft-bf16 --sample=all \
        --tokens=1_111_000_000_000

A quarter of it, read in four epochs, costs little: --sample=350BT --tokens=278_000_000_000. The
default number of tokens would be read 11,000 times.
"""
out_dir = "out/minicpm_1b"
data = "fineweb_edu"            # in place of the paper's mix (figure 11), which is not public
tokenizer = "openbmb/MiniCPM-1B-sft-bf16"   # on the Hugging Face hub; needs transformers
# The paper adds high-quality and SFT data in the decay; name corpora of your own:
# decay_data = "fineweb_edu:0.8,mine:0.2"

vocab_size = 73440
n_layer = 52
n_head = 24                     # 24 heads of 64, which share 8 key/value heads
n_kv_head = 8
n_embd = 1536
n_ff = 3840

block_size = 4096
micro_batch_size = 4            # fits GPUs of 80 GB, from 8 of them on (tools.plan)
batch_size = 480
# From 2M to 4M tokens per update (sequences * 4,096). The paper does not state when.
batch_schedule = "0:480,50000:960"
learning_rate = 0.01
max_steps = 304_700             # 50,000 * 1,966,080 + 254,700 * 3,932,160 tokens = 1.1T tokens
decay_steps = 18_500            # as in the 2.4B
half_life = 5000.0
min_lr = 0.0
warmup_steps = 2000             # not stated in the paper
eval_interval = 1000
eval_tokens = 10_000_000
save_interval = 500
keep_every = 10_000
async_save = True               # a checkpoint has 16 GB
