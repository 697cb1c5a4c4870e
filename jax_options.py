"""What train_jax.py's options mean together: the rules between them, and what a run, weights and data say about them.

`config` is a TrainConfig throughout. Everything here is for the person at the terminal: a mistake is an error of one
line before anything is written, and what is decided for them is printed.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import configurator
import jax_codec
import jax_data
import jax_run_dir
import jax_weights
from configurator import ConfigError

NEVER_INHERITED = ("out_dir", "eval_only", "init_from", "checkpoint", "overwrite", "print_config")
MODEL_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "gelu")  # what a checkpoint is bound to


def check_options(config: Any, sources: dict[str, str]) -> None:
    """The rules between options, and for out_dir. Raises ConfigError."""

    def named(key: str) -> str:
        return f"{key}={getattr(config, key)} ({sources.get(key, 'default')})"

    from_weights = config.init_from not in ("scratch", "resume")  # which have the shape of the model, too
    if config.n_embd % config.n_head and not from_weights:
        raise ConfigError(f"{named('n_embd')} is not divisible by {named('n_head')}; choose another of them")
    if from_weights:
        try:
            jax_weights.find_weights(config.init_from)
        except jax_weights.WeightsError as error:
            raise ConfigError(f"{named('init_from')} is neither scratch nor resume: {error}") from None
    if config.checkpoint != "latest" and not (config.init_from == "resume" and config.eval_only):
        raise ConfigError(f"{named('checkpoint')} is for --init_from=resume --eval_only=True")
    if config.overwrite and (config.init_from == "resume" or config.eval_only):
        raise ConfigError(f"{named('overwrite')} removes the run, which resume and eval_only need; leave it out")
    if not config.out_dir:
        raise ConfigError(f"out_dir is empty ({sources.get('out_dir', 'default')}); a run needs a directory")
    out_dir = Path(config.out_dir)
    if "://" in config.out_dir:
        raise ConfigError(f"{named('out_dir')} is no folder of this machine; mount it, and name where")
    if re.search(r"[\0\ud800-\udfff]", config.out_dir):
        raise ConfigError(f"{named('out_dir')} is no name of a folder in UTF-8; take another")
    really = [str(folder.resolve()) for folder in (out_dir, out_dir / "checkpoints")]
    needs_checkpoints = config.init_from == "resume" or not config.eval_only
    if needs_checkpoints and re.search(r"\\|gs:(/|\n)|[\ud800-\udfff]", "\n".join(really)):  # tensorstore takes others
        raise ConfigError(
            f"{named('out_dir')}: checkpoints cannot lie below a folder whose name has a backslash, ends with gs: or "
            f"is no UTF-8; take another"
        )
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"{named('out_dir')} is a file; a run needs a directory")
    if not (config.init_from == "resume" or config.eval_only or config.overwrite) and jax_run_dir.holds_run(out_dir):
        go_on = "--init_from=resume goes on with it"
        if jax_run_dir.newest_good(out_dir / "checkpoints")[0] is None:
            go_on = "only its best checkpoint is whole, which --init_from=resume cannot go on from"
        raise ConfigError(f"{named('out_dir')} holds a run: {go_on}, --overwrite=True removes it")
    foreign = jax_run_dir.holds_foreign_config(out_dir) and not jax_run_dir.holds_run(out_dir)
    if foreign and not (config.init_from == "resume" or config.eval_only):
        raise ConfigError(
            f"{named('out_dir')} has a config.json that is not a run's, and a run writes its own: take another"
        )
    if config.eval_iters * config.batch_size * config.block_size >= 2**31:  # tokens, which would take 34 GB
        raise ConfigError(
            f"{named('eval_iters')} is too much: all rows of an evaluation are in memory at once; lower it"
        )
    note_what_means_nothing(sources)
    if config.decay_lr and config.min_lr > config.learning_rate:
        print(f"note: min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}: the rate will rise")


def print_options(config: Any, sources: dict[str, str], resumed: bool) -> None:
    """The options as a config file, with where each came from; those that weights will decide as comments."""
    labels = dict.fromkeys(NEVER_INHERITED, "default") | sources
    of_weights = set[str]()
    if config.init_from not in ("scratch", "resume"):
        of_weights = set(MODEL_SHAPE) - sources.keys()
        labels |= dict.fromkeys(of_weights, f"default; {config.init_from} decides")
    config = dataclasses.replace(config, print_config=False)  # what is printed is a config file
    configurator.print_sources(config, labels, "the checkpoint" if resumed else "default", of_weights)


def memory_of_a_step(config: Any, vocab_size: int) -> int:
    """About how many bytes a step takes in float32: weights, gradient, two averages, and what is kept of its tokens."""
    weights = config.n_embd * (12 * config.n_layer * config.n_embd + vocab_size)
    tokens = config.batch_size * config.block_size
    return 4 * (4 * weights + 16 * config.n_layer * config.n_embd * tokens)


def note_what_means_nothing(sources: dict[str, str]) -> None:
    """A line for each of nanoGPT's options that is taken and has no meaning here."""
    for key in ("compile", "backend"):
        if key in sources:
            print(f"note: {key} has no meaning here: JAX always compiles, and picks its own backend")


