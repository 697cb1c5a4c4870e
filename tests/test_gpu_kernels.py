"""Kernels for an NVIDIA GPU (jax_gpu_kernels.py), each against jax_ops.py in float32.

Where there is no such GPU, JAX computes what the kernels say.

python -m pytest tests/test_gpu_kernels.py
"""

import contextlib
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_forms
import jax_gpu_attention
import jax_gpu_kernels
import jax_gpu_mlp
import jax_gpu_pallas
import jax_ops
import jax_transformer
from jax_transformer import GPTConfig, forward, init_params
from tests.tiny_model import random_ids

ON_GPU = jax_ops.on_nvidia_gpu("bfloat16")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, request):
    monkeypatch.setattr(jax_gpu_pallas, "INTERPRET", not ON_GPU)
    if not ON_GPU:
        request.getfixturevalue("exact_and_quick")
    with jax.default_matmul_precision("highest"):  # float32 products of a GPU are rounded to tf32 else
        yield


def normal(number: int, *shape: int, dtype="bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape).astype(dtype)


def assert_same_gradients(ours, theirs, arrays, *, tolerance: float):
    """Values and gradients of a function of 16-bit arrays, and of another of the same arrays in float32, which is as
    near as 16 bits allow: to `tolerance` of the largest element."""

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, arrays):
        value, pull = jax.vjp(function, *arrays)
        weights = jax.tree.map(lambda a: jax.random.normal(jax.random.key(9), a.shape).astype(a.dtype), value)
        return value, pull(weights)

    wide = [a.astype(jnp.float32) for a in arrays]
    results = value_and_gradients(ours, arrays), value_and_gradients(theirs, wide)
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


# Rows that fill a program, and that do not; widths that are a power of two, and that are not.
@pytest.mark.parametrize(
    ("rows", "width", "with_bias", "dtype", "tolerance"),
    [
        (64, 128, False, "float32", 1e-5),
        (12, 48, True, "float32", 1e-5),
        (7, 1600, False, "float32", 1e-5),
        (256, 384, True, "bfloat16", 1e-2),
    ],
)
def test_layer_norm_gives_its_input_and_its_normalised_rows(rows, width, with_bias, dtype, tolerance):
    weights = [normal(i, width, dtype="float32") for i in range(1 + with_bias)]
    sizes_R1 = np.geomspace(3e-3, 10, rows)[:, None]  # with the smallest, epsilon counts
    x_RD = (sizes_R1 * (1 + normal(2, rows, width, dtype="float32"))).astype(dtype)

    def ours(x_RD, scale_D, bias_D=None):
        return jax_gpu_kernels.layer_norm(x_RD, scale_D, bias_D)

    def theirs(x_RD, scale_D, bias_D=None):
        return x_RD, jax_ops.layer_norm(x_RD, scale_D, bias_D)

    assert_same_gradients(ours, theirs, [x_RD, *weights], tolerance=tolerance)


@pytest.mark.parametrize("shape", [(64, 64), (3, 1000)])
def test_gelu_is_that_of_the_normal_distribution(shape):
    assert_same_gradients(jax_gpu_kernels.gelu_erf, jax_ops.gelu_erf, [3 * normal(0, *shape)], tolerance=1e-2)


def test_gelu_and_its_slope_are_right_to_a_few_hundred_thousandths():
    """In float32, where nothing is rounded to 16 bits."""
    x = jnp.concatenate([-jnp.logspace(-3, 5, 500), jnp.logspace(-3, 5, 500), jnp.zeros(1)])
    y, pull = jax.vjp(jax_gpu_kernels.gelu_erf, x)
    exact_y, exact_pull = jax.vjp(jax_ops.gelu_erf, x)
    np.testing.assert_allclose(y, exact_y, rtol=1e-6, atol=6e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0], exact_pull(jnp.ones_like(x))[0], atol=4e-5)


@pytest.mark.parametrize(("rows", "by_kernel"), [(2**19, True), (2**20, False)])
def test_gelu_of_more_elements_than_a_kernel_counts_is_xlas(monkeypatch, rows, by_kernel):
    monkeypatch.setattr(jax_forms, "gpu_kernels", lambda dtype: jax_gpu_kernels)
    traced = jax.make_jaxpr(lambda x: jax_forms.gelu(x, "erf"))(jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16))
    assert ("pallas_call" in str(traced)) == by_kernel


def test_all_can_be_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax_forms, "on_nvidia_gpu", lambda dtype: True)
    assert jax_forms.gpu_kernels("bfloat16") is jax_gpu_kernels
    monkeypatch.setenv("GPU_KERNELS", "none")
    assert jax_forms.gpu_kernels("bfloat16") is None


