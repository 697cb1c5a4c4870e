# GPT-2's own weights, tuned to Shakespeare: twenty updates.
#     python data/shakespeare/prepare.py
#     python train_jax.py config/finetune_shakespeare.py
# The largest GPT-2 wants a large GPU; --init_from=gpt2 is the same lesson on a small one.

import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())  # every try is a run of its own

# It overfits within a few updates: look every five, and keep only what improved the validation loss.
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

# 1 row x 32 micro-batches x 1024 tokens = 32,768 tokens an update: the 301,966 of the data are seen about twice.
batch_size = 1  # 1.5 billion parameters leave little memory for activations
gradient_accumulation_steps = 32
max_iters = 20

# The weights are good already: a low rate, and no schedule for so short a run.
learning_rate = 3e-5
decay_lr = False
