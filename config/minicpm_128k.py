"""MiniCPM-2.4B-128K, second half (paper section 7.2): from 32,768 to 131,072 tokens by NTK-aware RoPE.

    python data/fineweb_edu/prepare.py --tokenizer=openbmb/MiniCPM-2B-sft-bf16 --min_doc_tokens=131072 --suffix=_long     and so on: see data

The paper gives the method, the mixture's shares and that it is WSD; lengths of the stages, tokens, batch and learning rate it
does not.
"""
init_from = "out/minicpm_128k_32k"
out_dir = "out/minicpm_128k"
data = "fineweb_edu_long:0.44,fineweb_edu_short:0.56"   # stands for books, encyclopedias and papers against short text
tokenizer = "openbmb/MiniCPM-2B-sft-bf16"   # on the Hugging Face hub; needs transformers
doc_mask = True

vocab_size = 122753             # the checkpoint's, like the next four
n_layer = 40
n_head = 36
n_embd = 2304
n_ff = 5760
tie_word_embeddings = False
rope_theta = 1e6                # this and the next three: the released model's config
rope_scaling = "dynamic"
rope_factor = 4.0
max_position = 65536            # from here on the base grows with the length of the input

block_size = 131072
batch_size = 64                 # 64 sequences * 131,072 tokens = 8,388,608 tokens an update: one for each of 64 GPUs
max_steps = 1000                # * 8,388,608 tokens = 8.4B tokens
decay_steps = 200
learning_rate = 0.001           # where the 2.4B's decay ends; the decay here goes to a tenth of it
warmup_steps = 20
recompute = 1
eval_interval = 200
eval_tokens = 10_000_000
save_interval = 100
async_save = True
