"""Generation: prompts through the model once (prefill), then token by token with a cache of keys and values (decode).

    new_ids = generate(params, config, [[464, 3290], [40]], max_new_tokens=50, top_k=200, key=jax.random.key(0))

Everything per token happens on the device; the host gets a chunk of tokens at a time. Ids only, no text: see
`jax_codec.make_codec`. Dimension key: jax_transformer.py; here T is a bucket for prompts, S = block_size.

All rows of a batch end in the same column, so that a new token is written at one place, and a shorter prompt begins
further right. When the columns are used up, the window slides: positions are learned, so every token that moves gets
other keys and values, and the last block_size tokens go through the model again for each new one, as in nanoGPT.
"""

import functools
import operator
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_cache import Cache, decoding_weights, forward_cached, init_cache
from jax_transformer import GPTConfig, Params

MAX_TOKENS_PER_DISPATCH = 32
NOT_FINITE = -1  # drawn where no token can be


class Sampling(NamedTuple):
    """How the next token is drawn. Static: another choice compiles anew."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    vocab_size: int  # ids from here on are padding of the model's vocabulary


class Decoding(NamedTuple):
    """What changes with every token; its memory is donated. Either `cache` or `window_BS` is there."""

    cache: Cache | None
    window_BS: jax.Array | None  # the last block_size tokens of each row, once the columns are used up
    pads_B: jax.Array  # the column in which each row begins
    column: jax.Array  # where the next token goes
    last_B: jax.Array  # the token that goes there
    drawn: jax.Array  # tokens drawn so far, of each row
    done_B: jax.Array  # rows that drew a stop token


def generate(
    params: Params,
    config: GPTConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Collection[int] = (),
    key: jax.Array,
    vocab_size: int | None = None,
    first_row: int = 0,
) -> list[list[int]]:
    """The new ids of each prompt, at most max_new_tokens: those of `stream`, which says what the options mean."""
    new_ids: list[list[int]] = [[] for _ in prompts]
    for chunk in stream(
        params, config, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, stop_tokens=stop_tokens, key=key, vocab_size=vocab_size, first_row=first_row,
        tokens_per_dispatch=MAX_TOKENS_PER_DISPATCH,
    ):  # fmt: skip
        for row, ids in zip(new_ids, chunk, strict=True):
            row.extend(ids)
    return new_ids


def stream(
    params: Params,
    config: GPTConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: Collection[int] = (),
    key: jax.Array,
    vocab_size: int | None = None,
    first_row: int = 0,
    tokens_per_dispatch: int = 4,
) -> Iterator[list[list[int]]]:
    """Yield the new ids of all rows as they come, a few at a time; a row that drew a stop token gets no more.

    Prompts are ids of any lengths; of one that is longer than the window the last block_size count, and a line on
    stderr says so. Row i draws from fold_in(key, first_row + i), whatever the other rows are. The stop token itself is
    not returned. Temperature 0 takes the likeliest token. Ids from `vocab_size` on, the padding of the model's
    vocabulary, are never drawn. Prefill compiles once for each power of two of the longest prompt, decode once, for
    each number of rows and way of drawing.

    Where it is called again and again, `params` may be what `decoding_weights` makes of them: it saves doing it anew.

    Raises ValueError, at once, on an empty prompt, an id that the vocabulary lacks, or an option out of its range.
    Raises FloatingPointError, as it goes, where the logits are not finite: there is no next token then.
    """
    max_new_tokens, top_k = operator.index(max_new_tokens), None if top_k is None else operator.index(top_k)
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    check_options(max_new_tokens, temperature, top_k, top_p, min_p)
    if not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1 and at most the model's {config.vocab_size}")
    if not 1 <= tokens_per_dispatch <= MAX_TOKENS_PER_DISPATCH:
        raise ValueError(f"tokens_per_dispatch={tokens_per_dispatch} must be from 1 to {MAX_TOKENS_PER_DISPATCH}")
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one")
    rows = [list(map(operator.index, prompt)) for prompt in prompts]
    for number, ids in enumerate(rows):
        if not ids:
            raise ValueError(f"prompt {number} is empty: the model needs at least one token to go on from")
        if (bad := next((i for i in ids if not 0 <= i < vocab_size), None)) is not None:
            raise ValueError(f"prompt {number} has token id {bad}, which is not in the vocabulary of {vocab_size}")
    longest = max(map(len, rows))
    if longest > config.block_size:
        print(
            f"the longest prompt has {longest} tokens: only the last {config.block_size} fit in the model's window",
            file=sys.stderr,
        )
    top_p, min_p = (None if p is None else float(p) for p in (top_p, min_p))
    sampling = Sampling(float(temperature), top_k, top_p, min_p, vocab_size)
    row_keys_B = _row_keys(key, first_row + np.arange(len(rows)))
    stops = [i for i in map(operator.index, stop_tokens) if 0 <= i < vocab_size]  # others are never drawn
    return _run(params, config, rows, sampling, max_new_tokens, stops, row_keys_B, tokens_per_dispatch, first_row)


def check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Raise ValueError, with one message, if one of them is out of its range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature} must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be at least 0 and at most 1")


def _run(params, config, rows, sampling, max_new_tokens, stop_tokens, row_keys_B, tokens_per_dispatch, first_row):
    """The loop of `stream`, on the host: one prefill, then chunks of tokens."""
    if max_new_tokens == 0:
        return
    weights = params if "head" in params else decoding_weights(params, config)
    stop_ids = jnp.asarray(stop_tokens, jnp.int32)
    static = {"config": config, "sampling": sampling}
    done = [False] * len(rows)

    def take(new_BC: np.ndarray) -> list[list[int]]:
        """Add a chunk to the rows; what is new of each, up to its stop token."""
        chunk: list[list[int]] = [[] for _ in rows]
        for b, ids in enumerate(new_BC.tolist()):
            for i in ids:
                if i == NOT_FINITE and not done[b]:
                    where = f"after {len(rows[b]) + len(chunk[b])} tokens of row {first_row + b}"
                    why = f"the weights are not sound, or too large for {config.dtype}"
                    raise FloatingPointError(f"{where} the logits are not finite: {why}")
                done[b] = done[b] or i in stop_tokens
                if not done[b]:
                    chunk[b].append(i)
            rows[b].extend(chunk[b])
        return chunk

    W = config.block_size
    longest = min(max(map(len, rows)), W)
    ids_BT, pads_B = pad_left(rows, longest)
    bucket = min(1 << (longest - 1).bit_length(), W)  # a power of two, or the window
    ids_BT = np.pad(ids_BT, ((0, 0), (0, bucket - longest)))  # not looked at: the next tokens go there
    state = _prefill(weights, ids_BT, pads_B, np.int32(longest), row_keys_B, stop_ids, **static)
    drawn, column = 1, longest
    yield take(np.asarray(state.last_B)[:, None])  # host-device sync
    while drawn < max_new_tokens and not all(done):
        if state.cache is not None and column == W:
            window_BS, pads_B = pad_left(rows, W)
            state = state._replace(cache=None, window_BS=jnp.asarray(window_BS), pads_B=jnp.asarray(pads_B))
        room = W - column if state.cache is not None else max_new_tokens
        steps = min(tokens_per_dispatch, max_new_tokens - drawn, room)
        state, new_BC, ran = _decode(weights, state, np.int32(steps), row_keys_B, stop_ids, **static)
        ran = int(ran)  # host-device sync: fewer than `steps` where all rows have stopped
        drawn, column = drawn + ran, column + ran
        yield take(np.asarray(new_BC)[:, :ran])


def pad_left(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `width` ids of each row, flush right in an array (B, width), and the column in which each begins."""
    ids_BT = np.zeros((len(rows), width), np.int32)
    for b, ids in enumerate(rows):
        ids_BT[b, max(width - len(ids), 0) :] = ids[-width:]
    return ids_BT, np.array([max(width - len(ids), 0) for ids in rows], np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# compiled


@jax.jit
def _row_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def _prefill(weights, ids_BT, pads_B, length, row_keys_B, stop_ids, *, config: GPTConfig, sampling: Sampling):
    """The prompts, which end in column length - 1, into a fresh cache; the first new token of each row."""
    B = ids_BT.shape[0]
    logits_BV, cache = forward_cached(weights, ids_BT, config, init_cache(config, B), pads_B, last=length - 1)
    next_B = draw(logits_BV, row_keys_B, 0, sampling)
    return Decoding(cache, None, pads_B, length, next_B, jnp.int32(1), jnp.isin(next_B, stop_ids))


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="state")
def _decode(weights, state: Decoding, steps, row_keys_B, stop_ids, *, config: GPTConfig, sampling: Sampling):
    """Up to `steps` more tokens: (state, new_BC, how many). Ends early where every row has stopped."""
    B = state.last_B.shape[0]

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done_B.all()

    def one_token(carry):
        i, state, new_BC = carry
        if state.window_BS is None:
            logits_BV, cache = forward_cached(
                weights, state.last_B[:, None], config, state.cache, state.pads_B, column=state.column
            )
            state = state._replace(cache=cache)
        else:
            logits_BV, _ = forward_cached(weights, state.window_BS, config, None, state.pads_B)
        next_B = draw(logits_BV, row_keys_B, state.drawn, sampling)
        if state.window_BS is not None:
            window_BS = jnp.concatenate([state.window_BS[:, 1:], next_B[:, None]], axis=1)
            state = state._replace(window_BS=window_BS, pads_B=jnp.maximum(state.pads_B - 1, 0))
        state = state._replace(
            column=state.column + 1,
            last_B=next_B,
            drawn=state.drawn + 1,
            done_B=state.done_B | jnp.isin(next_B, stop_ids),
        )
        return i + 1, state, new_BC.at[:, i].set(next_B)

    new_BC = jnp.zeros((B, MAX_TOKENS_PER_DISPATCH), jnp.int32)
    ran, state, new_BC = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, new_BC))
    return state, new_BC, ran


