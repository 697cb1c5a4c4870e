"""microGPT in MLX: the same GPT as ../jax/main.py, in arrays that are computed only when they are looked at.

Arrays' names end in their shape: T time, S time seen, D width, F MLP width, N heads, H head width, V tokens.
"""
# /// script
# dependencies = ["mlx[cpu]>=0.30,<1"]
# ///

import argparse
import random
import urllib.request
from http.client import HTTPException
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE = 1, 4, 16, 16  # BLOCK_SIZE is the longest input, in tokens
LEARNING_RATE, BETA1, BETA2, EPS, INIT_STD, TEMPERATURE = 0.01, 0.85, 0.99, 1e-8, 0.08, 0.5
NAMES = Path(__file__).resolve().parents[1] / "names.txt"  # one copy for all the programs beside this one
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"


def encode(doc, chars):
    """Input ids and targets, T each: a token and its successor. T follows the document: nothing is compiled."""
    bos = len(chars)  # the last token of the vocabulary; it stands at both ends of a document
    tokens = mx.array([bos, *map(chars.index, doc), bos][: BLOCK_SIZE + 1])
    return tokens[:-1], tokens[1:]


def init_params(vocab_size):
    """All that is learnt: a dict of matrices (out, in). A generator hides in mx.random, and has a state."""
    shapes = {"wte": (vocab_size, N_EMBD), "wpe": (BLOCK_SIZE, N_EMBD), "lm_head": (vocab_size, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"layer{i}.attn_{w}": (N_EMBD, N_EMBD) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layer{i}.mlp_fc1": (4 * N_EMBD, N_EMBD), f"layer{i}.mlp_fc2": (N_EMBD, 4 * N_EMBD)}
    return {name: mx.random.normal(shape, scale=INIT_STD) for name, shape in shapes.items()}


def rmsnorm(x):
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def forward(params, input_ids):
    """Logits (T, V) for T tokens: row t scores every token as the successor of input_ids[: t + 1]."""
    T, H = len(input_ids), N_EMBD // N_HEAD
    x_TD = rmsnorm(params["wte"][input_ids] + params["wpe"][:T])
    for i in range(N_LAYER):
        h_TD = rmsnorm(x_TD)
        q_TNH, k_SNH, v_SNH = ((h_TD @ params[f"layer{i}.attn_w{c}"].T).reshape(T, N_HEAD, H) for c in "qkv")
        scores_NTS = mx.einsum("tnh,snh->nts", q_TNH, k_SNH) / H**0.5
        scores_NTS = mx.where(mx.tri(T, dtype=mx.bool_), scores_NTS, -mx.inf)  # t looks back at s <= t, never ahead
        mixed_TNH = mx.einsum("nts,snh->tnh", mx.softmax(scores_NTS, axis=-1), v_SNH)
        x_TD += mixed_TNH.reshape(T, N_EMBD) @ params[f"layer{i}.attn_wo"].T
        h_TF = mx.maximum(rmsnorm(x_TD) @ params[f"layer{i}.mlp_fc1"].T, 0)
        x_TD += h_TF @ params[f"layer{i}.mlp_fc2"].T
    return x_TD @ params["lm_head"].T


def loss_fn(params, input_ids, targets):
    """The mean of -log(probability of the target)."""
    logits_TV = forward(params, input_ids)
    return mx.mean(mx.logsumexp(logits_TV, axis=-1) - logits_TV[mx.arange(len(targets)), targets])


def adam_update(params, grads, m_state, v_state, step, lr):
    """New (params, m_state, v_state); the states are running means of the gradients and of their squares."""
    m_state = tree_map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m_state, grads)
    v_state = tree_map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v_state, grads)
    m_part, v_part = 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)  # the rest is the zero that the means began with
    params = tree_map(lambda p, m, v: p - lr * m / m_part / (mx.sqrt(v / v_part) + EPS), params, m_state, v_state)
    return params, m_state, v_state


def train(params, docs, chars, num_steps):
    """Trained parameters, and the loss of every step."""
    zeros, losses = tree_map(mx.zeros_like, params), []
    m_state, v_state = zeros, zeros
    for step in range(num_steps):
        loss, grads = mx.value_and_grad(loss_fn)(params, *encode(docs[step % len(docs)], chars))
        lr = LEARNING_RATE * (1 - step / num_steps)
        params, m_state, v_state = adam_update(params, grads, m_state, v_state, step, lr)
        mx.eval(loss, params, m_state, v_state)  # up to here a graph was built; here all of the step is computed
        losses.append(loss.item())
        print(f"step {len(losses):4d} / {num_steps:4d} | loss {losses[-1]:.4f}", end="\r", flush=True)
    return params, losses


def generate(params, chars):
    """A new name, letter by letter."""
    bos, ids = len(chars), [len(chars)]
    while len(ids) <= BLOCK_SIZE:
        logits_V = forward(params, mx.array(ids))[-1] / TEMPERATURE
        ids.append(mx.random.categorical(logits_V).item())  # .item() looks at it, which is to compute it
        if ids[-1] == bos:
            break
    return "".join(chars[i] for i in ids if i != bos)


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
    mx.random.seed(args.seed)
    params = init_params(len(chars) + 1)
    print(f"num docs: {len(docs)}\nvocab size: {len(chars) + 1}\nnum params: {sum(p.size for p in params.values())}")
    params, _ = train(params, docs, chars, args.steps)
    print("\n--- inference (new, hallucinated names) ---")
    for i in range(args.samples):
        print(f"sample {i + 1:2d}: {generate(params, chars)}")


if __name__ == "__main__":
    main()
