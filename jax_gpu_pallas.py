"""How a kernel for an NVIDIA GPU is called, and functions that are one instruction there. For jax_gpu_kernels.py.

The kernels are written in Pallas, and XLA compiles them by Triton, for Ampere and later. JAX says that a version to
come will be without this way to Triton; they then have to be written for Mosaic, its other one to a GPU, and until they
are, XLA's own code takes their place. A kernel is run by each program of a grid, on pieces of arrays ("refs") that its
BlockSpecs cut out. What it loads has to be a power of two long.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

INTERPRET = False  # tests set it: JAX then computes what the kernels say, on any device
LOG2_E = math.log2(math.e)


def call(kernel, out_shape, *, grid, in_specs, out_specs, warps: int = 4, aliases: dict[int, int] | None = None):
    """The kernel as a function of arrays, as jax.experimental.pallas.pallas_call; a warp is 32 threads."""
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


def result(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    """What an array will be that a kernel fills."""
    return jax.ShapeDtypeStruct(shape, dtype)


def ptx(instruction: str, meaning: Callable[..., jax.Array], *numbers: jax.typing.ArrayLike) -> jax.Array:
    """One instruction of the GPU's for each of some float32 numbers, arrays of one shape or scalars beside them.

    Of an exponential XLA makes four instructions, of a quotient seven, for the sake of numbers below 1e-38, and it
    never joins a product with a sum. Tests get what the instruction means, and so do scalars alone, which Triton would
    want as arrays.
    """
    arrays = jnp.broadcast_arrays(*(jnp.asarray(number, jnp.float32) for number in numbers))
    if INTERPRET or arrays[0].ndim == 0:
        return meaning(*arrays)
    return triton.elementwise_inline_asm(
        f"{instruction}.f32 {', '.join(f'${i}' for i in range(len(arrays) + 1))};",
        args=arrays,
        constraints=",".join(["=f", *("f" for _ in arrays)]),
        pack=1,
        result_shape_dtypes=[result(jnp.float32, *arrays[0].shape)],
    )[0]


exp2 = functools.partial(ptx, "ex2.approx.ftz", jnp.exp2)
product_and_sum = functools.partial(ptx, "fma.rn", lambda x, y, z: x * y + z)


def exp_over(x: jax.Array, log2_z: jax.Array) -> jax.Array:
    """exp(x) / 2**log2_z, float32: a GPU's exponential is to the base of 2, so sums of them are kept as their log2."""
    return exp2(product_and_sum(LOG2_E, x, -log2_z))
