# The loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText, to hold one's own runs against.
#     python train_jax.py config/eval_gpt2_medium.py
# nanoGPT reports 2.85 (train) and 2.84 (validation). The shape comes with the weights.

init_from = "gpt2-medium"
eval_only = True
batch_size = 8  # rows a device takes at a time: fewer where memory is short
eval_iters = 500  # more batches than in training: this number is to be compared
wandb_log = False
