"""What the tests of the model share: a small GPT, its parameters and tokens at random."""

import functools

import jax
import numpy as np

from jax_transformer import GPTConfig, Params, abstract_params, forward

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, bias=True)


def random_params(config: GPTConfig, seed: int = 0) -> Params:
    """Float32 parameters none of which is at its initial value: a bias of 0 or a gain of 1 would hide mistakes."""
    random = np.random.default_rng(seed)

    def draw(path, a) -> np.ndarray:
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.2 * random.standard_normal(a.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def random_ids(config: GPTConfig, B: int = 2, T: int | None = None, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T or config.block_size), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=2)
def compiled_forward(params: Params, ids_BT: jax.Array, config: GPTConfig) -> jax.Array:
    return forward(params, ids_BT, config)
