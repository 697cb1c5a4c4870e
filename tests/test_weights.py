"""Weights in and out: every layout there is, every way a file can be wrong, and the round trip.

python -m pytest tests/test_weights.py

The truth is in fixtures/weights/, made with transformers and nanoGPT; fixtures/weights.py beside it is the recipe.
tests/test_peers.py compares with the live programs where they are installed.
"""

import copyreg
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import types
import zipfile
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

import jax_weights
from jax_transformer import GPTConfig, Params, abstract_params, cross_entropy, forward
from jax_weight_files import Tensor, WeightsError, open_npz, open_safetensors, open_torch
from jax_weights import load_weights, open_weights, save_hf

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "weights"


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


def random_params(config: GPTConfig, seed: int = 0) -> Params:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: random.standard_normal(a.shape).astype(np.float32), abstract_params(config))


# Writers of our own, so that files come into being that no library would write.

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "float64": "F64"}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        where = {"dtype": SAFETENSORS_DTYPES[array.dtype.name], "data_offsets": [len(data), len(data) + len(raw)]}
        header[name] = {"shape": list(array.shape), **where}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_torch(path: Path, saved: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """torch.save's zip form without torch: arrays become tensors of storages of their own."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*args: Any) -> None:
        raise AssertionError("only its name is wanted")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    storage_names = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
    for name in storage_names.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    storages: list[bytes] = []

    class Stored:
        def __init__(self, array: np.ndarray):
            self.pid = (
                "storage",
                getattr(torch, storage_names[array.dtype.name]),
                str(len(storages)),
                "cpu",
                array.size,
            )
            storages.append(array.tobytes())

    class Pickler(pickle.Pickler):
        dispatch_table = copyreg.dispatch_table.copy()

        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Stored) else None

    def reduce_array(array: np.ndarray) -> tuple:
        strides = tuple(stride // array.itemsize for stride in np.array(array, order="C").strides)
        return _rebuild_tensor_v2, (Stored(array), 0, array.shape, strides, False, OrderedDict())

    Pickler.dispatch_table[np.ndarray] = reduce_array
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        with zipfile.ZipFile(path, "w", compression) as archive:
            with archive.open("any name/data.pkl", "w") as file:
                Pickler(file, protocol=2).dump(saved)
            for key, raw in enumerate(storages):
                archive.writestr(f"any name/data/{key}", raw)


def tensors_of(folder: str) -> dict[str, np.ndarray]:
    tensors = open_safetensors(FIXTURES / folder / "model.safetensors")
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that loads, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "single", tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ----------------------------------------------------------------------------------------------------------------------
# in


def test_layout_table_is_the_models_own_tree():
    for config in (GPTConfig(2, 2, 8, 12, 23, bias=True), GPTConfig(11, 3, 6, 5, 7), GPTConfig(1, 1, 4, 3, 2)):
        table = {e.ours: e.shape for e in jax_weights.entries(vars(config), config.bias)}
        found = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
        assert table == {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in found}


@pytest.mark.parametrize("folder", ["single", "sharded", "hub", "bin", "legacy"])
def test_every_layout_gives_the_logits_and_the_loss_of_transformers(folder):
    params, config = load_weights(FIXTURES / folder)
    assert config == GPTConfig(2, 2, 8, 12, 23, bias=True, gelu="tanh")
    with np.load(FIXTURES / "logits.npz") as truth:
        logits_BTV = logits_of(params, truth["ids"], config)
        np.testing.assert_allclose(logits_BTV, truth["gpt2"], atol=1e-5)
        loss = cross_entropy(logits_BTV, jnp.asarray(truth["targets"], jnp.int32)).mean()
        np.testing.assert_allclose(loss, truth["gpt2_loss"], rtol=1e-6)
    assert_same(params, load_weights(FIXTURES / "single")[0])


def test_bfloat16_weights_become_the_same_float32():
    params, config = load_weights(FIXTURES / "bf16")
    with np.load(FIXTURES / "logits.npz") as truth:
        np.testing.assert_allclose(logits_of(params, truth["ids"], config), truth["bf16"], atol=1e-5)


@pytest.mark.parametrize("path", ["nanogpt", "nanogpt/ckpt.pt"])
def test_nanogpts_checkpoint_gives_nanogpts_logits_without_torch(path):
    params, config = load_weights(FIXTURES / path)
    assert config == GPTConfig(2, 2, 8, 12, 23, bias=False, gelu="erf")
    with np.load(FIXTURES / "logits.npz") as truth:
        logits_BTV = logits_of(params, truth["ids"], config)
        np.testing.assert_allclose(logits_BTV, truth["nanogpt"], atol=1e-5)
    assert "torch" not in sys.modules


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
    edit_json(tmp_path / "prefixed" / "config.json", tie_word_embeddings=False)  # untied, but equal
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
             for e in jax_weights.entries(vars(config), bias=False)}  # fmt: skip
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


def test_older_nanogpt_checkpoints_without_the_bias_option_have_biases(tmp_path):
    config = GPTConfig(1, 1, 4, 3, 5, bias=True)
    named = {e.theirs: np.ones(e.shape[::-1] if e.linear else e.shape, np.float32)
             for e in jax_weights.entries(vars(config), bias=True)}  # fmt: skip
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
# what is wrong is told in one line


def damaged(folder: Path, **changes: np.ndarray | None) -> None:
    """Rewrite a directory's tensors. changes: names with __ for dots; None takes a tensor out."""
    tensors: dict[str, Any] = tensors_of("single")
    for name, array in changes.items():
        tensors[f"transformer.{name.replace('__', '.')}"] = array
    write_safetensors(folder / "model.safetensors", {k: v for k, v in tensors.items() if v is not None})


def test_all_that_is_wrong_with_a_file_is_told_at_once(model):
    nan = np.full(8, np.nan, np.float32)
    damaged(model, h__0__ln_1__weight=None, h__1__mlp__c_fc__weight=np.zeros((32, 8), np.float32), odd=nan,
            ln_f__bias=nan, ln_f__weight=np.zeros(8, np.int64))  # fmt: skip
    with pytest.raises(WeightsError) as error:
        load_weights(model)
    assert "n_layer=2, n_embd=8, block_size=12, vocab_size=23" in str(error.value)
    for part in ("missing: h.0.ln_1.weight", "wrong shape: h.1.mlp.c_fc.weight is (32, 8), expected (8, 32)",
                 "unexpected: odd", "not finite: ln_f.bias", "not a float: ln_f.weight is I64"):  # fmt: skip
        assert part in str(error.value)


def test_every_tensor_that_is_not_finite_is_named(model):
    weird = np.zeros(8, np.float32)
    weird[3] = np.inf
    damaged(model, ln_f__bias=weird, h__0__ln_2__weight=weird * np.nan)
    with pytest.raises(WeightsError, match=r"not finite: h\.0\.ln_2\.weight, ln_f\.bias$"):
        load_weights(model)


def test_head_of_its_own_is_refused_and_one_that_is_missing_too(model):
    head = tensors_of("single")["transformer.wte.weight"].copy()
    head[3, 3] += 1
    tensors = tensors_of("single")
    write_safetensors(model / "model.safetensors", tensors | {"lm_head.weight": head})
    with pytest.raises(WeightsError, match=r"a head of its own.*lm_head\.weight differs from wte\.weight"):
        load_weights(model)
    write_safetensors(model / "model.safetensors", tensors)
    edit_json(model / "config.json", tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        load_weights(model)


CONFIG_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"n_embd": 16}, r"n_embd=16.*wrong shape: .*\(23, 8\), expected \(23, 16\)"),
    ({"n_layer": 3}, r"missing: h\.2\.ln_1\.weight, .*\(and 8 more\)"),
    ({"n_layer": 1}, r"unexpected: h\.1\.attn\.c_attn\.bias"),
    ({"n_layer": 10**12}, "n_layer is 1000000000000, not a sensible number"),
    ({"n_head": 3}, "n_embd=8 is not divisible by n_head=3"),
    ({"n_head": 0}, "n_head is 0"),
    ({"n_embd": "8"}, "n_embd is '8'"),
    ({"vocab_size": 24}, r"wte\.weight is \(23, 8\), expected \(24, 8\)"),
    ({"n_positions": 13}, r"wpe\.weight is \(12, 8\), expected \(13, 8\)"),
    ({"model_type": "llama"}, r"model_type is 'llama'; this model has \"gpt2\""),
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; this model has 1e-05"),
    ({"n_inner": 7}, "n_inner is 7; this model has null or 32"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"bias": "no"}, "bias is 'no'"),
    ({"bias": False}, r"not zero although config\.json says \"bias\": false.*h\.0\.ln_1\.bias"),
]


