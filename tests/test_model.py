"""The GPT itself (jax_transformer.py): forward pass, gradients, initialisation, counts.

python -m pytest tests/test_model.py
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ops import cross_entropy
from jax_transformer import (
    GPT2_SIZES,
    GPTConfig,
    Params,
    abstract_params,
    flops_per_token,
    forward,
    init_params,
    num_params,
)
from tests.tiny_model import TINY, compiled_forward, random_ids, random_params

pytestmark = pytest.mark.usefixtures("exact_and_quick")

CHAR = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)  # nanoGPT's character model


# ----------------------------------------------------------------------------------------------------------------------
# against GPT-2 written once more, with nothing but numpy


def numpy_gpt2(params: Params, ids_BT: np.ndarray, config: GPTConfig) -> np.ndarray:
    """Logits in float64, one sequence and one head at a time."""
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    N, H = config.n_head, config.n_embd // config.n_head

    def norm(x_TD, p):
        centred_TD = x_TD - x_TD.mean(1, keepdims=True)
        return centred_TD / np.sqrt((centred_TD**2).mean(1, keepdims=True) + 1e-5) * p["scale"] + p.get("bias", 0)

    def linear(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def gelu(x):
        if config.gelu == "erf":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x_TD, p):
        qkv_T3D = linear(x_TD, p["c_attn"])
        heads = []
        for n in range(N):
            q_TH, k_TH, v_TH = (part[:, n * H : (n + 1) * H] for part in np.split(qkv_T3D, 3, axis=1))
            scores_TS = q_TH @ k_TH.T / math.sqrt(H)
            scores_TS[np.triu_indices(len(x_TD), 1)] = -np.inf
            exp_TS = np.exp(scores_TS - scores_TS.max(1, keepdims=True))
            heads.append(exp_TS / exp_TS.sum(1, keepdims=True) @ v_TH)
        return linear(np.concatenate(heads, 1), p["c_proj"])

    logits = []
    for ids_T in ids_BT:
        x_TD = weights["wte"]["embedding"][ids_T] + weights["wpe"]["embedding"][: len(ids_T)]
        for i in range(config.n_layer):
            block = weights["h"][str(i)]
            x_TD = x_TD + attention(norm(x_TD, block["ln_1"]), block["attn"])
            hidden_TF = gelu(linear(norm(x_TD, block["ln_2"]), block["mlp"]["c_fc"]))
            c_proj = block["mlp"]["c_proj"]  # the one kernel that is stored (out, in)
            x_TD = x_TD + linear(hidden_TF, c_proj | {"kernel": c_proj["kernel"].T})
        logits.append(norm(x_TD, weights["ln_f"]) @ weights["wte"]["embedding"].T)
    return np.stack(logits)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_gpt2_written_in_numpy(bias, gelu):
    config = dataclasses.replace(TINY, n_head=4, n_embd=32, vocab_size=50, block_size=12, bias=bias, gelu=gelu)
    params, ids_BT = random_params(config), random_ids(config, B=3)
    truth_BTV = numpy_gpt2(params, ids_BT, config)
    np.testing.assert_allclose(compiled_forward(params, ids_BT, config), truth_BTV, rtol=1e-5, atol=1e-5)


def test_two_gelus_differ_by_more_than_the_tolerance():
    params, ids_BT = random_params(TINY), random_ids(TINY)
    tanh = dataclasses.replace(TINY, gelu="tanh")
    assert np.abs(numpy_gpt2(params, ids_BT, TINY) - numpy_gpt2(params, ids_BT, tanh)).max() > 1e-4


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_any_small_shape_is_gpt2_and_broadcasts_nothing_silently(B, T, n_head, H, bias):
    config = GPTConfig(1, n_head, n_head * H, block_size=5, vocab_size=7, bias=bias)
    params, ids_BT = random_params(config, seed=B), random_ids(config, B, T, seed=T)
    with jax.numpy_rank_promotion("raise"):  # a forgotten axis would be added in front, which is rarely what is meant
        logits_BTV = jax.jit(forward, static_argnums=2)(params, ids_BT, config)
    assert logits_BTV.shape == (B, T, 7)
    # A narrow row may be all but constant, and its norm then magnifies what rounding there is.
    np.testing.assert_allclose(logits_BTV, numpy_gpt2(params, ids_BT, config), rtol=1e-3, atol=1e-4)


def test_forward_gives_the_same_with_and_without_jit():
    params, ids_BT = random_params(TINY), random_ids(TINY)
    np.testing.assert_allclose(
        compiled_forward(params, ids_BT, TINY), forward(params, jnp.asarray(ids_BT), TINY), rtol=1e-5, atol=1e-6
    )


# ----------------------------------------------------------------------------------------------------------------------
# gradients and causality


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_gradient_of_every_tensor_is_the_finite_difference(gelu):
    config = dataclasses.replace(TINY, gelu=gelu, dtype="float64")
    ids_BT = jnp.asarray(random_ids(config, B=3))
    x_BT, y_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    random = np.random.default_rng(1)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), random_params(config))
        loss = jax.jit(lambda params: cross_entropy(forward(params, x_BT, config), y_BT).mean())
        assert loss(params).dtype == np.float64
        grads = jax.device_get(jax.grad(loss)(params))
        leaves, structure = jax.tree.flatten(params)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        for i, (path, grad) in enumerate(zip(paths, jax.tree.leaves(grads), strict=True)):
            for _ in range(2):
                direction = random.standard_normal(grad.shape)
                direction /= np.linalg.norm(direction)
                up, down = (
                    loss(jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]))
                    for step in (1e-5, -1e-5)
                )
                slope = (float(up) - float(down)) / 2e-5
                assert slope == pytest.approx((grad * direction).sum(), rel=1e-6, abs=1e-9), path


def test_loss_at_a_position_depends_on_no_later_position_and_on_every_earlier_one():
    T = TINY.block_size
    params, ids_BT = random_params(TINY), jnp.asarray(random_ids(TINY, B=1))
    targets_BT = jnp.roll(ids_BT, 3, axis=1)

    def losses(wpe_TD):
        return cross_entropy(forward({**params, "wpe": {"embedding": wpe_TD}}, ids_BT, TINY), targets_BT)[0]

    grads_TTD = jax.jit(jax.jacrev(losses))(params["wpe"]["embedding"])
    size_TT = np.abs(grads_TTD).max(axis=-1)  # of the loss at row t by the position embedding of column s
    assert (size_TT[np.triu_indices(T, 1)] == 0).all()
    assert (size_TT[np.tril_indices(T)] > 1e-6).all()


def test_another_later_token_leaves_earlier_logits_bit_for_bit():
    params, ids_BT = random_params(TINY), random_ids(TINY, B=1)
    before_TV = np.asarray(compiled_forward(params, ids_BT, TINY))[0]
    for t in range(TINY.block_size):
        other_BT = ids_BT.copy()
        other_BT[:, t] = (other_BT[:, t] + 1) % TINY.vocab_size
        after_TV = np.asarray(compiled_forward(params, other_BT, TINY))[0]
        np.testing.assert_array_equal(after_TV[:t], before_TV[:t])
        assert (after_TV[t:] != before_TV[t:]).any(axis=-1).all()


def test_shorter_input_gives_the_same_logits_as_the_beginning_of_a_longer_one():
    params, ids_BT = random_params(TINY), random_ids(TINY)
    long_BTV = compiled_forward(params, ids_BT, TINY)
    np.testing.assert_allclose(compiled_forward(params, ids_BT[:, :3], TINY), long_BTV[:, :3], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# counts. Nothing is allocated: GPT-2 XL alone would be 6 GB


def test_parameter_counts_are_nanogpts():
    assert num_params(abstract_params(CHAR)) / 1e6 == pytest.approx(10.65, abs=0.005)
    assert num_params(abstract_params(GPTConfig())) / 1e6 == pytest.approx(123.59, abs=0.005)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_sizes_have_the_published_number_of_parameters(name, count):
    params = abstract_params(GPT2_SIZES[name])
    assert all(isinstance(a, jax.ShapeDtypeStruct) and a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    assert num_params(params) + params["wpe"]["embedding"].size == count


def test_flops_per_token_follow_the_formula():
    assert flops_per_token(GPTConfig()) / 1e6 == pytest.approx(854.8, abs=0.05)  # nanoGPT's figure for the 124M model
    for config in (TINY, CHAR, *GPT2_SIZES.values()):
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        assert flops_per_token(config) == 6 * num_params(abstract_params(config)) + attention


# ----------------------------------------------------------------------------------------------------------------------
# initialisation

WIDE = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=128, bias=True)


@functools.cache
def fresh_params(seed: int) -> dict[str, np.ndarray]:
    """WIDE's initial parameters by dotted name."""
    leaves = jax.tree_util.tree_flatten_with_path(init_params(WIDE, jax.random.key(seed)))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(a) for path, a in leaves}


