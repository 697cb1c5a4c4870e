"""GPT-2 as Flax NNX modules: configuration, forward pass, counts. No I/O, no training.

Arrays carry their shape in their name. The dimension key, here and in every other file:

    B batch    T time (tokens)    R = B * T flat rows    D model width (n_embd)    F = 4 * D feed-forward
    N heads    H head width       V vocabulary           L layers                  A accumulated micro-batches
    S keys attended to (= T without a cache)    G = B * N heads of all rows
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
from flax import nnx

from jax_forms import attend, layer_norm, mlp
from jax_forms import cross_entropy as cross_entropy  # `forward` and its loss come from one place
from jax_ops import dropout

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


class LayerNorm(nnx.Module):
    """`layer_norm` with its gain and, if asked for, a bias."""

    def __init__(self, config: GPTConfig):
        self.scale = nnx.Param(jnp.ones(config.n_embd))
        self.bias = nnx.Param(jnp.zeros(config.n_embd)) if config.bias else None

    def __call__(self, x_RD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x itself, for what is added to it, and x normalised."""
        return layer_norm(x_RD, self.scale[...], None if self.bias is None else self.bias[...])


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

    def __call__(self, x_RD: jax.Array, B: int, seeds_22: jax.Array | None) -> jax.Array:
        of_weights_2, of_output_2 = (None, None) if seeds_22 is None else seeds_22
        y_RD = attend(x_RD, self.c_attn, B, self.n_head, self.dropout, of_weights_2)
        return dropout(self.c_proj(y_RD), self.dropout, of_output_2)


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig, linear, residual_init, rngs: nnx.Rngs):
        D, F = config.n_embd, 4 * config.n_embd
        self.gelu = config.gelu
        self.c_fc = linear(D, F, rngs=rngs)
        self.c_proj = LinearOut(F, D, config, residual_init, rngs)
        self.dropout = config.dropout

    def __call__(self, x_RD: jax.Array, seed_2: jax.Array | None) -> jax.Array:
        y_RD = mlp(x_RD, self.c_fc, self.c_proj, self.gelu)  # c_proj(gelu(c_fc(x)))
        return dropout(y_RD, self.dropout, seed_2)


class Block(nnx.Module):
    def __init__(self, config: GPTConfig, linear, residual_init, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, linear, residual_init, rngs)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, linear, residual_init, rngs)

    def __call__(self, x_RD: jax.Array, B: int, seeds_32: jax.Array | None) -> jax.Array:
        of_attn_22, of_mlp_2 = (None, None) if seeds_32 is None else (seeds_32[:2], seeds_32[2])
        with jax.named_scope("attn"):
            x_RD, normal_RD = self.ln_1(x_RD)
            x_RD = x_RD + self.attn(normal_RD, B, of_attn_22)
        with jax.named_scope("mlp"):
            x_RD, normal_RD = self.ln_2(x_RD)
            return x_RD + self.mlp(normal_RD, of_mlp_2)


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
    """Pre-LN decoder with learned positions and a head, tied or not. All initialisation is decided here:

    weights              normal, std 0.02
    residual c_proj      normal, std 0.02 / sqrt(2 * n_layer): each layer adds two to the stream (GPT-2, section 2.3)
    biases               0
    LayerNorm            scale 1, bias 0, epsilon 1e-5
    """

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs, tied: bool = True):
        D, L = config.n_embd, config.n_layer
        embeddings = config.vocab_size * (1 if tied else 2) + config.block_size
        normal = _normals_of_one_draw(rngs.params(), D * (embeddings + 12 * L * D))
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
        if not tied:
            self.lm_head = embed(config.vocab_size, rngs=rngs)

    def embed(self, input_ids_BT: jax.Array, seed_2: jax.Array | None) -> jax.Array:
        """Tokens and positions, (B, T, D)."""
        # Looked up in float32, whatever the compute type: a frequent token's gradient is a sum of thousands of rows.
        wte_VD, wpe_TD = self.wte.embedding[...], self.wpe.embedding[...][: input_ids_BT.shape[1]]
        x_BTD = jnp.take(wte_VD, input_ids_BT, axis=0) + wpe_TD[None]
        return dropout(x_BTD.astype(self.config.dtype), self.config.dropout, seed_2)

    def __call__(self, input_ids_BT: jax.Array, dropout_key: jax.Array | None, scan_layers: bool) -> jax.Array:
        B, T = input_ids_BT.shape
        L = self.config.n_layer
        of_embedding_2 = seeds_L32 = None
        if dropout_key is not None:  # one draw for all: to compile one takes XLA a tenth of a second
            seeds_2 = jax.random.bits(dropout_key, (1 + 3 * L, 2), jnp.uint32)
            of_embedding_2, seeds_L32 = seeds_2[0], seeds_2[1:].reshape(L, 3, 2)
        x_BTD = self.embed(input_ids_BT, of_embedding_2)
        # Flat rows inside the blocks: with (B, T, D) XLA on a CPU spends a third of the step on transposing copies
        # for the weight gradients.
        x_RD = x_BTD.reshape(B * T, -1)
        if scan_layers:
            x_RD = self.scanned(x_RD, B, seeds_L32)
        else:
            for i in range(L):
                x_RD = self.h[str(i)](x_RD, B, None if seeds_L32 is None else seeds_L32[i])
        with jax.named_scope("head"):
            _, normal_RD = self.ln_f(x_RD)
            head = getattr(self, "lm_head", self.wte)
            logits_RV = head.attend(normal_RD)  # by far the largest tensor of a step
        return logits_RV.reshape(B, T, -1)

    def scanned(self, x_RD: jax.Array, B: int, seeds_L32: jax.Array | None) -> jax.Array:
        """All blocks as one that is compiled once and looped over. It copies the weights to arrays of all layers."""
        graphdef = nnx.split(self.h["0"])[0]
        layers = [nnx.to_pure_dict(nnx.state(self.h[str(i)], nnx.Param)) for i in range(self.config.n_layer)]
        stacked = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *layers)

        def one_layer(x_RD, layer):
            params, seeds_32 = layer
            return nnx.merge(graphdef, params)(x_RD, B, seeds_32), None

        return jax.lax.scan(one_layer, x_RD, (stacked, seeds_L32))[0]


