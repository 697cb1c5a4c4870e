"""jax_cpu_kernels: our own code for a CPU beside numpy in float64, and beside XLA in whole models and runs."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_cpu_kernels as kernels
import jax_cpu_library
import jax_ops
from jax_cache import decoding_weights
from jax_generate import generate
from jax_ops import dropout
from jax_transformer import GPTConfig, cross_entropy, forward, init_params

ROOT = Path(__file__).resolve().parents[1]
no_compiler = shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]) is None
pytestmark = [
    pytest.mark.skipif(no_compiler, reason="needs a C++ compiler (c++, or what CXX names)"),
    pytest.mark.usefixtures("exact_and_quick"),
]

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=96, vocab_size=77, bias=True, gelu="tanh")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library is there in these tests, and not in those of other files."""
    made_in = tmp_path_factory.mktemp("kernels")
    kernels.load(lambda: made_in)
    assert kernels.loaded()
    yield made_in
    kernels._library = None


def heads_of(rows_RD: np.ndarray, B: int, N: int) -> np.ndarray:
    R, D = rows_RD.shape
    return rows_RD.reshape(B, R // B, N, D // N).swapaxes(1, 2).reshape(B * N, R // B, D // N)


def rows_of(heads_GTH: np.ndarray, B: int) -> np.ndarray:
    G, T, H = heads_GTH.shape
    return heads_GTH.reshape(B, G // B, T, H).swapaxes(1, 2).reshape(B * T, -1)


def attention_in_float64(qkv_RX, dy_RD, B: int, N: int, factors_GTS=1.0) -> tuple[np.ndarray, np.ndarray]:
    """Attention and the gradient of its product with dy, by the book; factors_GTS multiply the weights (dropout)."""
    q, k, v = (heads_of(part, B, N) for part in np.split(np.asarray(qkv_RX, np.float64), 3, axis=1))
    dy = heads_of(np.asarray(dy_RD, np.float64), B, N)
    T, H = q.shape[1:]
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(H), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y, dv = (weights * factors_GTS) @ v, (weights * factors_GTS).swapaxes(1, 2) @ dy
    dweights = dy @ v.swapaxes(1, 2) * factors_GTS
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(H)
    gradients = dscores @ k, dscores.swapaxes(1, 2) @ q, dv
    return rows_of(y, B), np.concatenate([rows_of(d, B) for d in gradients], axis=1)


def attention_and_gradient(qkv_RX, dy_RD, B: int, N: int, dropout_3=(0, 0, 0)):
    attend = jax.jit(lambda qkv_RX: kernels.attention(qkv_RX, jnp.array(dropout_3, jnp.uint32), B, N))
    y_RD, pullback = jax.vjp(attend, qkv_RX)
    return y_RD, pullback(dy_RD)[0]


@given(
    B=st.integers(1, 3), N=st.integers(1, 3), T=st.integers(1, 150), H=st.sampled_from([16, 32, 48, 64]),
    scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_attention_and_its_gradient_are_those_of_float64(B, N, T, H, scale, seed):
    rng = np.random.default_rng(seed)
    qkv_RX, dy_RD = (rng.normal(size=(B * T, n * N * H)).astype(np.float32) for n in (3, 1))
    qkv_RX[:, : 2 * N * H] *= scale  # large scores: nearly all of the weight on one key
    y_RD, dqkv_RX = attention_and_gradient(jnp.asarray(qkv_RX), jnp.asarray(dy_RD), B, N)
    expected_y, expected_dqkv = attention_in_float64(qkv_RX, dy_RD, B, N)
    np.testing.assert_allclose(y_RD, expected_y, atol=3e-6 * max(1, scale**2))  # scores are rounded, too
    np.testing.assert_allclose(dqkv_RX, expected_dqkv, atol=1e-5 * max(1, scale**3))


@pytest.mark.parametrize("T", [5, 64, 200])
def test_attention_drops_what_the_models_dropout_drops_of_all_weights(T):
    B, N, H, rate = 2, 3, 16, 0.3
    qkv_RX, dy_RD = (jax.random.normal(jax.random.key(n), (B * T, n * N * H)) for n in (3, 1))
    seeds_2 = jax.random.bits(jax.random.key(7), (2,))
    factors_GTS = np.asarray(dropout(jnp.ones((B * N, T, T)), rate, seeds_2))
    y_RD, dqkv_RX = attention_and_gradient(qkv_RX, dy_RD, B, N, (*map(int, seeds_2), int(rate * 2**32)))
    expected_y, expected_dqkv = attention_in_float64(qkv_RX, dy_RD, B, N, factors_GTS)
    np.testing.assert_allclose(y_RD, expected_y, atol=1e-5)
    np.testing.assert_allclose(dqkv_RX, expected_dqkv, atol=1e-5)


def test_attention_drops_by_indices_beyond_32_bits_too():
    G, T, H, rate, seeds = 1025, 2048, 16, 0.3, (3, 4_000_000_000)
    one_TX = np.random.default_rng(0).normal(size=(T, 3 * H)).astype(np.float32)
    dropout_3 = jnp.asarray((*seeds, int(rate * 2**32)), jnp.uint32)
    y_RD = kernels.attention(jnp.tile(one_TX, (G, 1)), dropout_3, G, 1)
    of_all = jax.jit(lambda g: dropout(jnp.ones((G, T, T)), rate, jnp.asarray(seeds, jnp.uint32))[g])
    for g in (0, 1, 1023, 1024):
        expected, _ = attention_in_float64(one_TX, np.zeros((T, H)), 1, 1, np.asarray(of_all(g))[None])
        np.testing.assert_allclose(y_RD[g * T : (g + 1) * T], expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_comes_out_not_finite_so_that_divergence_is_seen(bad):
    qkv_RX = jnp.zeros((40, 3 * 16)).at[10, :16].set(bad)  # a query
    y_RD, dqkv_RX = attention_and_gradient(qkv_RX, jnp.ones((40, 16)), 1, 1)
    assert np.isnan(y_RD[10]).all() and np.isfinite(y_RD[:10]).all() and np.isfinite(y_RD[11:]).all()
    assert np.isnan(dqkv_RX[10, :16]).all()


def gelu_in_float64(x: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """GELU and its slope, by the book."""
    x = x.astype(np.float64)
    if form == "erf":
        phi = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
        return x * phi, phi + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    tanh, dz = np.tanh(math.sqrt(2 / np.pi) * (x + 0.044715 * x**3)), math.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * dz


@given(
    form=st.sampled_from(["erf", "tanh"]), count=st.integers(1, 20_000), scale=st.sampled_from([1e-3, 1.0, 4.0, 1e5]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_gelu_and_its_slope_are_those_of_float64(form, count, scale, seed):
    rng = np.random.default_rng(seed)
    x, dy = (factor * rng.normal(size=count).astype(np.float32) for factor in (np.float32(scale), np.float32(1)))
    y, pullback = jax.vjp(jax.jit(lambda x: kernels.gelu(x, form)), jnp.asarray(x))
    expected_y, expected_slope = gelu_in_float64(x, form)
    np.testing.assert_allclose(y, expected_y, rtol=5e-7, atol=5e-7)
    np.testing.assert_allclose(pullback(jnp.asarray(dy))[0], dy * expected_slope, rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(jax.jit(kernels.gelu, static_argnums=1)(jnp.asarray(x), form), y)  # without slope


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_gelu_of_what_is_not_finite_is_that_of_xla(form):
    x = jnp.array([[jnp.nan, jnp.inf, -jnp.inf], [1e30, -1e30, 0.0]])
    np.testing.assert_array_equal(kernels.gelu(x, form), jax_ops.gelu(x, form))


def temporary_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_a_step_keeps_sixteen_numbers_a_layer_for_each_of_a_tokens(form):
    """Twice LayerNorm's input and output, queries, keys, values, attention's output, and GELU's output and slope."""
    B, T = 12, 64

    def needed_for(n_layer: int) -> int:
        config = dataclasses.replace(MODEL, n_layer=n_layer, n_head=4, gelu=form, bias=False)
        loss = lambda params, ids_BT: cross_entropy(forward(params, ids_BT, config), ids_BT).mean()  # noqa: E731
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        compiled = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
        return temporary_bytes(compiled)

    kept = (needed_for(6) - needed_for(2)) / 4 / (B * T * MODEL.n_embd * 4)
    assert 16 <= kept < 17


def test_gelu_without_a_gradient_overwrites_its_input():
    x_RD, kernel_DF = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 64), (64, 256)))
    mlp = jax.jit(lambda x_RD, kernel_DF: kernels.gelu(x_RD @ kernel_DF, "erf") @ kernel_DF.T)
    assert 256 * 256 * 4 <= temporary_bytes(mlp.lower(x_RD, kernel_DF).compile()) < 1.1 * 256 * 256 * 4
    x = jnp.linspace(-3, 3, 100)
    y, copy = jax.jit(lambda x: (kernels.gelu(x, "erf"), x + 0))(x)  # which is needed afterwards
    np.testing.assert_array_equal(copy, x)
    assert (y != x).all()


@given(R=st.integers(1, 21), K=st.integers(1, 70), M=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_products_with_panels_are_those_of_float64_and_a_row_is_the_same_in_any_batch(R, K, M, seed):
    rng = np.random.default_rng(seed)
    x_RK, kernel_KM = (rng.normal(size=shape).astype(np.float32) for shape in ((R, K), (K, M)))
    kernel_PKC = kernels.panels(jnp.asarray(kernel_KM))
    y_RM = kernels.product(jnp.asarray(x_RK), kernel_PKC, M)
    np.testing.assert_allclose(y_RM, x_RK.astype(np.float64) @ kernel_KM, atol=1e-5 * np.sqrt(K))
    alone_1M = kernels.product(jnp.asarray(x_RK[R // 2, None]), kernel_PKC, M)
    np.testing.assert_array_equal(alone_1M[0], y_RM[R // 2])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: kernels.attention(jnp.zeros((6, 48), jnp.bfloat16), jnp.zeros(3, jnp.uint32), 1, 1),
            "must be float32",
        ),
        (lambda: kernels.attention(jnp.zeros((6, 48)), jnp.zeros(2, jnp.uint32), 1, 1), "dropout_3 is uint32"),
        (lambda: kernels.attention(jnp.zeros((6, 48)), jnp.zeros(3, jnp.uint32), 4, 1), "6 rows are not 4 times"),
        (lambda: kernels.attention(jnp.zeros((6, 48)), jnp.zeros(3, jnp.uint32), 1, 2), "48 columns are not 3 x 2"),
        (lambda: kernels.gelu(jnp.zeros(6, jnp.bfloat16), "erf"), "must be float32"),
        (lambda: kernels.product(jnp.zeros((2, 8)), kernels.panels(jnp.zeros((9, 5))), 5), "x_RK has 8 columns"),
        (lambda: kernels.product(jnp.zeros((2, 9)), kernels.panels(jnp.zeros((9, 5))), 50), "1 panels of 32 columns"),
        (lambda: kernels.product(jnp.zeros((2, 9), int), kernels.panels(jnp.zeros((9, 5))), 5), "must be float32"),
    ],
)
def test_wrong_calls_are_refused_by_name(call, told):
    with pytest.raises(AssertionError, match=told):
        call()


def test_a_model_computes_the_same_with_and_without(folder, monkeypatch):
    params = init_params(MODEL, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    ids_BT = jax.random.randint(jax.random.key(1), (3, 90), 0, 77)
    prompts = [[1, 2, 3], [4] * 40, [5, 6]]
    results = []
    for load in (False, True):
        monkeypatch.setattr(kernels, "_library", None)
        if load:
            kernels.load(lambda: folder)
        assert kernels.loaded() == load
        # Dropout means nothing here; what was compiled for the one configuration is not taken for the other.
        config = dataclasses.replace(MODEL, dropout=0.1 if load else 0.0)
        loss = jax.value_and_grad(lambda p: cross_entropy(forward(p, ids_BT, config), ids_BT).mean())  # noqa: B023
        program = jax.jit(loss).lower(params)
        assert all((f"nanogpt_jax.{name}" in program.as_text()) == load for name in ("causal_attention", "gelu_tanh"))
        kernel = decoding_weights(params, config)["head"]["kernel"]
        assert kernel.ndim == (3 if load else 2)
        new_ids = generate(params, config, prompts, max_new_tokens=70, temperature=0, key=jax.random.key(0))
        results.append((program.compile()(params), new_ids))
    ((loss_0, grads_0), ids_0), ((loss_1, grads_1), ids_1) = results
    np.testing.assert_allclose(loss_1, loss_0, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5), grads_0, grads_1)
    assert ids_1 == ids_0


HEADS = ("--n_head=1", "--n_embd=32")  # heads as wide as our code takes them; those of tiny.py are not
LONG = (*HEADS, "--block_size=150", "--dropout=0.2")


def losses_of(out_dir: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["iter"], line.get("loss"), line.get("grad_norm"), line.get("val/loss")) for line in lines]


@pytest.mark.slow  # the two forms of a model are compared above
def test_without_a_compiler_the_run_is_the_same_but_for_rounding(quick, workdir):
    for out, env, notes in (("ours", {}, []), ("xla", {"CXX": "no-such-compiler"}, ["note: no C++ compiler"])):
        options = (f"--out_dir={out}", "--max_iters=10", *LONG)
        done = quick("train_jax.py", "tiny.py", *options, **env)
        assert [line[:21] for line in done.stdout.splitlines() if line.startswith("note: ")] == notes
    ours, xlas = (np.array([row[1] for row in losses_of(workdir / out) if row[1]]) for out in ("ours", "xla"))
    assert (ours != xlas).any()
    np.testing.assert_allclose(ours, xlas, atol=1e-4)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler no-such-compiler"),
        ({"CXX": "'"}, 'CXX="\'" names no C++ compiler'),
        ({"CXX": "false"}, "cannot compile jax_cpu_kernels.cc: it does not say why"),
        ({"CXX": f"{sys.executable} -c 0"}, "No such file"),  # a compiler that makes nothing
        ({"XDG_CACHE_HOME": "file"}, "Not a directory"),
    ],
)
def test_what_keeps_the_library_from_being_made_is_a_note(tmp_path, monkeypatch, capsys, env, told):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kernels, "_library", None)
    kernels.load(lambda: jax_cpu_library.cache_folder())  # a function of its own: what it returns is remembered
    assert not kernels.loaded()
    assert not kernels.loaded()  # and says it once
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and told in note and note.endswith("(JAX_README.md, Installation)")


def test_a_library_that_is_torn_is_told_and_made_anew_at_the_next_start(tmp_path):
    code = """
import sys
from pathlib import Path
import jax_cpu_kernels
jax_cpu_kernels.load(lambda: Path(sys.argv[1]))
print(jax_cpu_kernels.loaded())
"""
    said = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        said.append((done.stdout, done.stderr))
        if len(said) == 1:
            (library,) = tmp_path.iterdir()
            os.truncate(library, 100)
    assert said[0] == said[2] == ("True\n", "")
    assert re.fullmatch(r"note: .*cpu_kernels-.*\.so.*\nFalse\n", said[1][0]) and said[1][1] == ""


def test_a_run_compiles_the_library_once_and_the_next_one_finds_it(quick, workdir):
    (workdir / "counting").write_text('#!/bin/sh\necho called >> calls\nexec ${REAL_CXX:-c++} "$@"\n')
    (workdir / "counting").chmod(0o755)
    env = {"CXX": str(workdir / "counting"), "REAL_CXX": os.environ.get("CXX", "c++")}
    for _ in range(2):
        quick("train_jax.py", "tiny.py", "--max_iters=0", "--eval_only=True", *HEADS, **env)
        assert (workdir / "calls").read_text() == "called\n"


def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(quick, workdir):
    quick("train_jax.py", "tiny.py", "--out_dir=whole", *LONG)
    quick("train_jax.py", "tiny.py", "--out_dir=parts", "--max_iters=10", *LONG)
    quick("train_jax.py", "--init_from=resume", "--out_dir=parts", "--max_iters=20")
    assert losses_of(workdir / "parts") == losses_of(workdir / "whole")


def test_processes_that_make_the_library_at_once_all_have_it(tmp_path):
    code = """
import ctypes, sys
from pathlib import Path
import jax_cpu_library
ctypes.CDLL(str(jax_cpu_library.begin(lambda: Path(sys.argv[1])).result())).causal_attention
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    (library,) = tmp_path.iterdir()
    made_at = library.stat().st_mtime_ns
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert library.stat().st_mtime_ns == made_at
