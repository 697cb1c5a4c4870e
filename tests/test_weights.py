"""Weights in and out: every layout there is, and the round trip.

python -m pytest tests/test_weights.py

The truth is in fixtures/weights/, made with transformers and nanoGPT; fixtures/weights.py beside it is the recipe.
tests/test_peers.py compares with the live programs where they are installed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_weight_names
from jax_transformer import GPTConfig, Params, abstract_params, cross_entropy, forward
from jax_weight_files import open_safetensors
from jax_weights import load_weights, open_weights, save_hf
from tests.weight_files import FIXTURES, edit_json, tensors_of, write_safetensors, write_torch

ROOT = Path(__file__).resolve().parents[1]


def leaves(params: Params) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in found}


def assert_same(params: Params, others: Params) -> None:
    ours, theirs = leaves(params), leaves(others)
    assert ours.keys() == theirs.keys()
    assert all(a.dtype == np.float32 and a.tobytes() == theirs[name].tobytes() for name, a in ours.items())


compiled = jax.jit(forward, static_argnums=2)


def logits_of(params: Params, ids_BT: np.ndarray, config: GPTConfig) -> jax.Array:
    return compiled(params, jnp.asarray(ids_BT, jnp.int32), config)


def random_params(config: GPTConfig, seed: int = 0, tied: bool = True) -> Params:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: random.standard_normal(a.shape).astype(np.float32), abstract_params(config, tied))


# ----------------------------------------------------------------------------------------------------------------------
# in


def test_layout_table_is_the_models_own_tree():
    for config in (GPTConfig(2, 2, 8, 12, 23, bias=True), GPTConfig(11, 3, 6, 5, 7), GPTConfig(1, 1, 4, 3, 2)):
        for tied in (True, False):
            table = {e.ours: e.shape for e in jax_weight_names.entries(vars(config), config.bias, tied)}
            found = jax.tree_util.tree_flatten_with_path(abstract_params(config, tied))[0]
            assert table == {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in found}


def assert_logits_and_loss(params: Params, config: GPTConfig, truth: Any, name: str) -> None:
    logits_BTV = logits_of(params, truth["ids"], config)
    np.testing.assert_allclose(logits_BTV, truth[name], atol=1e-5)
    loss = cross_entropy(logits_BTV, jnp.asarray(truth["targets"], jnp.int32)).mean()
    np.testing.assert_allclose(loss, truth[f"{name}_loss"], rtol=1e-6)


@pytest.mark.parametrize("folder", ["single", "sharded", "hub", "bin", "legacy"])
def test_every_layout_gives_the_logits_and_the_loss_of_transformers(folder):
    params, config = load_weights(FIXTURES / folder)
    assert config == GPTConfig(2, 2, 8, 12, 23, bias=True, gelu="tanh")
    with np.load(FIXTURES / "logits.npz") as truth:
        assert_logits_and_loss(params, config, truth, "gpt2")
    assert_same(params, load_weights(FIXTURES / "single")[0])


def test_the_other_names_that_transformers_takes_for_the_sizes_count(tmp_path):
    shutil.copytree(FIXTURES / "single", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    options = json.loads(path.read_text())
    for name, other in (("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"), ("n_embd", "hidden_size"),
                        ("n_positions", "max_position_embeddings")):  # fmt: skip
        options[other] = options.pop(name)
    path.write_text(json.dumps(options))
    assert load_weights(tmp_path / "model")[1] == load_weights(FIXTURES / "single")[1]


def test_bfloat16_weights_become_the_same_float32():
    params, config = load_weights(FIXTURES / "bf16")
    with np.load(FIXTURES / "logits.npz") as truth:
        np.testing.assert_allclose(logits_of(params, truth["ids"], config), truth["bf16"], atol=1e-5)


def test_a_head_of_its_own_gives_the_logits_and_the_loss_of_transformers(tmp_path):
    params, config = load_weights(FIXTURES / "untied")
    assert config == GPTConfig(2, 2, 8, 12, 23, bias=True, gelu="tanh")
    with np.load(FIXTURES / "logits.npz") as truth:
        assert_logits_and_loss(params, config, truth, "untied")
    # A configuration may say that they are one: the numbers count.
    shutil.copytree(FIXTURES / "untied", tmp_path / "said")
    edit_json(tmp_path / "said" / "config.json", tie_word_embeddings=True)
    assert_same(load_weights(tmp_path / "said")[0], params)


@pytest.mark.parametrize("path", ["nanogpt", "nanogpt/ckpt.pt"])
def test_nanogpts_checkpoint_gives_nanogpts_logits_without_torch(path):
    was_imported = "torch" in sys.modules  # by other tests, where it is installed
    params, config = load_weights(FIXTURES / path)
    assert config == GPTConfig(2, 2, 8, 12, 23, bias=False, gelu="erf")
    with np.load(FIXTURES / "logits.npz") as truth:
        logits_BTV = logits_of(params, truth["ids"], config)
        np.testing.assert_allclose(logits_BTV, truth["nanogpt"], atol=1e-5)
    assert ("torch" in sys.modules) == was_imported


def test_files_of_our_own_writing_load_the_same(tmp_path):
    """Prefixed with and without a head, in one half precision or another, as npz, as torch's zip."""
    bare = {name.removeprefix("transformer."): array for name, array in tensors_of("single").items()}
    want = load_weights(FIXTURES / "single")[0]

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        shutil.copy(FIXTURES / "single" / "config.json", tmp_path / name)
        return tmp_path / name

    masks = {"h.0.attn.masked_bias": np.array(-1e4, np.float32), "h.1.attn.bias": np.ones((1, 1, 12, 12), np.float32)}
    head = {"lm_head.weight": bare["wte.weight"]}
    prefixed = {f"transformer.{name}": array for name, array in (bare | masks).items()}
    write_safetensors(folder("prefixed") / "model.safetensors", prefixed | head)
    np.savez_compressed(folder("npz") / "model.npz", **bare)  # type: ignore[arg-type]
    write_torch(folder("torch") / "pytorch_model.bin", OrderedDict(bare | masks | head))
    write_torch(folder("shards") / "a.bin", {name: bare[name] for name in list(bare)[:9]})
    write_torch(tmp_path / "shards" / "b.bin", {name: bare[name] for name in list(bare)[9:]})
    index = {"weight_map": {name: "a.bin" if i < 9 else "b.bin" for i, name in enumerate(bare)}}
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("prefixed", "npz", "torch", "shards", "npz/model.npz", "torch/pytorch_model.bin"):
        assert_same(load_weights(tmp_path / name)[0], want)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        path = folder(np.dtype(dtype).name) / "model.safetensors"
        write_safetensors(path, {name: array.astype(dtype) for name, array in bare.items()})
        rounded = jax.tree.map(lambda a, dtype=dtype: np.asarray(a).astype(dtype).astype(np.float32), want)
        assert_same(load_weights(path)[0], rounded)


