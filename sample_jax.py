"""Let a trained model write.

    python sample_jax.py --out_dir=out-shakespeare-char
    python sample_jax.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --max_new_tokens=200
    python sample_jax.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample_jax.py --out_dir=out-shakespeare-char --checkpoint=best

Every token runs the whole context through the model again: simple, and right by construction.
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

import configurator
import jax_checkpoint
import jax_data
from configurator import Between, ConfigError


@dataclass(frozen=True)
class SampleConfig:
    """Every option of the sampler."""

    init_from: Literal["resume"] = "resume"  # where the weights come from: a run
    out_dir: str = "out_jax"  # the run's directory
    checkpoint: str = "latest"  # latest | best | a step number
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    num_samples: Annotated[int, Between(1)] = 10  # samples to draw, all in one batch
    max_new_tokens: Annotated[int, Between(1)] = 500  # tokens to add to the prompt
    temperature: Annotated[float, Between(0.0, below=math.inf)] = 0.8  # below 1 is safer, above 1 wilder, 0 greedy
    top_k: Annotated[int, Between(0)] = 200  # draw among the k likeliest tokens only; 0 is all of them
    seed: Annotated[int, Between(0, below=2**32)] = 1337  # sample i depends on (seed, i) only
    device: str = "auto"  # auto | cpu | cuda | gpu | tpu, or one of several: cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # compute type; auto: bfloat16, on a CPU float32
    compile: bool = False  # no meaning here: JAX always compiles. Accepted for nanoGPT's command lines


def read_prompt(start: str) -> str:
    """The prompt itself, or the content of the file it names."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"start={start}: {path} cannot be read as UTF-8 text: {error}") from None


def main() -> None:
    config, sources = configurator.parse_with_sources(SampleConfig)
    if "compile" in sources:
        print("note: compile has no meaning here: JAX always compiles")
    step_dir, skipped = jax_checkpoint.find(Path(config.out_dir), config.checkpoint)
    for line in skipped:
        print(line)
    meta = jax_checkpoint.read_meta(step_dir)
    codec = jax_data.make_codec(meta["codec"])
    try:
        prompt_ids = codec.encode(read_prompt(config.start))
    except jax_data.DataError as error:
        raise ConfigError(f"--start={config.start}: {error}") from None
    if not prompt_ids:
        raise ConfigError("start is empty: give the model something to go on from, a newline for instance")

    # jax is imported only here, so that a mistake in the options is told at once
    import jax
    import jax.numpy as jnp

    import jax_train_utils as utils
    from jax_transformer import GPTConfig, Params, abstract_params, forward

    with configurator.one_line_errors(ValueError):
        devices = utils.find_devices(config.device)
    model = GPTConfig(**{**meta["model"], "dtype": utils.compute_dtype(config.dtype, devices[0]), "dropout": 0.0})
    mesh = utils.make_mesh(devices[:1])
    wanted = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=utils.replicated(mesh)), abstract_params(model)
    )
    params = jax_checkpoint.restore(step_dir, {"params": wanted})["params"]

    def draw(logits_V: jax.Array, key: jax.Array) -> jax.Array:
        """The next token of one sample."""
        logits_V = jnp.where(jnp.arange(logits_V.size) < codec.vocab_size, logits_V, -jnp.inf)  # padding has no text
        if config.temperature == 0:
            return jnp.argmax(logits_V)
        if 0 < config.top_k < codec.vocab_size:
            logits_V = jnp.where(logits_V < jax.lax.top_k(logits_V, config.top_k)[0][-1], -jnp.inf, logits_V)
        return jax.random.categorical(key, logits_V / config.temperature)

    @functools.partial(jax.jit, donate_argnums=1)
    def add_token(params: Params, window_BT: jax.Array, tokens: jax.Array, keys_B: jax.Array) -> tuple:
        """The token after the first `tokens` ones, for each row: (window with it, next_B).

        The window holds the last block_size tokens, padded on the right, which the causal mask hides.
        """
        length = jnp.minimum(tokens, window_BT.shape[1])
        logits_BV = forward(params, window_BT, model)[:, length - 1].astype(jnp.float32)
        next_B = jax.vmap(draw)(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, tokens))
        full = tokens >= window_BT.shape[1]
        window_BT = jnp.where(full, jnp.roll(window_BT, -1, axis=1), window_BT)
        return window_BT.at[:, jnp.where(full, length - 1, length)].set(next_B), next_B

    B = config.num_samples
    context = prompt_ids[-model.block_size :]
    if len(context) < len(prompt_ids):
        print(f"the prompt has {len(prompt_ids)} tokens: only the last {model.block_size} fit in the model's window")
    window_BT = jnp.zeros((B, model.block_size), jnp.int32).at[:, : len(context)].set(jnp.asarray(context))
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), jnp.arange(B))
    new_tokens = []
    for i in tqdm(range(config.max_new_tokens), unit="token", leave=False, disable=not sys.stderr.isatty()):
        window_BT, next_B = add_token(params, window_BT, np.int32(len(context) + i), keys_B)
        new_tokens.append(next_B)
    for row in np.stack(new_tokens, axis=1).tolist():  # host-device sync, once
        print(codec.decode(prompt_ids + row))
        print("---------------")


if __name__ == "__main__":
    configurator.use_huge_pages()
    configurator.run_script(main, jax_data.DataError, jax_checkpoint.CheckpointError)
