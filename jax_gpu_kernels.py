"""On an NVIDIA GPU, in 16 bits: LayerNorm, GELU, the loss, and attention with dropout, each in one pass over memory.

Between its matrix products a GPT waits for memory, and for erf and exp. What XLA makes of these functions goes through
its tensors up to twice as often as it has to, since it never joins a sum over a row with what follows from it, and
takes many instructions for an exponential. BENCHMARKS.md has what this gives. Without dropout, attention is cuDNN's.

The kernels are written in Pallas, and XLA compiles them by Triton, for Ampere and later. JAX says that a version to
come will be without this way to Triton; they then have to be written for Mosaic, its other one to a GPU, and until they
are, XLA's own code takes their place. A kernel is run by each program of a grid, on pieces of arrays ("refs") that its
BlockSpecs cut out. What it loads has to be a power of two long: a row of D numbers is loaded as C, and those that are
not there are masked. Nothing is added up in an order left to chance: the same input gives the same bits. Gradients are
written by hand, and have none themselves.

`jax_forms` decides where they are used. Dimension key: jax_transformer.py; here also C columns, the power of two, and P
programs.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jax_ops import is_kept, seed_of_rows

INTERPRET = False  # tests set it: JAX then computes what the kernels say, on any device
LOG2_E = math.log2(math.e)

# Numbers, rows and so on that a program works on at a time, as measured on an H200 (dev/LOG.md).
TILE = 1024
ROWS_SUMMED = 32  # at least, whose contributions to the gradients of LayerNorm's weights one program adds up
PROGRAMS = 512  # about as many are there for that at most: they are at work at the same time, and leave less to add up
LOGITS_TILE = 8192
ATTENTION_TILE = 64  # queries, and keys; half as many of wide heads, for which a small GPU has no more room


def _call(kernel, out_shape, *, grid, in_specs, out_specs, warps: int = 4, aliases: dict[int, int] | None = None):
    """The kernel as a function of arrays; a warp is 32 threads."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=INTERPRET,
    )


