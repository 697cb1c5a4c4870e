"""One update and what it is made of (jax_train_utils.py): schedule, AdamW, state, precision.

python -m pytest tests/test_train_utils.py
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_train_utils as utils
from jax_transformer import GPTConfig, cross_entropy, forward

pytestmark = pytest.mark.usefixtures("exact_and_quick")

ROOT = Path(__file__).resolve().parents[1]
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=13)
ADAMW = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_clip": 1.0}
OPTIMIZER = utils.make_optimizer(**ADAMW)
relaxed = settings(deadline=None, max_examples=200)


@functools.cache
def compiled_step(config: GPTConfig = TINY, seed: int = 0):
    return utils.compile_train_step(config, OPTIMIZER, seed)


@functools.cache
def initial_state() -> utils.TrainState:
    return jax.tree.map(np.asarray, utils.init_state(TINY, OPTIMIZER, 0))


def new_state(loss_scale: float = 1.0) -> utils.TrainState:
    """A fresh state, of which a step may take the memory. The parameters depend on neither dropout nor dtype."""
    params, adam_state = jax.tree.map(jnp.array, (initial_state().params, initial_state().opt_state[0]))
    return utils.TrainState(params, (adam_state, utils.LossScale(jnp.float32(loss_scale), jnp.int32(0))))


def random_batch(A: int = 1, B: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    shape = (A, B, TINY.block_size + 1)
    tokens_ABW = np.random.default_rng(seed).integers(0, TINY.vocab_size, shape, dtype=np.int32)
    return tokens_ABW[..., :-1].copy(), tokens_ABW[..., 1:].copy()


def update(step, state, batch, iteration: int = 0, learning_rate: float = 1e-2):
    """One update; the metrics as Python numbers. The state given is gone after it, as in training."""
    state, metrics = step(state, *batch, np.float32(learning_rate), np.int32(iteration))
    return state, {name: value.item() for name, value in metrics.items()}


def on_host(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]  # copies, which donation does not take away


def assert_bit_identical(some: list[np.ndarray], others: list[np.ndarray]) -> None:
    assert [(a.dtype, a.shape, a.tobytes()) for a in some] == [(a.dtype, a.shape, a.tobytes()) for a in others]


# ----------------------------------------------------------------------------------------------------------------------
# learning rate


def test_schedule_at_nanogpts_defaults():
    lr = functools.partial(
        utils.warmup_cosine, learning_rate=6e-4, warmup_iters=2000, lr_decay_iters=600_000, min_lr=6e-5
    )
    assert lr(0) == pytest.approx(6e-4 / 2001)  # not 0: the first update counts too
    assert lr(1999) == pytest.approx(6e-4 * 2000 / 2001)
    assert lr(2000) == pytest.approx(6e-4)
    assert lr(301_000) == pytest.approx((6e-4 + 6e-5) / 2)  # half-way down
    assert lr(600_000) == pytest.approx(6e-5)
    assert lr(600_001) == lr(10**9) == 6e-5


@relaxed
@given(st.integers(0, 400), st.integers(0, 100), st.integers(1, 200), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_schedule_is_warm_up_then_half_a_cosine_then_flat(iteration, warmup_iters, decay, peak, share):
    end, floor = warmup_iters + decay, share * peak
    ramp = (iteration + 1) / (warmup_iters + 1)
    angle = math.pi / 2 * min(max(iteration - warmup_iters, 0) / decay, 1)
    expected = peak * ramp if ramp < 1 else floor + (peak - floor) * math.cos(angle) ** 2
    assert utils.warmup_cosine(iteration, peak, warmup_iters, end, floor) == pytest.approx(expected, rel=1e-9)


def test_schedule_without_warm_up_begins_at_the_peak():
    assert utils.warmup_cosine(0, 1e-3, 0, 100, 1e-4) == 1e-3


def test_schedule_without_decay_falls_to_the_floor_after_warm_up():
    rates = [utils.warmup_cosine(iteration, 1e-3, 10, 10, 1e-4) for iteration in (9, 10, 11, 12)]
    assert rates == pytest.approx([1e-3 * 10 / 11, 1e-3, 1e-4, 1e-4])  # nanoGPT divides by zero at 10


# ----------------------------------------------------------------------------------------------------------------------
# AdamW


def numpy_adamw(params, gradients, learning_rate, *, beta1, beta2, weight_decay, grad_clip):
    """Loshchilov & Hutter's algorithm 2 in float64 for a dict of arrays, after clipping by the global norm."""
    params = {name: np.float64(p) for name, p in params.items()}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        shrink = min(1.0, grad_clip / norm) if grad_clip else 1.0
        for name, g in gradient.items():
            m[name] = beta1 * m[name] + (1 - beta1) * shrink * g
            v[name] = beta2 * v[name] + (1 - beta2) * (shrink * g) ** 2
            step = m[name] / (1 - beta1**t) / (np.sqrt(v[name] / (1 - beta2**t)) + 1e-8)
            decay = weight_decay * params[name] if params[name].ndim >= 2 else 0
            params[name] = params[name] - learning_rate * (step + decay)
    return params


