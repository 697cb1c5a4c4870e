"""What the tests of weights share: the fixtures' tensors, and writers of files no library would write."""

import copyreg
import json
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_weight_files import open_safetensors

FIXTURES = Path(__file__).parent / "fixtures" / "weights"

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


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
