"""Files of tensors: safetensors, torch's, numpy's .npz. Each opens to a dict of tensors that are not read yet.

Names, shapes and dtypes are known once a file is open; the numbers are read one tensor at a time, so that a model never
lies in memory twice. Nothing a file says is executed: torch's pickles are read by an unpickler that can build plain
data and tensors, and neither torch nor jax is imported.
"""

import contextlib
import functools
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # numpy learns of bfloat16 from it
import numpy as np
import safetensors


class WeightsError(ValueError):
    """Weights that cannot be used. One line: what is wrong, in which file, and what to do."""


class Tensor(NamedTuple):
    """A tensor of a file. A tuple, so that no pickle can change one after it was checked."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name
    read: Callable[[], np.ndarray]  # raises WeightsError


FLOATS = {"float16", "bfloat16", "float32", "float64"}
Tensors = dict[str, Tensor]
# What zipfile and numpy raise for a byte that is not what it was: flags and versions that mean something else, a name
# that is no UTF-8, an entry that is elsewhere, numbers that cannot be inflated.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, EOFError, KeyError, RuntimeError)


@contextlib.contextmanager
def _damage_in(path: Path, *damage: type[Exception]) -> Iterator[None]:
    try:
        yield
    except WeightsError:
        raise
    except damage as error:
        words = " ".join(str(error).split())[:200] or "the data ends too early"
        raise WeightsError(
            f"{path} cannot be read ({words}): it is damaged, incomplete or no file of weights; get it again"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# safetensors

SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def open_safetensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file. Raises WeightsError."""
    with (
        _damage_in(path, safetensors.SafetensorError, OSError),
        safetensors.safe_open(path, framework="numpy") as file,
    ):
        tensors = {}
        for name in file.keys():  # noqa: SIM118  # it is no dict
            about = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(about.get_dtype(), about.get_dtype())
            tensors[name] = Tensor(tuple(about.get_shape()), dtype, functools.partial(_read_safetensor, path, name))
        return tensors


def _read_safetensor(path: Path, name: str) -> np.ndarray:
    # Opened anew for each tensor: the pages of the file that were read count as this process's until it is closed.
    with (
        _damage_in(path, safetensors.SafetensorError, OSError),
        safetensors.safe_open(path, framework="numpy") as file,
    ):
        return file.get_tensor(name)


# ----------------------------------------------------------------------------------------------------------------------
# numpy


def open_npz(path: Path) -> Tensors:
    """The arrays of an .npz file, compressed or not. Raises WeightsError."""
    tensors = {}
    with _damage_in(path, *ZIP_DAMAGE), zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            name = entry.removesuffix(".npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read_header is None:
                    raise ValueError(f"{entry} has format {version}")
                shape, _, dtype = read_header(file)
            tensors[name] = Tensor(shape, dtype.name, functools.partial(_read_npz, path, name))
    return tensors


def _read_npz(path: Path, name: str) -> np.ndarray:
    with (
        _damage_in(path, *ZIP_DAMAGE),
        np.load(path, allow_pickle=False) as arrays,
    ):
        return arrays[name]


# ----------------------------------------------------------------------------------------------------------------------
# torch

TORCH_STORAGES: dict[str, np.dtype] = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    # no weights, but masks, counters and the like lie beside them
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
}
LARGEST_PICKLE = 2**26  # of names and numbers, not of weights: GPT-2's has 50 KB
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how a file of torch before 1.6 begins


class Storage(NamedTuple):
    """A run of numbers in the file, of which tensors are views."""

    key: str
    dtype: np.dtype
    numel: int
    raw: Callable[[str], bytes]  # from the key


class _TorchUnpickler(pickle._Unpickler):
    """Plain data, OrderedDict and tensors. Every other name a pickle asks for is refused, not imported.

    Python's own unpickler rather than the C one, since a hostile file can make that one allocate any amount of memory.
    """

    def __init__(self, file: Any, storage_of: Callable[[Any], Storage]):
        super().__init__(file, encoding="utf-8")
        self.storage_of = storage_of

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # New functions each time: a pickle may set attributes of what it is given.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in TORCH_STORAGES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of weights needs")

    def persistent_load(self, pid: Any) -> Storage:
        return self.storage_of(pid)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    whole = [offset, *shape, *strides]
    if not (isinstance(storage, Storage) and all(type(n) is int and n >= 0 for n in whole)):
        raise pickle.UnpicklingError("a tensor is not made of a storage, an offset, a shape and strides")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise pickle.UnpicklingError(f"a tensor of shape {short_repr(shape)} goes past the end of its numbers")
    strides = tuple(stride * storage.dtype.itemsize for stride in strides)
    read = functools.partial(_read_torch_tensor, storage, offset, tuple(shape), strides)
    return Tensor(tuple(shape), storage.dtype.name, read)


