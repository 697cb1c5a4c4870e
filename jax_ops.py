"""The functions that a GPT is made of, as fast as XLA makes them: softmax, GELU, dropout, attention, LayerNorm, loss.

Pure functions of arrays, without weights or settings. Where a gradient is written by hand, it is because the one that
JAX derives takes more passes over memory; BENCHMARKS.md and dev/LOG.md have what each gives. Dimension key:
jax_transformer.py.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _in_memory(*arrays: jax.Array) -> Any:
    """The same arrays, which on a GPU are written to its memory before anything that follows reads them.

    Without this, XLA would compute them anew inside each operation that reads them.
    """
    return jax.lax.platform_dependent(
        *arrays, cpu=lambda *same: same, default=lambda *same: jax.lax.optimization_barrier(same)
    )


@jax.custom_vjp
def softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last axis, with the gradient in its short form: JAX's own keeps more and takes more passes."""
    return _softmax_forward(scores)[0]


def _softmax_forward(scores):
    weights = jax.lax.platform_dependent(scores, cpu=jax.nn.softmax, default=_softmax_in_passes)
    return weights, weights


def _softmax_in_passes(scores):
    """For a GPU: with dropout in it, the one kernel that XLA makes of a softmax takes three times as long as these."""
    (largest,) = _in_memory(scores.max(axis=-1, keepdims=True))
    (total,) = _in_memory(jnp.exp(scores - largest).sum(axis=-1, keepdims=True))
    return jnp.exp(scores - largest) / total


def _softmax_backward(weights, dweights):
    (mean,) = _in_memory(jnp.sum(weights * dweights, axis=-1, keepdims=True))
    return (weights * (dweights - mean),)


softmax.defvjp(_softmax_forward, _softmax_backward)


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """x * Phi(x), Phi the normal distribution (Hendrycks & Gimpel 2016), with its slope made in the same pass.

    JAX's own keeps x and takes two passes more over the widest tensor of a layer: 2 % of a step on a CPU, although XLA
    makes the slope in the backward pass there all the same (jax_cpu_kernels.gelu does not). On a GPU it is the
    arithmetic of erf and exp that takes the time, and this does it once.
    """
    return _gelu_erf_and_slope(x)[0]


def _gelu_erf_and_slope(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cdf = 0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5))
    slope = cdf + wide * jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    return (wide * cdf).astype(x.dtype), slope.astype(x.dtype)


gelu_erf.defvjp(lambda x: _in_memory(*_gelu_erf_and_slope(x)), lambda slope, dy: (dy * slope,))


def gelu(x: jax.Array, form: str) -> jax.Array:
    """GELU in one of its two forms: 'erf', or its approximation by 'tanh'."""
    return gelu_erf(x) if form == "erf" else jax.nn.gelu(x, approximate=True)


