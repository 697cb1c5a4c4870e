# A small character-level model of Python's standard library: what `make train` trains. It needs no download, and
# minutes on a laptop's CPU.
#     python data/stdlib_char/prepare.py
#     python train_jax.py config/train_stdlib_char.py

out_dir = "out-stdlib-char"
dataset = "stdlib_char"

# 0.8M parameters and 768 characters an update: two CPU cores do thirty to sixty of these a second.
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
dropout = 0.0  # so short a run sees each character less than once: nothing to overfit

learning_rate = 3e-3  # three times nanoGPT's for small models: after 1500 updates 1.69 instead of 1.79
min_lr = 3e-4
max_iters = 2000
lr_decay_iters = 2000  # the whole run
warmup_iters = 100
beta2 = 0.99  # a longer memory, for there are few tokens in an update

eval_interval = 500
eval_iters = 20  # an evaluation should not take longer than the training between two of them
always_save_checkpoint = False
log_interval = 100