def inherit_options(defaults: Any, step_dir: Path, meta: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """On resume: the options the run was saved with, overridden by those given now, and where these came from.

    Raises ConfigError if one given now contradicts the model in the checkpoint.
    """
    names = [field.name for field in dataclasses.fields(defaults) if field.name not in NEVER_INHERITED]
    there = {key: meta["config"][key] for key in names if key in meta["config"]}
    saved = dataclasses.replace(defaults, **configurator.checked(type(defaults), there, f"{step_dir}/meta"))
    config, sources = configurator.parse_with_sources(type(defaults), default=saved, quiet=True)
    for key in names:
        before, now = getattr(saved, key), getattr(config, key)
        if now != before and key in MODEL_SHAPE:
            raise ConfigError(
                f"{key}={now} ({sources[key]}) contradicts the checkpoint {step_dir}, which has {key}={before}; "
                f"leave it out, or start another run with its own --out_dir"
            )
        if now != before and not config.print_config:
            print(f"resuming with {key} = {now}, which was {before} ({sources[key]})")
    return config, sources


def adopt_shape(config: Any, sources: dict[str, str], model: dict[str, Any]) -> Any:
    """With --init_from=gpt2 and the like: the options with the shape of the weights' model, `model`.

    A shorter block_size crops the model. Raises ConfigError if another option given contradicts the weights.
    """
    shape = {key: model[key] for key in MODEL_SHAPE}
    for key in shape.keys() & sources.keys():
        given = getattr(config, key)
        if key == "block_size" and given < shape[key]:
            shape[key] = given
        elif given != shape[key]:
            what = "is longer than" if key == "block_size" else "contradicts"
            raise ConfigError(
                f"{key}={given} ({sources[key]}) {what} init_from={config.init_from}, whose weights have "
                f"{key}={shape[key]}; leave it out"
            )
    return dataclasses.replace(config, **shape)


def open_data(
    config: Any, meta: dict[str, Any] | None, weights: jax_weights.Weights | None
) -> tuple[Path, dict[str, Any], int, dict[str, str]]:
    """The data set's folder, codec, the model's vocabulary size and `outlines`, once the data were found good.

    Raises DataError, and ConfigError if a run is to go on with another vocabulary than it began with, or if the data's
    is larger than that of the weights to start from.
    """
    try:
        data_dir = jax_data.find_data_dir(config.dataset)
    except jax_data.DataError as error:
        if meta is None:
            raise
        raise jax_data.DataError(f"{error}; or name where the run's data are now by --dataset=FOLDER") from None
    found: dict[str, Any] | None = jax_codec.load_meta(data_dir)
    if found is None:
        print(f"no meta.json in {data_dir}: its tokens are taken for GPT-2's, as nanoGPT does")
        found = jax_codec.GPT2_META
    else:
        print(f"found vocab_size = {found['vocab_size']} (inside {data_dir})")
    codec: dict[str, Any] = {key: found[key] for key in ("tokenizer", "vocab_size", "dtype", "itos") if key in found}
    if meta is not None:
        keys = ("tokenizer", "vocab_size", "itos") if meta["codec"].get("tokenizer") != "unknown" else ("vocab_size",)
        if any(codec.get(key) != meta["codec"].get(key) for key in keys):
            raise ConfigError(f"dataset={config.dataset} has another vocabulary than the run in {config.out_dir}")
        vocab_size = meta["model"]["vocab_size"]
    elif weights is not None:
        vocab_size = weights.model["vocab_size"]
        if found["vocab_size"] > vocab_size:
            raise ConfigError(
                f"dataset={config.dataset} has a vocabulary of {found['vocab_size']}, but the weights of "
                f"init_from={config.init_from} know {vocab_size} tokens; prepare the data with their tokenizer"
            )
        theirs: dict[str, Any] | None = jax_codec.GPT2_META
        if config.init_from not in jax_weights.HUB:
            path = jax_weights.find_weights(config.init_from)
            theirs = None if path is None else jax_codec.load_meta_beside(path)
        if theirs is not None and any(theirs.get(key) != codec.get(key) for key in ("tokenizer", "itos")):
            other = "of another alphabet" if theirs["tokenizer"] == codec["tokenizer"] else codec["tokenizer"]
            print(f"note: {config.init_from} knows {theirs['tokenizer']} tokens, and those of {data_dir} are {other}")
    else:
        vocab_size = jax_codec.model_vocab_size(found)
        if codec["tokenizer"] == "gpt2":
            print(f"the model's vocab_size is {vocab_size}: GPT-2's 50257 rounded up for efficiency")
    jax_data.check_dataset(data_dir, config.block_size, vocab_size)
    outlines = jax_data.outlines(data_dir)
    before = meta["data"] if meta is not None and meta["config"].get("dataset") == config.dataset else None
    if before not in (None, outlines):
        goes_on = "" if config.eval_only else ", so the run will not go on as if it had never stopped"
        print(f"note: {data_dir} is not what it was{goes_on}")
    return data_dir, codec, vocab_size, outlines


def same_in_all(
    config: Any,
    step_dir: Path | None,
    weights: jax_weights.Weights | None,
    outlines: dict[str, str],
    codec: dict[str, Any],
    vocab_size: int,
) -> dict[str, Any]:
    """Name -> value of what has to be the same in all processes that train together: options, and what files hold."""
    # wandb's name is the first process's business, and in nanoGPT's configs the time
    options = {key: value for key, value in dataclasses.asdict(config).items() if not key.startswith("wandb_")}
    files = dict(outlines)
    if step_dir is not None:
        files |= {"init_from": str(step_dir), "MANIFEST.json": (step_dir / "MANIFEST.json").read_text()}
    if weights is not None:
        files["the weights"] = weights.outline()
    return options | files | {"meta.json": codec, "vocab_size": vocab_size}
