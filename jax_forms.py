"""The functions of jax_ops.py that have a form of their own on some device, and which form is taken where.

On an NVIDIA GPU they are kernels of our own (jax_gpu_kernels.py), or cuDNN's; on a CPU attention and GELU are ours
(jax_cpu_kernels.py); else they are what XLA makes of jax_ops.py. Dimension key: jax_transformer.py.
"""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_cpu_kernels
import jax_ops
from jax_ops import causal_attention, on_nvidia_gpu

CUDNN_WIDTH = 128  # of a head, at most; from Hopper on it takes 256


def gpu_kernels(dtype: jax.typing.DTypeLike) -> Any:
    """The module jax_gpu_kernels, or None where its kernels do not run, or shall not: with GPU_KERNELS=none."""
    return _gpu_kernels() if on_nvidia_gpu(dtype) and os.environ.get("GPU_KERNELS") != "none" else None


@functools.cache
def _gpu_kernels() -> Any:
    try:
        import jax_gpu_kernels  # with all of Pallas, which a start on a CPU does without
    except ImportError as error:
        print(f"note: {error}, so XLA's own code takes the place of jax_gpu_kernels.py, and is slower")
        return None
    return jax_gpu_kernels


def layer_norm(x_RD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """x itself and jax_ops.layer_norm of it, each (R, D): x, too, so that one kernel can also add its two gradients."""
    kernels = gpu_kernels(x_RD.dtype)
    if kernels is None:
        return x_RD, jax_ops.layer_norm(x_RD, scale_D, bias_D)
    return kernels.layer_norm(x_RD, scale_D, bias_D)


def gelu(x_RF: jax.Array, form: str) -> jax.Array:
    """jax_ops.gelu of each element, (R, F) -> (R, F)."""
    kernels = gpu_kernels(x_RF.dtype)
    if kernels and form == "erf" and x_RF.size < 2**32:  # as far as a kernel counts elements
        return kernels.gelu_erf(x_RF)
    if jax_cpu_kernels.fits_gelu(x_RF.dtype):
        return jax_cpu_kernels.gelu(x_RF, form)
    return jax_ops.gelu(x_RF, form)


def mlp(x_RD: jax.Array, c_fc: nnx.Linear, c_proj: Any, form: str) -> jax.Array:
    """c_proj(gelu(c_fc(x))), (R, D) -> (R, D), GELU in one of its forms; c_proj's kernel is (D, F)."""
    kernels = gpu_kernels(x_RD.dtype)
    biases = c_fc.bias is not None or c_proj.bias is not None
    if kernels and form == "erf" and not biases and kernels.fits_mlp(*x_RD.shape):
        return kernels.mlp(x_RD, *(linear.kernel[...].astype(x_RD.dtype) for linear in (c_fc, c_proj)))
    return c_proj(gelu(c_fc(x_RD), form))


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """jax_ops.cross_entropy: -log p(target) in nats, (B, T) float32, of logits (B, T, V).

    Raises AssertionError if targets_BT has another shape.
    """
    # The kernel rounds the gradient before float16's loss scale can lift it.
    kernels = gpu_kernels(logits_BTV.dtype) if logits_BTV.dtype == jnp.bfloat16 else None
    if kernels is None or not kernels.fits_cross_entropy(logits_BTV.shape[-1]):
        return jax_ops.cross_entropy(logits_BTV, targets_BT)
    assert logits_BTV.shape[:-1] == targets_BT.shape, f"logits {logits_BTV.shape} do not fit targets {targets_BT.shape}"
    with jax.named_scope("loss"):
        losses_R = kernels.cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1))
    return losses_R.reshape(targets_BT.shape)