# ----------------------------------------------------------------------------------------------------------------------
# drawing


def draw(logits_BV: jax.Array, row_keys_B: jax.Array, number: jax.Array | int, sampling: Sampling) -> jax.Array:
    """Token `number` of each row, (B,) int32, from the logits (B, V) of its last one, or NOT_FINITE."""
    assert logits_BV.ndim == 2, f"logits_BV must have 2 dimensions, (batch, vocabulary), not shape {logits_BV.shape}"
    assert logits_BV.shape[0] == row_keys_B.shape[0], f"{logits_BV.shape[0]} rows, but {row_keys_B.shape[0]} keys"
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.vocab_size < logits_BV.shape[1]:
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < sampling.vocab_size, logits_BV, -jnp.inf)
    finite_B = jnp.isfinite(logits_BV.max(axis=-1))  # NaN and infinity are what comes out, whatever the others are
    if sampling.temperature < 1e-30:  # so near 0 that float32 could not divide by it
        return jnp.where(finite_B, likeliest(logits_BV), NOT_FINITE)
    logits_BV = warp(logits_BV, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, number)
    next_B = pick(jax.nn.softmax(logits_BV, axis=-1), jax.vmap(jax.random.uniform)(keys_B))
    return jnp.where(finite_B, next_B, NOT_FINITE)