# ----------------------------------------------------------------------------------------------------------------------
# pure functions over a plain dict of parameters


@functools.cache
def _graphdef(config: GPTConfig, tied: bool) -> nnx.GraphDef:
    """The module's structure without any array in it."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0), tied)), nnx.Param)
    return graphdef


@functools.partial(jax.jit, static_argnames=("config", "tied"))
def init_params(config: GPTConfig, key: jax.Array, tied: bool = True) -> Params:
    """Fresh float32 parameters: a nested dict of arrays with string keys. The same key gives the same parameters.

    Without `tied` the head is a matrix of its own, `lm_head`, as some weights from elsewhere have it.
    """
    return nnx.to_pure_dict(nnx.split(GPT(config, nnx.Rngs(params=key), tied), nnx.Param)[1])


def check_params(params: Params, config: GPTConfig) -> None:
    """Raise AssertionError, naming the first that differs, unless the parameters are those of such a model."""
    if (given := _shapes(params)) != (expected := _expected_shapes(config, has_tied_head(params))):
        name = min(name for name in given.keys() | expected if given.get(name) != expected.get(name))
        raise AssertionError(f"params do not fit config: {name} is {given.get(name)}, expected {expected.get(name)}")


@functools.cache
def _expected_shapes(config: GPTConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    return _shapes(abstract_params(config, tied))


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf) for path, leaf in leaves}


def has_tied_head(params: Params) -> bool:
    """Whether the embeddings are the head, too."""
    return "lm_head" not in params


def abstract_params(config: GPTConfig, tied: bool = True) -> Params:
    """The shapes and dtypes that `init_params` would give, without computing anything."""
    return jax.eval_shape(functools.partial(init_params, config, tied=tied), jax.random.key(0))


def forward(
    params: Params,
    input_ids_BT: jax.Array,
    config: GPTConfig,
    *,
    dropout_key: jax.Array | None = None,
    scan_layers: bool = False,
) -> jax.Array:
    """Logits (B, T, V) of the next token at each position, in config.dtype. With `dropout_key`, in training mode.

    With `scan_layers`, one layer is compiled and looped over: the same numbers up to rounding.

    Ids must lie in [0, vocab_size). Outside, compiled code cannot raise: a larger id gives NaN, a negative one wraps to
    another token. Check them on the host (jax_data.check_dataset). Raises AssertionError on a wrong rank, type, length,
    or on parameters of another configuration.
    """
    assert input_ids_BT.ndim == 2, f"input_ids_BT must have 2 dimensions, (batch, time), not shape {input_ids_BT.shape}"
    assert jnp.issubdtype(input_ids_BT.dtype, jnp.integer), f"input_ids_BT must be integers, not {input_ids_BT.dtype}"
    T = input_ids_BT.shape[1]
    assert 1 <= T <= config.block_size, f"{T} tokens do not fit in block_size={config.block_size}"
    check_params(params, config)
    dropout_key = None if config.dropout == 0 else dropout_key
    return nnx.merge(_graphdef(config, has_tied_head(params)), params)(input_ids_BT, dropout_key, scan_layers)


def num_params(params: Params) -> int:
    """Number of parameters as nanoGPT and the GPT-2 paper count them: without the position embeddings."""
    return sum(p.size for p in jax.tree.leaves(params)) - params["wpe"]["embedding"].size


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of training on one token: 6 params + 12 L D T (PaLM, arXiv 2204.02311, appendix B)."""
    return 6 * num_params(abstract_params(config)) + 12 * config.n_layer * config.n_embd * config.block_size
