"""The kernels of jax_gpu_mlp.py against GELU's formula in float32; where there is no Hopper GPU, by JAX's interpreter.

A process of its own, which tests/test_gpu_kernels.py starts: interpreted, each warpgroup is a thread that waits for the
others inside XLA, so XLA has to have more threads than a small machine has cores.
"""

import importlib
import sys

import jax
import numpy as np

import jax_gpu_mlp
from jax_gpu_mlp import mlp

# Shapes and type. Tiles of 192 columns, with more pieces than their buffers, two for each warpgroup, and fewer of the K
# than a ring of stages holds; one tile of 128 columns, for the first warpgroup alone, and more of the K.
INTERPRETED = [
    ([(256, 128), (128, 768), (128, 768)], "bfloat16"),
    ([(128, 384), (384, 128), (384, 128)], "float16"),
]
ON_A_GPU = [
    ([(8192, 768), (768, 3072), (768, 3072)], "bfloat16"),
    ([(4096, 1024), (1024, 4096), (1024, 4096)], "float16"),
]


def exact_mlp(x_RD, c_fc_DF, c_proj_DF):
    return jax.nn.gelu(x_RD @ c_fc_DF, approximate=False) @ c_proj_DF.T


def largest_errors(shapes: list[tuple[int, int]], dtype: str) -> list[float]:
    """Of the result, the gradients of x and both weights, and the result alone, each by its largest element."""
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def normal(shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    x_RD, c_fc_DF, c_proj_DF = map(normal, shapes)
    (D, F), dy_RD = c_fc_DF.shape, normal(x_RD.shape)
    arrays = [x_RD, c_fc_DF * D**-0.5, c_proj_DF * F**-0.5]
    y_RD, pull = jax.vjp(mlp, *arrays)
    exact_y_RD, exact_pull = jax.vjp(exact_mlp, *(a.astype("float32") for a in arrays))
    got = [y_RD, *pull(dy_RD), mlp(*arrays)]
    expected = [exact_y_RD, *exact_pull(dy_RD.astype("float32")), exact_y_RD]
    pairs = [[np.asarray(a, np.float64) for a in pair] for pair in zip(got, expected, strict=True)]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


if __name__ == "__main__":
    if on_a_gpu := jax_gpu_mlp.is_hopper():
        jax.config.update("jax_default_matmul_precision", "highest")  # float32 products are rounded to tf32 else
    else:
        params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
        # JAX 0.10 finds no races yet. Fewer threads that stand for copies hide those between copies.
        jax_gpu_mlp.INTERPRET = params.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
    for case in ON_A_GPU if on_a_gpu else INTERPRETED:
        errors = largest_errors(*case)
        print(*case, *(f"{error:.1e}" for error in errors))
        if max(errors) > {"bfloat16": 1e-2, "float16": 1.5e-3}[case[-1]]:
            sys.exit("too far off")
