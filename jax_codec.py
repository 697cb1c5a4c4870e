"""What a data set's token ids mean: its meta.json, and the codec that it names. Neither numpy nor JAX."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

TOKENIZERS = ("char", "gpt2", "bytes")
END_OF_TEXT = "<|endoftext|>"  # between GPT-2's documents
GPT2_VOCAB_SIZE = 50257
BYTES_VOCAB_SIZE = 256
GPT2_META = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB_SIZE, "dtype": "uint16"}  # where there is no meta data


class DataError(ValueError):
    """Bad or missing data. One line: what is wrong, in which file, and what to do."""


# ---- meta data ----------------------------------------------------------------------------------------------


def load_meta(data_dir: str | Path) -> dict[str, Any] | None:
    """What the ids mean, in meta.json's form: meta.json itself, else nanoGPT's meta.pkl, else None.

    Raises DataError if the file is damaged, or is not such a file.
    """
    path = Path(data_dir) / "meta.json"
    if path.exists():
        try:
            meta = json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            raise DataError(f"{path} cannot be read ({_one_line(error)}): prepare the data again") from error
        return check_meta(meta, path)
    path = Path(data_dir) / "meta.pkl"
    if path.exists():
        return check_meta(_from_nanogpt(_read_plain_pickle(path), path), path)
    return None


def load_meta_beside(weights: Path) -> dict[str, Any] | None:
    """What the ids of weights mean, a file or a folder of them, as export_jax.py leaves it there: `load_meta`."""
    return load_meta(weights if weights.is_dir() else weights.parent)


def model_vocab_size(meta: dict[str, Any]) -> int:
    """The vocabulary of a model that learns such data from scratch; GPT-2's is rounded up to a multiple of 64."""
    return 50304 if meta["tokenizer"] == "gpt2" else meta["vocab_size"]


def check_meta(meta: Any, where: str | Path) -> dict[str, Any]:
    """Return meta if it is a well-formed meta.json, whoever wrote it; else raise DataError naming `where`."""

    def require(ok: bool, problem: str) -> None:
        if not ok:
            raise DataError(f"{where}: {problem}: prepare the data again")

    require(isinstance(meta, dict), "not a JSON object")
    for key in ("tokenizer", "vocab_size", "dtype"):
        require(key in meta, f"no {key!r}")
    tokenizer, vocab_size, dtype, itos = meta["tokenizer"], meta["vocab_size"], meta["dtype"], meta.get("itos")
    require(isinstance(tokenizer, str), f"tokenizer is {short_repr(tokenizer)}, not a name")
    require(type(vocab_size) is int and 1 <= vocab_size <= 2**31, f"vocab_size is {short_repr(vocab_size)}")
    require(dtype in ("uint16", "uint32"), f"dtype is {short_repr(dtype)}, not uint16 or uint32")
    require(dtype == "uint32" or vocab_size <= 2**16, f"vocab_size {vocab_size} does not fit uint16")
    for key in ("train_tokens", "val_tokens"):
        count = meta.get(key, 0)
        require(type(count) is int and count >= 0, f"{key} is {short_repr(count)}")
    if tokenizer == "char":
        require(isinstance(itos, list), "no list 'itos' of the characters")
        require(all(isinstance(char, str) for char in itos), "itos holds something that is not text")
        require(len(itos) == vocab_size, f"itos has {len(itos)} characters, vocab_size is {vocab_size}")
        require(len(set(itos)) == vocab_size, "itos names a character twice")
        require(not any("\ud800" <= c <= "\udfff" for c in "".join(itos)), "itos holds half a character (a surrogate)")
    return meta


