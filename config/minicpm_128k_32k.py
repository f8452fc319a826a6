"""MiniCPM-2.4B-128K, first half (paper section 7.2).

From 4,096 to 32,768 tokens by a larger RoPE base (ABF).

The paper states the method, the shares of the mixture, and that the schedule is WSD. It does not
state the lengths of the stages, nor tokens, batch size and learning rate. First prepare one epoch
of long and of short documents, 0.44 and 0.56 of 21B tokens; 1 % of them is held out:

    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-2B-sft-bf16 --sample=all \
        --min_doc_tokens=32768 --suffix=_long --tokens=9_330_000_000
    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-2B-sft-bf16 --sample=100BT \
        --max_doc_tokens=32767 --suffix=_short --tokens=11_870_000_000

Documents of this length are rare: if all of the pages hold fewer tokens, the first command takes
all there are, and the run says how many epochs it reads.
"""
init_from = "out/minicpm_2b/step-00261000"    # the last stable checkpoint, weights only
out_dir = "out/minicpm_128k_32k"
# In place of the paper's mixture of books, encyclopedias and papers with short text.
data = "fineweb_edu_long:0.44,fineweb_edu_short:0.56"
tokenizer = "openbmb/MiniCPM-2B-sft-bf16"   # on the Hugging Face hub; needs transformers
doc_mask = True

vocab_size = 122753             # as in the checkpoint; also the next four
n_layer = 40
n_head = 36
n_embd = 2304
n_ff = 5760
tie_word_embeddings = False     # the head starts as a copy of the embedding
rope_theta = 1e6                # as in the released 128K model; not stated for this stage
max_position = 32768

block_size = 32768
batch_size = 128                # 128 sequences * 32,768 tokens = 4,194,304 tokens per update
max_steps = 5000                # * 4,194,304 tokens = 21B tokens
decay_steps = 0                 # the decay comes in the second half
learning_rate = 0.001           # close to 0.00077, where the 2.4B's decay ends
warmup_steps = 100
micro_batch_size = 1
recompute = 1
eval_interval = 500
eval_tokens = 10_000_000
save_interval = 250
async_save = True
