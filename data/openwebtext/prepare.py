"""OpenWebText, the open copy of the text GPT-2 was trained on: 8 million documents, 9 billion tokens.

    pip install huggingface_hub pyarrow
    python data/openwebtext/prepare.py                       # downloads about 25 GB of Parquet, writes 18 GB
    python data/openwebtext/prepare.py --source=my_shards    # a folder of .parquet, .jsonl or .txt that is here already

Killed or stopped, the same command goes on: finished shards lie in parts/ and are not done again.

Which documents are for validation is decided for each by a hash of (seed, shard, index), so that neither the
number of processes nor the order matters. nanoGPT's 9,035,582,198 training and 4,434,897 validation tokens
come from another random split; ours are close to them, not equal.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from prepare_tools import (
    GPT2_VOCAB_SIZE,
    DataError,
    OneLineParser,
    make_codec,
    read_text,
    run,
    val_fraction,
    write_dataset,
)

HERE = Path(__file__).resolve().parent
PARTS = HERE / "parts"
REPO = "Skylion007/openwebtext"


# ---- the documents ------------------------------------------------------------------------------------------


def download_shards() -> Path:
    """Fetch the Parquet files of the data set into the hub's cache (it goes on where it stopped)."""
    try:
        import huggingface_hub
        import pyarrow.parquet  # noqa: F401  # better to miss it now than after 25 GB
    except ImportError as error:
        raise DataError(
            f"{error.name} is not installed: `pip install huggingface_hub pyarrow`, or give --source=DIR"
        ) from error
    # the repository's own Parquet files, else the hub's automatic conversion of them
    for revision in ("main", "refs/convert/parquet"):
        try:
            names = huggingface_hub.HfApi().list_repo_files(REPO, repo_type="dataset", revision=revision)
            wanted = [name for name in names if name.endswith(".parquet")]
            if any("partial-" in name for name in wanted):  # the hub converts only the beginning of some large sets
                raise DataError(f"the hub has only a part of {REPO} as Parquet: get it elsewhere and give --source=DIR")
            if wanted:
                return Path(
                    huggingface_hub.snapshot_download(
                        REPO, repo_type="dataset", revision=revision, allow_patterns=wanted
                    )
                )
        except DataError:
            raise
        except Exception as error:  # the hub's client has many, and which depends on its version
            raise DataError(
                f"could not download {REPO} ({type(error).__name__}): try again with a network, or give --source=DIR"
            ) from error
    raise DataError(f"the hub has no Parquet files of {REPO} any more: get it elsewhere and give --source=DIR")


def list_shards(source: Path) -> list[Path]:
    """Every shard under source, in one fixed order."""
    files = [path for path in source.rglob("*") if path.suffix in (".parquet", ".jsonl", ".txt") and path.is_file()]
    if not files:
        raise DataError(f"--source={source} holds no .parquet, .jsonl or .txt file")
    return sorted(files, key=lambda path: path.relative_to(source).as_posix())


