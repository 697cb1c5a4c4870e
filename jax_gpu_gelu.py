"""GELU and its slope for an NVIDIA GPU: one exponential and a polynomial or two, no quotient.

Phi(-u) is 2 to a polynomial of u >= 0, and GELU's slope there that power times another one. Both were fitted up to 6.5
for the least largest error, absolute and relative (dev/LOG.md), and fall to zero beyond. In float32 GELU is right to
5e-6, and to 0.3 % at -4, where it is 1e-4; its slope to 4e-5. bfloat16's steps are 0.4 to 0.8 %, float16's 0.05 to 0.1.
"""

import jax
import jax.numpy as jnp

# The coefficients of u**0, u**1, ...
LOG2_TAIL = (-1.00005817, -1.15017891, -0.461917996, -0.0497963205, 0.00623321859, -0.000351222552)
SLOPE_BY_TAIL = (0.99997777, -0.79720747, -0.63935751, -0.10553962, 0.01844941, -0.00142673)


def gelu(x: jax.Array, exp2, product_and_sum) -> jax.Array:
    """x * Phi(x) of float32 numbers, by a kernel's own exp2(x) and product_and_sum(x, y, z), x * y + z."""
    u = jnp.abs(x)
    return product_and_sum(-u, exp2(_polynomial(u, LOG2_TAIL, product_and_sum)), jnp.maximum(x, 0))


def gelu_slope(x: jax.Array, exp2, product_and_sum) -> jax.Array:
    """The derivative of `gelu`, Phi(x) + x Phi'(x)."""
    u = jnp.minimum(jnp.abs(x), 8)  # beyond, zero times what is too large for float32 would not be zero
    below = exp2(_polynomial(u, LOG2_TAIL, product_and_sum)) * _polynomial(u, SLOPE_BY_TAIL, product_and_sum)
    return jnp.where(x < 0, below, 1 - below)


def _polynomial(u, coefficients, product_and_sum):
    """By Horner's rule."""
    total = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        total = product_and_sum(u, total, coefficient)
    return total
