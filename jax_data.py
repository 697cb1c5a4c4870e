"""Token files and batches. Only numpy: preparing data never waits for JAX.

A data set is a folder with train.bin and val.bin (nanoGPT's headerless token ids, little-endian) and a
meta.json that says how the ids were made. A batch is a pure function of (data, split, step, seed): there
is no loader state to save, so a resumed run sees exactly the batches it would have seen.
"""

import contextlib
import json
import os
import pickle
import queue
import shlex
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jax_codec import TOKENIZERS, DataError, check_meta, load_meta

DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
STREAMS = {"train": 0, "val": 1, "train_eval": 2}  # one family of random numbers each, so none shifts another
EPOCH_STREAM = 16  # added to the stream of a split where its blocks are shuffled instead of drawn
FULL_SCAN_TOKENS = 2**28  # up to here every token is checked at start; a larger file is checked in windows
SCAN_WINDOW = 2**22

Batch = TypeVar("Batch")


# ---- finding and checking a data set ------------------------------------------------------------------------


def find_data_dir(dataset: str | Path) -> Path:
    """The folder of a data set: data/<dataset> here or beside this file, or any folder given by its path."""
    roots = [Path("data"), Path(__file__).resolve().parent / "data"]
    folders = [root / dataset for root in roots] + [Path(dataset)]
    for folder in folders:
        if (folder / "train.bin").is_file():
            return folder
    for folder in folders:
        if (folder / "prepare.py").is_file() or (folder / "val.bin").is_file():
            raise DataError(f"{folder / 'train.bin'} is missing: run `{_command_to_prepare(folder)}`")
    there = sorted({path.parent.name for root in roots for path in root.glob("*/train.bin")})
    raise DataError(
        f"no data set {str(dataset)!r}: run `{_command_to_prepare(roots[0] / dataset)}`"
        f" (prepared here: {', '.join(there) or 'none'})"
    )


def _command_to_prepare(folder: Path) -> str:
    if (folder / "prepare.py").is_file():
        return f"python {shlex.quote(str(folder / 'prepare.py'))}"
    try:
        meta = load_meta(folder)
    except DataError:
        meta = None
    tokenizer = meta["tokenizer"] if meta and meta["tokenizer"] in TOKENIZERS else "gpt2"
    script = Path("data/prepare_text.py")
    if not script.is_file():
        script = Path(__file__).resolve().parent / script
    return f"python {shlex.quote(str(script))} --input=FILE --out={shlex.quote(str(folder))} --tokenizer={tokenizer}"


def check_dataset(data_dir: str | Path, block_size: int, vocab_size: int) -> None:
    """Raise DataError unless both token files can feed a model of this block_size and vocab_size."""
    data_dir = Path(data_dir)
    meta = load_meta(data_dir)
    again = f"run `{_command_to_prepare(data_dir)}` again"
    for split in ("train", "val"):
        path = data_dir / f"{split}.bin"
        ids = _open_tokens(path, DTYPES[meta["dtype"] if meta else "uint16"])
        if len(ids) <= block_size:
            raise DataError(f"{path} holds {len(ids):,} tokens, too few for block_size {block_size}: make that smaller")
        if (
            ids.itemsize == 2
            and f"{split}_tokens" not in (meta or {})
            and not ids[1 : 2**16 : 2].any()
            and ids[: 2**16].any()
        ):
            raise DataError(f"{path}: every second uint16 is 0: these are uint32 ids; {again}, or say so in meta.json")
        expected = len(ids) if meta is None else meta.get(f"{split}_tokens", len(ids))
        if len(ids) != expected:
            raise DataError(f"{path} holds {len(ids):,} tokens, but meta.json says {expected:,}: {again}")
        for start in _scan_starts(len(ids)):
            window = ids[start : start + SCAN_WINDOW]
            if window.max() >= vocab_size:
                offset = start + int(np.argmax(window >= vocab_size))
                raise DataError(
                    f"{path}: token id {ids[offset]} at offset {offset} is not below the vocab_size of {vocab_size}:"
                    f" {again}"
                )


def _scan_starts(n_tokens: int) -> Iterable[int]:
    if n_tokens <= FULL_SCAN_TOKENS:
        return range(0, n_tokens, SCAN_WINDOW)
    windows = FULL_SCAN_TOKENS // SCAN_WINDOW  # the first, the last, and evenly spaced ones between
    return [int(start) for start in np.linspace(0, n_tokens - SCAN_WINDOW, windows)]


# ---- writing a data set -------------------------------------------------------------------------------------

Tokens = Sequence[int] | np.ndarray | Iterator[np.ndarray]


