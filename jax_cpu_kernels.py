"""On a CPU: attention, GELU, and products of a few rows with large weights, by code of our own in jax_cpu_kernels.cc.

XLA's products run at the speed of the processor, but for two things. Those of attention are small and do not gain from
a second core, and between them the scores go through memory several times. And where a weight meets a few rows, as in
generation, it is read at a third of the memory's speed. Of GELU, XLA keeps three tensors for the gradient, the widest
of a layer, where two would do. BENCHMARKS.md has what this gives.

jax_cpu_library.py makes the library. Where that is not possible, XLA computes the same; `loaded` says which it is.
Float32 only. Dimension key: jax_transformer.py; here also X = 3 * D (queries, keys, values), K inputs and M outputs of
a product, and P panels of C columns.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp

import jax_cpu_library

FUNCTIONS = ("causal_attention", "causal_attention_gradient", "gelu_erf", "gelu_tanh", "product_with_panels")
PANEL_WIDTH = 32  # two of the widest vectors there are

_library: Future[Path] | None = None  # what `load` has begun


def load(find_folder: Callable[[], Path] = jax_cpu_library.cache_folder) -> None:
    """Have the library made, or found, unless that is so already (`jax_cpu_library.begin`). Returns at once."""
    global _library
    if _library is None:
        _library = jax_cpu_library.begin(find_folder)


def loaded() -> bool:
    """Whether the functions below can be called in what is compiled now. Waits for what `load` has begun."""
    global _library
    if _library is None:
        return False
    try:
        _register(_library.result())
    except OSError as error:
        _library = None
        instead = "attention, GELU and generation take XLA's own code, which is slower (JAX_README.md, Installation)"
        print(f"note: {error}; {instead}")
        return False
    return True


@functools.cache
def _register(library: Path) -> None:
    """Raises OSError, in one line, where the library cannot be used here."""
    try:
        functions = ctypes.CDLL(str(library))
    except OSError as error:
        if "permi" not in str(error).lower():  # else it is a folder that no code may be in. Torn, it is made anew next
            with contextlib.suppress(OSError):
                library.unlink()
        raise
    try:
        for name in FUNCTIONS:
            capsule = jax.ffi.pycapsule(getattr(functions, name))
            jax.ffi.register_ffi_target(f"nanogpt_jax.{name}", capsule, platform="cpu")
    except (RuntimeError, ValueError, AttributeError) as error:  # XLA's, where it takes no such functions
        raise OSError(f"{library} cannot be used: {next(iter(str(error).splitlines()), error)}") from error


def _call(name: str, results, *arrays: jax.Array, overwritten: dict[int, int] | None = None):
    """overwritten: number of an argument -> number of the result that may take over its memory."""
    call = jax.ffi.ffi_call(f"nanogpt_jax.{name}", results, vmap_method="sequential", input_output_aliases=overwritten)
    return call(*arrays)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------


def fits_attention(dtype: jax.typing.DTypeLike, head_width: int) -> bool:
    """Whether `attention` takes these: float32, and heads that are whole vectors."""
    return jnp.dtype(dtype) == jnp.float32 and head_width % 16 == 0 and loaded()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attention(qkv_RX: jax.Array, dropout_3: jax.Array, B: int, n_head: int) -> jax.Array:
    """Causal attention of B rows of tokens, (R, 3 * D) -> (R, D): jax_ops.causal_attention for each head.

    dropout_3, uint32: two seeds, and the rate times 2**32, 0 for none; it drops what jax_ops.dropout drops of
    all weights (G, T, S). Scores are made again for the gradient instead of kept: of each query only the log of its sum
    of exponentials is (Dao et al. 2022, "FlashAttention"). Raises AssertionError on other types and shapes.
    """
    return _attention_forward(qkv_RX, dropout_3, B, n_head)[0]


def _attention_forward(qkv_RX, dropout_3, B, n_head):
    R, X = qkv_RX.shape
    assert qkv_RX.dtype == jnp.float32, f"qkv_RX must be float32, not {qkv_RX.dtype}"
    assert (dropout_3.shape, dropout_3.dtype) == ((3,), jnp.uint32), f"dropout_3 is {dropout_3.dtype}{dropout_3.shape}"
    assert R % B == 0, f"{R} rows are not {B} times as many tokens"
    assert X % (3 * n_head * 16) == 0, f"{X} columns are not 3 x {n_head} heads of 16 numbers, or 32, 48, ..."
    y_RD, logsum_GT = _call("causal_attention", (_float32(R, X // 3), _float32(B * n_head, R // B)), qkv_RX, dropout_3)
    return y_RD, (qkv_RX, dropout_3, logsum_GT)


def _attention_backward(B, n_head, saved, dy_RD):
    return _call("causal_attention_gradient", _float32(*saved[0].shape), *saved, dy_RD), None


attention.defvjp(_attention_forward, _attention_backward)


def fits_gelu(dtype: jax.typing.DTypeLike) -> bool:
    """Whether `gelu` takes this type: float32."""
    return jnp.dtype(dtype) == jnp.float32 and loaded()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, form: str) -> jax.Array:
    """jax_ops.gelu of each element, form 'erf' or 'tanh'; its slope, made in the same pass, is kept for the gradient.

    As `attention`, it can be differentiated once. Raises AssertionError on other types.
    """
    assert x.dtype == jnp.float32, f"x must be float32, not {x.dtype}"
    return _call(f"gelu_{form}", _float32(*x.shape), x, overwritten={0: 0})


def _gelu_forward(x, form):
    return tuple(_call(f"gelu_{form}", [_float32(*x.shape)] * 2, x))


gelu.defvjp(_gelu_forward, lambda form, slope, dy: (dy * slope,))


def panels(kernel_KM: jax.Array) -> jax.Array:
    """A weight as panels (P, K, C) of C columns each, for `product`; zeros where the last one is wider."""
    K, M = kernel_KM.shape
    P = -(-M // PANEL_WIDTH)
    padded_KM = jnp.pad(kernel_KM, ((0, 0), (0, P * PANEL_WIDTH - M)))
    return padded_KM.reshape(K, P, PANEL_WIDTH).transpose(1, 0, 2)


def product(x_RK: jax.Array, kernel_PKC: jax.Array, M: int) -> jax.Array:
    """x @ kernel, (R, M), with the kernel in `panels`. It has no gradient. Raises AssertionError on other shapes."""
    (R, K), (P, rows, C) = x_RK.shape, kernel_PKC.shape
    assert x_RK.dtype == kernel_PKC.dtype == jnp.float32, f"both must be float32, not {x_RK.dtype}, {kernel_PKC.dtype}"
    assert rows == K, f"x_RK has {K} columns, and kernel_PKC is for {rows}"
    assert C == PANEL_WIDTH and P == -(-M // C), f"{P} panels of {C} columns do not make {M} columns"
    return _call("product_with_panels", _float32(R, M), x_RK, kernel_PKC)
