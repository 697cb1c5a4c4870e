"""What a GPT is made of (jax_ops.py): softmax, GELU, dropout, attention, LayerNorm, loss, and their gradients.

python -m pytest tests/test_ops.py
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ops import causal_attention, cross_entropy, dropout, gelu_erf, layer_norm, softmax

pytestmark = pytest.mark.usefixtures("exact_and_quick")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_layer_norm_and_its_gradient_are_those_of_the_formula(dtype, tolerance, with_bias):
    keys = jax.random.split(jax.random.key(0), 4)
    x_RD = (3 + 2 * jax.random.normal(keys[0], (7, 24))).astype(dtype)
    weights_RD = jax.random.normal(keys[1], (7, 24))
    scale_and_bias = [jax.random.normal(key, (24,)) for key in keys[2 : 3 + with_bias]]

    def formula(x_RD, scale_D, bias_D=0.0):
        x_RD = x_RD.astype(jnp.float32)
        centred_RD = x_RD - x_RD.mean(1, keepdims=True)
        return centred_RD / jnp.sqrt((centred_RD**2).mean(1, keepdims=True) + 1e-5) * scale_D + bias_D

    def weighted(function):
        def total(x_RD, scale_and_bias):
            return (function(x_RD, *scale_and_bias).astype(jnp.float32) * weights_RD).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))

    ours, theirs = weighted(layer_norm)(x_RD, scale_and_bias), weighted(formula)(x_RD, scale_and_bias)
    assert ours[1][0].dtype == x_RD.dtype
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1 << 18,), (512, 512), (64, 4, 32, 32)])
def test_dropout_masks_look_like_coin_flips(shape):
    """Rate, neighbours at several distances, and masks of other keys: each within 5 standard deviations of chance."""
    rate = 0.3
    seeds = [jax.random.bits(jax.random.key(i), (2,)) for i in range(4)]
    masks = [np.asarray(dropout(jnp.ones(shape), rate, seed_2)).ravel() != 0 for seed_2 in seeds]
    size = masks[0].size
    for mask in masks:
        assert abs(mask.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / size)
    flips = [(mask - mask.mean()) / mask.std() for mask in masks]
    for distance in (1, 2, 4, 32, 128, 512, 1024, 4096, 65536):
        assert abs(np.mean(flips[0][distance:] * flips[0][:-distance])) < 5 / math.sqrt(size - distance), distance
    for other in flips[1:]:
        assert abs(np.mean(flips[0] * other)) < 5 / math.sqrt(size)
    ones_per_bucket = masks[0].reshape(256, -1).sum(axis=1)  # neither clumped nor evened out
    spread = ones_per_bucket.var() / (size / 256 * rate * (1 - rate))
    assert 0.6 < spread < 1.5


@pytest.mark.parametrize("T", [1, 7, 130])
def test_attention_and_its_gradient_are_those_of_the_formula(T):
    G, H = 2, 4
    random = np.random.default_rng(T)
    wide = random.standard_normal((5, G, T, H))
    qkv, direction, dy_GTH = wide[:3], random.standard_normal((3, G, T, H)), wide[4]

    def formula(q_GTH, k_GTH, v_GTH):
        scores_GTS = np.where(np.tril(np.ones((T, T), bool)), q_GTH @ k_GTH.swapaxes(1, 2) / math.sqrt(H), -np.inf)
        weights_GTS = np.exp(scores_GTS - scores_GTS.max(axis=-1, keepdims=True))
        return weights_GTS / weights_GTS.sum(axis=-1, keepdims=True) @ v_GTH

    y_GTH, back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, 0.0, None), *jnp.asarray(qkv, jnp.float32))
    np.testing.assert_allclose(y_GTH, formula(*qkv), rtol=1e-4, atol=1e-5)
    step = 1e-5 * direction
    expected = np.sum(dy_GTH * (formula(*(qkv + step)) - formula(*(qkv - step)))) / 2e-5
    slope = sum(
        np.sum(np.float64(d) * a) for d, a in zip(back(jnp.asarray(dy_GTH, jnp.float32)), direction, strict=True)
    )
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_softmax_has_the_gradient_of_its_formula():
    random = np.random.default_rng(0)
    scores, dweights = (jnp.asarray(random.standard_normal((3, 5, 7)), jnp.float32) * 3 for _ in range(2))
    scores = jnp.where(jnp.arange(7) <= jnp.arange(5)[:, None], scores, -jnp.inf)

    def formula(scores):
        return jnp.exp(scores) / jnp.exp(scores).sum(axis=-1, keepdims=True)

    (ours, ours_back), (expected, back) = (jax.vjp(f, scores) for f in (softmax, formula))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ours_back(dweights)[0], back(dweights)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_slope_are_those_of_the_normal_distribution(dtype):
    x = jnp.linspace(-8, 8, 1001).astype(dtype)
    wide = np.asarray(x, np.float64)
    phi = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(wide)
    slope = phi + wide * np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    y, back = jax.vjp(gelu_erf, x)
    assert y.dtype == x.dtype
    tolerance = {"float32": 1e-6, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), wide * phi, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(back(jnp.ones_like(x))[0], np.float64), slope, rtol=tolerance, atol=tolerance)


def test_gradient_of_attention_in_bfloat16_is_that_in_float32():
    random = np.random.default_rng(0)
    qkv = [jnp.asarray(random.standard_normal((3, 16, 8)), jnp.bfloat16) for _ in range(3)]
    dy_GTH = jnp.asarray(random.standard_normal((3, 16, 8)), jnp.bfloat16)

    def gradient(dtype):
        back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, 0.0, None), *(a.astype(dtype) for a in qkv))[1]
        return back(dy_GTH.astype(dtype))

    for low, full in zip(gradient("bfloat16"), gradient("float32"), strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(low), full, atol=2e-2 * np.abs(full).max())


@pytest.mark.parametrize("size", [1.0, 1e4])  # exp(1e4) is far beyond any float
def test_cross_entropy_is_minus_the_log_probability(size):
    random = np.random.default_rng(0)
    logits_BTV = (size * random.standard_normal((2, 5, 7))).astype(np.float32)
    targets_BT = random.integers(0, 7, (2, 5))
    exact_BTV = logits_BTV.astype(np.float64)
    top_BT1 = exact_BTV.max(-1, keepdims=True)
    log_probability_BTV = exact_BTV - top_BT1 - np.log(np.exp(exact_BTV - top_BT1).sum(-1, keepdims=True))
    truth_BT = -np.take_along_axis(log_probability_BTV, targets_BT[..., None], -1)[..., 0]
    loss_BT = cross_entropy(jnp.asarray(logits_BTV), jnp.asarray(targets_BT))
    assert loss_BT.dtype == jnp.float32
    np.testing.assert_allclose(loss_BT, truth_BT, rtol=1e-6, atol=1e-6 * size)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gradient_of_cross_entropy_is_the_probabilities_less_one_at_the_target(dtype, tolerance):
    random = np.random.default_rng(0)
    logits_BTV = jnp.asarray(4 * random.standard_normal((2, 5, 7)), dtype)
    targets_BT, weights_BT = random.integers(-7, 7, (2, 5)), random.standard_normal((2, 5))  # negative: from the end
    gradient = jax.grad(lambda logits: (cross_entropy(logits, jnp.asarray(targets_BT)) * weights_BT).sum())
    p_BTV = np.exp(np.asarray(logits_BTV, np.float64))
    expected = (p_BTV / p_BTV.sum(-1, keepdims=True) - np.eye(7)[targets_BT]) * weights_BT[..., None]
    found = jax.jit(gradient)(logits_BTV)
    assert found.dtype == logits_BTV.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cross_entropy_of_low_precision_is_computed_in_float32(dtype):
    logits_BTV = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 7)), dtype)
    targets_BT = jnp.zeros((2, 5), jnp.int32)
    loss_BT = cross_entropy(logits_BTV, targets_BT)
    assert loss_BT.dtype == jnp.float32
    np.testing.assert_array_equal(loss_BT, cross_entropy(logits_BTV.astype(jnp.float32), targets_BT))


def test_cross_entropy_refuses_targets_of_another_shape():
    with pytest.raises(AssertionError, match=r"\(2, 3, 4\).*\(2, 4\)"):
        cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), jnp.int32))