def test_mlp_for_hopper_is_gelu_between_two_products():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"NPROC": "16", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {} if jax_gpu_mlp.is_hopper() else {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.hopper_mlp"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("hopper", "bias", "form", "T", "D", "by_kernel"),
    [
        (True, False, "erf", 64, 64, True),
        (False, False, "erf", 64, 64, False),
        (True, True, "erf", 64, 64, False),
        (True, False, "tanh", 64, 64, False),
        (True, False, "erf", 32, 64, False),  # fewer rows than a tile has
        (True, False, "erf", 64, 96, False),
    ],
)
def test_mlp_is_hoppers_where_it_fits(monkeypatch, hopper, bias, form, T, D, by_kernel):
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=D, block_size=64, vocab_size=65, bias=bias, gelu=form, dtype="bfloat16"
    )
    params, ids_BT = init_params(config, jax.random.key(0)), jnp.zeros((2, T), jnp.int32)
    asked = []

    def instead_of_mlp(x_RD, *weights_DF):
        asked.append([weight_DF.shape for weight_DF in weights_DF])
        return x_RD

    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q_BTNH, *_, **__: q_BTNH)
    monkeypatch.setattr(jax_gpu_kernels, "mlp", instead_of_mlp)
    monkeypatch.setattr(jax_gpu_mlp, "is_hopper", lambda: hopper)
    monkeypatch.setattr(jax_forms, "gpu_kernels", lambda dtype: jax_gpu_kernels)
    jax.eval_shape(lambda params: forward(params, ids_BT, config), params)
    assert asked == ([[(64, 256), (64, 256)]] if by_kernel else [])


@pytest.mark.parametrize(
    ("vocabulary", "of_mean"), [(2, True), (65, False), (1000, True), (8192, False), (50_257, True)]
)
def test_loss_and_its_gradient_are_those_of_the_formula(vocabulary, of_mean):
    targets_R = jax.random.randint(jax.random.key(1), (12,), -vocabulary, vocabulary)  # a lookup takes negative ones

    def loss(function, logits_RV):
        losses_R = function(logits_RV, targets_R)
        return losses_R.mean() if of_mean else losses_R

    assert_same_gradients(
        functools.partial(loss, jax_gpu_kernels.cross_entropy),
        functools.partial(loss, jax_ops.cross_entropy),
        [3 * normal(0, 12, vocabulary)],
        tolerance=1e-2,
    )


def test_loss_is_exact_where_exponentials_would_overflow():
    logits_RV = np.array([[300, 296, -300, 0], [-2000, -2000, -2000, -2000], [-np.inf, 3, -np.inf, 4]])
    loss_R = jax_gpu_kernels.cross_entropy(jnp.asarray(logits_RV, jnp.bfloat16), jnp.asarray([1, 2, 3]))
    expected_R = [4 + np.log1p(np.exp(-4)), np.log(4), np.log1p(np.exp(-1))]
    np.testing.assert_allclose(loss_R, expected_R, atol=4e-4)  # between numbers near 2,000 float32 has 1.2e-4


def test_a_target_outside_of_the_vocabulary_gives_nan_and_touches_no_other_row():
    logits_RV = normal(0, 6, 65)
    targets_R = jnp.asarray([1, 65, 64, -66, -100, 3])
    loss_R, pull = jax.vjp(lambda logits_RV: jax_gpu_kernels.cross_entropy(logits_RV, targets_R), logits_RV)
    (dlogits_RV,) = pull(jnp.ones(6))
    expected_RV = jax.grad(lambda logits: jax_ops.cross_entropy(logits, targets_R).sum())(logits_RV.astype("float32"))
    np.testing.assert_array_equal(np.isnan(loss_R), [False, True, False, True, True, False])
    rows = np.array([0, 2, 5])
    np.testing.assert_allclose(dlogits_RV[rows].astype("float32"), expected_RV[rows], rtol=1e-2, atol=1e-3)


def test_float16_gradients_are_scaled_before_they_are_rounded(monkeypatch):
    """Those of improbable tokens of a batch of many, which without the loss's scale are below float16's numbers."""
    monkeypatch.setattr(jax_forms, "on_nvidia_gpu", lambda dtype: True)
    logits_BTV, targets_BT = normal(0, 8, 512, 100, dtype="float16") - 8, jnp.zeros((8, 512), jnp.int32)
    logits_BTV = logits_BTV.at[..., 0].set(8)

    def scaled_loss(logits_BTV):
        return jax_transformer.cross_entropy(logits_BTV, targets_BT).mean() * 65536

    ours_BTV, exact_BTV = jax.grad(scaled_loss)(logits_BTV), jax.grad(scaled_loss)(logits_BTV.astype("float32"))
    np.testing.assert_allclose(ours_BTV.astype("float32")[..., 1:].sum(), exact_BTV[..., 1:].sum(), rtol=0.05)