def test_initial_parameters_are_what_the_table_says():
    residual = 0.02 / math.sqrt(2 * WIDE.n_layer)
    for name, a in fresh_params(0).items():
        assert a.dtype == np.float32, name
        if name.endswith("bias"):
            assert (a == 0).all(), name
        elif name.endswith("scale"):
            assert (a == 1).all(), name
        else:
            std = residual if name.endswith("c_proj.kernel") else 0.02
            # Of n normal numbers the std is known to one part in sqrt(2n), the mean to std / sqrt(n): five of these.
            assert a.std() == pytest.approx(std, rel=5 / math.sqrt(2 * a.size)), name
            assert abs(a.mean()) < 5 * std / math.sqrt(a.size), name
            assert np.abs(a).max() > 2.5 * std, name  # a normal distribution, not one cut off at two std


def test_no_two_initial_weights_share_numbers():
    residual = 0.02 / math.sqrt(2 * WIDE.n_layer)
    weights = {name: a.ravel().astype(np.float64) for name, a in fresh_params(0).items() if a.ndim == 2}
    assert len(weights) == 2 + 4 * WIDE.n_layer
    # Two neighbours, to 5 places of a standard deviation: enough to be unique among all pairs of all weights.
    flat = [np.round(a / (residual if "c_proj" in name else 0.02), 5) for name, a in weights.items()]
    pairs = np.concatenate([np.stack([a[:-1], a[1:]], axis=1) for a in flat])
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_initial_parameters_follow_from_the_key_alone():
    again = jax.tree.leaves(init_params(WIDE, jax.random.key(0)))
    for (name, a), b, other in zip(fresh_params(0).items(), again, fresh_params(1).values(), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.ndim == 1 or (a != other).mean() > 0.99, name


def test_parameters_are_a_plain_dict_with_string_keys_whose_shapes_are_known_beforehand():
    params = init_params(WIDE, jax.random.key(0))
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        assert all(isinstance(entry, jax.tree_util.DictKey) and isinstance(entry.key, str) for entry in path)
    assert type(params) is dict
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_params(WIDE)
    )
    without_bias = abstract_params(dataclasses.replace(WIDE, bias=False))
    assert not any("bias" in str(path) for path, _ in jax.tree_util.tree_flatten_with_path(without_bias)[0])


