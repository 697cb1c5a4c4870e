"""Weights from elsewhere: GPT-2's, those of transformers and of nanoGPT in; transformers' form out.

    params, config = load_weights("gpt2")              # or gpt2-medium, gpt2-large, gpt2-xl: from the Hugging Face hub
    params, config = load_weights("my-gpt2")           # a directory that transformers wrote, or export_jax.py
    params, config = load_weights("out/ckpt.pt")       # nanoGPT's
    save_hf(params, config, "my-gpt2")

The work is in two halves, so that a script can tell a mistake before it imports jax: `open_weights` finds the files and
checks names and shapes, `read_weights` reads the numbers, a tensor at a time.
"""

import difflib
import functools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_weight_files import FLOATS, Tensor, Tensors, WeightsError, open_npz, open_safetensors, open_torch
from jax_weight_names import HEAD, MASKS, PREFIX, entries

if TYPE_CHECKING:
    from jax_transformer import GPTConfig, Params

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # of GPTConfig
ALIASES = {  # transformers takes either name
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}
GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}  # transformers' names


# ----------------------------------------------------------------------------------------------------------------------
# in


@dataclass(frozen=True)
class Weights:
    """Weights that were found, with the right names and shapes, and are not read yet."""

    source: str  # what to call them in a message
    model: dict[str, Any]  # the fields of GPTConfig
    tensors: dict[str, tuple[str, Tensor, bool]]  # our name -> its name in the file, it, and whether it is transposed

    def outline(self) -> str:
        """What tells two weights apart without reading all of them: shape, and a checksum of two of the tensors."""
        some = [self.tensors[name][1].read().tobytes() for name in ("wpe.embedding", "h.0.attn.c_proj.kernel")]
        return f"{self.model}, crc {zlib.crc32(b''.join(some)):08x}"


def load_weights(name_or_path: str | Path) -> tuple["Params", "GPTConfig"]:
    """Parameters (float32, on JAX's default device) and configuration of weights from elsewhere.

    name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once, kept in the hub's cache; HF_HUB_OFFLINE is
    respected); a directory with transformers' config.json and model.safetensors, pytorch_model.bin (either may be in
    shards) or model.npz, or one of these files; nanoGPT's ckpt.pt. Dropout is 0. Raises WeightsError.
    """
    from jax_transformer import GPTConfig

    weights = open_weights(name_or_path)
    return read_weights(weights), GPTConfig(**weights.model)


def find_weights(name_or_path: str | Path) -> Path | None:
    """The path of local weights, None for a name that the hub knows. Raises WeightsError for anything else."""
    name = str(name_or_path)
    if name in HUB:
        return None
    path = Path(name)
    if not path.exists():
        near = difflib.get_close_matches(name.lower(), HUB, 1)
        advice = f"did you mean {near[0]}?" if near else f"the names are {', '.join(HUB)}"
        raise WeightsError(f"{name!r} is neither a GPT-2 nor a directory or file that is there; {advice}")
    return path


