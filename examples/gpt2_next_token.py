"""What comes after "Hello world"? GPT-2's five likeliest next tokens, with their probabilities.

    python examples/gpt2_next_token.py
    python examples/gpt2_next_token.py --model=gpt2-xl --text="The capital of France is"
    python examples/gpt2_next_token.py --model=my-gpt2        # a directory that export_jax.py or transformers wrote

Weights and tokenizer are downloaded once. It runs from any directory.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import jax_codec
import jax_console
import jax_weights
from configurator import AtLeast1, ConfigError


@dataclass(frozen=True)
class ExampleConfig:
    """Every option of the example."""

    model: str = "gpt2"  # gpt2 | gpt2-medium | gpt2-large | gpt2-xl | a path to weights
    text: str = "Hello world"  # what to go on from
    top: AtLeast1 = 5  # how many tokens to show


def main() -> None:
    config = configurator.parse(ExampleConfig)
    weights = jax_weights.open_weights(config.model)
    path = jax_weights.find_weights(config.model)
    codec = jax_codec.make_codec(None if path is None else jax_codec.load_meta_beside(path))  # None: GPT-2's
    ids = codec.encode(config.text)
    if not 1 <= len(ids) <= weights.model["block_size"]:
        raise ConfigError(f"text has {len(ids)} tokens; the model takes 1 to {weights.model['block_size']}")
    if max(ids) >= weights.model["vocab_size"]:
        raise ConfigError(
            f"{config.model} knows {weights.model['vocab_size']} tokens only: not the {codec.tokenizer} tokenizer"
        )

    # jax is imported only here, so that a mistake in the options is told at once
    import jax
    import jax.numpy as jnp

    from jax_transformer import GPTConfig, forward

    params, model = jax_weights.read_weights(weights), GPTConfig(**weights.model)
    logits_BTV = jax.jit(forward, static_argnums=2)(params, jnp.asarray([ids]), model)  # B = 1
    known_V = jnp.arange(model.vocab_size) < codec.vocab_size  # rows beyond only pad the vocabulary
    probabilities_V = jax.nn.softmax(jnp.where(known_V, logits_BTV[0, -1], -jnp.inf))
    top_probabilities, top_ids = jax.lax.top_k(probabilities_V, min(config.top, codec.vocab_size, model.vocab_size))
    print(f"{config.text!r} is {len(ids)} tokens: {ids}")
    for probability, token in zip(top_probabilities.tolist(), top_ids.tolist(), strict=True):  # host-device sync
        print(f"  {probability:7.2%}  {token:>6}  {codec.decode([token])!r}")


if __name__ == "__main__":
    jax_console.run_script(main, ConfigError, jax_codec.DataError, jax_weights.WeightsError)