def test_fresh_model_is_indifferent_between_the_tokens():
    logits_BTV = compiled_forward(init_params(WIDE, jax.random.key(0)), random_ids(WIDE), WIDE)
    loss = cross_entropy(logits_BTV, jnp.asarray(random_ids(WIDE, seed=1)))
    assert float(loss.mean()) == pytest.approx(math.log(WIDE.vocab_size), abs=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# lower precision, loss, checks at the boundary


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.006)])
def test_lower_precision_is_close_to_float32(dtype, tolerance):
    params, ids_BT = random_params(TINY), random_ids(TINY)
    full_BTV = compiled_forward(params, ids_BT, TINY)
    low_BTV = compiled_forward(params, ids_BT, dataclasses.replace(TINY, dtype=dtype))
    assert full_BTV.dtype == jnp.float32
    assert low_BTV.dtype == jnp.dtype(dtype)
    error = np.abs(np.asarray(low_BTV, np.float32) - full_BTV).max()
    assert 0 < error < tolerance * np.abs(full_BTV).max()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros(3, np.int32), ["(3,)"]),
        (np.zeros((1, 2, 3), np.int32), ["(1, 2, 3)"]),
        (np.zeros((1, 3), np.float32), ["float32"]),
        (np.zeros((1, 9), np.int32), ["9", "block_size=8"]),
        (np.zeros((1, 0), np.int32), ["0 tokens", "block_size=8"]),
    ],
)
def test_forward_refuses_bad_ids_and_names_the_values(ids, words):
    with pytest.raises(AssertionError) as error:
        forward(abstract_params(TINY), ids, TINY)  # refused before a parameter is looked at
    assert all(word in str(error.value) for word in words), error.value


