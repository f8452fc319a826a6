"""The model of the labs: 0.2M parameters on bytes, trained in seconds.

Each lab changes what it studies.
"""
data = "pytorch"
tokenizer = "bytes"         # with a larger vocabulary most of so small a model would be embedding

n_layer = 4
n_embd = 64
n_head = 2                  # 2 heads of 32
n_ff = 160
dim_model_base = 64         # width at which the learning rate below is the best

block_size = 128
batch_size = 16             # 16 sequences * 128 bytes = 2,048 bytes per update
max_steps = 200
learning_rate = 0.01        # as in the paper
eval_tokens = 65536
eval_interval = 0           # only at the end
save_interval = 0
sample_tokens = 0
compile = False             # compiling takes longer than most runs here