def test_orientation_follows_the_kind_of_file_for_every_matrix(tmp_path):
    # one entry of each matrix marked, off the diagonal: a transposition too many moves it, also where it is square
    config = GPTConfig(1, 1, 4, 3, 5)
    named = {e.theirs: np.zeros(e.shape[::-1] if e.linear else e.shape, np.float32)
             for e in jax_weight_names.entries(vars(config), bias=False)}  # fmt: skip
    for array in named.values():
        array.flat[1] = 1  # [0, 1], in the file
    args = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 3, "vocab_size": 5, "bias": False, "dropout": 0.5}
    write_torch(tmp_path / "ckpt.pt", {"model_args": args, "model": named})
    params, found = load_weights(tmp_path / "ckpt.pt")
    assert found == config  # a checkpoint's dropout was for its training
    block = params["h"]["0"]
    kernels = block["attn"]["c_attn"], block["attn"]["c_proj"], block["mlp"]["c_fc"]
    assert [np.argwhere(k["kernel"]).tolist() for k in kernels] == [[[1, 0]]] * 3  # (in, out); torch has (out, in)
    assert np.argwhere(block["mlp"]["c_proj"]["kernel"]).tolist() == [[0, 1]]  # (out, in), as in torch


def test_older_nanogpt_checkpoints_without_the_bias_option_have_biases_and_its_first_gelu(tmp_path):
    config = GPTConfig(1, 1, 4, 3, 5, bias=True, gelu="tanh")
    named = {e.theirs: np.ones(e.shape[::-1] if e.linear else e.shape, np.float32)
             for e in jax_weight_names.entries(vars(config), bias=True)}  # fmt: skip
    args = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 3, "vocab_size": 5}
    write_torch(tmp_path / "ckpt.pt", {"model_args": args, "model": named})
    assert load_weights(tmp_path / "ckpt.pt")[1] == config


