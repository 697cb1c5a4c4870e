"""microGPT in MLX, batched: what vmap does in ../jax_batched/main.py is written out, a batch dimension in every line.

Arrays' names end in their shape: B batch, T time, S time seen, D width, F MLP width, N heads, H head width, V tokens.
"""
# /// script
# dependencies = ["mlx[cpu]>=0.30,<1"]
# ///

import argparse
import random
import urllib.request
from http.client import HTTPException
from pathlib import Path
from string import ascii_lowercase

import mlx.core as mx
from mlx.utils import tree_map

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE, BATCH_SIZE = 2, 4, 64, 16, 32  # BLOCK_SIZE is the longest input, in tokens
LEARNING_RATE, BETA1, BETA2, EPS, INIT_STD, TEMPERATURE = 0.01, 0.85, 0.99, 1e-8, 0.08, 0.5
NAMES = Path(__file__).resolve().parents[1] / "names.txt"  # one copy for all the programs beside this one
URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"


def make_batch(docs, step, batch_size, chars=ascii_lowercase):
    """(B, T) each: input_ids, targets, pad_mask (True is padding), target_mask (1 counts)."""
    bos = len(chars)  # the last token of the vocabulary; it stands at both ends of a name, and fills up its row
    names = [docs[i % len(docs)] for i in range(step * batch_size, (step + 1) * batch_size)]
    tokens = mx.array([[bos, *map(chars.index, name), *BLOCK_SIZE * [bos]][: BLOCK_SIZE + 1] for name in names])
    pad_mask = mx.arange(BLOCK_SIZE) > mx.array([[len(name)] for name in names])
    return tokens[:, :-1], tokens[:, 1:], pad_mask, (~pad_mask).astype(mx.float32)


def init_params(vocab_size):
    """All that is learnt: a dict of matrices (out, in). A generator hides in mx.random, and has a state."""
    shapes = {"wte": (vocab_size, N_EMBD), "wpe": (BLOCK_SIZE, N_EMBD), "lm_head": (vocab_size, N_EMBD)}
    for i in range(N_LAYER):
        shapes |= {f"layer{i}.attn_{w}": (N_EMBD, N_EMBD) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layer{i}.mlp_fc1": (4 * N_EMBD, N_EMBD), f"layer{i}.mlp_fc2": (N_EMBD, 4 * N_EMBD)}
    return {name: mx.random.normal(shape, scale=INIT_STD) for name, shape in shapes.items()}


def rmsnorm(x):
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def forward_batch(params, input_ids, pad_mask):
    """Logits (B, T, V) for B sequences of T tokens: those at t score every token as the successor of row[: t + 1]."""
    (B, T), H = input_ids.shape, N_EMBD // N_HEAD
    seen_BNTS = mx.logical_and(mx.tri(T), ~pad_mask[:, None, None, :])  # t looks back at s <= t, and at no padding
    x_BTD = rmsnorm(params["wte"][input_ids] + params["wpe"][:T])
    for i in range(N_LAYER):
        h_BTD = rmsnorm(x_BTD)
        q_BTNH, k_BSNH, v_BSNH = ((h_BTD @ params[f"layer{i}.attn_w{c}"].T).reshape(B, T, N_HEAD, H) for c in "qkv")
        scores_BNTS = mx.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) / H**0.5
        scores_BNTS = mx.where(seen_BNTS, scores_BNTS, -mx.inf)
        mixed_BTNH = mx.einsum("bnts,bsnh->btnh", mx.softmax(scores_BNTS, axis=-1), v_BSNH)
        x_BTD += mixed_BTNH.reshape(B, T, N_EMBD) @ params[f"layer{i}.attn_wo"].T
        h_BTF = mx.maximum(rmsnorm(x_BTD) @ params[f"layer{i}.mlp_fc1"].T, 0)
        x_BTD += h_BTF @ params[f"layer{i}.mlp_fc2"].T
    return x_BTD @ params["lm_head"].T


def forward_vmap(params, input_ids, pad_mask):
    """The same logits as in JAX: MLX has vmap too, and lifts a function of one sequence over the rows of a batch."""

    def forward_single(ids_T, mask_T):
        return forward_batch(params, ids_T[None], mask_T[None])[0]  # one sequence is a batch of one

    return mx.vmap(forward_single)(input_ids, pad_mask)


def loss_fn(params, input_ids, targets, pad_mask, target_mask):
    """The mean of -log(probability of the target), over the targets that count, of all rows together."""
    logits_BTV = forward_batch(params, input_ids, pad_mask)
    logit_BT = mx.take_along_axis(logits_BTV, targets[..., None], axis=-1)[..., 0]
    return mx.sum((mx.logsumexp(logits_BTV, axis=-1) - logit_BT) * target_mask) / mx.sum(target_mask)


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
        batch = make_batch(docs, step, BATCH_SIZE, chars)
        loss, grads = mx.value_and_grad(loss_fn)(params, *batch)
        lr = LEARNING_RATE * (1 - step / num_steps)
        params, m_state, v_state = adam_update(params, grads, m_state, v_state, step, lr)
        mx.eval(loss, params, m_state, v_state)  # up to here a graph was built; here all of the step is computed
        losses.append(loss.item())
        if len(losses) % 10 == 0 or len(losses) == num_steps:
            last = losses[(len(losses) - 1) // 10 * 10 :]
            print(f"step {len(losses):4d} / {num_steps:4d} | loss {sum(last) / len(last):.4f}")  # the mean of the ten
    return params, losses


def generate(params, chars, count):
    """New names, all of them letter by letter at once."""
    ids_BT = mx.full((count, 1), len(chars))
    for _ in range(BLOCK_SIZE):
        logits_BV = forward_batch(params, ids_BT, mx.full(ids_BT.shape, False))[:, -1]
        letters_B = mx.random.categorical(logits_BV / TEMPERATURE)
        ids_BT = mx.concatenate([ids_BT, letters_B[:, None]], axis=1)
    return ["".join((chars + "\n")[i] for i in row).split("\n")[1] for row in ids_BT.tolist()]  # "\n" for BOS


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
    for i, name in enumerate(generate(params, chars, args.samples) if args.samples else []):
        print(f"sample {i + 1:2d}: {name}")


if __name__ == "__main__":
    main()
