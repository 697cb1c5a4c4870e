"""Dropout: where it is, what it drops, and what it leaves alone (jax_transformer.py, jax_ops.py).

python -m pytest tests/test_dropout.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ops
import jax_transformer
from jax_ops import causal_attention, dropout
from jax_transformer import forward
from tests.tiny_model import TINY, compiled_forward, random_ids, random_params

pytestmark = pytest.mark.usefixtures("exact_and_quick")

DROPPING = dataclasses.replace(TINY, n_layer=1, dropout=0.25)
PLACES = ["embedding", "attention weights", "attention output", "mlp output"]


def test_every_place_of_dropout_is_active_and_keeps_the_expectation(monkeypatch):
    params, ids_BT = random_params(DROPPING), jnp.asarray(random_ids(DROPPING))
    rate = DROPPING.dropout
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    active = -1

    def one_at_a_time(x, rate, seed_2):
        here = len(seen) == active
        seen.append((np.asarray(x), np.asarray(dropout(x, rate, seed_2)) if here else np.asarray(x)))
        return jnp.asarray(seen[-1][1])

    monkeypatch.setattr(jax_ops, "dropout", one_at_a_time)  # of attention weights
    monkeypatch.setattr(jax_transformer, "dropout", one_at_a_time)
    plain_BTV = forward(params, ids_BT, DROPPING)
    assert len(seen) == len(PLACES)
    for active, place in enumerate(PLACES):
        seen.clear()
        dropped_BTV = forward(params, ids_BT, DROPPING, dropout_key=jax.random.key(0))
        assert np.abs(dropped_BTV - plain_BTV).max() > 0.01, place
        before, after = (a[seen[active][0] != 0] for a in seen[active])  # masked attention weights are 0 anyway
        kept = after != 0
        np.testing.assert_allclose(after[kept], before[kept] / (1 - rate), rtol=1e-6, err_msg=place)
        assert kept.mean() == pytest.approx(1 - rate, abs=0.12), place  # of 144 numbers or more


def test_dropout_follows_from_its_key():
    params, ids_BT = random_params(DROPPING), jnp.asarray(random_ids(DROPPING))
    training = jax.jit(lambda key: forward(params, ids_BT, DROPPING, dropout_key=key))
    first = training(jax.random.key(1))
    np.testing.assert_array_equal(first, training(jax.random.key(1)))
    assert (np.asarray(first) != training(jax.random.key(2))).mean() > 0.9


def test_without_a_key_or_a_rate_nothing_is_dropped():
    params, ids_BT = random_params(DROPPING), jnp.asarray(random_ids(DROPPING))
    no_rate = dataclasses.replace(DROPPING, dropout=0.0)
    plain = compiled_forward(params, ids_BT, no_rate)
    # three programs, so equal but for rounding; a single dropped number would show a thousand times as much
    np.testing.assert_allclose(compiled_forward(params, ids_BT, DROPPING), plain, rtol=1e-5, atol=1e-5)
    keyed = jax.jit(lambda key: forward(params, ids_BT, no_rate, dropout_key=key))(jax.random.key(1))
    np.testing.assert_allclose(keyed, plain, rtol=1e-5, atol=1e-5)


def test_attention_weights_are_dropped_one_by_one_and_scaled_up():
    G, T, rate = 128, 8, 0.25
    random = np.random.default_rng(0)
    q_GTH, k_GTH = (jnp.asarray(random.standard_normal((G, T, T), np.float32)) for _ in range(2))
    v_GTH = jnp.broadcast_to(jnp.eye(T), (G, T, T))  # the result is the weights

    @jax.jit
    def weights(key):
        return causal_attention(q_GTH, k_GTH, v_GTH, rate, None if key is None else jax.random.bits(key, (2,)))

    kept_GTS, dropped_GTS = np.asarray(weights(None)), np.asarray(weights(jax.random.key(0)))
    np.testing.assert_allclose(kept_GTS.sum(-1), 1, rtol=1e-5)
    visible_GTS = np.broadcast_to(np.tril(np.ones((T, T), bool)), kept_GTS.shape)
    np.testing.assert_array_equal(kept_GTS > 0, visible_GTS)
    survived = dropped_GTS > 0
    np.testing.assert_allclose(dropped_GTS[survived], kept_GTS[survived] / (1 - rate), rtol=1e-5)
    assert survived[visible_GTS].mean() == pytest.approx(1 - rate, abs=0.03)
    # No two rows, heads or sequences may share a mask: of 8 weights two masks agree once in 2 ** 6 or so.
    assert len({mask.tobytes() for mask in survived[:, -1]}) > 40


def kept_by_the_book(shape: tuple[int, ...], seeds: tuple[int, int], rate: float, place: tuple[int, ...]) -> bool:
    """The hash of one element's index, and of the high word of its row's, in Python's integers."""

    def lowbias32(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    row = 0
    for size, index in zip(shape[:-1], place[:-1], strict=True):
        row = row * size + index
    low, high = (row * shape[-1] + place[-1]) % 2**32, row * shape[-1] >> 32
    return lowbias32(lowbias32(low ^ seeds[0]) ^ seeds[1] ^ lowbias32(high)) >= int(rate * 2**32)


# Of the large ones, above 2**32 elements, the compiler makes only those that are asked for.
@pytest.mark.parametrize("shape", [(3, 5, 7), (1100, 2048, 2048), (2**17, 40_000), (2**10, 2**7, 2**16)])
def test_what_is_dropped_follows_from_the_index_beyond_32_bits_too(shape):
    seeds, rate = (3, 4_000_000_000), 0.3
    places = [tuple(n - 1 - i * n // 9 for n in shape) for i in range(9)]

    @jax.jit
    def kept(seeds_2):
        return jnp.stack([dropout(jnp.ones(shape), rate, seeds_2)[place] > 0 for place in places])

    seeds_2 = jnp.asarray(seeds, jnp.uint32)
    compiled = kept.lower(seeds_2).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 1e6
    expected = [kept_by_the_book(shape, seeds, rate, place) for place in places]
    assert compiled(seeds_2).tolist() == expected and {*expected} == {True, False}


def test_heads_whose_indices_are_the_same_in_32_bits_drop_other_weights():
    T = 2048
    heads_2S = jax.jit(lambda seeds_2: dropout(jnp.ones((1100, T, T)), 0.5, seeds_2)[jnp.asarray([1, 1025]), -1] > 0)
    first_S, other_S = heads_2S(jnp.asarray([1, 2], jnp.uint32))
    assert (first_S == other_S).mean() == pytest.approx(0.5, abs=0.05)