def test_exponentials_quotients_and_products_with_a_sum_are_one_instruction_each(monkeypatch):
    monkeypatch.setattr(jax_gpu_pallas, "INTERPRET", False)
    traced = str(jax.make_jaxpr(jax_gpu_pallas.exp_over)(jnp.ones((8, 8)), jnp.ones((8, 1))))
    for part in ("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", "ex2.approx.ftz.f32 $0, $1;"):
        assert part in traced
    assert "asm" not in str(jax.make_jaxpr(jax_gpu_pallas.exp_over)(1.0, 2.0))  # Triton has no scalars there


def test_logits_that_are_not_numbers_show_in_the_loss():
    logits_RV = normal(0, 3, 1000).at[1, 999].set(jnp.nan).at[2, 5].set(jnp.inf)
    loss_R = jax_gpu_kernels.cross_entropy(logits_RV, jnp.asarray([0, 0, 0]))
    np.testing.assert_array_equal(np.isfinite(loss_R), [True, False, False])


@pytest.mark.parametrize(("T", "N", "H", "rate"), [(64, 2, 128, 0.3), (192, 1, 64, 0.3), (192, 2, 16, 0.0)])
def test_attention_drops_the_weights_that_dropout_drops(T, N, H, rate):
    B, seed_2 = 2, jnp.asarray([3, 4_000_000_000], jnp.uint32)
    assert jax_gpu_kernels.fits_attention(T, H)

    def theirs(*arrays):
        q_GTH, k_GTH, v_GTH = (a_BTNH.transpose(0, 2, 1, 3).reshape(B * N, T, H) for a_BTNH in arrays)
        y_GTH = jax_ops.causal_attention(q_GTH, k_GTH, v_GTH, rate, seed_2)
        return y_GTH.reshape(B, N, T, H).transpose(0, 2, 1, 3)

    def ours(*arrays):
        return jax_gpu_kernels.attention(*arrays, seed_2, rate)

    assert_same_gradients(ours, theirs, [normal(i, B, T, N, H, dtype="float32") for i in range(3)], tolerance=1e-5)


def test_attention_drops_by_indices_beyond_32_bits_too():
    B, N, T, tile, rate, seeds_2 = 100, 11, 2048, 64, 0.3, jnp.asarray([3, 4_000_000_000], jnp.uint32)
    of_all = jax.jit(lambda g: jax_ops.dropout(jnp.ones((B * N, T, T)), rate, seeds_2)[g, 128:192, 64:128] > 0)
    for g in (0, 1023, 1024, 1099):
        here = jax_gpu_attention._is_kept(seeds_2, g, B * N, T, 2, 1, tile, rate)
        np.testing.assert_array_equal(here, of_all(g))


def test_heads_too_wide_for_cudnn_are_xlas(monkeypatch):
    config = GPTConfig(n_layer=1, n_head=1, n_embd=192, block_size=16, vocab_size=65, dropout=0.2, dtype="bfloat16")
    params, ids_BT = init_params(config, jax.random.key(0)), jnp.asarray(random_ids(config))
    logits = []
    for kernels in (None, jax_gpu_kernels):
        monkeypatch.setattr(jax_forms, "gpu_kernels", lambda dtype: kernels)  # noqa: B023
        logits.append(jax.jit(lambda params: forward(params, ids_BT, config))(params))  # else NotImplementedError
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[0]).max()


@pytest.mark.parametrize(
    ("flags", "by_cudnn"),
    [
        ("", True),
        ("--xla_gpu_deterministic_ops=true", False),
        ("--xla_gpu_triton_gemm_any=false --xla_gpu_exclude_nondeterministic_ops", False),
        ("--xla_gpu_deterministic_ops='true'", False),
        ("--xla_gpu_deterministic_ops=false", True),
    ],
)
def test_attention_is_not_cudnns_where_results_shall_be_the_same_every_time(monkeypatch, flags, by_cudnn):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=65, dtype="bfloat16")
    params, ids_BT = init_params(config, jax.random.key(0)), jnp.asarray(random_ids(config))
    asked = []

    def instead(q_BTNH, *_, implementation, **__):
        asked.append(implementation)
        return q_BTNH

    plain = jax.jit(lambda params: forward(params, ids_BT, config))(params)
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(jax_forms, "gpu_kernels", lambda dtype: jax_gpu_kernels)
    monkeypatch.setenv("XLA_FLAGS", flags)
    ours = jax.jit(lambda params: forward(params, ids_BT, config))(params)
    assert asked == (["cudnn"] if by_cudnn else [])
    if not by_cudnn:
        assert np.abs(plain - ours).max() < 0.02 * np.abs(plain).max()


