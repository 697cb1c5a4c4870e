"""microGPT in JAX, batched: the model is written for one sequence, and vmap makes it one for 32.

Arrays' names end in their shape: B batch, T time, S time seen, D width, F MLP width, N heads, H head width, V tokens.
"""
# /// script
# dependencies = ["jax>=0.10,<0.13,!=0.11.1", "numpy>=2,<3"]
# ///

import argparse
import random
import urllib.request
from http.client import HTTPException
from pathlib import Path
from string import ascii_lowercase

import jax
import jax.numpy as jnp
import numpy as np

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE, BATCH_SIZE = 2, 4, 64, 16, 32  # BLOCK_SIZE is the longest input, in tokens
LEARNING_RATE, BETA1, BETA2, EPS, INIT_STD, TEMPERATURE = 0.01, 0.85, 0.99, 1e-8, 0.08, 0.5
NAMES = Path(__file__).resolve().parents[1] / "names.txt"  # one copy for all the programs beside this one
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"


def make_batch(docs, step, batch_size, chars=ascii_lowercase):
    """(B, T) each: input_ids, targets, pad_mask (True is padding), target_mask (1 counts). Fixed T: one compilation."""
    bos = len(chars)  # the last token of the vocabulary; it stands at both ends of a name, and fills up its row
    names = [docs[i % len(docs)] for i in range(step * batch_size, (step + 1) * batch_size)]
    tokens = [[bos, *map(chars.index, name), *BLOCK_SIZE * [bos]][: BLOCK_SIZE + 1] for name in names]
    input_ids, targets = np.array(tokens)[:, :-1], np.array(tokens)[:, 1:]
    pad_mask = np.arange(BLOCK_SIZE) > np.array([[len(name)] for name in names])
    return input_ids, targets, pad_mask, np.float32(~pad_mask)


def init_params(key, vocab_size):
    """All that is learnt: a dict of matrices (out, in). Nothing hides in JAX: a draw is a function of its key."""
    shapes = {"wte": (vocab_size, N_EMBD), "wpe": (BLOCK_SIZE, N_EMBD), "lm_head": (vocab_size, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"layer{i}.attn_{w}": (N_EMBD, N_EMBD) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layer{i}.mlp_fc1": (4 * N_EMBD, N_EMBD), f"layer{i}.mlp_fc2": (N_EMBD, 4 * N_EMBD)}
    return {k: INIT_STD * jax.random.normal(jax.random.fold_in(key, i), shapes[k]) for i, k in enumerate(shapes)}


def rmsnorm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def forward_single(params, input_ids, pad_mask):
    """Logits (T, V) for one sequence of T tokens: row t scores every token as the successor of input_ids[: t + 1]."""
    T, H = len(input_ids), N_EMBD // N_HEAD
    x_TD = rmsnorm(params["wte"][input_ids] + params["wpe"][:T])
    for i in range(N_LAYER):
        h_TD = rmsnorm(x_TD)
        q_TNH, k_SNH, v_SNH = ((h_TD @ params[f"layer{i}.attn_w{c}"].T).reshape(T, N_HEAD, H) for c in "qkv")
        scores_NTS = jnp.einsum("tnh,snh->nts", q_TNH, k_SNH) / H**0.5
        seen_TS = jnp.tri(T, dtype=bool) & ~pad_mask  # t looks back at s <= t, never ahead, and at no padding
        scores_NTS = jnp.where(seen_TS, scores_NTS, -jnp.inf)
        mixed_TNH = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores_NTS), v_SNH)
        x_TD += mixed_TNH.reshape(T, N_EMBD) @ params[f"layer{i}.attn_wo"].T
        h_TF = jax.nn.relu(rmsnorm(x_TD) @ params[f"layer{i}.mlp_fc1"].T)
        x_TD += h_TF @ params[f"layer{i}.mlp_fc2"].T
    return x_TD @ params["lm_head"].T


forward_batch = jax.vmap(forward_single, in_axes=(None, 0, 0))  # one params for all, a row of ids and of mask for each