def _shape(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ptx(instruction: str, meaning: Callable[..., jax.Array], *numbers: jax.typing.ArrayLike) -> jax.Array:
    """One instruction of the GPU's for each float32 number, and what it means, which scalars and tests get.

    Of an exponential XLA makes four instructions, of a quotient seven, for the sake of numbers below 1e-38, and it
    never joins a product with a sum.
    """
    arrays = jnp.broadcast_arrays(*(jnp.asarray(number, jnp.float32) for number in numbers))
    if INTERPRET or arrays[0].ndim == 0:
        return meaning(*arrays)
    return triton.elementwise_inline_asm(
        f"{instruction}.f32 {', '.join(f'${i}' for i in range(len(arrays) + 1))};",
        args=arrays,
        constraints=",".join(["=f", *("f" for _ in arrays)]),
        pack=1,
        result_shape_dtypes=[_shape(jnp.float32, *arrays[0].shape)],
    )[0]


_exp2 = functools.partial(_ptx, "ex2.approx.ftz", jnp.exp2)
_reciprocal = functools.partial(_ptx, "rcp.approx.ftz", jnp.reciprocal)
_product_and_sum = functools.partial(_ptx, "fma.rn", lambda x, y, z: x * y + z)


def _exp(x: jax.Array, less: jax.Array) -> jax.Array:
    """exp(x - less), to the base of 2, since that is the GPU's."""
    return _exp2(_product_and_sum(LOG2_E, x, -LOG2_E * less))


def _columns_below(D: int, *shape: int) -> jax.Array:
    """Which columns of a tile of that shape there really are."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < D


# ----------------------------------------------------------------------------------------------------------------------
# LayerNorm


@jax.custom_vjp
def layer_norm(x_RD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """x itself and jax_ops.layer_norm of it, each (R, D).

    x comes back because it is used again, as the stream that a layer adds to: so its two gradients are added in the
    pass that makes the second.
    """
    return _layer_norm_forward(x_RD, scale_D, bias_D)[0]


def _layer_norm_forward(x_RD, scale_D, bias_D):
    R, D = x_RD.shape
    C = pl.next_power_of_2(D)
    rows = math.gcd(R, max(1, TILE // C))

    def layer_norm_kernel(x_ref, scale_ref, bias_ref, y_ref, mean_ref, rstd_ref):
        mask = _columns_below(D, rows, C)
        x = triton.load(x_ref, mask=mask, other=0).astype(jnp.float32)
        mean = jnp.sum(x, axis=1) / D
        centred = jnp.where(mask, x - mean[:, None], 0)
        rstd = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / D + 1e-5)
        y = centred * rstd[:, None] * triton.load(scale_ref, mask=_columns_below(D, C), other=0)[None]
        if bias_D is not None:
            y += triton.load(bias_ref, mask=_columns_below(D, C), other=0)[None]
        triton.store(y_ref, y.astype(y_ref.dtype), mask=mask)
        mean_ref[...], rstd_ref[...] = mean, rstd

    of_rows, of_row, weight = (
        pl.BlockSpec((rows, C), lambda i: (i, 0)),
        pl.BlockSpec((rows,), lambda i: (i,)),
        pl.BlockSpec((C,), lambda i: (0,)),
    )
    y_RD, mean_R, rstd_R = _call(
        layer_norm_kernel,
        (_shape(x_RD.dtype, R, D), _shape(jnp.float32, R), _shape(jnp.float32, R)),
        grid=(R // rows,),
        in_specs=[of_rows, weight, weight],
        out_specs=(of_rows, of_row, of_row),
        warps=min(32, max(1, rows * C // 1024)),
    )(x_RD, scale_D, scale_D if bias_D is None else bias_D)
    return (x_RD, y_RD), (x_RD, mean_R, rstd_R, scale_D, bias_D)


def _layer_norm_backward(saved, gradients):
    x_RD, mean_R, rstd_R, scale_D, bias_D = saved
    R, D = x_RD.shape
    C = pl.next_power_of_2(D)
    summed = math.gcd(R, max(ROWS_SUMMED, pl.next_power_of_2(max(1, R // PROGRAMS))))
    rows = math.gcd(summed, max(1, 2 * TILE // C))
    weights = 1 if bias_D is None else 2  # the scale's gradient, and the bias's

    def layer_norm_gradient_kernel(x_ref, mean_ref, rstd_ref, scale_ref, dstream_ref, dy_ref, dx_ref, *sum_refs):
        mask = _columns_below(D, rows, C)
        scale = triton.load(scale_ref, mask=_columns_below(D, C), other=0)[None]

        def some_rows(i, sums):
            here = pl.ds(i * rows, rows)
            x, dstream, dy = (
                triton.load(ref.at[here, :], mask=mask, other=0).astype(jnp.float32)
                for ref in (x_ref, dstream_ref, dy_ref)
            )
            rstd = rstd_ref[here][:, None]
            normal = jnp.where(mask, (x - mean_ref[here][:, None]) * rstd, 0)
            dnormal = dy * scale
            mean_of_dnormal = jnp.sum(dnormal, axis=1)[:, None] / D
            mean_of_product = jnp.sum(dnormal * normal, axis=1)[:, None] / D
            dx = dstream + (dnormal - mean_of_dnormal - normal * mean_of_product) * rstd
            triton.store(dx_ref.at[here, :], dx.astype(dx_ref.dtype), mask=mask)
            return [total + jnp.sum(of_row, axis=0) for total, of_row in zip(sums, (dy * normal, dy), strict=False)]

        sums = jax.lax.fori_loop(0, summed // rows, some_rows, [jnp.zeros(C, jnp.float32) for _ in sum_refs])
        for sum_ref, total in zip(sum_refs, sums, strict=True):
            triton.store(sum_ref, total, mask=_columns_below(D, C))

    of_rows, of_row, weight, sums = (
        pl.BlockSpec((summed, C), lambda i: (i, 0)),
        pl.BlockSpec((summed,), lambda i: (i,)),
        pl.BlockSpec((C,), lambda i: (0,)),
        pl.BlockSpec((None, C), lambda i: (i, 0)),
    )
    programs = R // summed
    dx_RD, *sums_PD = _call(
        layer_norm_gradient_kernel,
        (_shape(x_RD.dtype, R, D), *weights * [_shape(jnp.float32, programs, D)]),
        grid=(programs,),
        in_specs=[of_rows, of_row, of_row, weight, of_rows, of_rows],
        out_specs=(of_rows, *weights * [sums]),
    )(x_RD, mean_R, rstd_R, scale_D, *gradients)
    dscale_D, *dbias_D = (of_programs_PD.sum(axis=0) for of_programs_PD in sums_PD)
    return dx_RD, dscale_D, dbias_D[0] if dbias_D else None


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


# ----------------------------------------------------------------------------------------------------------------------
# GELU


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """jax_ops.gelu_erf: x * Phi(x), of any shape. Only x is kept for the gradient."""
    return _by_element(lambda x: _product_and_sum(-jnp.abs(x), _normal_tail(x)[0], jnp.maximum(x, 0)), x)


def _gelu_erf_backward(x, dy):
    def gradient(x, dy):
        tail, density = _normal_tail(x)
        return dy * _product_and_sum(x, density, jnp.where(x < 0, tail, 1 - tail))

    return (_by_element(gradient, x, dy),)


gelu_erf.defvjp(lambda x: (gelu_erf(x), x), _gelu_erf_backward)


def _normal_tail(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Phi(-|x|) to 1.3e-5, and the density at x.

    Abramowitz & Stegun 1964, 7.1.25: erfc by one exponential, which is the density's, too, and a polynomial of 1 / x.
    GELU is right to 2.4e-5 then: to the last of bfloat16's digits down to -2.5, and to 1 % at -4, where it is 1e-4.
    """
    t = _reciprocal(_product_and_sum(0.47047 * math.sqrt(0.5), jnp.abs(x), 1))
    exponential = _exp2(x * x * (-0.5 * LOG2_E))
    polynomial = _product_and_sum(t, _product_and_sum(0.5 * 0.7478556, t, 0.5 * -0.0958798), 0.5 * 0.3480242)
    tail = t * polynomial * exponential
    return tail, exponential * (1 / math.sqrt(2 * math.pi))


def _by_element(function, *arrays: jax.Array) -> jax.Array:
    """function of each element of the arrays, computed in float32."""
    size, dtype = arrays[0].size, arrays[0].dtype

    def gelu_kernel(*refs):
        *inputs, output_ref = refs
        mask = pl.program_id(0) * TILE + jnp.arange(TILE) < size
        output = function(*(triton.load(ref, mask=mask, other=0).astype(jnp.float32) for ref in inputs))
        triton.store(output_ref, output.astype(dtype), mask=mask)

    tile = pl.BlockSpec((TILE,), lambda i: (i,))
    call = _call(
        gelu_kernel,
        _shape(dtype, size),
        grid=(pl.cdiv(size, TILE),),
        in_specs=[tile] * len(arrays),
        out_specs=tile,
        warps=2,
    )
    return call(*(array.reshape(-1) for array in arrays)).reshape(arrays[0].shape)


# ----------------------------------------------------------------------------------------------------------------------
# loss


def fits_cross_entropy(V: int) -> bool:
    """Whether `cross_entropy` is fast for V logits a row: one tile of them, or rows that begin at a whole 16 bytes."""
    return V <= LOGITS_TILE or V % 8 == 0


@jax.custom_vjp
def cross_entropy(logits_RV: jax.Array, targets_R: jax.Array) -> jax.Array:
    """jax_ops.cross_entropy of logits (R, V), in nats, (R,) float32; NaN for a target outside of [-V, V).

    Where a gradient will be asked for, that of the losses' mean is made at once and takes the place of the logits: a
    row's second reading comes from the cache, so that the largest tensor of a step is read once and written once.
    """
    return _cross_entropy_call(logits_RV, targets_R, with_gradient=False)[0]


def _cross_entropy_forward(logits_RV, targets_R):
    loss_R, dlogits_RV = _cross_entropy_call(logits_RV, targets_R, with_gradient=True)
    return loss_R, dlogits_RV


def _cross_entropy_backward(dlogits_RV, dloss_R):
    # Where it is the mean whose gradient is asked for, this is 1 / R by itself, so 1, and XLA leaves the product out.
    factor_R = dloss_R / np.float32(1 / dloss_R.size)
    return (dlogits_RV * factor_R[:, None]).astype(dlogits_RV.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cross_entropy_call(logits_RV: jax.Array, targets_R: jax.Array, with_gradient: bool) -> list[jax.Array]:
    R, V = logits_RV.shape
    tile = min(LOGITS_TILE, max(8, pl.next_power_of_2(V)))

    def cross_entropy_kernel(logits_ref, targets_ref, loss_ref, *dlogits_refs):
        row = pl.program_id(0)
        target = targets_ref[row]
        target = jnp.where(target < 0, target + V, target)  # as a lookup counts it
        target = jnp.where(target < 0, V, target)  # out of range, too
        target_logit = triton.load(logits_ref.at[row, target], mask=target < V, other=jnp.nan).astype(jnp.float32)

        def columns(i):
            """Of tile i; the last axis is what one thread reads at a time."""
            first, rest = (jax.lax.broadcasted_iota(jnp.int32, (tile // 8, 8), axis) for axis in (0, 1))
            return i * tile + first * 8 + rest

        def load(i):
            logits = triton.load(logits_ref.at[row, columns(i)], mask=columns(i) < V, other=-jnp.inf)
            return logits.astype(jnp.float32)

        def largest_and_total(i, carry):  # of each thread by itself, so that none waits for another
            largest, total, logits = carry
            following = load(i + 1)  # asked for before this tile is worked on
            new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
            shrink = _exp(largest, new_largest)
            return new_largest, total * shrink + jnp.sum(_exp(logits, new_largest[:, None]), axis=1), following

        lowest = float(jnp.finfo(jnp.float32).min) / 2  # times log2(e) still a number
        start = jnp.full(tile // 8, lowest), jnp.zeros(tile // 8, jnp.float32), load(0)
        largest_of_each, total_of_each, _ = jax.lax.fori_loop(0, pl.cdiv(V, tile), largest_and_total, start)
        largest = jnp.max(largest_of_each)
        log_total = largest + jnp.log(jnp.sum(total_of_each * _exp(largest_of_each, largest)))
        loss_ref[row] = log_total - target_logit
        for dlogits_ref in dlogits_refs:

            def gradient(i, logits, dlogits_ref=dlogits_ref):
                following = load(i + 1)
                p_by_R = _exp(logits, log_total + math.log(R))
                triton.store(dlogits_ref.at[row, columns(i)], p_by_R.astype(dlogits_ref.dtype), mask=columns(i) < V)
                return following

            jax.lax.fori_loop(0, pl.cdiv(V, tile), gradient, load(0))
            if not INTERPRET:  # where there are no threads
                triton.debug_barrier()  # all have written: now the one number that is not p / R
            here = columns(target // tile)
            at_target = jnp.full(here.shape, (_exp(target_logit, log_total) - 1) / R, dlogits_ref.dtype)
            triton.store(dlogits_ref.at[row, here], at_target, mask=(here == target) & (here < V))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    loss, dlogits = _shape(jnp.float32, R), _shape(logits_RV.dtype, R, V)
    results = (loss, dlogits) if with_gradient else (loss,)
    return _call(
        cross_entropy_kernel,
        results,
        grid=(R,),
        in_specs=[whole, whole],
        out_specs=tuple(whole for _ in results),
        warps=max(1, tile // 256),
        aliases={0: 1} if with_gradient else None,
    )(logits_RV, targets_R)


# ----------------------------------------------------------------------------------------------------------------------
# attention with dropout


def fits_attention(T: int, H: int) -> bool:
    """Whether `attention` takes T tokens and heads of H numbers."""
    return _attention_tile(T, H) >= 16 and H in (16, 32, 64, 128)


def _attention_tile(T: int, H: int) -> int:
    return math.gcd(T, ATTENTION_TILE if H <= 64 else ATTENTION_TILE // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, seed_2: jax.Array, rate: float) -> jax.Array:
    """jax_ops.causal_attention of all heads, (B, T, N, H), without a tensor of all its weights in memory.

    For T and H that `fits_attention`. With two seeds (uint32) it drops the weights that jax_ops.dropout drops.

    For the gradient the weights are made again, of each query's log of the sum of its exponentials (Dao et al. 2022,
    "FlashAttention").
    """
    return _attention_forward(q_BTNH, k_BTNH, v_BTNH, seed_2, rate)[0]


def _attention_forward(q_BTNH, k_BTNH, v_BTNH, seed_2, rate):
    B, T, N, H = q_BTNH.shape
    tile = _attention_tile(T, H)

    def attention_kernel(q_ref, k_ref, v_ref, seed_ref, y_ref, log_total_ref):
        i, b, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        q = q_ref[...]

        def some_keys(j, carry):
            y, largest, total = carry
            here = pl.ds(j * tile, tile)
            scores = _scores(q, k_ref[here, :], i, j)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
            weights, shrink = _exp(scores, new_largest[:, None]), _exp(largest, new_largest)
            total = total * shrink + jnp.sum(weights, axis=1)
            kept = jnp.where(_is_kept(seed_ref, b * N + n, B * N, T, i, j, tile, rate), weights, 0)
            return y * shrink[:, None] + _dot(kept.astype(q.dtype), v_ref[here, :]), new_largest, total

        start = jnp.zeros((tile, H), jnp.float32), jnp.full(tile, -jnp.inf), jnp.zeros(tile, jnp.float32)
        y, largest, total = jax.lax.fori_loop(0, i + 1, some_keys, start)
        y_ref[...] = (y / (total * (1 - rate))[:, None]).astype(y_ref.dtype)
        log_total_ref[...] = largest + jnp.log(total)

    some, every, row, seeds = _attention_specs(T, H, tile)
    y_BTNH, log_total_BNT = _call(
        attention_kernel,
        (_shape(q_BTNH.dtype, B, T, N, H), _shape(jnp.float32, B, N, T)),
        grid=(T // tile, B, N),
        in_specs=[some, every, every, seeds],
        out_specs=(some, row),
    )(q_BTNH, k_BTNH, v_BTNH, seed_2)
    return y_BTNH, (q_BTNH, k_BTNH, v_BTNH, seed_2, y_BTNH, log_total_BNT)


def _attention_backward(rate, saved, dy_BTNH):
    """Of each tile as keys with the queries after it, and as queries with the keys before it: so all programs have the
    same work."""
    q_BTNH, k_BTNH, v_BTNH, seed_2, y_BTNH, log_total_BNT = saved
    B, T, N, H = q_BTNH.shape
    tile = _attention_tile(T, H)
    # sum over s of p(s) dp(s), the mean that softmax's gradient takes away
    mean_BNT = jnp.einsum("BTNH,BTNH->BNT", y_BTNH, dy_BTNH, preferred_element_type=jnp.float32)

    def attention_gradient_kernel(
        q_ref, k_ref, v_ref, seed_ref, dy_ref, log_total_ref, mean_ref, dq_ref, dk_ref, dv_ref
    ):
        at, b, n = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        own = pl.ds(at * tile, tile)

        def weights_and_dscores(q, k, v, dy, rows, i, j):
            weights = _exp(_scores(q, k, i, j), log_total_ref[rows][:, None])
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
    gradients = _call(
        attention_gradient_kernel,
        (_shape(q_BTNH.dtype, B, T, N, H),) * 3,
        grid=(T // tile, B, N),
        in_specs=[every, every, every, seeds, every, every_row, every_row],
        out_specs=(some,) * 3,
    )(q_BTNH, k_BTNH, v_BTNH, seed_2, dy_BTNH, log_total_BNT, mean_BNT)
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