@pytest.mark.parametrize(("dropout", "bias"), [(0.0, False), (0.2, True)])
def test_a_model_of_these_kernels_learns_as_the_plain_one(monkeypatch, dropout, bias):
    """Loss and gradient, of the kernels and of XLA's code. Attention without dropout is cuDNN's: of its interface
    layout, scale and mask are ours, and where there is no such GPU, its arithmetic is XLA's."""
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=65, dropout=dropout, bias=bias, dtype="bfloat16"
    )
    params, ids_BT = init_params(config, jax.random.key(0)), jnp.asarray(random_ids(config))
    cudnn, asked = jax.nn.dot_product_attention, []

    def fused_attention(q_BTNH, k_BTNH, v_BTNH, *, is_causal, implementation):
        asked.append((implementation, q_BTNH.shape))
        implementation = implementation if ON_GPU else "xla"
        return cudnn(q_BTNH, k_BTNH, v_BTNH, is_causal=is_causal, implementation=implementation)

    def loss(params):
        logits_BTV = forward(params, ids_BT, config, dropout_key=jax.random.key(1))
        return jax_transformer.cross_entropy(logits_BTV, ids_BT).mean()

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused_attention)
    results = []
    for kernels in (None, jax_gpu_kernels):
        monkeypatch.setattr(jax_forms, "gpu_kernels", lambda dtype: kernels)  # noqa: B023
        results.append(jax.jit(jax.value_and_grad(lambda params: loss(params)))(params))
    B, T = ids_BT.shape
    assert asked == [("cudnn", (B, T, 2, 16))] * (config.n_layer if dropout == 0 else 0)
    (plain_loss, plain_grads), (our_loss, our_grads) = results
    assert abs(plain_loss - our_loss) < 1e-2
    for expected, got in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(our_grads), strict=True):
        assert np.abs(got - expected).max() <= 0.05 * np.abs(expected).max() + 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# lowered for a GPU that is not there, which says more than computing what they mean


@pytest.mark.skipif(ON_GPU, reason="the kernels themselves are run here")
def test_every_kernel_is_lowered_for_a_gpu(monkeypatch):
    monkeypatch.setattr(jax_gpu_pallas, "INTERPRET", False)
    monkeypatch.setattr(jax_gpu_mlp, "_cores", lambda: 132)
    with contextlib.suppress(ImportError):  # JAX 0.11 and later look for the GPU
        gpu_info = importlib.import_module("jax._src.pallas.triton.gpu_info")
        monkeypatch.setattr(gpu_info, "get_gpu_info", lambda: gpu_info._get_gpu_info_impl(gpu_info.GpuVersion.H200))

    def value_and_pull(function, *arrays):
        value, pull = jax.vjp(function, *arrays)
        return pull(value)

    def loss(logits_RV):
        return jax_gpu_kernels.cross_entropy(logits_RV, jnp.zeros(64, jnp.int32)).mean()

    def attend(q_BTNH, k_BTNH, v_BTNH):
        return jax_gpu_attention.attention(q_BTNH, k_BTNH, v_BTNH, jnp.zeros(2, jnp.uint32), 0.1)

    def shape(*sizes: int, dtype="bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    weights = [shape(768, dtype="float32")] * 2
    for function, arrays, kernels in (
        (jax_gpu_kernels.layer_norm, [shape(64, 768), *weights], 2),
        (jax_gpu_kernels.gelu_erf, [shape(64, 3072)], 2),
        (jax_gpu_kernels.gelu_erf, [shape(3, 1001)], 2),
        (loss, [shape(64, 50304)], 1),
        (attend, [shape(2, 128, 2, 64)] * 3, 2),
        (jax_gpu_mlp.mlp, [shape(2048, 768), shape(768, 3072), shape(768, 3072)], 2),
    ):
        traced = jax.jit(functools.partial(value_and_pull, function)).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @__gpu$xla.gpu.triton") + text.count("custom_call @mosaic_gpu") == kernels
