"""Let a trained model write.

    python sample_jax.py --out_dir=out-shakespeare-char
    python sample_jax.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --max_new_tokens=200
    python sample_jax.py --out_dir=out-shakespeare-char --start="ROMEO:" --stream=True --stop="JULIET:"
    python sample_jax.py --out_dir=out-shakespeare-char --start=FILE:prompts.txt --prompt_per_line=True
    python sample_jax.py --out_dir=out-shakespeare-char --checkpoint=best --temperature=0
    python sample_jax.py --init_from=my-gpt2 --start="ROMEO:"
    python sample_jax.py --init_from=gpt2-xl --start="What is the answer?" --num_samples=5 --max_new_tokens=100

After the options that were given, each sample is printed as its prompt and what follows, then a line of dashes. Remarks
go to stderr.
"""

if __name__ == "__main__":  # before the other imports, since it starts the script again
    import jax_host_memory

    jax_host_memory.use_huge_pages()


import ast
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

import configurator
import jax_codec
import jax_console
import jax_run_dir
import jax_weights
from configurator import AtLeast0, AtLeast1, Between, ConfigError


@dataclass(frozen=True)
class SampleConfig:
    """Every option of the sampler."""

    init_from: str = "resume"  # resume: the run in out_dir; or gpt2 | gpt2-medium | gpt2-large | gpt2-xl | a path
    out_dir: str = "out_jax"  # the run's directory
    checkpoint: str = "latest"  # of the run: latest | best | a step number
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    prompt_per_line: bool = False  # with FILE: each line that is not blank is a prompt of its own
    num_samples: AtLeast1 = 10  # samples of each prompt, all in one batch
    max_new_tokens: AtLeast0 = 500  # tokens to add to the prompt
    temperature: Annotated[float, Between(0.0, below=math.inf)] = 0.8  # below 1 is safer, above 1 wilder, 0 greedy
    top_k: Annotated[int | None, Between(1)] = 200  # draw among the k likeliest tokens only; None is all of them
    top_p: Annotated[float | None, Between(above=0, high=1)] = None  # the likeliest that have this probability together
    min_p: Annotated[float | None, Between(0.0, 1.0)] = None  # those with this share of the likeliest's probability
    stop: str = ""  # end a sample before this text; several: --stop='["A", "B"]'
    stream: bool = False  # print as it is written, one sample after another
    seed: Annotated[int, Between(0, below=2**32)] = 1337  # sample i depends on (seed, i) only
    device: str = "auto"  # auto | cpu | cuda | gpu | tpu, or one of several: cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # compute type; auto: bfloat16, on a CPU float32
    compile: bool = False  # no meaning here: JAX always compiles. Accepted for nanoGPT's command lines


