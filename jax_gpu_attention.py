"""Attention on an NVIDIA GPU, in 16 bits, without a tensor of all its weights: with dropout, or in a fixed order.

Without either it is cuDNN's (jax_forms.py: attend). A kernel like those of jax_gpu_kernels.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_gpu_pallas import LOG2_E, call, exp2, exp_over, result
from jax_ops import is_kept, seed_of_rows

TILE = 64  # queries, and keys; half as many of wide heads, for which a small GPU has no more room


def fits_attention(T: int, H: int) -> bool:
    """Whether `attention` takes T tokens and heads of H numbers."""
    return _attention_tile(T, H) >= 16 and H in (16, 32, 64, 128)


def _attention_tile(T: int, H: int) -> int:
    return math.gcd(T, TILE if H <= 64 else TILE // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, seed_2: jax.Array, rate: float) -> jax.Array:
    """jax_ops.causal_attention of all heads, (B, T, N, H), without a tensor of all its weights in memory.

    For T and H that `fits_attention`. With two seeds (uint32) it drops the weights that jax_ops.dropout drops.

    For the gradient the weights are made again, of each query's log2 of the sum of its exponentials (Dao et al. 2022,
    "FlashAttention").
    """
    return _attention_forward(q_BTNH, k_BTNH, v_BTNH, seed_2, rate)[0]


def _attention_forward(q_BTNH, k_BTNH, v_BTNH, seed_2, rate):
    B, T, N, H = q_BTNH.shape
    tile = _attention_tile(T, H)

    def attention_kernel(q_ref, k_ref, v_ref, seed_ref, y_ref, log2_total_ref):
        i, b, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        q = q_ref[...]

        def some_keys(j, carry):
            y, largest, total = carry
            here = pl.ds(j * tile, tile)
            scores = _scores(q, k_ref[here, :], i, j)
            new_largest = jnp.maximum(largest, LOG2_E * jnp.max(scores, axis=1))
            weights, shrink = exp_over(scores, new_largest[:, None]), exp2(largest - new_largest)
            total = total * shrink + jnp.sum(weights, axis=1)
            kept = jnp.where(_is_kept(seed_ref, b * N + n, B * N, T, i, j, tile, rate), weights, 0)
            return y * shrink[:, None] + _dot(kept.astype(q.dtype), v_ref[here, :]), new_largest, total

        start = jnp.zeros((tile, H), jnp.float32), jnp.full(tile, -jnp.inf), jnp.zeros(tile, jnp.float32)
        y, largest, total = jax.lax.fori_loop(0, i + 1, some_keys, start)
        y_ref[...] = (y / (total * (1 - rate))[:, None]).astype(y_ref.dtype)
        log2_total_ref[...] = largest + jnp.log2(total)

    some, every, row, seeds = _attention_specs(T, H, tile)
    y_BTNH, log2_total_BNT = call(
        attention_kernel,
        (result(q_BTNH.dtype, B, T, N, H), result(jnp.float32, B, N, T)),
        grid=(T // tile, B, N),
        in_specs=[some, every, every, seeds],
        out_specs=(some, row),
    )(q_BTNH, k_BTNH, v_BTNH, seed_2)
    return y_BTNH, (q_BTNH, k_BTNH, v_BTNH, seed_2, y_BTNH, log2_total_BNT)


def _attention_backward(rate, saved, dy_BTNH):
    """Of each tile as keys with the queries after it, and as queries with the keys before it: so all programs have the
    same work."""
    q_BTNH, k_BTNH, v_BTNH, seed_2, y_BTNH, log2_total_BNT = saved
    B, T, N, H = q_BTNH.shape
    tile = _attention_tile(T, H)
    # sum over s of p(s) dp(s), the mean that softmax's gradient takes away
    mean_BNT = jnp.einsum("BTNH,BTNH->BNT", y_BTNH, dy_BTNH, preferred_element_type=jnp.float32)

    def attention_gradient_kernel(
        q_ref, k_ref, v_ref, seed_ref, dy_ref, log2_total_ref, mean_ref, dq_ref, dk_ref, dv_ref
    ):
        at, b, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        own = pl.ds(at * tile, tile)

        def weights_and_dscores(q, k, v, dy, rows, i, j):
            weights = exp_over(_scores(q, k, i, j), log2_total_ref[rows][:, None])
            kept = jnp.where(_is_kept(seed_ref, b * N + n, B * N, T, i, j, tile, rate), 1 / (1 - rate), 0)
            dscores = weights * (kept * _dot(dy, v.T) - mean_ref[rows][:, None]) / math.sqrt(H)
            return (kept * weights).astype(q.dtype), dscores.astype(q.dtype)

        k, v = k_ref[own, :], v_ref[own, :]

        def queries_after(i, carry):
            dk, dv = carry
            rows = pl.ds(i * tile, tile)
            q, dy = q_ref[rows, :], dy_ref[rows, :]
            weights, dscores = weights_and_dscores(q, k, v, dy, rows, i, at)
            return dk + _dot(dscores.T, q), dv + _dot(weights.T, dy)

        zeros = jnp.zeros((tile, H), jnp.float32)
        dk, dv = jax.lax.fori_loop(at, T // tile, queries_after, (zeros, zeros))
        dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
        q, dy = q_ref[own, :], dy_ref[own, :]

        def keys_before(j, dq):
            rows = pl.ds(j * tile, tile)
            k = k_ref[rows, :]
            _, dscores = weights_and_dscores(q, k, v_ref[rows, :], dy, own, at, j)
            return dq + _dot(dscores, k)

        dq_ref[...] = jax.lax.fori_loop(0, at + 1, keys_before, zeros).astype(dq_ref.dtype)

    some, every, _, seeds = _attention_specs(T, H, tile)
    every_row = pl.BlockSpec((None, None, T), lambda i, b, n: (b, n, 0))
    gradients = call(
        attention_gradient_kernel,
        (result(q_BTNH.dtype, B, T, N, H),) * 3,
        grid=(T // tile, B, N),
        in_specs=[every, every, every, seeds, every, every_row, every_row],
        out_specs=(some,) * 3,
    )(q_BTNH, k_BTNH, v_BTNH, seed_2, dy_BTNH, log2_total_BNT, mean_BNT)
    return *gradients, None


attention.defvjp(_attention_forward, _attention_backward)


def _attention_specs(T: int, H: int, tile: int):
    """A tile of a head's rows, all its rows, a tile of the head's numbers a row; the seeds."""
    return (
        pl.BlockSpec((None, tile, None, H), lambda i, b, n: (b, i, n, 0)),
        pl.BlockSpec((None, T, None, H), lambda i, b, n: (b, 0, n, 0)),
        pl.BlockSpec((None, None, tile), lambda i, b, n: (b, n, i)),
        pl.BlockSpec((2,), lambda i, b, n: (0,)),
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _positions(i, j, tile: int) -> tuple[jax.Array, jax.Array]:
    """Of the queries of tile i and the keys of tile j."""
    shape = (tile, tile)
    queries = i * tile + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return queries, j * tile + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _scores(q, k, i, j) -> jax.Array:
    """Of each query of tile i with each key of tile j, -inf where the key comes after the query."""
    tile, H = q.shape
    queries, keys = _positions(i, j, tile)
    return jnp.where(queries >= keys, _dot(q, k.T) / math.sqrt(H), -jnp.inf)


def _is_kept(seed_ref, g, G: int, T: int, i, j, tile: int, rate: float) -> jax.Array:
    """Which weights of head g jax_ops.dropout keeps of all of them, (G, T, S)."""
    queries, keys = _positions(i, j, tile)
    row = jnp.uint32(g * T) + queries.astype(jnp.uint32)
    seed_1 = seed_of_rows(seed_ref[1], row, T) if G * T * T > 2**32 else seed_ref[1]
    return is_kept(row * jnp.uint32(T) + keys.astype(jnp.uint32), seed_ref[0], seed_1, rate)