def test_gpt2s_names_come_from_the_hubs_cache_without_a_network(tmp_path, environment):
    snapshot = tmp_path / "models--openai-community--gpt2-medium" / "snapshots" / ("0" * 40)
    shutil.copytree(FIXTURES / "hub", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = """
import sys, jax_weights, jax_weight_files
print(jax_weights.open_weights("gpt2-medium").model["n_embd"])
try:
    jax_weights.open_weights("gpt2-large")
except jax_weight_files.WeightsError as error:
    print(error)
print([name for name in ("jax", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                          env=environment | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.stderr == ""
    n_embd, error, imported = done.stdout.splitlines()
    assert n_embd == "8"
    assert re.match(r"gpt2-large is not in the cache .* \(HF_HUB_OFFLINE is set\): .* `hf download openai-", error)
    assert imported == "[]"


def test_loading_takes_little_more_memory_than_the_parameters(tmp_path, environment):
    config = GPTConfig(n_layer=6, n_head=4, n_embd=384, vocab_size=20_000, block_size=256, bias=True)  # 73 MB
    save_hf(random_params(config), config, tmp_path)
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
import jax_transformer, jax_weights
def kilobytes(what):
    return int(open("/proc/self/status").read().split(what + ":")[1].split()[0])
jax.device_put(np.ones(9), may_alias=False).block_until_ready()
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
params, _ = jax_weights.load_weights(sys.argv[1])
print((kilobytes("VmHWM") - before) * 1024 / sum(a.nbytes for a in jax.tree.leaves(params)))
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell the peak memory of a stretch of a program")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, capture_output=True,
                          env=environment, check=True)  # fmt: skip
    assert 0.9 < float(done.stdout) < 1.3


# ----------------------------------------------------------------------------------------------------------------------
# out


@settings(max_examples=15, deadline=None)
@given(
    st.builds(
        lambda heads, width, **rest: GPTConfig(n_head=heads, n_embd=heads * width, **rest),
        heads=st.integers(1, 3), width=st.integers(1, 4), n_layer=st.integers(1, 3), block_size=st.integers(1, 6),
        vocab_size=st.integers(1, 9), bias=st.booleans(), gelu=st.sampled_from(["erf", "tanh"]),
    ),
    st.integers(0, 2**32),
    st.booleans(),
)  # fmt: skip
def test_what_is_saved_loads_bit_for_bit(tmp_path_factory, config, seed, tied):
    folder = tmp_path_factory.mktemp("saved")
    params = random_params(config, seed, tied)
    save_hf(params, config, folder)
    loaded, found = load_weights(folder)
    assert found == config
    assert_same(loaded, params)
    tensors = open_safetensors(folder / "model.safetensors")
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == 6 * config.n_layer + 1  # transformers wants all of them
    assert all(not tensors[name].read().any() for name in biases) or config.bias


def test_saving_over_what_is_there_replaces_it_and_leaves_nothing_else(tmp_path):
    first, second = GPTConfig(1, 1, 4, 3, 5), GPTConfig(2, 1, 4, 3, 5, bias=True)
    save_hf(random_params(first), first, tmp_path)
    save_hf(random_params(second), second, tmp_path)
    assert load_weights(tmp_path)[1] == second
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert open_weights(tmp_path / "model.safetensors").model["n_layer"] == 2
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}  # others may read it


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPTConfig(2, 1, 4, 3, 6, bias=True), r"wte\.embedding"),
        (GPTConfig(1, 1, 4, 3, 5, bias=True), r"h\.1\.attn"),
        (GPTConfig(3, 1, 4, 3, 5, bias=True), r"h\.2\.attn"),
        (GPTConfig(2, 1, 4, 3, 5), r"h\.0\.attn\.c_attn\.bias"),
    ],
)
def test_parameters_of_another_model_are_not_saved(tmp_path, config, named):
    with pytest.raises(AssertionError, match=rf"params do not fit config: {named}"):
        save_hf(random_params(GPTConfig(2, 1, 4, 3, 5, bias=True)), config, tmp_path)
    assert not any(tmp_path.iterdir())
