"""DPO as in the paper (section 7.1): one epoch over UltraFeedback and pairs of one's own, learning rate 1e-5, cosine.

    torchrun --nproc_per_node=8 -m family.dpo config/minicpm_dpo.py --init_from=MiniCPM-2B-sft-bf16 --pairs=pairs.jsonl
"""
out_dir = "out/minicpm_dpo"
epochs = 1
learning_rate = 1e-5
schedule = "cosine"
mup_lr = False              # no learning rates by role: the authors did DPO without
beta = 0.1                  # not stated in the paper, nor are these three
batch_size = 64
block_size = 2048
weight_decay = 0.0
recompute = 1
eval_interval = 100
save_interval = 200
