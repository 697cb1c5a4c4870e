"""GPT-2 as Flax NNX modules: configuration, forward pass, loss, counts. No I/O, no training.

Arrays carry their shape in their name. The dimension key, here and in every other file:

    B batch    T time (tokens)    R = B * T flat rows    D model width (n_embd)    F = 4 * D feed-forward
    N heads    H head width       V vocabulary           L layers                  A accumulated micro-batches
    S keys attended to (= T without a cache)    G = B * N heads of all rows       Q queries of a block
    X = 3 * D queries, keys and values

The modules exist to be split once: `init_params` gives a plain dict of arrays, and `forward` is a pure function of it,
so that the training step is plain `jax.jit` over plain dicts. Paper: Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners"; names of the parameters are those of its released code (wte, wpe, h, c_attn, ...).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_cpu_kernels

Params = dict[str, Any]  # nested dict of float32 arrays; its inner layout is this file's own business


@dataclass(frozen=True)
class GPTConfig:
    """Shape and arithmetic of a GPT. Hashable: a static argument of every compiled function."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 padded to a multiple of 64: faster matrix products
    dropout: float = 0.0
    bias: bool = False
    gelu: Literal["erf", "tanh"] = "erf"  # erf: nanoGPT's; tanh: what GPT-2's released weights were trained with
    dtype: str = "float32"  # compute type; parameters, softmax and loss are always float32

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"dtype={self.dtype!r} must be float32, bfloat16, float16 or, with x64 on, float64")
        if self.gelu not in ("erf", "tanh"):
            raise ValueError(f"gelu={self.gelu!r} must be 'erf' or 'tanh'")


