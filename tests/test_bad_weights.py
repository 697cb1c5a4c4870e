"""Every way a file of weights can be wrong, told in one line; pickles that would run code run nothing.

python -m pytest tests/test_bad_weights.py
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_weight_files import Tensor, WeightsError, open_npz, open_safetensors, open_torch
from jax_weights import load_weights
from tests.weight_files import FIXTURES, edit_json, tensors_of, write_safetensors, write_torch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that loads, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "single", tmp_path / "model"))


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


def test_head_of_another_shape_is_refused_and_one_that_is_missing_too(model):
    tensors = tensors_of("single")
    head = tensors["transformer.wte.weight"][:-1]
    write_safetensors(model / "model.safetensors", tensors | {"lm_head.weight": head})
    with pytest.raises(WeightsError, match=r"wrong shape: lm_head\.weight is \(22, 8\), expected \(23, 8\)"):
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
    ({"num_attention_heads": 4}, "num_attention_heads is 4, and n_head 2"),
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


def saves_as_ckpt(content: dict[str, Any]):
    return lambda folder: write_torch(folder / "ckpt.pt", content)


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
    "checkpoint of no model": ("bin", saves_as_ckpt({"a": 1}), "not a checkpoint of nanoGPT"),
    "checkpoint of sizes alone": ("bin", saves_as_ckpt({"model_args": {}}), "not a checkpoint of nanoGPT"),
    "checkpoint of numbers": ("bin", saves_as_ckpt({"model_args": {}, "model": {1: 2}}), "not a checkpoint of nanoGPT"),
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


@pytest.mark.parametrize("name", ["bin/pytorch_model.bin", "logits.npz", "logits.npz, compressed"])
def test_any_changed_byte_of_a_zip_entrys_header_is_told_when_the_entry_is_read(name, tmp_path):
    name, _, compressed = name.partition(", ")
    open_file, path = open_npz if name.endswith("npz") else open_torch, tmp_path / Path(name).name
    shutil.copy(FIXTURES / name, path)
    if compressed:
        with np.load(FIXTURES / name) as arrays:
            np.savez_compressed(path, **arrays)
    whole, entry = path.read_bytes(), b"data/0" if name.endswith("bin") else b"gpt2.npy"
    # Before its name the entry's own header has 30 bytes, and the list of entries at the end of the file 46.
    headers = {whole.index(entry) - n for n in range(-1, 30)} | {whole.rindex(entry) - n for n in range(-1, 46)}
    told = set()
    for at in headers:
        for changed in (whole[at] ^ bits for bits in (1, 8, 32, 255)):  # three flags of a zip file; all
            path.write_bytes(whole[:at] + bytes([changed]) + whole[at + 1 :])
            try:
                for tensor in open_file(path).values():
                    tensor.read()
            except WeightsError as error:
                told.add(str(error)[len(str(path)) :])
    assert len(told) > 3 and not any("\n" in line for line in told)


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
