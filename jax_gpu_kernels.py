"""On an NVIDIA GPU, in 16 bits: LayerNorm, GELU, the loss, and attention with dropout, each in one pass over memory.

Between its matrix products a GPT waits for memory, and for erf and exp. What XLA makes of these functions goes through
its tensors up to twice as often as it has to, since it never joins a sum over a row with what follows from it, and
takes many instructions for an exponential. BENCHMARKS.md has what this gives. Attention without dropout is cuDNN's,
where it does not have to be deterministic.

jax_gpu_pallas.py says how such a kernel works. A row of D numbers is loaded as C, a power of two, and those that are
not there are masked. Nothing is added up in an order left to chance: the same input gives the same bits. Gradients are
written by hand, and have none themselves.

`jax_forms` decides where they are used. Dimension key: jax_transformer.py; here also C columns, the power of two, and P
programs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import jax_gpu_gelu
import jax_gpu_pallas
from jax_gpu_attention import attention as attention  # jax_forms finds all of them here
from jax_gpu_attention import fits_attention as fits_attention
from jax_gpu_mlp import fits_mlp as fits_mlp
from jax_gpu_mlp import mlp as mlp
from jax_gpu_pallas import LOG2_E, call, exp2, exp_over, product_and_sum, result

# Numbers, rows and so on that a program works on at a time, as measured on an H200 (dev/LOG.md).
TILE = 1024
ROWS_SUMMED = 32  # one program adds up the gradients of LayerNorm's weights over this many rows at least
PROGRAMS = 512  # and about this many programs do it at most: they all run at once, and leave fewer sums to add up
LOGITS_TILE = 8192


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
    y_RD, mean_R, rstd_R = call(
        layer_norm_kernel,
        (result(x_RD.dtype, R, D), result(jnp.float32, R), result(jnp.float32, R)),
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
            contributions = (dy * normal, dy)[: len(sums)]  # to the bias only where there is one
            return [total + jnp.sum(rows_C, axis=0) for total, rows_C in zip(sums, contributions, strict=True)]

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
    dx_RD, *sums_PD = call(
        layer_norm_gradient_kernel,
        (result(x_RD.dtype, R, D), *weights * [result(jnp.float32, programs, D)]),
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
    return _by_element(lambda x: jax_gpu_gelu.gelu(x, exp2, product_and_sum), x)


def _gelu_erf_backward(x, dy):
    return (_by_element(lambda x, dy: dy * jax_gpu_gelu.gelu_slope(x, exp2, product_and_sum), x, dy),)


gelu_erf.defvjp(lambda x: (gelu_erf(x), x), _gelu_erf_backward)


def _by_element(function, *arrays: jax.Array) -> jax.Array:
    """function of each element of the arrays, computed in float32."""
    size, dtype = arrays[0].size, arrays[0].dtype

    def gelu_kernel(*refs):
        *inputs, output_ref = refs
        # not by counting elements, of which there may be more than 2**31
        mask = (pl.program_id(0) < size // TILE) | (jnp.arange(TILE) < size % TILE)
        output = function(*(triton.load(ref, mask=mask, other=0).astype(jnp.float32) for ref in inputs))
        triton.store(output_ref, output.astype(dtype), mask=mask)

    tile = pl.BlockSpec((TILE,), lambda i: (i,))
    kernel = call(
        gelu_kernel,
        result(dtype, size),
        grid=(pl.cdiv(size, TILE),),
        in_specs=[tile] * len(arrays),
        out_specs=tile,
        warps=2,
    )
    return kernel(*(array.reshape(-1) for array in arrays)).reshape(arrays[0].shape)


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
            new_largest = jnp.maximum(largest, LOG2_E * jnp.max(logits, axis=1))
            exponentials = exp_over(logits, new_largest[:, None])
            return new_largest, total * exp2(largest - new_largest) + jnp.sum(exponentials, axis=1), following

        start = jnp.full(tile // 8, jnp.finfo(jnp.float32).min), jnp.zeros(tile // 8, jnp.float32), load(0)
        largest_of_each, total_of_each, _ = jax.lax.fori_loop(0, pl.cdiv(V, tile), largest_and_total, start)
        largest = jnp.max(largest_of_each)
        log2_total = largest + jnp.log2(jnp.sum(total_of_each * exp2(largest_of_each - largest)))
        loss_ref[row] = log2_total * math.log(2) - target_logit
        for dlogits_ref in dlogits_refs:

            def gradient(i, logits, dlogits_ref=dlogits_ref):
                following = load(i + 1)
                p_by_R = exp_over(logits, log2_total + math.log2(R))
                triton.store(dlogits_ref.at[row, columns(i)], p_by_R.astype(dlogits_ref.dtype), mask=columns(i) < V)
                return following

            jax.lax.fori_loop(0, pl.cdiv(V, tile), gradient, load(0))
            if not jax_gpu_pallas.INTERPRET:  # where there are no threads
                triton.debug_barrier()  # all have written: now the one number that is not p / R
            here = columns(target // tile)
            at_target = jnp.full(here.shape, (exp_over(target_logit, log2_total) - 1) / R, dlogits_ref.dtype)
            triton.store(dlogits_ref.at[row, here], at_target, mask=(here == target) & (here < V))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    loss, dlogits = result(jnp.float32, R), result(logits_RV.dtype, R, V)
    results = (loss, dlogits) if with_gradient else (loss,)
    return call(
        cross_entropy_kernel,
        results,
        grid=(R,),
        in_specs=[whole, whole],
        out_specs=tuple(whole for _ in results),
        warps=max(1, tile // 256),
        aliases={0: 1} if with_gradient else None,
    )(logits_RV, targets_R)
