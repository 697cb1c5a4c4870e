"""Forms of one computation that a CPU or a default configuration does not take: they give the same numbers.

XLA's forms for a GPU, scanned layers, a sum in higher precision (jax_transformer.py, jax_ops.py).

python -m pytest tests/test_forms.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_ops
import jax_transformer
from jax_ops import cross_entropy
from jax_transformer import GPTConfig, forward
from tests.tiny_model import TINY, random_ids, random_params

pytestmark = pytest.mark.usefixtures("exact_and_quick")


@pytest.mark.parametrize("dropout_key", [None, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forms_for_a_gpu_compute_the_same(monkeypatch, dtype, dropout_key):
    """What `platform_dependent` keeps from a CPU, computed on one: loss and every gradient."""
    config = dataclasses.replace(TINY, n_layer=1, n_embd=32, n_head=2, dtype=dtype, dropout=0.25)
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
    graphdef, params = jax_transformer._graphdef(config, True), random_params(config)
    ids_BT, pulled_back = jnp.zeros((64, 64), jnp.int32), jnp.ones((64, 64, 8), jnp.bfloat16)

    def embedded(wte_VD):
        return nnx.merge(graphdef, params | {"wte": {"embedding": wte_VD}}).embed(ids_BT, None)

    gradient = jax.vjp(embedded, jnp.zeros((3, 8)))[1](pulled_back)[0]
    np.testing.assert_array_equal(gradient, np.repeat([[4096.0], [0.0], [0.0]], 8, axis=1))
