# The loss of OpenAI's gpt2 (124M parameters) on OpenWebText, to hold one's own runs against.
#     python train_jax.py config/eval_gpt2.py
# nanoGPT reports 3.11 (train) and 3.12 (validation). The shape comes with the weights.

init_from = "gpt2"
eval_only = True
batch_size = 8  # rows a device takes at a time: fewer where memory is short
eval_iters = 500  # more batches than in training: this number is to be compared
wandb_log = False
