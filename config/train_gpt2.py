# GPT-2 (124M) on OpenWebText, from scratch, to a validation loss of about 2.85.
#     python train_jax.py config/train_gpt2.py
# Four days on eight A100s is what nanoGPT reports; the model is the default one.

wandb_log = True  # a run of days is watched from elsewhere
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 rows x 1024 tokens x 40 micro-batches = 491,520 tokens an update, the half million GPT-2 was trained with. The 40
# are shared out over all devices, so fewer devices take longer and learn the same. Not enough memory? Halve batch_size
# and double gradient_accumulation_steps.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 updates are 295 billion tokens; the cosine comes down to its floor with the last of them.
max_iters = 600000
lr_decay_iters = 600000

weight_decay = 1e-1  # GPT-3's value

eval_interval = 1000  # also how much a lost machine can cost
eval_iters = 200  # the loss to about two decimals
log_interval = 10
