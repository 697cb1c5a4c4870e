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