def pick(probabilities_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Tokens, (B,) int32, by their probabilities: the first up to which they add up to more than uniform_B in [0, 1).

    One random number a row. jax.random.categorical takes one for each token of the vocabulary, and on a CPU a tenth of
    the time of a small model. However the sums are rounded, it is never a token of probability 0.
    """
    V = probabilities_BV.shape[-1]
    sums_BV = jnp.where(probabilities_BV > 0, jnp.cumsum(probabilities_BV, axis=-1), 0)
    enough_BV = sums_BV > uniform_B[:, None] * sums_BV.max(axis=-1, keepdims=True)
    return jnp.where(enough_BV, jnp.arange(V, dtype=jnp.int32), V - 1).min(axis=-1)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest of each row, (B,) int32.

    What jnp.argmax is, as two plain reductions: on a CPU, for 8 rows of 50257, in a quarter of the time.
    """
    V = logits_BV.shape[-1]
    smaller_BV = logits_BV < logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(smaller_BV, V - 1, jnp.arange(V, dtype=jnp.int32)).min(axis=-1)


def warp(
    logits_BV: jax.Array, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> jax.Array:
    """Logits / temperature, their maximum 0, and -inf where a token may not be drawn. In transformers' order:

    top_k   only the k largest stay (and what equals the k-th); k above the vocabulary is the vocabulary
    top_p   the fewest that are together at least that probable (and what equals the last; Holtzman et al. 2020)
    min_p   only those with at least min_p times the largest probability (Nguyen et al. 2024)
    """
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature  # a small one overflows otherwise
    V = logits_BV.shape[-1]
    if top_k is not None and top_k < V:
        # The barrier keeps XLA from seeing that one of the k is asked for: it would sort the whole vocabulary instead.
        kth_B1 = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, top_k)[0])[:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p is not None and top_p < 1:
        logits_BV = keep_likeliest(logits_BV, top_p)
    if min_p:
        probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
        least_B1 = min_p * probabilities_BV.max(axis=-1, keepdims=True)
        logits_BV = jnp.where(probabilities_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def keep_likeliest(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """-inf for all but the fewest largest logits of each row that are together at least top_p probable.

    Without sorting, which takes a CPU as long as a small model: the least logit that stays is found bit by bit, by
    adding up the probabilities of those at or above it. Equals stay together.
    """
    top_p = max(top_p, float(np.finfo(np.float32).tiny))  # below it XLA takes 0, which no logit at all would reach
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV < sign, bits_BV | sign, ~bits_BV)  # integers in the order of the floats

    def decide_bit(i, least_B):
        higher_B = least_B | (sign >> i.astype(jnp.uint32))
        sums_B = jnp.where(order_BV >= higher_B[:, None], probabilities_BV, 0).sum(axis=-1)
        return jnp.where(sums_B >= top_p, higher_B, least_B)

    least_B = jax.lax.fori_loop(0, 32, decide_bit, jnp.zeros(len(logits_BV), jnp.uint32))
    return jnp.where(order_BV >= least_B[:, None], logits_BV, -jnp.inf)