def read_documents(shard: Path) -> Iterator[str | None]:
    """The documents of a shard: rows of a 'text' column, lines of JSON with "text", or one whole .txt file."""
    if shard.suffix == ".txt":
        yield read_text(shard)
    elif shard.suffix == ".jsonl":
        with open(shard, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise DataError(f'{shard}, line {number}: not a JSON object with a "text"')
                yield text
    else:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError("pyarrow is not installed: `pip install pyarrow`") from error
        try:
            with pyarrow.parquet.ParquetFile(shard) as file:
                for rows in file.iter_batches(batch_size=1000, columns=["text"]):
                    yield from (text.as_py() for text in rows.column("text").cast(pyarrow.string()))
        except (pyarrow.ArrowException, KeyError) as error:
            raise DataError(f"{shard} is no Parquet file with a column of texts: fetch it again") from error


def is_for_validation(seed: int, shard: str, index: int, share: float) -> bool:
    """Whether document `index` of a shard goes to validation: a coin that depends on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{shard}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


# ---- one shard, in a process of its own ---------------------------------------------------------------------


def leave_with_parent() -> None:
    """End this worker as soon as the main process is gone, however it went."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process answers it
    threading.Thread(target=wait, daemon=True).start()


def tokenize_shard(shard: Path, name: str, part: Path, seed: int, share: float) -> None:
    """Write the ids of a shard to part.val and part.train; the latter, renamed last, says that it is done."""
    import tiktoken

    bpe = tiktoken.get_encoding("gpt2")
    ids = {"train": array("H"), "val": array("H")}
    for index, text in enumerate(read_documents(shard)):
        if text is None:  # an empty cell of a Parquet file
            continue
        split = "val" if is_for_validation(seed, name, index, share) else "train"
        ids[split].extend(bpe.encode_ordinary(text))  # ordinary: "<|endoftext|>" in a web page is only text
        ids[split].append(bpe.eot_token)
    for split in ("val", "train"):
        tmp = part.with_suffix(f".{split}.{os.getpid()}.tmp")
        np.array(ids[split], "<u2").tofile(tmp)
        os.replace(tmp, part.with_suffix(f".{split}"))


# ---- all of them --------------------------------------------------------------------------------------------


def open_parts(settings: dict) -> None:
    """Keep what earlier runs with these settings finished of these shards; throw away all else."""
    PARTS.mkdir(exist_ok=True)
    file = PARTS / "settings.json"
    before: Any = None
    with contextlib.suppress(ValueError, FileNotFoundError):  # cut off as the power went: nothing is known then
        before = json.loads(file.read_text())
    before = before if isinstance(before, dict) else {}
    same = {**before, "shards": None} == {**settings, "shards": None}
    pairs = zip(before.get("shards", ()), settings["shards"], strict=False)
    kept = {f"{i:05d}" for i, (shard, now) in enumerate(pairs) if same and tuple(shard) == now}
    # .train first: it is what says that a part is done.
    for part in sorted(PARTS.iterdir(), key=lambda part: part.suffix != ".train"):
        if part != file and part.name.partition(".")[0] not in kept:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(settings))
    os.replace(tmp, file)


def tokenize(jobs: list[tuple], num_proc: int) -> None:
    from tqdm import tqdm

    # spawn: a fork may copy a lock that some thread of the hub's client holds
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=leave_with_parent) as pool:
        try:
            running = [pool.submit(tokenize_shard, *job) for job in jobs]
            for done in tqdm(as_completed(running), total=len(running), desc="shards", smoothing=0):
                done.result()
        except BrokenProcessPool as error:
            raise OSError("a worker died, most likely for want of memory: try a smaller --num_proc") from error
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():  # not to wait for the shards under way
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = OneLineParser(description="Download and tokenize OpenWebText.")
    parser.add_argument("--source", type=Path, help="a folder of .parquet, .jsonl or .txt shards; default: download")
    parser.add_argument("--num_proc", type=int, default=8, help="processes that tokenize")
    parser.add_argument(
        "--val_fraction", type=val_fraction, default=0.0005, help="the share of documents to validate on"
    )
    parser.add_argument("--seed", type=int, default=2357, help="which documents those are")
    options = parser.parse_args()
    if options.num_proc < 1:
        raise DataError(f"--num_proc={options.num_proc} is not at least 1")
    make_codec(None)  # one clear line now, rather than one from each worker
    if options.source and not options.source.is_dir():
        raise DataError(f"--source={options.source} is not a folder")
    source = (options.source or download_shards()).resolve()
    shards = list_shards(source)
    names = [shard.relative_to(source).as_posix() for shard in shards]
    sizes = [shard.stat().st_size for shard in shards]
    open_parts(
        {"seed": options.seed, "val_fraction": options.val_fraction, "shards": list(zip(names, sizes, strict=True))}
    )

    parts = [PARTS / f"{i:05d}" for i in range(len(shards))]
    jobs = [
        (shard, name, part, options.seed, options.val_fraction)
        for shard, name, part in zip(shards, names, parts, strict=True)
        if not part.with_suffix(".train").exists()
    ]
    print(f"{len(shards) - len(jobs)} of {len(shards)} shards are done already")
    tokenize(jobs, options.num_proc)

    def ids(split: str) -> Iterator[np.ndarray]:
        return (np.fromfile(part.with_suffix(f".{split}"), "<u2") for part in parts)

    meta = write_dataset(HERE, "gpt2", GPT2_VOCAB_SIZE, ids("train"), ids("val"))
    shutil.rmtree(PARTS)
    print(f"train has {meta['train_tokens']:,} tokens")
    print(f"val has {meta['val_tokens']:,} tokens")


if __name__ == "__main__":
    run(main)
