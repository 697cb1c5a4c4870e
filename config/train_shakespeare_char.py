# A small character-level model of Shakespeare: minutes on a GPU, validation loss about 1.47.
#     python data/shakespeare_char/prepare.py
#     python train_jax.py config/train_shakespeare_char.py
#     python sample_jax.py --out_dir=out-shakespeare-char

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

# A million characters are soon learnt by heart: look often, and keep only what improved the validation loss.
eval_interval = 250
eval_iters = 200
always_save_checkpoint = False
log_interval = 10

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

# 64 rows of 256 characters fit one device, so there is nothing to accumulate.
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

# 10.6M parameters: enough to overfit, hence the dropout.
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models bear a higher rate than the default
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000  # the whole run
warmup_iters = 100
beta2 = 0.99  # a longer memory, for there are few tokens in an update
