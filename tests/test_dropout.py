"""Dropout: where it is, what it drops, and what it leaves alone (jax_transformer.py, jax_ops.py).

python -m pytest tests/test_dropout.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ops
import jax_transformer
from jax_ops import causal_attention, cross_entropy, dropout
from jax_transformer import GPTConfig, forward
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


def test_fused_attention_where_there_is_one_computes_the_same(monkeypatch):
    """cuDNN's attention through its interface, with XLA's arithmetic behind it: layout, scale and mask are ours."""
    config = dataclasses.replace(TINY, n_embd=32, n_head=4)
    params, ids_BT = random_params(config), jnp.asarray(random_ids(config))
    plain_BTV = forward(params, ids_BT, config)
    interface, asked = jax.nn.dot_product_attention, []

    def with_xla(q_BTNH, k_BTNH, v_BTNH, *, is_causal, implementation):
        asked.append((implementation, q_BTNH.shape))
        return interface(q_BTNH, k_BTNH, v_BTNH, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax_transformer, "has_fused_attention", lambda dtype: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    np.testing.assert_allclose(forward(params, ids_BT, config), plain_BTV, rtol=1e-4, atol=1e-5)
    B, T = ids_BT.shape
    assert asked == [("cudnn", (B, T, 4, 8))] * config.n_layer
    dropping = dataclasses.replace(config, dropout=0.5)  # cuDNN has no usable dropout
    forward(params, ids_BT, dropping, dropout_key=jax.random.key(0))
    assert len(asked) == config.n_layer


@pytest.mark.parametrize("dropout_key", [None, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forms_for_a_gpu_compute_the_same(monkeypatch, dtype, dropout_key):
    """What `platform_dependent` keeps from a CPU, computed on one: loss and every gradient."""
    config = dataclasses.replace(TINY, n_embd=32, n_head=2, dtype=dtype, dropout=0.25)
    params = random_params(config)
    ids_BT, targets_BT = (jnp.asarray(random_ids(config, seed=seed)) for seed in (0, 1))
    key = None if dropout_key is None else jax.random.key(dropout_key)

    def loss(params):
        return cross_entropy(forward(params, ids_BT, config, dropout_key=key), targets_BT).mean()

    asked = []

    def as_on_a_gpu(*arrays, cpu, default):
        asked.append(default)
        return default(*arrays)

    plain = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_a_gpu)
    ours = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    assert jax_ops._softmax_in_passes in asked
    assert "optimization_barrier" in str(jax.make_jaxpr(lambda params: loss(params))(params))
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("dropout_key", [None, 0])
def test_scanned_layers_are_the_same_layers(dropout_key):
    config = dataclasses.replace(TINY, n_layer=3, dropout=0.25)
    params = random_params(config)
    ids_BT, targets_BT = (jnp.asarray(random_ids(config, seed=seed)) for seed in (0, 1))
    key = None if dropout_key is None else jax.random.key(dropout_key)

    def loss_and_gradient(scan_layers):
        def loss(params):
            logits_BTV = forward(params, ids_BT, config, dropout_key=key, scan_layers=scan_layers)
            return cross_entropy(logits_BTV, targets_BT).mean()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled(params), str(compiled.as_text()).count("while(")

    (scanned, loops), (unrolled, no_loops) = loss_and_gradient(True), loss_and_gradient(False)
    assert loops > no_loops
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_embedding_gradients_are_summed_in_float32():
    """A sum of 4096 ones in bfloat16 ends at 256, and a frequent token would hardly learn."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=3, dtype="bfloat16")
    graphdef, params = jax_transformer._graphdef(config), random_params(config)
    ids_BT, pulled_back = jnp.zeros((64, 64), jnp.int32), jnp.ones((64, 64, 8), jnp.bfloat16)

    def embedded(wte_VD):
        return nnx.merge(graphdef, params | {"wte": {"embedding": wte_VD}}).embed(ids_BT, None)

    gradient = jax.vjp(embedded, jnp.zeros((3, 8)))[1](pulled_back)[0]
    np.testing.assert_array_equal(gradient, np.repeat([[4096.0], [0.0], [0.0]], 8, axis=1))
