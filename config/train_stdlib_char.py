# A small character-level model of Python's standard library: what `make train` trains. It needs no download, and
# minutes on a laptop's CPU.
#     python data/stdlib_char/prepare.py
#     python train_jax.py config/train_stdlib_char.py

out_dir = "out-stdlib-char"
dataset = "stdlib_char"

# 0.8M parameters and 2,048 characters an update: two CPU cores are enough.
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
dropout = 0.0  # so short a run sees too little of the data to overfit

learning_rate = 1e-3  # small models bear a higher rate than the default
min_lr = 1e-4
max_iters = 1500
lr_decay_iters = 1500  # the whole run
warmup_iters = 100
beta2 = 0.99  # a longer memory, for there are few tokens in an update

eval_interval = 250
eval_iters = 20  # an evaluation should not take longer than the training between two of them
always_save_checkpoint = False
log_interval = 50
