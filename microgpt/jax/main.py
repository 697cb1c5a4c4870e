"""microGPT in JAX, in pure functions: a GPT that reads names and invents new ones, after Andrej Karpathy's microgpt.py.

With --reference=True it draws the random numbers that the original draws: the same losses, the same names.
Arrays' names end in their shape: T time, S time seen, D width, F MLP width, N heads, H head width, V tokens.
"""
# /// script
# dependencies = ["jax>=0.10,<0.13,!=0.11.1", "numpy>=2,<3"]
# ///

import argparse
import random
import urllib.request
from http.client import HTTPException
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE = 1, 4, 16, 16  # BLOCK_SIZE is the longest input, in tokens
LEARNING_RATE, BETA1, BETA2, EPS, INIT_STD, TEMPERATURE = 0.01, 0.85, 0.99, 1e-8, 0.08, 0.5
NAMES = Path(__file__).resolve().parents[1] / "names.txt"  # one copy for all the programs beside this one
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"


def encode(doc, chars):
    """Input ids and targets, T each: a token and its successor, -1 where there is none. One length, one compilation."""
    bos = len(chars)  # the last token of the vocabulary; it stands at both ends of a document
    tokens = [bos, *map(chars.index, doc), bos][: BLOCK_SIZE + 1]
    return (tokens[:-1] + BLOCK_SIZE * [bos])[:BLOCK_SIZE], (tokens[1:] + BLOCK_SIZE * [-1])[:BLOCK_SIZE]


def init_params(key, vocab_size):
    """All that is learnt: a dict of matrices (out, in). Nothing hides in JAX: a draw is a function of its key."""
    shapes = {"wte": (vocab_size, N_EMBD), "wpe": (BLOCK_SIZE, N_EMBD), "lm_head": (vocab_size, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"layer{i}.attn_{w}": (N_EMBD, N_EMBD) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layer{i}.mlp_fc1": (4 * N_EMBD, N_EMBD), f"layer{i}.mlp_fc2": (N_EMBD, 4 * N_EMBD)}
    return {k: INIT_STD * jax.random.normal(jax.random.fold_in(key, i), shapes[k]) for i, k in enumerate(shapes)}


def rmsnorm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def forward(params, input_ids):
    """Logits (T, V) for T tokens: row t scores every token as the successor of input_ids[: t + 1]."""
    T, H = len(input_ids), N_EMBD // N_HEAD
    x_TD = rmsnorm(params["wte"][input_ids] + params["wpe"][:T])
    for i in range(N_LAYER):
        h_TD = rmsnorm(x_TD)
        q_TNH, k_SNH, v_SNH = ((h_TD @ params[f"layer{i}.attn_w{c}"].T).reshape(T, N_HEAD, H) for c in "qkv")
        scores_NTS = jnp.einsum("tnh,snh->nts", q_TNH, k_SNH) / H**0.5
        scores_NTS = jnp.where(jnp.tri(T, dtype=bool), scores_NTS, -jnp.inf)  # t looks back at s <= t, never ahead
        mixed_TNH = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores_NTS), v_SNH)
        x_TD += mixed_TNH.reshape(T, N_EMBD) @ params[f"layer{i}.attn_wo"].T
        h_TF = jax.nn.relu(rmsnorm(x_TD) @ params[f"layer{i}.mlp_fc1"].T)
        x_TD += h_TF @ params[f"layer{i}.mlp_fc2"].T
    return x_TD @ params["lm_head"].T


def loss_fn(params, input_ids, targets):
    """The mean of -log(probability of the target), over the targets that are not -1."""
    logprobs_TV = jax.nn.log_softmax(forward(params, input_ids))
    return -jnp.mean(logprobs_TV[jnp.arange(len(targets)), targets], where=targets >= 0)


def adam_update(params, grads, m_state, v_state, step, lr):
    """New (params, m_state, v_state); the states are running means of the gradients and of their squares."""
    m_state = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m_state, grads)
    v_state = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v_state, grads)
    m_part, v_part = 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)  # the rest is the zero that the means began with
    params = jax.tree.map(lambda p, m, v: p - lr * m / m_part / (jnp.sqrt(v / v_part) + EPS), params, m_state, v_state)
    return params, m_state, v_state


def train_step(state, batch):
    (params, m_state, v_state), (step, lr, input_ids, targets) = state, batch
    loss, grads = jax.value_and_grad(loss_fn)(params, input_ids, targets)
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
        examples = np.array([encode(docs[step % len(docs)], chars) for step in steps])
        state, chunk = train_steps(state, (steps, lrs, examples[:, 0], examples[:, 1]))
        for loss in chunk[: num_steps - start].tolist():  # .tolist() waits for the device
            losses.append(loss)
            print(f"step {len(losses):4d} / {num_steps:4d} | loss {loss:.4f}", end="\r", flush=True)
    return state[0], losses


def generate(params, chars, key, rng=None):
    """A new name, letter by letter, each drawn with a key of its own; with an rng, as the original draws."""
    bos = len(chars)
    ids = np.full(BLOCK_SIZE + 1, bos)  # what is not drawn yet lies ahead, where no position looks
    for t in range(BLOCK_SIZE):
        k = jax.random.fold_in(key, t)
        logits_V = np.asarray(jax.jit(forward)(params, ids[:-1]))[t] / TEMPERATURE
        ids[t + 1] = rng.choices(range(bos + 1), np.exp(logits_V))[0] if rng else jax.random.categorical(k, logits_V)
        if ids[t + 1] == bos:
            break
    return "".join(chars[i] for i in ids[1:] if i != bos)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, default=NAMES, help="a text file with a name on each line")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=20, help="how many names to invent")
    parser.add_argument("--reference", choices=["True", "False"], default="False", help="draw as the original does")
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
    rng = random.Random(args.seed)
    rng.shuffle(docs)
    chars = "".join(sorted(set("".join(docs))))
    key, init_key = jax.random.split(jax.random.key(args.seed))
    params = init_params(init_key, len(chars) + 1)
    if args.reference == "True":
        params = {k: jnp.array([[rng.gauss(0, INIT_STD) for _ in r] for r in p.tolist()]) for k, p in params.items()}
    print(f"num docs: {len(docs)}\nvocab size: {len(chars) + 1}\nnum params: {sum(p.size for p in params.values())}")
    params, _ = train(params, docs, chars, args.steps)
    print("\n--- inference (new, hallucinated names) ---")
    for i in range(1, args.samples + 1):
        name = generate(params, chars, jax.random.fold_in(key, i), rng if args.reference == "True" else None)
        print(f"sample {i:2d}: {name}")


if __name__ == "__main__":
    main()
