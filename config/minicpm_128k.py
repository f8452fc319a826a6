"""MiniCPM-2.4B-128K, second half (paper section 7.2).

From 32,768 to 131,072 tokens by NTK-aware RoPE.

The paper states the method, the shares of the mixture, and that the schedule is WSD. It does not
state the lengths of the stages, nor tokens, batch size and learning rate. First prepare one epoch
of longer documents, 0.44 of 8.4B tokens, of which 1 % is held out. The short ones are those of the
first half.

    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-2B-sft-bf16 --sample=all \
        --min_doc_tokens=131072 --suffix=_longer --tokens=3_730_000_000

If all of the pages hold fewer tokens of such documents, it takes all there are, and the run says
how many epochs it reads.
"""
init_from = "out/minicpm_128k_32k"
out_dir = "out/minicpm_128k"
# In place of the paper's mixture of books, encyclopedias and papers with short text.
data = "fineweb_edu_longer:0.44,fineweb_edu_short:0.56"
tokenizer = "openbmb/MiniCPM-2B-sft-bf16"   # on the Hugging Face hub; needs transformers
doc_mask = True

vocab_size = 122753             # as in the checkpoint; also the next four
n_layer = 40
n_head = 36
n_embd = 2304
n_ff = 5760
tie_word_embeddings = False
rope_theta = 1e6                # this and the next three as in the released model
rope_scaling = "dynamic"
rope_factor = 4.0
max_position = 65536            # from this length on the RoPE base grows with the input

block_size = 131072
batch_size = 64                 # 64 sequences * 131,072 tokens = 8,388,608 tokens per update,
                                # one sequence for each of 64 GPUs
max_steps = 1000                # * 8,388,608 tokens = 8.4B tokens
decay_steps = 200
learning_rate = 0.001           # close to 0.00077, where the 2.4B's decay ends; here it decays to a
                                # tenth
warmup_steps = 20
micro_batch_size = 1
recompute = 1
eval_interval = 200
eval_tokens = 10_000_000
save_interval = 100
async_save = True
