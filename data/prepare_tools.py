"""What the prepare scripts share: fetching a file, reading text, making ids of it, failing in one line."""

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root
from jax_codec import BYTES_VOCAB_SIZE, END_OF_TEXT, GPT2_VOCAB_SIZE, DataError, make_codec
from jax_data import write_dataset

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PIECE = 2**20  # characters encoded at a time, so that a big text does not become one big Python list


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and a description as it was written."""


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message} (--help shows every option)")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script: exit 0 when done, 2 for bad input, 1 where the machine failed, 130 on Ctrl-C; one line each."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character of a folder's name
    try:
        main()
        code, line = 0, ""
    except DataError as error:
        code, line = 2, str(error)
    except OSError as error:
        code, line = 1, f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        code, line = 130, "stopped; run the same command again to go on"
    if line:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)


def val_fraction(text: str) -> float:
    """The argparse type of --val_fraction: a share between 0 and 1."""
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def named_path(text: str) -> Path:
    """The argparse type of a path. An empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file or folder, or . for the current one")
    return Path(text)


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch url to path, going on where an earlier attempt stopped. The file appears only whole and verified."""
    import requests
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # a compressed reply could not be continued
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
            if reply.status_code != 416:  # 416: the part is already as long as the file
                reply.raise_for_status()
                if reply.status_code != 206:  # this server sends the whole file again
                    have = 0
                total = have + int(reply.headers.get("Content-Length", 0))
                bar = tqdm(desc=path.name, total=total or None, initial=have, unit="B", unit_scale=True)
                with open(part, "ab" if have else "wb") as file, bar:
                    for chunk in reply.iter_content(2**16):
                        file.write(chunk)
                        bar.update(len(chunk))
    except requests.RequestException as error:
        raise DataError(
            f"could not download ({type(error).__name__}): fetch {url} on a machine with a network and put it at {path}"
        ) from error
    if hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise DataError(f"what came from {url} is not the expected file (sha256 differs): run this again")
    os.replace(part, path)


def shakespeare_text(folder: Path) -> str:
    """folder/input.txt, whatever the user put there; where there is none, tiny shakespeare is downloaded."""
    path = folder / "input.txt"
    if not path.exists():
        download(TINY_SHAKESPEARE, path, TINY_SHAKESPEARE_SHA256)
    return read_text(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark, with newlines as \\n."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start}):"
            " convert it, or leave it out"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """The beginning for training, the end for validation, cut by characters as nanoGPT does; not in an end of text."""
    cut = int(len(text) * (1 - val_fraction))
    around = text.find(END_OF_TEXT, max(0, cut - len(END_OF_TEXT) + 1), cut + len(END_OF_TEXT) - 1)
    if around >= 0:
        after = around + len(END_OF_TEXT)
        cut = after if after < len(text) else around
    return text[:cut], text[cut:]


def write_text(out_dir: Path, tokenizer: str, train_text: str, val_text: str) -> None:
    """Make a data set of two texts and print its size."""
    itos = None
    if tokenizer == "char":
        itos = sorted(set(train_text) | set(val_text))
        if len(itos) > 2**16:
            raise DataError(
                f"the text has {len(itos):,} distinct characters, more than uint16 holds: use --tokenizer=bytes"
            )
        if not itos:
            raise DataError("the text is empty")
    vocab_size = len(itos) if itos else {"gpt2": GPT2_VOCAB_SIZE, "bytes": BYTES_VOCAB_SIZE}[tokenizer]
    codec = make_codec({"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "itos": itos})

    def encode(text: str) -> np.ndarray:
        if tokenizer == "gpt2":  # BPE must see a document as a whole: another cut could split a token
            pieces = re.split(f"(?={re.escape(END_OF_TEXT)})", text)
        else:
            pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        return np.concatenate([np.empty(0, np.uint16), *(np.array(codec.encode(p), np.uint16) for p in pieces)])

    meta = write_dataset(out_dir, tokenizer, vocab_size, encode(train_text), encode(val_text), itos=itos)
    print(f"characters: {len(train_text) + len(val_text):,}")
    print(f"vocab size: {vocab_size:,}")
    print(f"train has {meta['train_tokens']:,} tokens")
    print(f"val has {meta['val_tokens']:,} tokens")
