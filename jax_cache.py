"""The forward pass with a cache: keys and values of earlier tokens are kept, so that each token runs through once.

    weights = decoding_weights(params, config)
    logits_BV, cache = forward_cached(weights, ids_BT, config, init_cache(config, B), pads_B)               # prefill
    logits_BV, cache = forward_cached(weights, next_B[:, None], config, cache, pads_B, column=column)       # decode

It computes what `forward` computes, for the last position alone. Dimension key: jax_transformer.py. To be called in
compiled functions; the loop around it is in jax_generate.py.
"""

import functools
import math

import jax
import jax.numpy as jnp

import jax_cpu_kernels
from jax_ops import gelu, layer_norm
from jax_transformer import GPTConfig, Params, check_params

# Of each layer the keys and the values, each as segments (B, N, S, H) that together have block_size columns. A CPU
# reads only as many segments as there are tokens; a slice of one large array it would copy, for every token.
Segments = tuple[jax.Array, ...]
Cache = tuple[tuple[Segments, Segments], ...]
FIRST_SEGMENT = 64  # columns; then 64, 128, 256, ..., so that what is read at most doubles


def init_cache(config: GPTConfig, B: int) -> Cache:
    """An empty cache for B rows: float32 on a CPU, elsewhere in the compute type and of one segment."""
    dtype, widths = jnp.dtype(config.dtype), [config.block_size]
    if jax.default_backend() == "cpu":
        dtype, widths = jnp.promote_types(dtype, jnp.float32), []  # jax 0.10 copies all of a bfloat16 buffer to write
        while sum(widths) < config.block_size:
            widths.append(min(max(FIRST_SEGMENT, sum(widths)), config.block_size - sum(widths)))
    shapes = [(B, config.n_head, S, config.n_embd // config.n_head) for S in widths]
    keys, values = ([tuple(jnp.zeros(s, dtype) for s in shapes) for _ in range(config.n_layer)] for _ in range(2))
    return tuple(zip(keys, values, strict=True))


@functools.partial(jax.jit, static_argnames="config")
def decoding_weights(params: Params, config: GPTConfig) -> Params:
    """What `forward_cached` takes: weights in the compute type, and each as (in, out), also the head's.

    On a CPU in the panels of `jax_cpu_kernels`, where that is loaded. The embeddings are there twice for it. Raises
    AssertionError on parameters of another configuration.
    """
    check_params(params, config)
    weights = jax.tree.map(lambda a: a.astype(config.dtype) if a.ndim > 1 else a, params)
    weights["head"] = {"kernel": weights.pop("lm_head", weights["wte"])["embedding"].T}
    layers = [weights["head"]]
    for block in weights["h"].values():
        block["mlp"]["c_proj"]["kernel"] = block["mlp"]["c_proj"]["kernel"].T
        layers += [block["attn"]["c_attn"], block["attn"]["c_proj"], block["mlp"]["c_fc"], block["mlp"]["c_proj"]]
    if config.dtype == "float32" and jax_cpu_kernels.loaded():
        for layer in layers:
            layer["kernel"] = jax_cpu_kernels.panels(layer["kernel"])
    return weights


def forward_cached(
    weights: Params,
    ids_BT: jax.Array,
    config: GPTConfig,
    cache: Cache | None,
    pads_B: jax.Array,
    *,
    column: jax.Array | int = 0,
    last: jax.Array | int = -1,
) -> tuple[jax.Array, Cache | None]:
    """Logits (B, V) of the token after the T ones that stand in columns `column` and on, and the cache with them.

    All rows end in the same column; row b begins, at its position 0, in column pads_B[b], and what is before is not
    looked at. Several tokens, T > 1, go to an empty cache at column 0, where `last` may name the one that counts as
    the last. Without a cache they are only read. `weights` are `decoding_weights`; ids as in `forward`. Raises
    AssertionError on wrong ranks, types and lengths, and a cache of another batch or configuration.
    """
    assert ids_BT.ndim == 2, f"ids_BT must have 2 dimensions, (batch, time), not shape {ids_BT.shape}"
    assert jnp.issubdtype(ids_BT.dtype, jnp.integer), f"ids_BT must be integers, not {ids_BT.dtype}"
    B, T = ids_BT.shape
    assert pads_B.shape == (B,), f"pads_B has shape {pads_B.shape}, and ids_BT {B} rows"
    assert 1 <= T <= config.block_size, f"{T} tokens do not fit in block_size={config.block_size}"
    assert T == 1 or (isinstance(column, int) and column == 0), f"{T} tokens at once must go to column 0"
    if cache is not None:
        assert len(cache) == config.n_layer, f"the cache has {len(cache)} layers, not n_layer={config.n_layer}"
        assert cache[0][0][0].shape[0] == B, f"the cache is for {cache[0][0][0].shape[0]} rows, not for {B}"
        width = sum(a.shape[2] for a in cache[0][0])
        assert width == config.block_size, f"the cache has {width} columns, not block_size={config.block_size}"

    columns_T = column + jnp.arange(T)
    positions_BT = jnp.maximum(columns_T[None] - pads_B[:, None], 0)
    x_BTD = weights["wte"]["embedding"][ids_BT] + weights["wpe"]["embedding"][positions_BT]
    D = config.n_embd
    x_RD = x_BTD.reshape(B * T, D)
    new_cache = []
    for i in range(config.n_layer):
        block = weights["h"][str(i)]
        with jax.named_scope("attn"):
            qkv_RX = _linear(_norm(x_RD, block["ln_1"]), block["attn"]["c_attn"], 3 * D)
            q_BNTH, k_BNTH, v_BNTH = qkv_RX.reshape(B, T, 3, config.n_head, -1).transpose(2, 0, 3, 1, 4)
            keys: Segments = (k_BNTH,)
            values: Segments = (v_BNTH,)
            if cache is not None:
                new_cache.append((_write(cache[i][0], k_BNTH, column), _write(cache[i][1], v_BNTH, column)))
                if T == 1:
                    keys, values = new_cache[i]
            y_BNTH = _attend(q_BNTH, keys, values, columns_T, pads_B)
            y_RD = y_BNTH.swapaxes(1, 2).reshape(B * T, -1).astype(x_RD.dtype)
            x_RD = x_RD + _linear(y_RD, block["attn"]["c_proj"], D)
        with jax.named_scope("mlp"):
            h_RF = _linear(_norm(x_RD, block["ln_2"]), block["mlp"]["c_fc"], 4 * D)
            x_RD = x_RD + _linear(gelu(h_RF, config.gelu), block["mlp"]["c_proj"], D)
    with jax.named_scope("head"):
        logits_BV = _linear(_norm(x_RD.reshape(B, T, -1)[:, last], weights["ln_f"]), weights["head"], config.vocab_size)
    return logits_BV, None if cache is None else tuple(new_cache)


def _linear(x_RK, layer, M):
    kernel = layer["kernel"]  # (K, M), or its panels
    y_RM = x_RK @ kernel if kernel.ndim == 2 else jax_cpu_kernels.product(x_RK, kernel, M)
    return y_RM + layer["bias"].astype(y_RM.dtype)[None] if "bias" in layer else y_RM


def _norm(x_RD, layer):
    return layer_norm(x_RD, layer["scale"], layer.get("bias"))


def _write(segments: Segments, new_BNTH: jax.Array, column: jax.Array | int) -> Segments:
    """The segments with T columns replaced: from 0 on, or the single one at `column`."""
    written, start, T = [], 0, new_BNTH.shape[2]
    new_BNTH = new_BNTH.astype(segments[0].dtype)
    for old_BNSH in segments:
        S = old_BNSH.shape[2]
        at = jnp.clip(column - start, 0, S - 1)
        if T > 1:  # column is 0
            part_BNTH = new_BNTH[:, :, start : start + S]
        else:  # where the column is another segment's, this one gets back what it has
            here = (start <= column) & (column < start + S)
            part_BNTH = jnp.where(here, new_BNTH, jax.lax.dynamic_slice_in_dim(old_BNSH, at, 1, axis=2))
        written.append(jax.lax.dynamic_update_slice_in_dim(old_BNSH, part_BNTH, at, axis=2))
        start += S
    return tuple(written)


def _attend(q_BNTH, keys: Segments, values: Segments, columns_T, pads_B):
    """Attention of queries in columns_T over the columns of the segments: causal, and from pads_B on.

    Softmax goes segment by segment (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"); one that
    begins after the last query is left out.
    """
    dtype, start = keys[0].dtype, 0
    precise = jnp.promote_types(dtype, jnp.float32)
    q_BNTH = (q_BNTH / math.sqrt(q_BNTH.shape[-1])).astype(dtype)

    def add_segment(k_BNSH, v_BNSH, start, before):
        scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=precise)
        columns_S = start + jnp.arange(k_BNSH.shape[2])
        visible_BTS = (columns_S <= columns_T[:, None])[None] & (columns_S >= pads_B[:, None])[:, None]
        # Not -inf: a query before its row's beginning sees nothing, and must not become a NaN in the keys of others.
        scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, jnp.finfo(precise).min)
        max_BNT1 = jnp.maximum(scores_BNTS.max(axis=-1, keepdims=True), before[0])
        weights_BNTS, scale_BNT1 = jnp.exp(scores_BNTS - max_BNT1), jnp.exp(before[0] - max_BNT1)
        sum_BNT1 = weights_BNTS.sum(axis=-1, keepdims=True) + scale_BNT1 * before[1]
        y_BNTH = jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS.astype(dtype), v_BNSH, preferred_element_type=precise)
        return max_BNT1, sum_BNT1, y_BNTH + scale_BNT1 * before[2]

    zeros_BNT1 = jnp.zeros((*q_BNTH.shape[:3], 1), precise)
    so_far = (zeros_BNT1 + jnp.finfo(precise).min, zeros_BNT1, jnp.zeros(q_BNTH.shape, precise))
    for k_BNSH, v_BNSH in zip(keys, values, strict=True):
        add = functools.partial(add_segment, k_BNSH, v_BNSH, start)
        so_far = add(so_far) if start == 0 else jax.lax.cond(columns_T[-1] >= start, add, lambda so_far: so_far, so_far)
        start += k_BNSH.shape[2]
    return so_far[2] / so_far[1]