def toy_params_and_gradients() -> tuple[dict, list[dict]]:
    """A bias, a matrix and a stack of matrices; gradient norms between 0.04 and 40."""
    random = np.random.default_rng(0)
    shapes = {"bias": (5,), "matrix": (4, 3), "stack": (2, 3, 2)}
    draw = {name: functools.partial(random.standard_normal, shape, np.float32) for name, shape in shapes.items()}
    sizes = (1.0, 0.01, 10.0, 0.1, 3.0, 0.3)
    return {name: f() for name, f in draw.items()}, [{name: size * f() for name, f in draw.items()} for size in sizes]


def run_optimizer(options: dict) -> dict[str, np.ndarray]:
    params, gradients = toy_params_and_gradients()
    optimizer = utils.make_optimizer(**options)
    state = optimizer.init(params)
    for gradient in gradients:
        directions, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, directions)
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize(
    "change",
    [{}, {"grad_clip": 0.0}, {"weight_decay": 0.0}, {"beta1": 0.5, "beta2": 0.99}, {"grad_clip": 1e6}],
    ids=str,
)
def test_optimizer_is_adamw_written_in_numpy(change):
    options = {**ADAMW, **change}
    truth = numpy_adamw(*toy_params_and_gradients(), 0.1, **options)
    for name, p in run_optimizer(options).items():
        np.testing.assert_allclose(p, truth[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_update_that_is_not_finite_keeps_the_averages_and_their_count_bit_for_bit():
    params, gradients = toy_params_and_gradients()
    optimizer = utils.make_optimizer(**ADAMW)
    _, before = optimizer.update(gradients[0], optimizer.init(params), params)
    bad = jax.tree.map(lambda g: g * np.nan, gradients[1])
    _, after = optimizer.update(bad, before, params, finite=np.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    _, moved = optimizer.update(gradients[1], before, params, finite=np.bool_(True))
    assert not np.array_equal(moved[1].mu["matrix"], before[1].mu["matrix"])


def test_compiled_update_copies_no_average():
    """What a step needs besides its own state: no second mu and nu, which for GPT-2 would be a gigabyte."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=8, vocab_size=4096)
    mesh = utils.make_mesh(jax.devices()[:1])
    state = utils.fresh_state(config, OPTIMIZER, 0, mesh)
    ids = utils.shard_rows(np.zeros((1, 8), np.int32), 1, mesh)
    compiled = utils.compile_train_step(config, OPTIMIZER, 0, mesh).lower(state, ids, ids, 1e-3, 0).compile()
    params_bytes = sum(p.nbytes for p in jax.tree.leaves(state.params))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.8 * params_bytes


def test_weight_decay_is_for_tensors_of_two_or_more_dimensions():
    with_decay, without = run_optimizer(ADAMW), run_optimizer({**ADAMW, "weight_decay": 0.0})
    np.testing.assert_array_equal(with_decay["bias"], without["bias"])
    for name in ("matrix", "stack"):
        assert np.abs(with_decay[name] - without[name]).max() > 1e-3


def test_grad_clip_0_is_no_clipping_and_clipping_matters():
    unclipped, unreachable, clipped = (run_optimizer({**ADAMW, "grad_clip": c}) for c in (0.0, 1e6, 1.0))
    for name in clipped:
        np.testing.assert_allclose(unclipped[name], unreachable[name], rtol=1e-6)
        assert np.abs(clipped[name] - unclipped[name]).max() > 1e-2


def test_step_reports_the_gradient_norm_before_clipping_and_the_loss_before_the_update():
    (x_ABT, y_ABT), params = random_batch(), new_state().params
    params = jax.tree.map(lambda p: 3 * p, params)  # so that the gradient is large enough to be clipped
    loss, grads = jax.jit(
        jax.value_and_grad(lambda params: cross_entropy(forward(params, x_ABT[0], TINY), y_ABT[0]).mean())
    )(params)
    norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert norm > ADAMW["grad_clip"]
    _, metrics = update(compiled_step(), utils.TrainState(params, new_state().opt_state), (x_ABT, y_ABT))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["finite"] is True
    assert metrics["loss_scale"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# the step


def test_accumulated_micro_batches_are_one_large_batch():
    x_ABT, y_ABT = random_batch(A=4, B=2)
    split, split_metrics = update(compiled_step(), new_state(), (x_ABT, y_ABT))
    whole, metrics = update(compiled_step(), new_state(), (x_ABT.reshape(1, 8, -1), y_ABT.reshape(1, 8, -1)))
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert split_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-6)
    # The gradients are compared, in Adam's moments: its first step is of one length whatever they are.
    for a, b in zip(on_host(split.opt_state), on_host(whole.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_training_learns_a_batch_by_heart():
    state, batch, losses = new_state(), random_batch(), []
    for iteration in range(30):
        state, metrics = update(compiled_step(), state, batch, iteration)
        losses.append(metrics["loss"])
    assert losses[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_step_takes_over_the_memory_of_the_old_state():
    old = new_state()
    new, _ = update(compiled_step(), old, random_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.opt_state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


# ----------------------------------------------------------------------------------------------------------------------
# dropout

DROPPING = dataclasses.replace(TINY, dropout=0.3)


def loss_with_dropout(batch, iteration: int = 0, seed: int = 0) -> float:
    return update(compiled_step(DROPPING, seed), new_state(), batch, iteration)[1]["loss"]


def test_dropout_follows_from_seed_and_iteration():
    batch = random_batch(A=4, B=2)
    first = loss_with_dropout(batch, iteration=3)
    assert loss_with_dropout(batch, iteration=3) == first
    assert loss_with_dropout(batch, iteration=4) != first
    assert loss_with_dropout(batch, iteration=3, seed=1) != first


def test_micro_batches_of_one_iteration_have_masks_of_their_own():
    # Were there one mask for all, micro-batches could change places without changing the loss.
    x_ABT, y_ABT = random_batch(A=4, B=2)
    swapped = x_ABT[::-1].copy(), y_ABT[::-1].copy()
    change = abs(loss_with_dropout((x_ABT, y_ABT)) - loss_with_dropout(swapped))
    rounding = abs(
        update(compiled_step(), new_state(), (x_ABT, y_ABT))[1]["loss"]
        - update(compiled_step(), new_state(), swapped)[1]["loss"]
    )
    assert rounding < 1e-6 < 1e-5 < change


def test_weights_and_dropout_have_keys_of_their_own():
    weights_key, dropout_key = utils.random_keys(7)
    again, other = utils.random_keys(7), utils.random_keys(8)
    assert weights_key == again[0] and dropout_key == again[1]
    assert len({jax.random.key_data(key).tobytes() for key in (weights_key, dropout_key, *other)}) == 4


# ----------------------------------------------------------------------------------------------------------------------
# what is not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weight_leaves_the_state_bit_for_bit(bad):
    state, _ = update(compiled_step(), new_state(), random_batch())  # moments that are not zero
    kernel = state.params["h"]["0"]["mlp"]["c_fc"]["kernel"]
    state.params["h"]["0"]["mlp"]["c_fc"]["kernel"] = kernel.at[0, 0].set(bad)
    before = on_host(state)
    state, metrics = update(compiled_step(), state, random_batch(seed=1), iteration=1)
    assert metrics["finite"] is False
    assert_bit_identical(on_host(state), before)


def test_one_bad_micro_batch_skips_the_whole_update_and_training_goes_on_after_it():
    good, (x_ABT, y_ABT) = random_batch(A=4, B=2), random_batch(A=4, B=2, seed=1)
    x_ABT[2, 1, 0] = TINY.vocab_size  # an id outside the vocabulary gives NaN
    state, _ = update(compiled_step(), new_state(), good)
    before = on_host(state)
    state, metrics = update(compiled_step(), state, (x_ABT, y_ABT), iteration=1)
    assert metrics["finite"] is False and math.isnan(metrics["loss"])
    assert_bit_identical(on_host(state), before)
    state, metrics = update(compiled_step(), state, good, iteration=2)
    assert metrics["finite"] is True
    assert any((a != b).any() for a, b in zip(on_host(state.params), before, strict=False))


# ----------------------------------------------------------------------------------------------------------------------
# lower precision

HALF = dataclasses.replace(TINY, dtype="float16")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of numpy's memory on a CPU")
def test_arrays_in_numpys_memory_are_copied_to_such_as_a_step_can_take_over():
    raw = np.zeros(4096 + 64, np.float32)
    start = (-raw.ctypes.data % 64) // 4
    numpys = raw[start : start + 4096]  # where XLA takes memory over without a copy
    given = jax.device_put(numpys, may_alias=True)
    assert given.unsafe_buffer_pointer() == numpys.ctypes.data  # or this test shows nothing
    own = utils.in_own_memory({"a": given})["a"]
    numpys[:] = 1
    assert given.is_deleted() and (np.asarray(own) == 0).all()
    place = own.unsafe_buffer_pointer()
    taken_over = jax.jit(lambda a: a + 1, donate_argnums=0)(own)
    assert taken_over.unsafe_buffer_pointer() == place


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_lower_precision_goes_down_and_keeps_float32_state(dtype):
    config = dataclasses.replace(TINY, dtype=dtype)
    state, batch, losses = new_state(loss_scale=2.0**12 if dtype == "float16" else 1.0), random_batch(), []
    kinds = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for iteration in range(20):
        state, metrics = update(compiled_step(config), state, batch, iteration)
        assert metrics["finite"]
        losses.append(metrics["loss"])
    assert losses[-1] < 0.8 * losses[0]
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == kinds
    assert {kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)} == {np.dtype("float32")}


def test_float16_overflow_halves_the_scale_and_skips_the_update():
    state = new_state(loss_scale=2.0**30)
    before = on_host((state.params, state.opt_state[0]))
    state, metrics = update(compiled_step(HALF), state, random_batch())
    assert metrics["finite"] is False and math.isfinite(metrics["loss"])
    assert metrics["loss_scale"] == 2.0**30  # the one that was too large
    assert state.opt_state[1].scale == 2.0**29
    assert_bit_identical(on_host((state.params, state.opt_state[0])), before)


def test_float16_scale_comes_down_until_training_goes_on():
    state, iteration = new_state(loss_scale=2.0**30), 0
    metrics = {"finite": False}
    while not metrics["finite"]:
        state, metrics = update(compiled_step(HALF), state, random_batch(), iteration)
        iteration += 1
        assert iteration < 20
    assert metrics["loss_scale"] == 2.0 ** (30 - (iteration - 1))


def test_float16_scale_doubles_after_a_row_of_good_updates(monkeypatch):
    monkeypatch.setattr(utils, "LOSS_SCALE_GROWTH_INTERVAL", 3)
    step = utils.compile_train_step(HALF, OPTIMIZER, 0)
    state, scales, good_updates = new_state(loss_scale=2.0**10), [], []
    for iteration in range(9):
        batch = random_batch()
        if iteration == 4:
            batch[0][0, 0, 0] = TINY.vocab_size  # NaN: the scale is halved and the row begins anew
        state, _ = update(step, state, batch, iteration)
        scales.append(math.log2(state.opt_state[1].scale))
        good_updates.append(int(state.opt_state[1].good_updates))
    assert scales == [10, 10, 11, 11, 10, 10, 10, 11, 11]
    assert good_updates == [1, 2, 0, 1, 0, 1, 2, 0, 1]


def test_loss_scale_never_falls_below_1():
    loss_scale = utils.LossScale(jnp.float32(4), jnp.int32(5))
    scales = []
    for _ in range(4):
        loss_scale = utils.update_loss_scale(loss_scale, jnp.asarray(False))
        scales.append(float(loss_scale.scale))
        assert int(loss_scale.good_updates) == 0
    assert scales == [2, 1, 1, 1]


def test_loss_scale_does_not_change_the_update():
    results = []
    for scale in (2.0**6, 2.0**12):
        _, metrics = update(compiled_step(HALF), new_state(scale), random_batch())
        results.append((metrics["loss"], metrics["grad_norm"]))
    assert results[0] == pytest.approx(results[1], rel=2e-3)
    _, exact = update(compiled_step(), new_state(), random_batch())
    assert results[1] == pytest.approx((exact["loss"], exact["grad_norm"]), rel=5e-3)


def test_only_float16_has_a_loss_scale(monkeypatch):
    monkeypatch.setattr(utils, "init_params", lambda config, key: {"weight": jnp.zeros(2)})  # nothing to compile
    for dtype, scale in {"float16": 65536, "bfloat16": 1, "float32": 1}.items():
        loss_scale = utils.init_state(dataclasses.replace(TINY, dtype=dtype), OPTIMIZER, 0).opt_state[1]
        assert (float(loss_scale.scale), int(loss_scale.good_updates)) == (scale, 0)


# ----------------------------------------------------------------------------------------------------------------------
# state and evaluation


def test_abstract_state_describes_a_fresh_one():
    mesh = utils.make_mesh(jax.devices()[:1])
    state = utils.fresh_state(TINY, OPTIMIZER, 3, mesh)
    described = utils.abstract_state(TINY, OPTIMIZER, mesh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(described), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert str(jax.tree.structure(state)) == str(jax.tree.structure(described))
    assert_bit_identical(on_host(state), on_host(utils.init_state(TINY, OPTIMIZER, 3)))
    assert isinstance(state.opt_state[1], utils.LossScale)
    assert optax.tree_utils.tree_get(state.opt_state, "count") == 0


def test_evaluation_is_the_mean_loss_of_each_row_without_dropout():
    state, (x_ABT, y_ABT) = new_state(), random_batch(A=3, B=2)
    losses_AB = utils.compile_eval(DROPPING)(state.params, x_ABT, y_ABT)
    assert losses_AB.shape == (3, 2) and losses_AB.dtype == jnp.float32
    row_loss = jax.jit(lambda x_T, y_T: cross_entropy(forward(state.params, x_T[None], TINY), y_T[None]).mean())
    one_by_one = [row_loss(*row) for row in zip(x_ABT.reshape(6, -1), y_ABT.reshape(6, -1), strict=True)]
    np.testing.assert_allclose(np.ravel(losses_AB), one_by_one, rtol=1e-6)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))  # training goes on with them


def test_step_refuses_targets_of_another_shape():
    x_ABT, y_ABT = random_batch()
    with pytest.raises(AssertionError, match=r"\(1, 8, 8\).*\(1, 3, 8\)"):
        compiled_step()(new_state(), x_ABT, y_ABT[:, :3], np.float32(0.1), np.int32(0))
