"""Give a trained model to transformers: weights, configuration and, where it is GPT-2's, the tokenizer.

    python export_jax.py --out_dir=out-shakespeare-char --hf_dir=my-gpt2
    python export_jax.py --out_dir=out_jax --hf_dir=my-gpt2 --checkpoint=best --trim_vocab=True

What it writes loads with transformers' from_pretrained, and here with --init_from=my-gpt2.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import configurator
import jax_codec
import jax_console
import jax_run_dir
import jax_weights
from configurator import ConfigError
from jax_codec import END_OF_TEXT, TOKENIZERS


@dataclass(frozen=True)
class ExportConfig:
    """Every option of the exporter."""

    out_dir: str = "out_jax"  # the run's directory
    hf_dir: str = ""  # where to write; has to be given
    checkpoint: str = "latest"  # latest | best | a step number
    trim_vocab: bool = False  # leave out the embedding rows that no token has: 50257 of 50304
    overwrite: bool = False  # write into an hf_dir that is not empty: an earlier export there is replaced


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2's tokenizer in transformers' files


def _printable_bytes() -> dict[int, str]:
    """A visible character for each byte, as GPT-2's vocabulary is written: itself, or one from 256 upwards."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {byte: chr(byte) for byte in themselves} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding joins last to make this one: merge all pairs of a lower rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def gpt2_tokenizer_files() -> dict[str, str]:
    """vocab.json, merges.txt, tokenizer.json and tokenizer_config.json, derived from tiktoken's ranks: name -> text.

    Raises DataError where tiktoken has its files neither in its cache nor from the network.
    """
    jax_codec.make_codec(jax_codec.GPT2_META)
    import tiktoken

    bpe = tiktoken.get_encoding("gpt2")
    ranks = {token: bpe.encode_single_token(token) for token in bpe.token_byte_values()}
    printable = _printable_bytes()

    def shown(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    vocab = {shown(token): ranks[token] for token in by_rank} | {END_OF_TEXT: bpe.eot_token}
    merges = [[shown(part) for part in _merge_of(token, ranks)] for token in by_rank if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": bpe.eot_token, "content": END_OF_TEXT, "special": True, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": merges},
    }  # fmt: skip
    about = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 1024}
    about |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "vocab.json": json.dumps(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]),
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(about, indent=1) + "\n",
    }


# ----------------------------------------------------------------------------------------------------------------------

OUR_FILES = (*jax_weights.HF_FILES, "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "meta.json")


def tokenizer_files(codec: dict[str, Any], model: dict[str, Any]) -> dict[str, str]:
    """What goes beside the weights so that their ids mean something: name -> text."""
    if codec["tokenizer"] != "gpt2":
        return {"meta.json": json.dumps(codec) + "\n"}
    files = gpt2_tokenizer_files()
    about = json.loads(files["tokenizer_config.json"]) | {"model_max_length": model["block_size"]}
    return files | {"tokenizer_config.json": json.dumps(about, indent=1) + "\n"}


def main() -> None:
    config = configurator.parse(ExportConfig)
    if not config.hf_dir:
        raise ConfigError("hf_dir is not given: say where to write, --hf_dir=my-gpt2 for instance")
    folder = Path(config.hf_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"hf_dir={config.hf_dir} is a file; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"hf_dir={config.hf_dir} is not empty: choose another, or replace an earlier export by --overwrite=True"
        )
    if jax_run_dir.holds_run(folder):
        raise ConfigError(f"hf_dir={config.hf_dir} holds a run, whose config.json would be lost; choose another")
    step_dir, skipped = jax_run_dir.find_checkpoint(Path(config.out_dir), config.checkpoint)
    for line in skipped:
        print(line)
    meta = jax_run_dir.read_meta(step_dir)
    codec = meta["codec"]
    files = tokenizer_files(codec, meta["model"])

    # jax is imported only here, so that a mistake in the options is told at once
    import jax_checkpoint
    import jax_devices
    import jax_train_utils as utils
    from jax_transformer import GPTConfig, abstract_params

    mesh = utils.make_mesh(jax_devices.find_devices("cpu")[:1])  # nothing is computed
    model = GPTConfig(**meta["model"])
    wanted = utils.placed(abstract_params(model, meta["tied_head"]), utils.replicated(mesh))
    step_dir, meta, restored = jax_checkpoint.restore_beside_a_trainer(
        Path(config.out_dir), config.checkpoint, step_dir, {"params": wanted}
    )
    params = restored["params"]
    if config.trim_vocab:
        params, model = trim_vocab(params, model, codec["vocab_size"])

    is_gpt2 = codec["tokenizer"] == "gpt2"
    jax_weights.save_hf(params, model, folder, eos_token_id=jax_codec.GPT2_VOCAB_SIZE - 1 if is_gpt2 else None)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in set(OUR_FILES) - {*files, *jax_weights.HF_FILES}:  # of an earlier export, with another tokenizer
        (folder / name).unlink(missing_ok=True)
    print(f"exported {step_dir} to {folder}:")
    for name in sorted([*files, *jax_weights.HF_FILES]):
        print(f"  {name:22} {(folder / name).stat().st_size:>13,} bytes")
    if not is_gpt2:
        says = "meta.json" if codec["tokenizer"] in TOKENIZERS else "nothing"
        print(f"  transformers has no tokenizer of kind {codec['tokenizer']!r}: {says} says what the ids mean")
    if model.vocab_size > codec["vocab_size"]:
        print(
            f"  {model.vocab_size} rows of embeddings, of which no token has the last "
            f"{model.vocab_size - codec['vocab_size']}; --trim_vocab=True leaves them out"
        )
    print(f"transformers.AutoModelForCausalLM.from_pretrained({config.hf_dir!r}) loads it")


def trim_vocab(params: Any, model: Any, vocab_size: int) -> tuple[Any, Any]:
    """The model without the embedding rows from vocab_size on, which pad it and belong to no token."""
    trimmed = {
        name: {"embedding": params[name]["embedding"][:vocab_size]} for name in {"wte", "lm_head"} & params.keys()
    }
    return params | trimmed, replace(model, vocab_size=vocab_size)


if __name__ == "__main__":
    jax_console.run_script(main, ConfigError, jax_codec.DataError, jax_run_dir.CheckpointError)