def write_dataset(
    out_dir: str | Path,
    tokenizer: str,
    vocab_size: int,
    train_ids: Tokens,
    val_ids: Tokens,
    *,
    itos: list[str] | None = None,
    dtype: str = "uint16",
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json (for char meta.pkl too) and return the meta data.

    Ids are one sequence, or an iterator of arrays where they do not fit in memory. Each file appears whole
    or not at all, meta.json last.
    """
    out_dir = Path(out_dir)
    meta: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": dtype}
    check_meta({**meta, "itos": itos}, out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{out_dir} is a file, not a folder: choose another name") from error
    for split, ids in (("train", train_ids), ("val", val_ids)):
        meta[f"{split}_tokens"] = _write_tokens(out_dir / f"{split}.bin.tmp", ids, DTYPES[dtype], vocab_size)
    for split in ("train", "val"):
        os.replace(out_dir / f"{split}.bin.tmp", out_dir / f"{split}.bin")
    if itos is None:
        (out_dir / "meta.pkl").unlink(missing_ok=True)  # it would describe what was here before
    else:
        meta["itos"] = itos
        stoi = {char: i for i, char in enumerate(itos)}
        nanogpt = {"vocab_size": vocab_size, "itos": dict(enumerate(itos)), "stoi": stoi}
        _replace_file(out_dir / "meta.pkl", pickle.dumps(nanogpt, protocol=4))
    _replace_file(out_dir / "meta.json", (json.dumps(meta) + "\n").encode())
    return meta


@contextlib.contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """No file is left of what could not be written to its end: a full disk needs the room."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write_tokens(path: Path, ids: Tokens, dtype: np.dtype, vocab_size: int) -> int:
    count = 0
    with _whole_or_gone(path), open(path, "wb") as file:
        for piece in ids if isinstance(ids, Iterator) else [ids]:
            array = np.asarray(piece)
            if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
                raise DataError(f"{path}: ids from {array.min()} to {array.max()}, but vocab_size is {vocab_size}")
            file.write(array.astype(dtype).tobytes())
            count += len(array)
    if count == 0:
        raise DataError(f"nothing to write to {path.with_suffix('')}: give more text, or another val_fraction")
    return count


def _replace_file(path: Path, content: bytes) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_bytes(content)
    os.replace(tmp, path)


# ---- batches ------------------------------------------------------------------------------------------------


def outline(path: Path) -> str:
    """What tells two token files apart without reading them whole: size, and a checksum of sixteen pieces of each."""
    data = np.memmap(path, np.uint8, "r")
    pieces = [data[start : start + 2**16] for start in np.linspace(0, max(0, len(data) - 2**16), 16, dtype=np.int64)]
    return f"{len(data):,} bytes, crc {zlib.crc32(b''.join(map(bytes, pieces))):08x}"


def outlines(data_dir: Path) -> dict[str, str]:
    """What tells two data sets apart: `outline` of each file, by its name."""
    return {name: outline(data_dir / name) for name in ("train.bin", "val.bin")}


def unchanged(path: Path, content: str) -> Callable[[], None]:
    """A function that raises DataError once the `outline` of the file is not `content` any more. Cheap to call."""
    known = _fingerprint(path)

    def check() -> None:
        nonlocal known
        if (now := _fingerprint(path)) == known:
            return
        if not (now and path.stat().st_size) or outline(path) != content:
            raise DataError(
                f"{path} was written anew while the run reads it; with the tokens it began with, resume goes on"
            )
        known = now  # touched, or copied over itself

    return check


def get_batch(
    data_dir: str | Path,
    split: str,
    step: int,
    *,
    seed: int,
    batch_size: int,
    block_size: int,
    sampling: str = "random",
    vocab_size: int | None = None,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one step: (x_BT, y_BT), int32, where y is x moved on by one token; with `rows`, those of its rows.

    A pure function of its arguments and the files. split is 'train', 'val' or 'train_eval', which reads
    train.bin in a stream of its own. sampling is 'random' (crops anywhere; row i does not depend on
    batch_size), 'epoch' (blocks that do not overlap, each once an epoch, in an order of its own) or 'spread'
    (row i is a crop anywhere in the i-th of batch_size equal stretches: for evaluations, which it makes less noisy).
    With vocab_size all rows' ids are checked, since check_dataset looks at parts of a huge file. Raises DataError.
    """
    starts_B = batch_starts(
        data_dir, split, step, seed=seed, batch_size=batch_size, block_size=block_size, sampling=sampling
    )
    windows_NW = _windows_of(data_dir, split, block_size)
    rows_BW = windows_NW[starts_B if rows is None else starts_B[rows]]
    if vocab_size is not None:
        largest = rows_BW.max()
        if rows is not None and len(rows) < batch_size:  # so that all the processes find a bad id at the same step
            largest = max(windows_NW[start].max() for start in starts_B)
        if largest >= vocab_size:
            raise DataError(f"{data_dir}: a token id in the {split} data is {largest}, not below {vocab_size}")
    return rows_BW[:, :-1].astype(np.int32), rows_BW[:, 1:].astype(np.int32)


def batch_starts(
    data_dir: str | Path,
    split: str,
    step: int,
    *,
    seed: int,
    batch_size: int,
    block_size: int,
    sampling: str = "random",
) -> np.ndarray:
    """Where the rows of `get_batch`, given the same arguments, begin in the token file: (B,) int64, in tokens."""
    if split not in STREAMS or sampling not in ("random", "epoch", "spread"):
        raise ValueError(f"split {split!r} or sampling {sampling!r} is unknown")
    if not (0 <= seed < 2**32 and step >= 0 and batch_size >= 1 and block_size >= 1):
        raise ValueError(
            f"seed={seed} (0 to 2**32 - 1), {step=} (0 or more), {batch_size=} or {block_size=} (1 or more)"
        )
    windows = len(_windows_of(data_dir, split, block_size))
    if sampling in ("random", "spread"):
        # raw bits, since numpy keeps them the same for ever, which it does not promise of its distributions
        raw_B = np.random.Philox(key=[seed ^ (STREAMS[split] << 32), step]).random_raw(batch_size)
        where_B = (raw_B >> 11) * 2.0**-53
        if sampling == "spread":
            where_B = (np.arange(batch_size) + where_B) / batch_size
        starts_B = np.minimum(where_B * windows, windows - 1).astype(np.int64)
    else:
        blocks = (windows + block_size - 1) // block_size
        rows_B = np.arange(step * batch_size, (step + 1) * batch_size)
        starts_B = np.empty(batch_size, np.int64)
        for epoch in range(rows_B[0] // blocks, rows_B[-1] // blocks + 1):  # a batch may lie across several
            here_B = rows_B // blocks == epoch
            order = _epoch_order(seed ^ ((STREAMS[split] + EPOCH_STREAM) << 32), epoch, blocks)
            starts_B[here_B] = order[rows_B[here_B] % blocks] * block_size
    return starts_B


@lru_cache(maxsize=4)  # two epochs each for training and for an evaluation; 8 bytes a block
def _epoch_order(stream: int, epoch: int, blocks: int) -> np.ndarray:
    return np.argsort(np.random.Philox(key=[stream, epoch]).random_raw(blocks), kind="stable")


def _windows_of(data_dir: str | Path, split: str, block_size: int) -> np.ndarray:
    """Every run of block_size + 1 tokens of a split, as rows of a view (N, block_size + 1) of its memory map."""
    path, width = Path(data_dir) / ("val.bin" if split == "val" else "train.bin"), block_size + 1
    dtype = _read_dtype(path.parent, _fingerprint(path.parent / "meta.json"))
    return _map_windows(path, dtype, width, _fingerprint(path))


@lru_cache(maxsize=8)  # opened once; a file prepared again has another fingerprint
def _map_windows(path: Path, dtype: np.dtype, width: int, fingerprint: tuple[int, ...]) -> np.ndarray:
    ids = _open_tokens(path, dtype)
    if len(ids) < width:
        raise DataError(f"{path} holds {len(ids):,} tokens, too few for block_size {width - 1}: use a smaller one")
    return np.lib.stride_tricks.sliding_window_view(ids, width)


def _open_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    again = f"run `{_command_to_prepare(path.parent)}`"
    if not path.is_file():
        raise DataError(f"{path} is missing: {again}")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(
            f"{path} has {size:,} bytes, which is not a number of {dtype.name} tokens: it is cut short,"
            f" or of another dtype (meta.json may say uint32): {again} again"
        )
    return np.asarray(np.memmap(path, dtype, mode="r"))


@lru_cache(maxsize=8)
def _read_dtype(data_dir: Path, fingerprint: tuple[int, ...]) -> np.dtype:
    meta = load_meta(data_dir)
    return DTYPES[meta["dtype"] if meta else "uint16"]


def _fingerprint(path: Path) -> tuple[int, ...]:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def prefetch(
    make: Callable[[int], Batch], start: int, end: int | None = None, *, ahead: int = 2
) -> Generator[Batch, None, None]:
    """Yield make(start), ..., make(end - 1), made in a thread, at most `ahead` of them in advance; None: without end.

    An exception in make is raised here. Closing the generator, or dropping it, ends the thread.
    """
    steps = range(start, sys.maxsize if end is None else end)
    ready: queue.SimpleQueue[tuple[Batch | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(ahead)
    stop = threading.Event()

    def work() -> None:
        for step in steps:
            room.acquire()
            if stop.is_set():
                return
            try:
                ready.put((make(step), None))
            except BaseException as error:  # noqa: BLE001  # raised again where the batch is asked for
                ready.put((None, error))
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            batch, error = ready.get()
            if error is not None:
                raise error
            room.release()
            yield batch  # type: ignore[misc]  # it is a Batch where there is no error
    finally:
        stop.set()
        room.release()
        thread.join(timeout=5)  # a daemon, so that a stuck disk cannot keep the program from ending
