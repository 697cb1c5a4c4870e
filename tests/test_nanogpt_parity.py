"""Fifty updates, step by step beside nanoGPT: the same weights, the same batches, the same losses and weights after.

python -m pytest tests/test_nanogpt_parity.py

The truth is in fixtures/nanogpt_steps.npz; nanogpt_steps.py beside it says how it was made with nanoGPT and torch.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_train_utils as utils
from jax_transformer import GPTConfig, Params, abstract_params

FIXTURE = Path(__file__).parent / "fixtures" / "nanogpt_steps.py"
spec = importlib.util.spec_from_file_location("nanogpt_steps", FIXTURE)
assert spec is not None and spec.loader is not None
steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(steps)

VARIANTS = {"no_bias": False, "bias": True}


def our_params(weights: dict[str, np.ndarray]) -> Params:
    """nanoGPT's names and torch's orientation -> our nested dict."""
    params: Params = {}
    for name, array in weights.items():
        *path, leaf = name.split(".")
        if path[-1] in ("wte", "wpe"):
            leaf = "embedding"
        elif leaf == "weight":
            # torch's Linear is (out, in), and so is our mlp.c_proj; our other kernels are (in, out)
            as_torch = array.ndim == 1 or path[-2:] == ["mlp", "c_proj"]
            leaf, array = "scale" if array.ndim == 1 else "kernel", array if as_torch else array.T
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return params


@functools.cache
def nanogpt_run(variant: str) -> dict[str, Any]:
    """What nanoGPT came to: losses, grad_norms, learning_rates, and `final`, its parameters as our nested dict."""
    with np.load(FIXTURE.with_suffix(".npz")) as stored:
        arrays = {name.removeprefix(f"{variant}/"): stored[name] for name in stored if name.startswith(f"{variant}/")}
    final = {name.removeprefix("final."): arrays.pop(name) for name in list(arrays) if name.startswith("final.")}
    return {**arrays, "final": our_params(final)}


def our_run(variant: str, **changes: float) -> tuple[np.ndarray, np.ndarray, Params]:
    """Losses and gradient norms of every update, and the parameters in the end. changes: other optimizer options."""
    bias = VARIANTS[variant]
    config = GPTConfig(**steps.MODEL, bias=bias)
    optimizer = utils.make_optimizer(**{**steps.OPTIMIZER, **changes})
    params = jax.tree.map(jnp.asarray, our_params(steps.initial_weights(bias)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(config))
    state = utils.TrainState(params, utils.init_state(config, optimizer, seed=0).opt_state)
    train_step = utils.compile_train_step(config, optimizer, seed=0)
    losses, norms = [], []
    for update in range(steps.UPDATES):
        learning_rate = utils.warmup_cosine(update, **steps.SCHEDULE)
        x_ABT, y_ABT = (rows.astype(np.int32) for rows in steps.batches(update))
        state, metrics = train_step(state, x_ABT, y_ABT, np.float32(learning_rate), np.int32(update))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return np.array(losses), np.array(norms), jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_weights_of_fifty_updates_are_nanogpts(variant):
    truth = nanogpt_run(variant)
    losses, norms, final = our_run(variant)
    np.testing.assert_allclose(losses, truth["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, truth["grad_norms"], rtol=1e-5)
    D = steps.MODEL["n_embd"]
    for (path, ours), theirs in zip(
        jax.tree_util.tree_flatten_with_path(final)[0], jax.tree.leaves(truth["final"]), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("c_attn.bias"):
            # The keys' third is left out. It adds the same to all scores of a query, which a softmax does not see, so
            # that its gradient is nothing but rounding, of which Adam makes steps of ordinary length.
            ours, theirs = (np.delete(a, slice(D, 2 * D)) for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_learning_rates_are_nanogpts(variant):
    ours = [utils.warmup_cosine(update, **steps.SCHEDULE) for update in range(steps.UPDATES)]
    np.testing.assert_allclose(ours, nanogpt_run(variant)["learning_rates"], rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixture_clips_most_updates_but_not_all(variant):
    clipped = (nanogpt_run(variant)["grad_norms"] > steps.OPTIMIZER["grad_clip"]).sum()
    assert steps.UPDATES / 2 < clipped < steps.UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"grad_clip": 0.0}, {"weight_decay": 0.0}], ids=str)
def test_fixture_would_notice_another_optimizer(change):
    # What the comparison is worth: an optimizer that leaves something out is off by a hundred times its tolerance.
    off = np.abs(our_run("bias", **change)[0] / nanogpt_run("bias")["losses"] - 1).max()
    assert off > 1e-3
