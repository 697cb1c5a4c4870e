"""What the tests of checkpoints share: a run small enough to be saved in a moment."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_checkpoint import Saver


def tree(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "wte": {"embedding": jax.random.normal(keys[0], (7, 4))},
        "h": {str(i): {"kernel": jax.random.normal(jax.random.fold_in(keys[1], i), (4, 4))} for i in range(11)},
    }


def optimizer_state(seed: int) -> tuple:
    import optax

    return optax.adam(1e-3).init(tree(seed)), {"scale": jnp.float32(seed)}


ABOUT: dict[str, Any] = {  # the least that meta may hold
    "config": {"seed": 1},
    "model": {
        "n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 7, "dropout": 0.0, "bias": False,
        "gelu": "erf", "dtype": "float32",
    },
    "codec": {"tokenizer": "bytes", "vocab_size": 256, "dtype": "uint16"},
    "best_val_loss": None,
    "evaluated_at": 3,
    "wandb_run_id": "abc",
    "bad_steps": 0,
    "devices": None,
    "tied_head": True,
    "data": None,
}  # fmt: skip


def save_steps(out_dir: Path, steps: dict[int, bool], keep: int = 2) -> None:
    """steps: step -> is it the best so far."""
    saver = Saver(out_dir, keep)
    for step, is_best in steps.items():
        saver.save(step, tree(step), optimizer_state(step), ABOUT | {"best_val_loss": step / 2}, is_best=is_best)
    saver.close()