def fits_cudnn(H: int) -> bool:
    """Whether attention with heads of H numbers can be cuDNN's.

    Not with XLA's flag for results that are the same every time: XLA then does not find again what it compiled for
    cuDNN, and ends with an IndexError (openxla/xla#46500, and JAX 0.11.2).
    """
    same_every_time = r"--xla_gpu_(deterministic|exclude_nondeterministic)_ops(=['\"]?(true|1)|\s|$)"
    return H % 8 == 0 and H <= CUDNN_WIDTH and not re.search(same_every_time, os.environ.get("XLA_FLAGS", ""), re.I)


def attend(
    x_RD: jax.Array, c_attn: nnx.Linear, B: int, n_head: int, rate: float, seed_2: jax.Array | None
) -> jax.Array:
    """Causal attention of all heads of B rows of tokens, (R, D) -> (R, D), in the fastest form there is here."""
    R, D = x_RD.shape
    T, N, H = R // B, n_head, D // n_head
    rate, seed_2 = (0.0, jnp.zeros(2, jnp.uint32)) if seed_2 is None else (rate, seed_2)
    kernels = gpu_kernels(x_RD.dtype)
    by_cudnn = rate == 0 and fits_cudnn(H)
    if kernels and (by_cudnn or kernels.fits_attention(T, H)):
        # Three products: to cut what these read out of one, and to join its gradient, would be a copy each.
        qkv = [part_RD.reshape(B, T, N, H) for part_RD in _products_apart(x_RD, c_attn, 3)]
        if by_cudnn:
            y_BTNH = jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="cudnn")
        else:
            y_BTNH = kernels.attention(*qkv, seed_2, rate)
        return y_BTNH.reshape(R, D)
    qkv_RX = c_attn(x_RD)
    if jax_cpu_kernels.fits_attention(qkv_RX.dtype, H):
        return jax_cpu_kernels.attention(qkv_RX, jnp.append(seed_2, np.uint32(rate * 2**32)), B, N)
    # Split before the heads are looked at: the gradient then is one concatenation, and no transposing copy.
    q_BTNH, k_BTNH, v_BTNH = (part_RD.reshape(B, T, N, H) for part_RD in jnp.split(qkv_RX, 3, axis=1))
    # Heads first: every product is then over whole, contiguous matrices.
    q_GTH, k_GTH, v_GTH = (a.transpose(0, 2, 1, 3).reshape(B * N, T, H) for a in (q_BTNH, k_BTNH, v_BTNH))
    y_GTH = causal_attention(q_GTH, k_GTH, v_GTH, rate, seed_2)
    return y_GTH.reshape(B, N, T, H).transpose(0, 2, 1, 3).reshape(R, D)


def _products_apart(x_RK: jax.Array, linear: nnx.Linear, parts: int) -> list[jax.Array]:
    """jnp.split(linear(x_RK), parts, axis=1), each part as a product of its own."""
    parts_RM = _products(x_RK, jnp.split(linear.kernel[...].astype(x_RK.dtype), parts, axis=1))
    if linear.bias is None:
        return parts_RM
    biases_M = jnp.split(linear.bias[...].astype(x_RK.dtype), parts)
    return [part_RM + bias_M[None] for part_RM, bias_M in zip(parts_RM, biases_M, strict=True)]


@jax.custom_vjp
def _products(x_RK: jax.Array, kernels_KM: list[jax.Array]) -> list[jax.Array]:
    """x @ kernel for each of the kernels."""
    return [x_RK @ kernel_KM for kernel_KM in kernels_KM]


def _products_backward(saved, dys_RM):
    """With the sum for dx in an order in which XLA lets each product add to the one before, in cuBLAS."""
    x_RK, kernels_KM = saved
    dx_RK = None
    for dy_RM, kernel_KM in zip(dys_RM, kernels_KM, strict=True):
        product_RK = dy_RM @ kernel_KM.T
        dx_RK = product_RK if dx_RK is None else product_RK + dx_RK
    return dx_RK, [x_RK.T @ dy_RM for dy_RM in dys_RM]


_products.defvjp(lambda x_RK, kernels_KM: (_products(x_RK, kernels_KM), (x_RK, kernels_KM)), _products_backward)