class _PlainUnpickler(pickle._Unpickler):
    """Builds dicts, lists, text and numbers only. Python's own unpickler rather than the C one, since a
    hostile file can make that one allocate any amount of memory."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}, and plain data names nothing")


def _read_plain_pickle(path: Path) -> Any:
    try:
        return _PlainUnpickler(BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is refused ({_one_line(error)}): prepare the data again") from error


def _from_nanogpt(meta: Any, path: Path) -> dict[str, Any]:
    """nanoGPT's {'vocab_size', 'itos', 'stoi'} in meta.json's form.

    nanoGPT's trainer reads the first alone, so that is enough to train; nobody knows then what the ids mean.
    """
    vocab_size, itos = (meta.get(key) if isinstance(meta, dict) else None for key in ("vocab_size", "itos"))
    if type(vocab_size) is not int:
        raise DataError(f"{path} is not nanoGPT's dict of vocab_size, itos and stoi: prepare the data again")
    if itos is None:
        return {"tokenizer": "unknown", "vocab_size": vocab_size, "dtype": "uint16"}
    itos = dict(enumerate(itos)) if isinstance(itos, list) else itos
    if not isinstance(itos, dict) or len(itos) != vocab_size or any(i not in itos for i in range(vocab_size)):
        raise DataError(f"{path}: itos does not name the ids 0 to {vocab_size - 1}: prepare the data again")
    characters = [itos[i] for i in range(vocab_size)]
    return {"tokenizer": "char", "vocab_size": vocab_size, "dtype": "uint16", "itos": characters}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---- text codecs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """Text to ids and back. decode takes ids below vocab_size and raises DataError on any other."""

    tokenizer: str
    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], str]


def make_codec(meta: dict[str, Any] | None) -> Codec:
    """The codec of a data set's meta data; without any it is GPT-2's, as in nanoGPT.

    Raises DataError for one that is not known, or whose files cannot be had.
    """
    tokenizer = "gpt2" if meta is None else check_meta(meta, "the codec")["tokenizer"]
    if tokenizer == "char":
        assert meta is not None
        return _char_codec(meta["itos"])
    if tokenizer == "gpt2":
        return _gpt2_codec()
    if tokenizer == "bytes":
        return Codec(
            "bytes",
            BYTES_VOCAB_SIZE,
            lambda text: list(text.encode("utf-8", errors="surrogatepass")),
            lambda ids: bytes(_check_ids(ids, BYTES_VOCAB_SIZE)).decode("utf-8", errors="replace"),
        )
    raise DataError(
        f"no codec for tokenizer {short_repr(tokenizer)}: {', '.join(TOKENIZERS)} are known (a meta.pkl without itos "
        f"does not say what its ids mean)"
    )


def _char_codec(itos: list[str]) -> Codec:
    stoi = {char: i for i, char in enumerate(itos)}

    def encode(text: str) -> list[int]:
        try:
            return [stoi[char] for char in text]
        except KeyError:
            unknown = ", ".join(repr(char) for char in sorted(set(text) - stoi.keys()))
            raise DataError(f"characters that are not in the vocabulary of {len(itos)}: {unknown}") from None

    return Codec("char", len(itos), encode, lambda ids: "".join(itos[i] for i in _check_ids(ids, len(itos))))


def _gpt2_codec() -> Codec:
    try:
        import tiktoken

        bpe = tiktoken.get_encoding("gpt2")
    except ImportError as error:
        raise DataError("the gpt2 tokenizer needs tiktoken: `pip install tiktoken`") from error
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged download is a ValueError
        raise DataError(
            f"the gpt2 tokenizer could not fetch its two files ({type(error).__name__}): once, with a network, run"
            " `TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"`,"
            " then copy DIR here and set TIKTOKEN_CACHE_DIR to it"
        ) from error
    return Codec(
        "gpt2",
        GPT2_VOCAB_SIZE,
        lambda text: bpe.encode(text, allowed_special={END_OF_TEXT}),
        lambda ids: bpe.decode(_check_ids(ids, GPT2_VOCAB_SIZE)),
    )


def _check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [int(i) for i in ids]
    for i in checked:
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} has no text: the tokenizer knows 0 to {vocab_size - 1}")
    return checked
