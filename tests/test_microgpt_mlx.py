"""The teaching programs in MLX against those in JAX: same weights, same names, same numbers.

python -m pytest tests/test_microgpt_mlx.py        (pip install -r microgpt/mlx/requirements.txt)

What all four programs have in common is tested in tests/test_microgpt.py.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

mx = pytest.importorskip(
    "mlx.core", reason="no MLX here: pip install -r microgpt/mlx/requirements.txt", exc_type=ImportError
)

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = ["emma", "olivia", "ava", "maximiliana", "bo", "jacqueline", "kit", "william", "theo", "quinn", "xavier"]


def load_program(name: str) -> Any:
    path = ROOT / "microgpt" / name / "main.py"
    spec = importlib.util.spec_from_file_location(f"microgpt_{name}_main", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


jax_single, jax_batched, mlx_single, mlx_batched = map(load_program, ("jax", "jax_batched", "mlx", "mlx_batched"))
single_grad, batch_grad = (jax.jit(jax.value_and_grad(module.loss_fn)) for module in (jax_single, jax_batched))


def same_params(module: Any, scale: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """One set of weights, for JAX and for MLX."""
    params = {name: scale * p for name, p in module.init_params(jax.random.key(0), 27).items()}
    return params, {name: mx.array(np.array(p)) for name, p in params.items()}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], rtol: float, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(np.array(ours[name]), np.array(theirs[name]), rtol, atol, err_msg=name)


@pytest.mark.parametrize("scale", [1.0, 2.0])  # the weights of the start, and such as make attention sharp
def test_first_loss_and_gradients_of_a_name_are_those_of_jax(scale):
    params, params_mx = same_params(jax_single, scale)
    for name in NAMES:
        loss, grads = single_grad(params, *map(np.array, jax_single.encode(name, LETTERS)))
        loss_mx, grads_mx = mx.value_and_grad(mlx_single.loss_fn)(params_mx, *mlx_single.encode(name, LETTERS))
        np.testing.assert_allclose(loss_mx.item(), loss, rtol=1e-5)
        assert_same(grads_mx, grads, rtol=1e-4, atol=1e-5)


def test_first_loss_and_gradients_of_a_batch_are_those_of_jax():
    params, params_mx = same_params(jax_batched)
    loss, grads = batch_grad(params, *jax_batched.make_batch(NAMES, 3, 32))
    loss_mx, grads_mx = mx.value_and_grad(mlx_batched.loss_fn)(params_mx, *mlx_batched.make_batch(NAMES, 3, 32))
    np.testing.assert_allclose(loss_mx.item(), loss, rtol=1e-5)
    assert_same(grads_mx, grads, rtol=0, atol=1e-5)


def test_batches_are_those_of_jax():
    for ours, theirs in zip(mlx_batched.make_batch(NAMES, 5, 6), jax_batched.make_batch(NAMES, 5, 6), strict=True):
        np.testing.assert_array_equal(np.array(ours), theirs)
        assert np.array(ours).dtype.kind == theirs.dtype.kind


def test_adam_is_that_of_jax():
    params, params_mx = same_params(jax_single)
    grads = {name: p * p - 0.003 for name, p in params.items()}
    state, state_mx = ({name: 0 * p for name, p in ps.items()} for ps in (params, params_mx))
    new, new_mx = (params, state, state), (params_mx, state_mx, state_mx)
    for step in range(3):
        new = jax_single.adam_update(new[0], grads, *new[1:], step, 0.01)
        new_mx = mlx_single.adam_update(
            new_mx[0], {name: mx.array(np.array(g)) for name, g in grads.items()}, *new_mx[1:], step, 0.01
        )
    for ours, theirs in zip(new_mx, new, strict=True):
        assert_same(ours, theirs, rtol=1e-4, atol=1e-7)


def test_fifty_steps_end_where_those_of_jax_end(capsys, monkeypatch):
    for module in (jax_batched, mlx_batched):
        monkeypatch.setattr(module, "BATCH_SIZE", 8)  # MLX's matrix products on a CPU are slow
    params, params_mx = same_params(jax_batched)
    _, losses = jax_batched.train(params, NAMES, LETTERS, 50)
    _, losses_mx = mlx_batched.train(params_mx, NAMES, LETTERS, 50)
    assert len(losses_mx) == len(losses) == 50 and losses[-1] < losses[0] - 1
    assert abs(np.mean(losses_mx) - np.mean(losses)) < 0.02
    np.testing.assert_allclose(losses_mx[:3], losses[:3], rtol=0, atol=1e-3)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0] for line in printed[5:]] == [line.split("|")[0] for line in printed[:5]]

    params, params_mx = same_params(jax_single)
    _, losses = jax_single.train(params, NAMES, LETTERS, 50)
    _, losses_mx = mlx_single.train(params_mx, NAMES, LETTERS, 50)
    assert abs(np.mean(losses_mx) - np.mean(losses)) < 0.02


def test_vmap_agrees_with_the_batch_that_is_written_out(monkeypatch):
    _, params = same_params(jax_batched, 2.0)
    input_ids, targets, pad_mask, target_mask = mlx_batched.make_batch(NAMES, 0, len(NAMES))
    logits_BTV = np.array(mlx_batched.forward_batch(params, input_ids, pad_mask))
    np.testing.assert_allclose(mlx_batched.forward_vmap(params, input_ids, pad_mask), logits_BTV, rtol=1e-5, atol=1e-5)

    # the single program's forward, lifted as in JAX
    monkeypatch.setattr(mlx_single, "N_LAYER", 2)
    monkeypatch.setattr(mlx_single, "N_EMBD", 64)
    lifted = mx.vmap(mlx_single.forward, in_axes=(None, 0))(params, input_ids)
    kept = ~np.array(pad_mask)
    np.testing.assert_allclose(np.array(lifted)[kept], logits_BTV[kept], rtol=1e-5, atol=1e-5)

    # and its gradients, name by name
    _, grads = mx.value_and_grad(mlx_batched.loss_fn)(params, input_ids, targets, pad_mask, target_mask)
    total = {name: mx.zeros_like(p) for name, p in params.items()}
    for row, name in enumerate(NAMES):
        n = len(name) + 1
        one = mx.grad(mlx_single.loss_fn)(params, input_ids[row, :n], targets[row, :n])
        total = {key: total[key] + n * one[key] for key in total}
    count = int(np.array(target_mask).sum())
    assert_same({key: value / count for key, value in total.items()}, grads, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_that_counts():
    _, params = same_params(jax_batched, 2.0)
    input_ids, targets, pad_mask, target_mask = mlx_batched.make_batch(NAMES, 0, len(NAMES))
    loss = mlx_batched.loss_fn(params, input_ids, targets, pad_mask, target_mask).item()
    noisy = [mx.where(pad_mask, 5, ids) for ids in (input_ids, targets)]
    for mask in (pad_mask, mx.zeros_like(pad_mask)):
        other = mlx_batched.loss_fn(params, *noisy, mask, target_mask).item()
        assert other == pytest.approx(loss, abs=1e-6)
    everything = mlx_batched.loss_fn(params, *noisy, pad_mask, mx.ones_like(target_mask)).item()
    assert abs(everything - loss) > 1e-2


def test_the_padding_mask_hides_where_the_future_does_not():
    _, params = same_params(jax_batched, 2.0)
    ids, mask = np.arange(16)[None], (np.arange(16) == 3)[None]
    changed = np.where(mask, 20, ids)
    before, after, seen = (
        np.array(mlx_batched.forward_batch(params, mx.array(i), mx.array(m)))
        for i, m in ((ids, mask), (changed, mask), (changed, mask & False))
    )
    np.testing.assert_array_equal(before[~mask], after[~mask])
    assert np.abs(seen - after).max() > 1e-3


def test_names_are_drawn_from_what_was_learnt():
    # one name, learnt by heart
    mx.random.seed(0)
    params, _ = mlx_batched.train(mlx_batched.init_params(27), ["quinn"], LETTERS, 30)
    assert mlx_batched.generate(params, LETTERS, 3) == ["quinn"] * 3
    params, _ = mlx_single.train(mlx_single.init_params(27), ["quinn"], LETTERS, 100)
    assert mlx_single.generate(params, LETTERS) == "quinn"
