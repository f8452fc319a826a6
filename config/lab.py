"""The model of the labs: bytes, 0.2M parameters, a run of seconds; a lab changes what it is about."""
data = "pytorch"
tokenizer = "bytes"         # 256 rows of embedding: of a small model with a larger vocabulary the matrices are the smaller part

n_layer = 4
n_embd = 64
n_head = 2                  # of 32
n_ff = 160
dim_model_base = 64         # the width at which the learning rate below is the best one

block_size = 128
batch_size = 16             # 2,048 bytes an update
max_steps = 200
learning_rate = 0.01        # the paper's
eval_tokens = 65536
eval_interval = 0           # only at the end
save_interval = 0
sample_tokens = 0
compile = False             # takes longer than most runs here