def loss_fn(params, input_ids, targets, pad_mask, target_mask):
    """The mean of -log(probability of the target), over the targets that count, of all rows together."""
    logprobs_BTV = jax.nn.log_softmax(forward_batch(params, input_ids, pad_mask))
    logprobs_BT = jnp.take_along_axis(logprobs_BTV, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(logprobs_BT * target_mask) / jnp.sum(target_mask)


def adam_update(params, grads, m_state, v_state, step, lr):
    """New (params, m_state, v_state); the states are running means of the gradients and of their squares."""
    m_state = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m_state, grads)
    v_state = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v_state, grads)
    m_part, v_part = 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)  # the rest is the zero that the means began with
    params = jax.tree.map(lambda p, m, v: p - lr * m / m_part / (jnp.sqrt(v / v_part) + EPS), params, m_state, v_state)
    return params, m_state, v_state


def train_step(state, batch):
    (params, m_state, v_state), (step, lr, *examples) = state, batch
    loss, grads = jax.value_and_grad(loss_fn)(params, *examples)
    return adam_update(params, grads, m_state, v_state, step, lr), loss


@jax.jit
def train_steps(state, batches):  # several steps in one compiled program: the state after them, and their losses
    return jax.lax.scan(train_step, state, batches)


def train(params, docs, chars, num_steps):
    """Trained parameters, and the loss of every step."""
    zeros, losses = jax.tree.map(jnp.zeros_like, params), []
    state = (params, zeros, zeros)
    for start in range(0, num_steps, 10):  # ten steps from one look at the losses to the next
        steps = np.arange(start, start + 10)
        lrs = LEARNING_RATE * np.maximum(0, 1 - steps / num_steps)  # 0 where the last ten go past the end
        examples = [make_batch(docs, step, BATCH_SIZE, chars) for step in steps]
        state, chunk = train_steps(state, (steps, lrs, *map(np.stack, zip(*examples, strict=True))))
        losses += chunk[: num_steps - start].tolist()  # .tolist() waits for the device
        print(f"step {len(losses):4d} / {num_steps:4d} | loss {np.mean(losses[start:]):.4f}")  # the mean of the ten
    return state[0], losses


def generate(params, chars, key, count):
    """New names, all of them letter by letter at once."""
    ids = np.full((count, BLOCK_SIZE + 1), len(chars))  # what is not drawn yet lies ahead, where no position looks
    no_padding = np.full((count, BLOCK_SIZE), False)
    for t in range(BLOCK_SIZE):
        logits_BTV = jax.jit(forward_batch)(params, ids[:, :-1], no_padding)
        ids[:, t + 1] = jax.random.categorical(jax.random.fold_in(key, t), logits_BTV[:, t] / TEMPERATURE)
    return ["".join((chars + "\n")[i] for i in row).split("\n")[1] for row in ids]  # "\n" for BOS: the first line


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, default=NAMES, help="a text file with a name on each line")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=20, help="how many names to invent")
    args = parser.parse_args()
    if not all(0 <= number < 2**31 for number in (args.seed, args.steps, args.samples)):
        parser.exit(2, "error: --seed, --steps and --samples go from 0 to 2147483647\n")
    try:
        if args.input == NAMES and not NAMES.exists():
            NAMES.write_bytes(urllib.request.urlopen(URL, timeout=30).read())
        lines = map(str.strip, args.input.read_text(encoding="utf-8-sig").split("\n"))
        docs = [line for line in lines if line] or parser.exit(2, f"error: {args.input} is empty\n")
    except (OSError, HTTPException, ValueError) as error:
        parser.exit(2, f"error: no names: {error}; put {URL} at {NAMES}, or give --input=FILE\n")
    random.Random(args.seed).shuffle(docs)
    chars = "".join(sorted(set("".join(docs))))
    key, init_key = jax.random.split(jax.random.key(args.seed))
    params = init_params(init_key, len(chars) + 1)
    print(f"num docs: {len(docs)}\nvocab size: {len(chars) + 1}\nnum params: {sum(p.size for p in params.values())}")
    params, _ = train(params, docs, chars, args.steps)
    print("\n--- inference (new, hallucinated names) ---")
    for i, name in enumerate(generate(params, chars, key, args.samples)):
        print(f"sample {i + 1:2d}: {name}")


if __name__ == "__main__":
    main()