def test_id_outside_the_vocabulary_is_not_silently_another_token():
    ids_BT = random_ids(TINY)
    ids_BT[0, 2] = TINY.vocab_size
    logits_BTV = compiled_forward(random_params(TINY), ids_BT, TINY)
    assert np.isnan(logits_BTV[0, 2:]).all()
    assert np.isfinite(logits_BTV[1]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_layer": 0}, ["n_layer=0"]),
        ({"n_head": -1}, ["n_head=-1"]),
        ({"n_embd": 0}, ["n_embd=0"]),
        ({"block_size": 0}, ["block_size=0"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"n_embd": 100, "n_head": 3}, ["n_embd=100", "n_head=3"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"dropout": -0.1}, ["dropout=-0.1"]),
        ({"dropout": math.nan}, ["dropout=nan"]),
        ({"gelu": "relu"}, ["gelu='relu'"]),
    ],
)
def test_config_refuses_what_makes_no_model_and_names_the_value(options, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_config_is_frozen_and_hashed_by_its_values():
    again = GPTConfig(**dataclasses.asdict(TINY))
    assert again == TINY and again is not TINY and hash(again) == hash(TINY)
    assert len({TINY, again, dataclasses.replace(TINY, dropout=0.1)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.n_layer = 3  # type: ignore[misc]


def test_defaults_of_the_config_are_the_contract():
    assert dataclasses.asdict(GPTConfig()) == {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "dropout": 0.0,
        "bias": False, "gelu": "erf", "dtype": "float32",
    }  # fmt: skip
    for config in GPT2_SIZES.values():
        assert (config.vocab_size, config.block_size, config.bias, config.gelu) == (50257, 1024, True, "tanh")


# ----------------------------------------------------------------------------------------------------------------------
# a head of its own


def test_a_head_of_its_own_that_equals_the_embeddings_is_the_tied_one_and_its_gradient_one_of_two_parts():
    params, ids_BT = random_params(TINY), jnp.asarray(random_ids(TINY))
    untied = params | {"lm_head": params["wte"]}

    @jax.jit
    def loss_and_gradients(params):
        return jax.value_and_grad(lambda p: cross_entropy(forward(p, ids_BT[:, :-1], TINY), ids_BT[:, 1:]).mean())(
            params
        )

    loss, grads = loss_and_gradients(params)
    untied_loss, untied_grads = loss_and_gradients(untied)
    np.testing.assert_allclose(untied_loss, loss, rtol=1e-6)
    both = untied_grads["wte"]["embedding"] + untied_grads.pop("lm_head")["embedding"]
    np.testing.assert_allclose(both, grads["wte"]["embedding"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        untied_grads["h"]["0"]["attn"]["c_attn"]["kernel"],
        grads["h"]["0"]["attn"]["c_attn"]["kernel"],
        rtol=1e-4,
        atol=1e-6,
    )
    assert num_params(untied) == num_params(params) + params["wte"]["embedding"].size
