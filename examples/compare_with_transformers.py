"""The same weights in transformers and here: how far apart are the logits?

    python examples/compare_with_transformers.py --batches=10                   # GPT-2
    python examples/compare_with_transformers.py --batches=10 --model=random    # small, random: no download
    python examples/compare_with_transformers.py --batches=10 --model=my-gpt2   # a directory

Random ids, float32 on the CPU. Exit code 1 if a logit differs by more than the tolerance. It needs torch and
transformers (pip install torch==2.13.0 "transformers>=5,<6") and runs from any directory.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import jax_console
import jax_weights
from configurator import AtLeast1, Between, ConfigError


@dataclass(frozen=True)
class CompareConfig:
    """Every option of the comparison."""

    model: str = "gpt2"  # gpt2 | gpt2-medium | gpt2-large | gpt2-xl | a directory of weights | random
    batches: AtLeast1 = 10  # how many to compare
    batch_size: AtLeast1 = 2  # rows of a batch
    tokens: AtLeast1 = 64  # of a row; fewer where the model's context is shorter
    tolerance: Annotated[float, Between(0.0)] = 1e-4  # the largest difference of two logits that is let pass
    seed: Annotated[int, Between(0, below=2**32)] = 1337  # of the ids, and of random weights


def write_random_model(folder: Path, seed: int) -> None:
    """A small GPT-2 of transformers, with biases and gains at random: those of a fresh model hide mistakes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    options = GPT2Config(
        n_layer=2, n_head=4, n_embd=64, n_positions=128, vocab_size=211, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter.ndim == 1 and name.endswith("weight")))
    model.save_pretrained(folder)


def main() -> int:
    config = configurator.parse(CompareConfig)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install torch==2.13.0 'transformers>=5,<6'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        if config.model == "random":
            write_random_model(Path(scratch), config.seed)
        source = scratch if config.model == "random" else config.model
        weights = jax_weights.open_weights(source)
        try:
            theirs = transformers.GPT2LMHeadModel.from_pretrained(
                jax_weights.HUB.get(source, source), dtype=torch.float32
            ).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers cannot load {config.model}: {error}") from None

        import jax
        import jax.numpy as jnp

        import jax_devices
        from jax_transformer import GPTConfig, cross_entropy, forward

        jax_devices.find_devices("cpu")
        params, model = jax_weights.read_weights(weights), GPTConfig(**weights.model)

    T = min(config.tokens, model.block_size)
    print(f"{config.model}: {model}\n{config.batches} batches of {config.batch_size} x {T} random ids")
    compiled = jax.jit(forward, static_argnums=2)
    random = np.random.default_rng(config.seed)
    rows = []
    print("batch   largest difference   largest logit   loss here   loss there   same likeliest")
    for batch in range(config.batches):
        ids_BT = random.integers(0, model.vocab_size, (config.batch_size, T + 1), dtype=np.int32)  # one to predict
        x_BT, y_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        ours_BTV = compiled(params, jnp.asarray(x_BT), model)
        our_loss = float(cross_entropy(ours_BTV, jnp.asarray(y_BT)).mean())  # host-device sync
        with torch.no_grad():
            logits_BTV = theirs(torch.tensor(x_BT, dtype=torch.long)).logits
            targets_BT = torch.tensor(y_BT, dtype=torch.long)
            their_loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()).item()
        here_BTV, there_BTV = np.asarray(ours_BTV), logits_BTV.numpy()
        difference = float(np.abs(here_BTV - there_BTV).max())
        same = float((here_BTV.argmax(-1) == there_BTV.argmax(-1)).mean())
        rows.append((difference, abs(our_loss - their_loss), same))
        largest = np.abs(there_BTV).max()
        print(f"{batch:5} {difference:20.2e} {largest:15.3f} {our_loss:11.5f} {their_loss:12.5f} {same:16.2%}")

    differences, loss_differences, sames = map(np.array, zip(*rows, strict=True))
    good = differences <= config.tolerance  # a NaN is not
    print(
        f"\nlargest difference of two logits   mean {differences.mean():.2e}   worst {differences.max():.2e}\n"
        f"difference of the losses           mean {loss_differences.mean():.2e}   worst {loss_differences.max():.2e}\n"
        f"same likeliest token               mean {sames.mean():.2%}     worst {sames.min():.2%}\n"
        f"{'✓' if good.all() else '✗'} {good.sum()} of {len(good)} batches within {config.tolerance:g}"
    )
    return 0 if good.all() else 1


if __name__ == "__main__":
    jax_console.run_script(main, ConfigError, jax_weights.WeightsError)