# ----------------------------------------------------------------------------------------------------------------------
# options


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompt, or what the file has that `start` names. Raises ConfigError."""
    if not config.start.startswith("FILE:"):
        if config.prompt_per_line:
            raise ConfigError(f"prompt_per_line=True is for --start=FILE:path, not for start={config.start!r}")
        return [config.start]
    path = Path(config.start.removeprefix("FILE:"))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"start={config.start}: {path} cannot be read as UTF-8 text: {error}") from None
    if not config.prompt_per_line:
        return [text]
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ConfigError(f"start={config.start}: {path} has no line with a prompt")
    return prompts


def stop_strings(stop: str) -> list[str]:
    """The string, or those of a list written as in Python or JSON; nothing for an empty one."""
    if stop.startswith("["):
        try:
            strings = ast.literal_eval(stop)
        except (SyntaxError, ValueError):
            strings = [stop]  # a bracket that begins a text
        if not strings or not all(isinstance(item, str) and item for item in strings):
            raise ConfigError(f"stop={stop} must be a text, or a list of texts that are not empty")
        return strings
    return [stop] if stop else []


def encode_prompts(codec: jax_codec.Codec, prompts: Sequence[str], start: str) -> list[list[int]]:
    """The ids of each prompt. Raises ConfigError where one has none, or characters that the codec lacks."""
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(codec.encode(prompt))
        except jax_codec.DataError as error:
            raise ConfigError(f"--start={start}: {error}") from None
        if not encoded[-1]:
            raise ConfigError("start is empty: give the model something to go on from, a newline for instance")
    return encoded


# ----------------------------------------------------------------------------------------------------------------------
# text


def settled(text: str, start: int, stops: Sequence[str], ended: bool) -> tuple[str, bool]:
    """What of a text can be shown, whatever tokens follow, and whether a stop string ended it.

    Of the stop strings after `start` the one that is complete first counts. Unless the text has `ended`, held back are
    characters of which only some bytes are there (decoded as U+FFFD), and what may be the beginning of a stop string.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
    if found:
        return text[: min(found)[1]], True
    if ended:
        return text, False
    text = text.rstrip("\ufffd")
    hold = max(
        (n for stop in stops for n in range(1, len(stop)) if len(text) - n >= start and text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - hold], False


def texts_so_far(
    chunks: Iterator[list[list[int]]], prompts: Sequence[list[int]], codec: jax_codec.Codec, stops: Sequence[str]
) -> Iterator[list[str]]:
    """The text of each row, prompt included, after every chunk of new ids; ends early where all rows have stopped."""
    rows = [list(prompt) for prompt in prompts]  # ids that are not decoded for good
    starts = [len(codec.decode(prompt)) for prompt in prompts]
    decoded = [""] * len(rows)  # the text before them
    texts, stopped = [""] * len(rows), [False] * len(rows)

    def update(ended: bool) -> None:
        for b, ids in enumerate(rows):
            if not stopped[b]:
                text = decoded[b] + codec.decode(ids)
                texts[b], stopped[b] = settled(text, starts[b], stops, ended)
                if not text.endswith("\ufffd"):  # else its last character may lack bytes
                    decoded[b], rows[b] = text, []

    for chunk in chunks:
        for ids, new_ids in zip(rows, chunk, strict=True):
            ids.extend(new_ids)
        update(ended=False)
        yield texts
        if all(stopped):
            break
    update(ended=True)
    yield texts


class Clock:
    """Counts new tokens and says how many there were a second."""

    def __init__(self, expected: int, bar: bool) -> None:
        self.bar = tqdm(total=expected, unit="token", leave=False, disable=not (bar and sys.stderr.isatty()))
        self.marks = [(time.perf_counter(), 0)]  # when how many tokens were there

    def count(self, chunks: Iterator[list[list[int]]]) -> Iterator[list[list[int]]]:
        for chunk in chunks:
            tokens = sum(map(len, chunk))
            self.marks.append((time.perf_counter(), self.marks[-1][1] + tokens))
            self.bar.update(tokens)
            yield chunk

    def summary(self) -> str:
        self.bar.close()
        (began, _), (ended, tokens) = self.marks[0], self.marks[-1]
        text = f"{tokens:,} new tokens in {ended - began:.2f} s"
        # The first dispatch has the prompt and its compilation in it, the second the compilation of decoding.
        compiled, before = self.marks[min(2, len(self.marks) - 1)]
        if tokens > before:
            text += f"; {(tokens - before) / (ended - compiled):,.1f} tokens/s after the first {before:,}"
        return text


# ----------------------------------------------------------------------------------------------------------------------
# model


def load(
    config: SampleConfig, step_dir: Path | None, meta: dict[str, Any], found: jax_weights.Weights | None
) -> tuple[Any, Any]:
    """The weights on the device, and the model's configuration: of the run's checkpoint, or those that were `found`."""
    import jax_checkpoint
    import jax_devices
    import jax_train_utils as utils
    from jax_cache import decoding_weights
    from jax_transformer import GPTConfig, abstract_params

    with jax_console.one_line_errors(ValueError):
        devices = jax_devices.find_devices(config.device)
    sharding = utils.replicated(utils.make_mesh(devices[:1]))
    shape = meta["model"] if found is None else found.model
    model = GPTConfig(**{**shape, "dtype": jax_devices.compute_dtype(config.dtype, devices[0]), "dropout": 0.0})
    if found is not None:
        return decoding_weights(jax_weights.read_weights(found, sharding), model), model
    assert step_dir is not None
    wanted = utils.placed(abstract_params(model, meta["tied_head"]), sharding)
    _, _, restored = jax_checkpoint.restore_beside_a_trainer(
        Path(config.out_dir), config.checkpoint, step_dir, {"params": wanted}
    )
    return decoding_weights(restored["params"], model), model


def main() -> None:
    config, sources = configurator.parse_with_sources(SampleConfig)
    if "compile" in sources:
        print("note: compile has no meaning here: JAX always compiles", file=sys.stderr)
    stops = stop_strings(config.stop)
    prompts = read_prompts(config)
    step_dir, meta, found, about_ids = None, {}, None, None
    if config.init_from == "resume":
        step_dir, skipped = jax_run_dir.find_checkpoint(Path(config.out_dir), config.checkpoint)
        print("".join(f"{line}\n" for line in skipped), end="", file=sys.stderr)
        meta = jax_run_dir.read_meta(step_dir)
        about_ids = meta.get("codec")
    elif config.checkpoint != "latest":
        raise ConfigError(f"{sources['checkpoint']}: checkpoint is for --init_from=resume, the run in out_dir")
    elif (path := jax_weights.find_weights(config.init_from)) is not None:  # a download comes last
        found = jax_weights.open_weights(path)
        about_ids = jax_codec.load_meta_beside(path)
    codec = jax_codec.make_codec(about_ids)  # None: GPT-2's
    prompt_ids = [ids for ids in encode_prompts(codec, prompts, config.start) for _ in range(config.num_samples)]
    if config.init_from != "resume" and found is None:
        found = jax_weights.open_weights(config.init_from)
    if found is not None and codec.vocab_size > found.model["vocab_size"]:
        raise ConfigError(
            f"{config.init_from} has a vocabulary of {found.model['vocab_size']}, and the {codec.tokenizer} tokenizer "
            f"one of {codec.vocab_size}: put the meta.json or meta.pkl of its training data beside the weights"
        )

    # jax is imported only from here on, so that a mistake in the options is told at once
    weights, model = load(config, step_dir, meta, found)
    import jax

    import jax_generate

    key = jax.random.key(config.seed, impl="threefry2x32")  # of others a row's numbers depend on the rows beside it

    def start(first_row: int, rows: list[list[int]], tokens_per_dispatch: int) -> Iterator[list[str]]:
        with jax_console.one_line_errors(ValueError):
            chunks = jax_generate.stream(
                weights, model, rows, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_k=config.top_k, top_p=config.top_p, min_p=config.min_p, key=key,
                vocab_size=min(codec.vocab_size, model.vocab_size), first_row=first_row,
                tokens_per_dispatch=tokens_per_dispatch,
            )  # fmt: skip
        return texts_so_far(clock.count(chunks), rows, codec, stops)

    clock = Clock(len(prompt_ids) * config.max_new_tokens, bar=not config.stream)
    if config.stream:
        for row, ids in enumerate(prompt_ids):
            shown = 0
            for (text,) in start(row, [ids], 4):
                print(text[shown:], end="", flush=True)
                shown = len(text)
            print("\n---------------")
    else:
        *_, texts = start(0, prompt_ids, 16)
        for text in texts:
            print(text)
            print("---------------")
    sys.stdout.flush()
    print(clock.summary(), file=sys.stderr)


if __name__ == "__main__":
    jax_console.run_script(
        main,
        ConfigError,
        jax_codec.DataError,
        jax_run_dir.CheckpointError,
        jax_weights.WeightsError,
        FloatingPointError,
    )