def open_weights(name_or_path: str | Path) -> Weights:
    """Find weights, downloading them where need be, and check their names and shapes. Raises WeightsError."""
    path = find_weights(name_or_path)
    if path is None:
        path = _from_hub(str(name_or_path))
    if path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists():
        path /= "ckpt.pt"  # the out_dir of nanoGPT
    if path.is_file() and path.suffix in (".pt", ".pth", ".ckpt"):
        return _open_nanogpt(path)
    folder = path if path.is_dir() else path.parent
    options, model = _read_hf_config(folder)
    found = _open_hf_tensors(path)
    bias = options.get("bias", True)
    tied = options.get("tie_word_embeddings", True) is not False
    return _match(str(name_or_path), folder / "config.json", found, model, "conv1d", bias is False, tied)


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    files = ("config.json", "model.safetensors")
    logging.set_verbosity_error()  # its retries

    def get(local_files_only: bool) -> Path:
        """The directory with both files."""
        return {
            Path(hf_hub_download(HUB[name], file, local_files_only=local_files_only)).parent for file in files
        }.pop()

    try:
        try:  # what is cached is not asked for again: these files do not change any more
            return get(local_files_only=True)
        except LocalEntryNotFoundError:
            if constants.HF_HUB_OFFLINE:
                raise
            print(f"downloading {HUB[name]} from the Hugging Face hub", flush=True)
            return get(local_files_only=False)
    except (OSError, ValueError) as error:  # the hub's own errors are either
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}"
        raise WeightsError(
            f"{name} is not in the cache {constants.HF_HUB_CACHE} and could not be downloaded ({why}): with a network, "
            f"run `hf download {HUB[name]} {' '.join(files)}`, then copy that cache here and set HF_HUB_CACHE to it, "
            f"or give a directory with these two files"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return content


def _checked_model(model: dict[str, Any], names: dict[str, str], where: Path) -> dict[str, Any]:
    """The model if its sizes make sense. names: what `where` calls our fields."""
    for key in SIZES:
        value, most = model[key], 10_000 if key == "n_layer" else 2**31
        if type(value) is not int or not 1 <= value < most:
            raise WeightsError(f"{where}: {names.get(key, key)} is {short_repr(value)}, not a sensible number")
    if model["n_embd"] % model["n_head"]:
        raise WeightsError(f"{where}: n_embd={model['n_embd']} is not divisible by n_head={model['n_head']}")
    if type(model["bias"]) is not bool:
        raise WeightsError(f"{where}: bias is {short_repr(model['bias'])}, neither true nor false")
    return {**model, "dropout": 0.0}


def _read_hf_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """transformers' config.json, and the model it describes. Raises WeightsError if ours cannot be that model."""
    path = folder / "config.json"
    if not path.exists():
        raise WeightsError(f"{folder} has no config.json: a directory of weights needs transformers' configuration")
    options = _read_json(path)
    if "model_type" not in options and "init_from" in options:
        raise WeightsError(
            f"{folder} is a run of this program: go on with it by --init_from=resume --out_dir={folder}, or turn it "
            f"into a directory of weights with export_jax.py"
        )
    for alias, name in ALIASES.items():
        if options.get(alias) is not None and options.setdefault(name, options[alias]) != options[alias]:
            raise WeightsError(
                f"{path}: {alias} is {short_repr(options[alias])}, and {name} {short_repr(options[name])}"
            )
    # What the code of our model has built in, and the value it has where a file does not say.
    activation = options.get("activation_function", "gelu_new")
    n_embd = options.get("n_embd", 768)
    built_in: dict[str, tuple[Any, list]] = {
        "model_type": (options.get("model_type", "gpt2"), ["gpt2"]),
        "activation_function": (activation, list(GELU)),
        "layer_norm_epsilon": (options.get("layer_norm_epsilon", 1e-5), [1e-5]),
        "n_inner": (options.get("n_inner"), [None, 4 * n_embd if type(n_embd) is int else None]),
        "scale_attn_weights": (options.get("scale_attn_weights", True), [True]),
        "scale_attn_by_inverse_layer_idx": (options.get("scale_attn_by_inverse_layer_idx", False), [False]),
        "add_cross_attention": (options.get("add_cross_attention", False), [False]),
    }
    for key, (value, possible) in built_in.items():
        if value not in possible:
            names = " or ".join(dict.fromkeys(json.dumps(choice) for choice in possible))
            raise WeightsError(f"{path}: {key} is {short_repr(value)}; this model has {names}")
    model = {
        "n_layer": options.get("n_layer", 12),
        "n_head": options.get("n_head", 12),
        "n_embd": n_embd,
        "block_size": options.get("n_positions", 1024),
        "vocab_size": options.get("vocab_size", 50257),
        "bias": options.get("bias", True),  # ours, written by save_hf: transformers always has biases
        "gelu": GELU[activation],
    }
    return options, _checked_model(model, {"block_size": "n_positions"}, path)


def _open_hf_tensors(path: Path) -> Tensors:
    """The tensors of transformers' weight file or files, in a directory or named themselves."""
    openers: dict[str, Callable[[Path], Any]] = {".safetensors": open_safetensors, ".bin": open_torch, ".npz": open_npz}
    names = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    files = [path] if path.is_file() else [path / name for name in [*names, "model.npz"] if (path / name).exists()]
    if not files:
        raise WeightsError(f"{path} has no weights: none of {', '.join([*names, 'model.npz'])}")
    shards = [files[0]]
    if files[0].suffix == ".json":
        weight_map = _read_json(files[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightsError(f"{files[0]} has no weight_map from tensors to files")
        shards = []
        for name in sorted(set(weight_map.values())):
            # Nothing outside the directory is opened, whatever an index says.
            if not name or Path(name).name != name or name in (".", "..") or "\\" in name:
                raise WeightsError(f"{files[0]}: {name!r} is not the name of a file beside it, and is not opened")
            shards.append(files[0].with_name(name))
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise WeightsError(f"{files[0].parent} lacks {', '.join(missing)}, which its index names: get it again")
    tensors: Tensors = {}
    for shard in shards:
        if shard.suffix not in openers:
            raise WeightsError(f"{shard} is of no known kind: {', '.join(openers)} or nanoGPT's .pt")
        opened = openers[shard.suffix](shard)
        if not isinstance(opened, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in opened.items()
        ):
            raise WeightsError(f"{shard} is not a table of tensors by name")
        if twice := tensors.keys() & opened.keys():
            raise WeightsError(f"{shard} has {min(twice)}, which another shard has, too")
        tensors |= opened
    return tensors


def _open_nanogpt(path: Path) -> Weights:
    saved = open_torch(path)
    args, named = (saved.get(key) if isinstance(saved, dict) else None for key in ("model_args", "model"))
    if not (isinstance(args, dict) and isinstance(named, dict) and all(isinstance(name, str) for name in named)):
        raise WeightsError(f"{path} is not a checkpoint of nanoGPT: it has no model_args and model")
    sizes = {key: args.get(key) for key in SIZES}
    # nanoGPT's GELU is erf, also where it began with GPT-2's weights. Until May 2023 it was tanh: in checkpoints of its
    # first month, which have biases and no word of them, and in later ones that nothing tells apart.
    model = _checked_model(
        {**sizes, "bias": args.get("bias", True), "gelu": "erf" if "bias" in args else "tanh"}, {}, path
    )
    found = {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
    return _match(str(path), path, found, model, "linear", zero_biases=False, tied_head=True)


def _match(
    source: str, where: Path, found: Tensors, model: dict[str, Any], kind: str, zero_biases: bool, tied_head: bool
) -> Weights:
    """Our parameters with the tensors they come from. Raises WeightsError naming everything that is wrong with a file.

    kind: the column of LAYOUT that says what is transposed. zero_biases: a model without biases, written for
    transformers, which has always some. tied_head: what the file's configuration says; a head that differs from the
    embeddings is one of its own in any case.
    """
    named: Tensors = {}
    problems: dict[str, list[str]] = {}

    def problem(what: str, which: str) -> None:
        problems.setdefault(what, []).append(which)

    for full_name, tensor in found.items():
        name = full_name[PREFIX.match(full_name).end() :]  # type: ignore[union-attr]  # it matches nothing, too
        if name in named:
            problem("twice", name)
        named[name] = tensor
    wte, head = named.get("wte.weight"), named.get(HEAD)
    if tied_head and wte is not None and head is not None and not np.array_equal(head.read(), wte.read()):
        tied_head = False
    if tied_head:
        named.pop(HEAD, None)
    tensors = {}
    for entry in entries(model, model["bias"] or zero_biases, tied_head):
        transposed: bool = getattr(entry, kind)
        in_file = entry.shape[::-1] if transposed else entry.shape
        given = named.pop(entry.theirs, None)
        is_bias = entry.theirs.endswith(".bias")
        if given is None:
            if not (is_bias and zero_biases):
                problem("missing", entry.theirs)
        elif given.shape != in_file:
            problem("wrong shape", f"{entry.theirs} is {given.shape}, expected {in_file}")
        elif given.dtype not in FLOATS:
            problem("not a float", f"{entry.theirs} is {given.dtype}")
        elif is_bias and zero_biases:
            if given.read().any():
                problem('not zero although config.json says "bias": false (take that out to keep it)', entry.theirs)
        else:
            tensors[entry.ours] = entry.theirs, given, transposed
    unexpected = sorted(name for name in named if not MASKS.fullmatch(name))
    for name in unexpected:
        problem("unexpected", name)
    if problems:  # then the values are looked at, too, so that all is told at once
        for name, tensor, _ in tensors.values():
            if not np.isfinite(tensor.read()).all():
                problem("not finite", name)
        raise _misfit(source, where, model, problems)
    return Weights(source, model, tensors)


def _misfit(source: str, where: Path, model: dict[str, Any], problems: dict[str, list[str]]) -> WeightsError:
    told = []
    for what, which in problems.items():
        more = f" (and {len(which) - 4} more)" if len(which) > 4 else ""
        told.append(f"{what}: {', '.join(which[:4])}{more}")
    sizes = ", ".join(f"{key}={model[key]}" for key in ("n_layer", "n_embd", "block_size", "vocab_size"))
    return WeightsError(f"{source} does not fit the model that {where} describes ({sizes}): {'; '.join(told)}")


def read_weights(weights: Weights, sharding: Any = None, block_size: int | None = None) -> "Params":
    """The numbers, float32, as jax arrays with this sharding (None: on JAX's default device).

    block_size: crop the model to that many position embeddings. In host memory: the parameters and little more, as each
    tensor is placed before the next is read. Raises WeightsError naming every tensor that has a NaN or an infinity.
    """
    import jax

    params: Params = {}
    bad = []
    # The largest first, when there is nothing else yet: a tensor is in memory twice while it is being placed.
    by_size = sorted(weights.tensors.items(), key=lambda item: -math.prod(item[1][1].shape))
    for ours, (name, tensor, transposed) in by_size:
        array = tensor.read().astype(np.float32, copy=False)
        if ours == "wpe.embedding":
            array = array[:block_size]
        if not np.isfinite(array).all():
            bad.append(name)
        *path, leaf = ours.split(".")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), path, params)
        # A copy always: on a CPU jax would otherwise share numpy's memory, which it cannot take over when training.
        node[leaf] = jax.device_put(array.T if transposed else array, sharding, may_alias=False)
        node[leaf].block_until_ready()  # host-device sync: the copy reads `array`, which goes away
    if bad:
        raise WeightsError(f"{weights.source} has weights that are not finite: {', '.join(sorted(bad))}")
    return params


# ----------------------------------------------------------------------------------------------------------------------
# out

HF_FILES = ("config.json", "model.safetensors")


def save_hf(params: "Params", config: "GPTConfig", folder: str | Path, *, eos_token_id: int | None = None) -> None:
    """Write a directory that transformers loads as GPT2LMHeadModel, and load_weights again, bit for bit.

    Where the model has no biases, zeros are written, which transformers needs, and config.json says so. eos_token_id:
    where a text ends, if the tokenizer has such a token. Each file appears whole or not at all; a kill can leave what
    was written of it, `.tmp`. Raises OSError, and AssertionError on parameters of another configuration.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from jax_transformer import check_params, has_tied_head

    check_params(params, config)
    model = asdict(config)
    tensors = {}
    for entry in entries(model, bias=True, tied_head=has_tied_head(params)):
        if entry.ours.endswith(".bias") and not config.bias:
            array = np.zeros(entry.shape, np.float32)
        else:
            leaf: Any = functools.reduce(lambda node, key: node[key], entry.ours.split("."), params)
            array = np.asarray(leaf, np.float32)  # host-device sync
        name = entry.theirs if entry.theirs == HEAD else f"transformer.{entry.theirs}"
        tensors[name] = np.ascontiguousarray(array.T if entry.conv1d else array)
    options = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: model[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_positions": config.block_size,
        "activation_function": {"erf": "gelu", "tanh": "gelu_new"}[config.gelu],
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "tie_word_embeddings": has_tied_head(params),
        "bos_token_id": eos_token_id,  # GPT-2 has one token for both ends
        "eos_token_id": eos_token_id,
        "bias": config.bias,  # not transformers': whether the biases are parameters or just zeros
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / f"{name}.tmp" for name in HF_FILES}
    try:
        written["config.json"].write_text(json.dumps(options, indent=1) + "\n")
        save_file(tensors, written["model.safetensors"], metadata={"format": "pt"})  # which transformers looks for
        shutil.copymode(*written.values())  # safetensors lets nobody else read it
        for name, path in written.items():
            os.replace(path, folder / name)
    except SafetensorError as error:  # its own form of an OSError
        raise OSError(f"{folder}: {error}") from error
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)