def _gpt2_size(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    return GPTConfig(n_layer, n_head, n_embd, block_size=1024, vocab_size=50257, bias=True, gelu="tanh")


GPT2_SIZES = {
    "gpt2": _gpt2_size(12, 12, 768),  # 124M
    "gpt2-medium": _gpt2_size(24, 16, 1024),  # 350M
    "gpt2-large": _gpt2_size(36, 20, 1280),  # 774M
    "gpt2-xl": _gpt2_size(48, 25, 1600),  # 1558M
}


# ----------------------------------------------------------------------------------------------------------------------
# modules


@jax.custom_vjp
def softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last axis, with the gradient in its short form: JAX's own keeps more and takes more passes."""
    return jax.nn.softmax(scores, axis=-1)


def _softmax_forward(scores):
    weights = jax.nn.softmax(scores, axis=-1)
    return weights, weights


def _softmax_backward(weights, dweights):
    return (weights * (dweights - jnp.sum(weights * dweights, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


@jax.custom_vjp
def gelu_erf(x: jax.Array) -> jax.Array:
    """x * Phi(x), Phi the normal distribution (Hendrycks & Gimpel 2016), with its slope made in the same pass.

    JAX's own keeps x and takes two passes more over the widest tensor of a layer: 2 % of a step on a CPU.
    """
    return _gelu_erf_forward(x)[0]


def _gelu_erf_forward(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cdf = 0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5))
    slope = cdf + wide * jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    return (wide * cdf).astype(x.dtype), slope.astype(x.dtype)


gelu_erf.defvjp(_gelu_erf_forward, lambda slope, dy: (dy * slope,))


def gelu(x: jax.Array, form: str) -> jax.Array:
    """GELU in one of its two forms: 'erf', or its approximation by 'tanh'."""
    return gelu_erf(x) if form == "erf" else jax.nn.gelu(x, approximate=True)


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Zero each element with probability `rate`, scale the others by 1 / (1 - rate); without `rngs`, x itself.

    What stays is decided by a hash of an element's index and 64 random bits, not by jax.random: threefry would take a
    sixth of a training step on a CPU. The hash is "lowbias32", twice (C. Wellons, hash-prospector, 2018).
    """
    if rngs is None or rate == 0:
        return x
    seed_2 = dropout_seeds(rngs)
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    index = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(n) for axis, n in enumerate(strides))
    bits = _lowbias32(_lowbias32(index ^ seed_2[0]) ^ seed_2[1])
    return jnp.where(bits >= np.uint32(rate * 2**32), x * (1 / (1 - rate)), 0).astype(x.dtype)


def dropout_seeds(rngs: nnx.Rngs) -> jax.Array:
    """The 64 random bits of the next dropout, (2,) uint32."""
    return jax.random.bits(rngs.dropout(), (2,), jnp.uint32)


def _lowbias32(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def has_fused_attention(dtype: jax.typing.DTypeLike) -> bool:
    """Whether cuDNN's attention runs here: an NVIDIA GPU from Ampere on, and 16 bits. It has no usable dropout."""
    device = jax.devices()[0]
    return (
        device.platform == "gpu"
        and "NVIDIA" in device.device_kind
        and float(device.compute_capability) >= 8.0
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    )


def attend(qkv_RX: jax.Array, B: int, n_head: int, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Causal attention of all heads of B rows of tokens, (R, 3 * D) -> (R, D), in the fastest form there is here."""
    R, D = qkv_RX.shape[0], qkv_RX.shape[1] // 3
    T, N, H = R // B, n_head, D // n_head
    if jax_cpu_kernels.fits_attention(qkv_RX.dtype, H):
        seeds_2 = jnp.zeros(2, jnp.uint32) if rngs is None or rate == 0 else dropout_seeds(rngs)
        return jax_cpu_kernels.attention(qkv_RX, jnp.append(seeds_2, np.uint32(rate * 2**32)), B, N)
    # Split before the heads are looked at: the gradient then is one concatenation, and no transposing copy.
    q_BTNH, k_BTNH, v_BTNH = (part_RD.reshape(B, T, N, H) for part_RD in jnp.split(qkv_RX, 3, axis=1))
    if rate == 0 and H % 8 == 0 and has_fused_attention(qkv_RX.dtype):
        y_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn")
    else:
        # Heads first: every product is then over whole, contiguous matrices.
        q_GTH, k_GTH, v_GTH = (a.transpose(0, 2, 1, 3).reshape(B * N, T, H) for a in (q_BTNH, k_BTNH, v_BTNH))
        y_GTH = causal_attention(q_GTH, k_GTH, v_GTH, rate, rngs)
        y_BTNH = y_GTH.reshape(B, N, T, H).transpose(0, 2, 1, 3)
    return y_BTNH.reshape(R, D)


def causal_attention(q_GTH: jax.Array, k_GTH: jax.Array, v_GTH: jax.Array, rate: float, rngs) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v under a causal mask, for each of G heads; scores and softmax in float32 at least."""
    T, H = q_GTH.shape[1:]
    precise = jnp.promote_types(q_GTH.dtype, jnp.float32)
    scores_GTS = jnp.einsum("GTH,GSH->GTS", q_GTH, k_GTH, preferred_element_type=precise) / math.sqrt(H)
    visible_TS = jnp.tril(jnp.ones((T, T), dtype=bool))
    weights_GTS = softmax(jnp.where(visible_TS[None], scores_GTS, -jnp.inf)).astype(v_GTH.dtype)
    return jnp.einsum("GTS,GSH->GTH", dropout(weights_GTS, rate, rngs), v_GTH)


def _row_means(x_RD: jax.Array) -> jax.Array:
    """Mean of each row, (R, 1). On a CPU as a matrix product, which runs on all cores; XLA's reduction runs on one."""
    D = x_RD.shape[1]
    means_R = jax.lax.platform_dependent(
        x_RD, cpu=lambda x_RD: x_RD @ jnp.full(D, 1 / D, x_RD.dtype), default=lambda x_RD: x_RD.mean(axis=1)
    )
    return means_R[:, None]


@jax.custom_vjp
def layer_norm(x_RD: jax.Array, scale_D: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) * scale over each row, in float32 at least (Ba et al. 2016).

    The gradient is written out so that it, too, is made of row means: with XLA's own, an update of a small model takes
    a tenth longer on a CPU. Only x itself and two numbers a row are kept for it.
    """
    return _layer_norm_forward(x_RD, scale_D)[0]


def _layer_norm_forward(x_RD, scale_D):
    wide_RD = x_RD.astype(jnp.promote_types(x_RD.dtype, jnp.float32))
    mean_R1 = _row_means(wide_RD)
    rstd_R1 = jax.lax.rsqrt(_row_means(jnp.square(wide_RD - mean_R1)) + 1e-5)
    return (wide_RD - mean_R1) * rstd_R1 * scale_D[None], (x_RD, mean_R1, rstd_R1, scale_D)


def _layer_norm_backward(saved, dy_RD):
    x_RD, mean_R1, rstd_R1, scale_D = saved
    normal_RD = (x_RD.astype(dy_RD.dtype) - mean_R1) * rstd_R1
    dnormal_RD = dy_RD * scale_D[None]
    dx_RD = (dnormal_RD - _row_means(dnormal_RD) - normal_RD * _row_means(dnormal_RD * normal_RD)) * rstd_R1
    return dx_RD.astype(x_RD.dtype), jnp.sum(dy_RD * normal_RD, axis=0)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """`layer_norm` with its gain and, if asked for, a bias."""

    def __init__(self, config: GPTConfig):
        self.scale = nnx.Param(jnp.ones(config.n_embd))
        self.bias = nnx.Param(jnp.zeros(config.n_embd)) if config.bias else None

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        y_RD = layer_norm(x_RD, self.scale[...])
        return (y_RD if self.bias is None else y_RD + self.bias[...][None]).astype(x_RD.dtype)


class LinearOut(nnx.Module):
    """x @ kernel.T, kernel (D, F): for F -> D, where the weight's gradient then needs no transposing copy."""

    def __init__(self, n_in: int, n_out: int, config: GPTConfig, kernel_init, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (n_out, n_in)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if config.bias else None

    def __call__(self, x_RF: jax.Array) -> jax.Array:
        y_RD = x_RF @ self.kernel[...].astype(self.dtype).T
        return y_RD if self.bias is None else y_RD + self.bias[...].astype(self.dtype)[None]


class CausalSelfAttention(nnx.Module):
    def __init__(self, config: GPTConfig, linear, residual_init, rngs: nnx.Rngs):
        D = config.n_embd
        self.n_head = config.n_head
        self.c_attn = linear(D, 3 * D, rngs=rngs)  # queries, keys and values of all heads in one product
        self.c_proj = linear(D, D, kernel_init=residual_init, rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, x_RD: jax.Array, B: int, rngs: nnx.Rngs | None) -> jax.Array:
        y_RD = attend(self.c_attn(x_RD), B, self.n_head, 0.0 if rngs is None else self.dropout, rngs)
        return dropout(self.c_proj(y_RD), self.dropout, rngs)


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, linear, residual_init, rngs: nnx.Rngs):
        D, F = config.n_embd, 4 * config.n_embd
        self.gelu = config.gelu
        self.c_fc = linear(D, F, rngs=rngs)
        self.c_proj = LinearOut(F, D, config, residual_init, rngs)
        self.dropout = config.dropout

    def __call__(self, x_RD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        h_RF = gelu(self.c_fc(x_RD), self.gelu)
        return dropout(self.c_proj(h_RF), self.dropout, rngs)


class Block(nnx.Module):
    def __init__(self, config: GPTConfig, linear, residual_init, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, linear, residual_init, rngs)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, linear, residual_init, rngs)

    def __call__(self, x_RD: jax.Array, B: int, rngs: nnx.Rngs | None) -> jax.Array:
        with jax.named_scope("attn"):
            x_RD = x_RD + self.attn(self.ln_1(x_RD), B, rngs)
        with jax.named_scope("mlp"):
            return x_RD + self.mlp(self.ln_2(x_RD), rngs)


def _normals_of_one_draw(key: jax.Array, count: int) -> Callable[[float], nnx.Initializer]:
    """What nnx.initializers.normal is, but all that it makes are pieces of one draw of `count` numbers.

    XLA takes a tenth of a second to compile a draw, and GPT-2 has fifty weights. A million numbers are drawn at a time:
    for all at once, a CPU takes five times their memory.
    """
    keys = jax.random.split(key, -(-count // 2**20))
    numbers = jax.lax.map(lambda key: jax.random.normal(key, (2**20,)), keys).reshape(-1)
    taken = 0

    def normal(std: float):
        def take(_, shape, dtype=jnp.float32, **__):
            nonlocal taken
            start, taken = taken, taken + math.prod(shape)
            assert taken <= count, f"{taken} numbers were asked for, and {count} drawn"
            return (std * numbers[start:taken]).reshape(shape).astype(dtype)

        return take

    return normal


class GPT(nnx.Module):
    """Pre-LN decoder with learned positions and a tied head. All initialisation is decided here:

    weights              normal, std 0.02
    residual c_proj      normal, std 0.02 / sqrt(2 * n_layer): each layer adds two to the stream (GPT-2, section 2.3)
    biases               0
    LayerNorm            scale 1, bias 0, epsilon 1e-5
    """

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        D, L = config.n_embd, config.n_layer
        normal = _normals_of_one_draw(rngs.params(), D * (config.vocab_size + config.block_size + 12 * L * D))
        init, residual_init = normal(0.02), normal(0.02 / math.sqrt(2 * L))
        dtype = jnp.dtype(config.dtype)
        linear = functools.partial(nnx.Linear, use_bias=config.bias, dtype=dtype, kernel_init=init)
        embed = functools.partial(nnx.Embed, features=D, dtype=dtype, embedding_init=init)

        self.config = config
        self.wte = embed(config.vocab_size, rngs=rngs)
        self.wpe = embed(config.block_size, rngs=rngs)
        # String keys, since integer ones do not survive a checkpoint.
        self.h = nnx.Dict({str(i): Block(config, linear, residual_init, rngs) for i in range(L)})
        self.ln_f = LayerNorm(config)

    def embed(self, input_ids_BT: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Tokens and positions, (B, T, D)."""
        # Looked up in float32, whatever the compute type: a frequent token's gradient is a sum of thousands of rows.
        wte_VD, wpe_TD = self.wte.embedding[...], self.wpe.embedding[...][: input_ids_BT.shape[1]]
        x_BTD = jnp.take(wte_VD, input_ids_BT, axis=0) + wpe_TD[None]
        return dropout(x_BTD.astype(self.config.dtype), self.config.dropout, rngs)

    def __call__(self, input_ids_BT: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        B, T = input_ids_BT.shape
        x_BTD = self.embed(input_ids_BT, rngs)
        # Flat rows inside the blocks: with (B, T, D) XLA on a CPU spends a third of the step on transposing copies
        # for the weight gradients.
        x_RD = x_BTD.reshape(B * T, -1)
        for i in range(self.config.n_layer):
            x_RD = self.h[str(i)](x_RD, B, rngs)
        with jax.named_scope("head"):
            logits_RV = self.wte.attend(self.ln_f(x_RD))  # the tied head: by far the largest tensor of a step
        return logits_RV.reshape(B, T, -1)


# ----------------------------------------------------------------------------------------------------------------------
# pure functions over a plain dict of parameters


@functools.cache
def _graphdef(config: GPTConfig) -> nnx.GraphDef:
    """The module's structure without any array in it."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))), nnx.Param)
    return graphdef


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: GPTConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: a nested dict of arrays with string keys. The same key gives the same parameters."""
    return nnx.to_pure_dict(nnx.split(GPT(config, nnx.Rngs(params=key)), nnx.Param)[1])


@functools.cache
def _expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    return _shapes(abstract_params(config))


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf) for path, leaf in leaves}


def abstract_params(config: GPTConfig) -> Params:
    """The shapes and dtypes that `init_params` would give, without computing anything."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def forward(
    params: Params, input_ids_BT: jax.Array, config: GPTConfig, *, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Logits (B, T, V) of the next token at each position, in config.dtype. With `dropout_key`, in training mode.

    Ids must lie in [0, vocab_size). Outside, compiled code cannot raise: a larger id gives NaN, a negative one wraps to
    another token. Check them on the host (jax_data.check_dataset). Raises AssertionError on a wrong rank, type, length,
    or on parameters of another configuration.
    """
    assert input_ids_BT.ndim == 2, f"input_ids_BT must have 2 dimensions, (batch, time), not shape {input_ids_BT.shape}"
    assert jnp.issubdtype(input_ids_BT.dtype, jnp.integer), f"input_ids_BT must be integers, not {input_ids_BT.dtype}"
    T = input_ids_BT.shape[1]
    assert 1 <= T <= config.block_size, f"{T} tokens do not fit in block_size={config.block_size}"
    if (given := _shapes(params)) != (expected := _expected_shapes(config)):
        differ = sorted(name for name in given.keys() | expected if given.get(name) != expected.get(name))
        name = differ[0]
        raise AssertionError(f"params do not fit config: {name} is {given.get(name)}, expected {expected.get(name)}")
    rngs = None if dropout_key is None or config.dropout == 0 else nnx.Rngs(dropout=dropout_key)
    return nnx.merge(_graphdef(config), params)(input_ids_BT, rngs)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) in nats, (B, T), in float32 whatever lower precision the logits have."""
    assert logits_BTV.shape[:-1] == targets_BT.shape, f"logits {logits_BTV.shape} do not fit targets {targets_BT.shape}"
    with jax.named_scope("loss"):
        logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
        target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT


def num_params(params: Params) -> int:
    """Number of parameters as nanoGPT and the GPT-2 paper count them: without the position embeddings."""
    return sum(p.size for p in jax.tree.leaves(params)) - params["wpe"]["embedding"].size


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of training on one token: 6 params + 12 L D T (PaLM, arXiv 2204.02311, appendix B)."""
    return 6 * num_params(abstract_params(config)) + 12 * config.n_layer * config.n_embd * config.block_size