def dropout(x: jax.Array, rate: float, seed_2: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate`, scale the others by 1 / (1 - rate); without a seed, x itself.

    What stays is decided by a hash of an element's index and 64 random bits, not by jax.random: threefry would take a
    sixth of a training step on a CPU. The hash is "lowbias32", twice (C. Wellons, hash-prospector, 2018).
    """
    if seed_2 is None or rate == 0:
        return x
    seed_1 = seed_2[1]
    if x.size > 2**32:
        seed_1 = seed_of_rows(seed_1, _flat_index(x.shape[:-1])[..., None], x.shape[-1])
    kept = is_kept(_flat_index(x.shape), seed_2[0], seed_1, rate)
    return jnp.where(kept, x * (1 / (1 - rate)), 0).astype(x.dtype)


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    """Of each element of an array, uint32: its place in memory, modulo 2**32."""
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    along = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(n) for axis, n in enumerate(strides)]
    return functools.reduce(jnp.add, along)


def is_kept(index: jax.Array, seed_0: jax.Array, seed_1: jax.Array, rate: float) -> jax.Array:
    """Which elements `dropout` leaves, by their index (uint32) and two seeds."""
    bits = _lowbias32(_lowbias32(index ^ seed_0) ^ seed_1)
    return bits >= np.uint32(rate * 2**32)


def seed_of_rows(seed_1: jax.Array, row: jax.Array, length: int) -> jax.Array:
    """`dropout`'s second seed for rows of `length` <= 2**16 elements; row, their numbers, and the result are uint32.

    It is another one for each 2**32 elements, so that what is dropped of the first is not dropped of all that follow.
    """
    rows_of_2_16, rest = row >> 16, row & np.uint32(0xFFFF)
    high_word = (rows_of_2_16 * np.uint32(length) + (rest * np.uint32(length) >> 16)) >> 16  # of row * length
    return seed_1 ^ _lowbias32(high_word)  # which is 0 of 0


def _lowbias32(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def on_nvidia_gpu(dtype: jax.typing.DTypeLike) -> bool:
    """Whether cuDNN's attention and jax_gpu_kernels run here: an NVIDIA GPU from Ampere on, and 16 bits."""
    device = jax.devices()[0]
    return (
        device.platform == "gpu"
        and "NVIDIA" in device.device_kind
        and float(device.compute_capability) >= 8.0
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    )


def causal_attention(q_GTH: jax.Array, k_GTH: jax.Array, v_GTH: jax.Array, rate: float, seed_2) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v under a causal mask, for each of G heads; scores and softmax in float32 at least."""
    T, H = q_GTH.shape[1:]
    scores_GTS = _scores(q_GTH, k_GTH) / math.sqrt(H)
    visible_TS = jnp.tril(jnp.ones((T, T), dtype=bool))
    weights_GTS = softmax(jnp.where(visible_TS[None], scores_GTS, -jnp.inf)).astype(v_GTH.dtype)
    return jnp.einsum("GTS,GSH->GTH", dropout(weights_GTS, rate, seed_2), v_GTH)


@jax.custom_vjp
def _scores(q_GTH, k_GTH):
    """q k^T, in float32 at least, whose gradient is computed from what came back in the type of q and k.

    As everywhere else; JAX would take the products of a gradient in float32, which on a GPU are half as fast.
    """
    precise = jnp.promote_types(q_GTH.dtype, jnp.float32)
    return jnp.einsum("GTH,GSH->GTS", q_GTH, k_GTH, preferred_element_type=precise)


def _scores_backward(saved, dscores_GTS):
    q_GTH, k_GTH = saved
    dscores_GTS = dscores_GTS.astype(q_GTH.dtype)
    return jnp.einsum("GTS,GSH->GTH", dscores_GTS, k_GTH), jnp.einsum("GTS,GTH->GSH", dscores_GTS, q_GTH)


_scores.defvjp(lambda q_GTH, k_GTH: (_scores(q_GTH, k_GTH), (q_GTH, k_GTH)), _scores_backward)


def _row_means(x_RD: jax.Array, weights_D: jax.Array | None = None) -> jax.Array:
    """Mean of each row, its elements times `weights_D`, (R, 1).

    On a CPU as a matrix product, which runs on all cores; XLA's reduction runs on one.
    """
    D = x_RD.shape[1]
    weights_D = jnp.ones(D, x_RD.dtype) if weights_D is None else weights_D.astype(x_RD.dtype)
    means_R = jax.lax.platform_dependent(
        x_RD,
        weights_D,
        cpu=lambda x_RD, weights_D: x_RD @ (weights_D / D),
        default=lambda x_RD, weights_D: (x_RD * weights_D[None]).mean(axis=1),
    )
    return means_R[:, None]


@jax.custom_vjp
def layer_norm(x_RD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None = None) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias over each row (Ba et al. 2016), in x's type.

    It computes in float32 at least. The gradient is written out so that it, too, is made of row means: with XLA's own,
    an update of a small model takes a tenth longer on a CPU. Only x itself and two numbers a row are kept for it.
    """
    return _layer_norm_forward(x_RD, scale_D, bias_D)[0]


def _layer_norm_forward(x_RD, scale_D, bias_D):
    wide_RD = x_RD.astype(jnp.promote_types(x_RD.dtype, jnp.float32))
    mean_R1 = _row_means(wide_RD)
    rstd_R1 = jax.lax.rsqrt(_row_means(jnp.square(wide_RD - mean_R1)) + 1e-5)
    y_RD = (wide_RD - mean_R1) * rstd_R1 * scale_D[None]
    y_RD = y_RD if bias_D is None else y_RD + bias_D[None]
    return y_RD.astype(x_RD.dtype), (x_RD, mean_R1, rstd_R1, scale_D, bias_D)


def _layer_norm_backward(saved, dy_RD):
    x_RD, mean_R1, rstd_R1, scale_D, bias_D = saved

    def wide(x_RD, dy_RD):
        """The normalised rows, and dy in the precision of the row's numbers."""
        return (x_RD.astype(rstd_R1.dtype) - mean_R1) * rstd_R1, dy_RD.astype(rstd_R1.dtype)

    # Three passes over x and dy: the means of rows, dx, and the sums over all rows, which XLA joins to dx. On a CPU it
    # makes dy * normal once, for its means and its sums. It must not need normal alone: that it would make in the
    # forward pass, and keep.
    normal_RD, wide_dy_RD = wide(x_RD, dy_RD)
    means = _row_means(wide_dy_RD, scale_D), _row_means(wide_dy_RD * normal_RD, scale_D)
    x_RD, dy_RD, mean_R1_of_dnormal, mean_R1_of_product = _in_memory(x_RD, dy_RD, *means)
    normal_RD, wide_dy_RD = wide(x_RD, dy_RD)
    dx_RD = (wide_dy_RD * scale_D[None] - mean_R1_of_dnormal - normal_RD * mean_R1_of_product) * rstd_R1
    normal_RD, wide_dy_RD = wide(*_in_memory(x_RD, dy_RD))
    dbias_D = None if bias_D is None else jnp.sum(wide_dy_RD, axis=0)
    return dx_RD.astype(x_RD.dtype), jnp.sum(wide_dy_RD * normal_RD, axis=0), dbias_D


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) in nats, (B, T), in float32 whatever lower precision the logits have."""
    assert logits_BTV.shape[:-1] == targets_BT.shape, f"logits {logits_BTV.shape} do not fit targets {targets_BT.shape}"
    with jax.named_scope("loss"):
        return _cross_entropy(logits_BTV, targets_BT)


@jax.custom_vjp
def _cross_entropy(logits_BTV, targets_BT):
    """With its gradient in one pass over the logits, p minus one at the target: JAX's own, through the lookup, writes
    float32 tensors of their shape four times, 3 % of GPT-2's step on a GPU and a sixth of its memory."""
    return _cross_entropy_forward(logits_BTV, targets_BT)[0]


def _cross_entropy_forward(logits_BTV, targets_BT):
    wide = jnp.promote_types(logits_BTV.dtype, jnp.float32)
    log_total_BT = jax.nn.logsumexp(logits_BTV.astype(wide), axis=-1)
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0].astype(wide)
    return log_total_BT - target_logits_BT, (logits_BTV, targets_BT, log_total_BT)


def _cross_entropy_backward(saved, dloss_BT):
    logits_BTV, targets_BT, log_total_BT = saved
    p_BTV = jnp.exp(logits_BTV.astype(log_total_BT.dtype) - log_total_BT[..., None])
    targets_BT = jnp.where(targets_BT < 0, targets_BT + logits_BTV.shape[-1], targets_BT)  # as the lookup counts them
    is_target_BTV = (
        jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, logits_BTV.ndim - 1) == targets_BT[..., None]
    )
    return ((p_BTV - is_target_BTV) * dloss_BT[..., None]).astype(logits_BTV.dtype), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