def _read_torch_tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    raw = storage.raw(storage.key)
    if len(raw) != storage.numel * storage.dtype.itemsize:  # as_strided would read past the end
        raise WeightsError(f"a storage has {len(raw)} bytes now, and had another number when the file was opened")
    numbers = np.frombuffer(raw, storage.dtype)
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, strides, writeable=False)


def _storage(pid: Any, raw: Callable[[str], bytes]) -> Storage:
    kind, storage_type, key, _, numel = pid[:5]
    if kind != "storage" or storage_type not in TORCH_STORAGES or not isinstance(key, str):
        raise pickle.UnpicklingError(f"{short_repr(pid)} is not a storage")
    if type(numel) is not int or numel < 0:
        raise pickle.UnpicklingError(f"a storage of {short_repr(numel)} numbers")
    return Storage(key, TORCH_STORAGES[storage_type], numel, raw)


def open_torch(path: Path) -> Any:
    """What torch.save wrote, with a Tensor for each tensor. Raises WeightsError."""
    with _damage_in(path, Exception):  # a damaged pickle raises nearly anything
        if zipfile.is_zipfile(path):
            return _open_torch_zip(path)
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise ValueError("its end is missing")
            file.seek(0)
            return _open_torch_legacy(path, file)


def _open_torch_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
        if folder is None:
            raise ValueError("a zip file, but not one of torch: it has no data.pkl")
        if entries[f"{folder}data.pkl"].file_size > LARGEST_PICKLE:
            raise ValueError("its data.pkl is too large to be that of weights")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it is of a big-endian machine")

        def storage_of(pid: Any) -> Storage:
            storage = _storage(pid, functools.partial(_read_zip_entry, path, f"{folder}data/"))
            entry = entries.get(f"{folder}data/{storage.key}")
            size = storage.numel * storage.dtype.itemsize
            if entry is None or entry.file_size != size or entry.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"storage {short_repr(storage.key)} is missing or of another length")
            return storage

        with archive.open(f"{folder}data.pkl") as file:
            return _TorchUnpickler(file, storage_of).load()


def _read_zip_entry(path: Path, folder: str, key: str) -> bytes:
    with _damage_in(path, *ZIP_DAMAGE), zipfile.ZipFile(path) as archive:
        return archive.read(folder + key)  # checks its CRC, too


def _open_torch_legacy(path: Path, file: BinaryIO) -> Any:
    """torch before 1.6: four pickles (magic number, protocol, machine, object), the keys, then each key's numbers."""

    def no_storage(pid: Any) -> Storage:
        raise pickle.UnpicklingError("a storage where none belongs")

    places: dict[str, tuple[int, int]] = {}  # key -> where its numbers are: start, bytes
    storages: dict[str, Storage] = {}

    def raw(key: str) -> bytes:
        start, size = places[key]
        with _damage_in(path, OSError), path.open("rb") as again:
            again.seek(start)
            return again.read(size)

    def storage_of(pid: Any) -> Storage:
        storage = _storage(pid, raw)
        return storages.setdefault(storage.key, storage)

    try:
        magic = _TorchUnpickler(file, no_storage).load()
    except Exception as error:
        raise ValueError("neither a zip file nor an older file of torch") from error
    if magic != LEGACY_MAGIC:
        raise ValueError("a pickle, but not one of torch")
    _TorchUnpickler(file, no_storage).load()
    machine = _TorchUnpickler(file, no_storage).load()
    if not machine["little_endian"]:
        raise ValueError("it is of a big-endian machine")
    saved = _TorchUnpickler(file, storage_of).load()
    end = path.stat().st_size
    for key in _TorchUnpickler(file, no_storage).load():
        numel = int.from_bytes(file.read(8), "little")
        places[key] = file.tell(), numel * storages[key].dtype.itemsize
        if numel != storages[key].numel or file.seek(places[key][1], 1) > end:
            raise ValueError(f"storage {short_repr(key)} is cut short or of another length")
    if missing := storages.keys() - places.keys():
        raise ValueError(f"storage {short_repr(sorted(missing))} is missing")
    return saved
