"""DPO as in the paper (section 7.1): one epoch, learning rate 1e-5, cosine schedule.

The authors used UltraFeedback and pairs of their own.

    torchrun --nproc_per_node=8 -m family.dpo config/minicpm_dpo.py \
        --init_from=MiniCPM-2B-sft-bf16 --pairs=pairs.jsonl
"""
out_dir = "out/minicpm_dpo"
epochs = 1
learning_rate = 1e-5
schedule = "cosine"
mup_lr = False              # one learning rate for all parameters, as the authors had
beta = 0.1                  # not stated in the paper, like the next three
batch_size = 64
block_size = 2048
weight_decay = 0.0
micro_batch_size = 4        # pairs
recompute = 1
eval_interval = 100
save_interval = 200