@pytest.mark.parametrize(("changes", "expected"), CONFIG_FAULTS, ids=lambda value: str(value)[:40])
def test_configuration_that_does_not_fit_is_refused(model, changes, expected):
    edit_json(model / "config.json", **changes)
    with pytest.raises(WeightsError, match=expected) as error:
        load_weights(model)
    assert "\n" not in str(error.value) and str(model / "config.json") in str(error.value)


def header_of_2_to_the_60(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def cut(name: str, keep: int):
    def damage(folder: Path) -> None:
        shutil.copy(FIXTURES / folder.name / name, folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return damage


def index_names(name: str):
    def damage(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
        (folder / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(tensors_of("single"), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


FILE_FAULTS: dict[str, tuple[str, Any, str]] = {
    "header of 2^60 bytes": ("single", header_of_2_to_the_60, "header too large.*damaged, incomplete or no"),
    "empty file": ("single", write("model.safetensors", b""), "damaged, incomplete or no"),
    "cut short": ("single", cut("model.safetensors", 9000), "damaged, incomplete or no"),
    "no config": ("single", remove("config.json"), r"has no config\.json"),
    "config of a run": ("single", write("config.json", b'{"init_from": "scratch"}'), "is a run of this program"),
    "config not JSON": ("single", write("config.json", b"{"), r"config\.json cannot be read as JSON"),
    "config a list": ("single", write("config.json", b"[]"), "not a JSON object"),
    "no weights": ("single", remove("model.safetensors"), r"has no weights: none of model\.safetensors"),
    "shard missing": ("sharded", remove("model-00002-of-00003.safetensors"), "lacks model-00002-of-00003.safetensors"),
    "shard cut short": ("sharded", cut("model-00003-of-00003.safetensors", 1400), "damaged, incomplete or no"),
    "index without map": ("sharded", write("model.safetensors.index.json", b"{}"), "no weight_map"),
    "shard outside": ("single", index_names("../x.safetensors"), "'../x.safetensors' is not the name of a file beside"),
    "shard far outside": ("single", index_names("/x.safetensors"), "'/x.safetensors' is not the name of a file"),
    "shard of dots": ("single", index_names(".."), r"'\.\.' is not the name of a file"),
    "shard of no kind": ("single", index_names("config.json"), "is of no known kind"),
    "bin cut short": ("bin", cut("pytorch_model.bin", 9000), "its end is missing.*damaged, incomplete or no"),
    "old bin cut short": ("legacy", cut("pytorch_model.bin", 9000), "damaged, incomplete or no"),
    "bin of text": ("bin", write("pytorch_model.bin", b"version https://git-lfs"), "neither a zip file nor"),
    "zip of something": ("bin", lambda f: zipfile.ZipFile(f / "pytorch_model.bin", "w").close(), r"no data\.pkl"),
    "bin of no table": ("bin", lambda f: write_torch(f / "pytorch_model.bin", [1]), "not a table of tensors by name"),
    "checkpoint of no model": ("bin", lambda f: write_torch(f / "ckpt.pt", {"a": 1}), "not a checkpoint of nanoGPT"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_file_that_is_damaged_is_told_in_one_line(tmp_path, fault):
    layout, damage, expected = FILE_FAULTS[fault]
    folder = Path(shutil.copytree(FIXTURES / layout, tmp_path / layout))
    damage(folder)
    path = folder / "ckpt.pt" if fault.startswith("checkpoint") else folder
    with pytest.raises(WeightsError, match=expected) as error:
        load_weights(path)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("gpt2-mediun", "did you mean gpt2-medium"), ("GPT-2", "did you mean gpt2"), ("nowhere/at/all", "the names are")],
)
def test_unknown_name_gets_the_nearest_one(name, advice):
    with pytest.raises(WeightsError, match=f"{name!r} is neither a GPT-2 nor a directory.*{advice}"):
        load_weights(name)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["single/model.safetensors", "bin/pytorch_model.bin",
                                             "legacy/pytorch_model.bin", "nanogpt/ckpt.pt", "logits.npz"]))  # fmt: skip
def test_file_cut_anywhere_is_refused_and_one_with_a_flipped_byte_never_crashes(data, name, tmp_path_factory):
    openers = {".safetensors": open_safetensors, ".bin": open_torch, ".pt": open_torch, ".npz": open_npz}
    whole = (FIXTURES / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / Path(name).name
    path.write_bytes(whole[:at])
    with pytest.raises(WeightsError):
        openers[path.suffix](path)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    try:
        opened = openers[path.suffix](path)
        for tensor in opened.values() if isinstance(opened, dict) else []:
            if isinstance(tensor, Tensor):
                tensor.read()
    except WeightsError as error:
        assert "\n" not in str(error)


# ----------------------------------------------------------------------------------------------------------------------
# pickles run nothing


class Runs:
    """Unpickled by anything else, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zip_of_pickle(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)


ATTACKS = {
    "reduce": lambda where: pickle.dumps({"model": Runs(where)}),
    "eval": lambda where: b"cbuiltins\neval\n(Vopen(" + repr(str(where)).encode() + b", 'w')\ntR.",
    "extension": lambda where: b"\x80\x02\x82\x01.",
    "attributes of what it was given": lambda where: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x01s\x86b."
    ),
    "numpy's own": lambda where: pickle.dumps(np.ones(3)),
    "dotted name": lambda where: b"\x80\x04\x8c\x0bcollections\x8c\x10abc.sys.modules\x93.",
    "bytes of 2^60": lambda where: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickle_that_asks_for_anything_but_tensors_is_refused_and_runs_nothing(tmp_path, attack, form):
    content = ATTACKS[attack](tmp_path / "it ran")
    if form == "zip":
        zip_of_pickle(tmp_path / "ckpt.pt", content)
    else:
        (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="damaged, incomplete or no"):
        load_weights(tmp_path / "ckpt.pt")
    assert not (tmp_path / "it ran").exists()


def test_tensor_that_reaches_past_its_numbers_is_refused(tmp_path):
    write_torch(tmp_path / "good.pt", {"model": np.zeros((2, 3), np.float32)})
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        content, numbers = archive.read("any name/data.pkl"), archive.read("any name/data/0")
    assert content.count(b"K\x02K\x03\x86") == 1  # the shape (2, 3)
    for shape in (b"K\x02K\x04\x86", b"K\x03K\x03\x86"):
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            archive.writestr("a/data.pkl", content.replace(b"K\x02K\x03\x86", shape))
            archive.writestr("a/data/0", numbers)
        with pytest.raises(WeightsError, match="past the end of its numbers"):
            open_torch(tmp_path / "bad.pt")
    write_torch(tmp_path / "packed.pt", {"model": np.zeros(10**6, np.float32)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="storage '0' is missing or of another length"):
        open_torch(tmp_path / "packed.pt")  # torch compresses nothing; a bomb would


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
)  # fmt: skip
def test_what_is_saved_loads_bit_for_bit(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("saved")
    params = random_params(config, seed)
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


def test_parameters_of_another_shape_are_not_saved(tmp_path):
    with pytest.raises(AssertionError, match=r"params do not fit config: wte\.embedding"):
        save_hf(random_params(GPTConfig(1, 1, 4, 3, 5)), GPTConfig(1, 1, 4, 3, 6), tmp_path)
    assert not any(tmp_path.iterdir())
