"""What one update is: learning rate, optimizer, train state, the compiled steps, and how rows spread over devices.

Everything here is a plain function of plain trees; `train_jax.py` is the loop around it.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_host_memory
from jax_transformer import GPTConfig, Params, abstract_params, cross_entropy, forward, init_params

# Dynamic loss scaling as in torch's GradScaler, of which nanoGPT's float16 makes use.
INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_GROWTH_INTERVAL = 2000  # good updates in a row before the scale doubles


def warmup_cosine(iteration: int, learning_rate: float, warmup_iters: int, lr_decay_iters: int, min_lr: float) -> float:
    """Linear warm-up, half a cosine down to `min_lr` at `lr_decay_iters`, then flat (nanoGPT's schedule)."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration > lr_decay_iters:
        return min_lr
    progress = (iteration - warmup_iters) / max(lr_decay_iters - warmup_iters, 1)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def make_optimizer(
    *, beta1: float, beta2: float, weight_decay: float, grad_clip: float
) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_step` applies: the iteration decides it, not the update count.

    Weight decay is for tensors of two or more dimensions, so never for biases and norm gains. grad_clip=0: no clipping.
    Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    return optax.chain(
        _clip(grad_clip) if grad_clip > 0 else optax.identity(),
        _adam_in_place(beta1, beta2),
        optax.add_decayed_weights(weight_decay, mask=functools.partial(jax.tree.map, lambda p: p.ndim >= 2)),
    )


def global_norm(grads: Params) -> jax.Array:
    """optax.tree.norm, the root of the sum of all squares, a scalar; of one array at least.

    With one sum at the end and not one for each array, since on a GPU each is a kernel, and GPT-2 has 75 arrays.
    """
    squares = [jnp.square(g) if g.ndim < 2 else jnp.sum(jnp.square(g), axis=-1) for g in jax.tree.leaves(grads)]
    joined = jnp.concatenate([square.reshape(-1) for square in squares])
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(joined)))  # the barrier: else XLA takes it apart again


def _clip(max_norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm by a product, as PyTorch does it; a quotient takes a CPU another pass over them all."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1, max_norm / global_norm(grads))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(optax.identity().init, update)


def _adam_in_place(beta1: float, beta2: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, whose averages stay as they are where the update is told `finite=False`.

    From optax's own, XLA on a CPU computes the averages once for the state and again for the direction, and so copies
    the old ones before it overwrites them. Here the direction is made of the new ones, which take the place of the old.
    """

    def update(grads, state, params=None, *, finite=True):
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        mu = jax.tree.map(lambda m, g: jnp.where(finite, (1 - beta1) * g + beta1 * m, m), state.mu, grads)
        nu = jax.tree.map(lambda v, g: jnp.where(finite, (1 - beta2) * g**2 + beta2 * v, v), state.nu, grads)
        mu, nu = jax.lax.platform_dependent(  # what comes before is not computed again after
            mu, nu, cpu=lambda *trees: jax.lax.optimization_barrier(trees), default=lambda *trees: trees
        )
        mu_scale, nu_scale = 1 - beta1**count, 1 - beta2**count
        directions = jax.tree.map(lambda m, v: m / mu_scale / (jnp.sqrt(v / nu_scale) + 1e-8), mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(beta1, beta2).init, update)


# ----------------------------------------------------------------------------------------------------------------------
# state


class LossScale(NamedTuple):
    """float16 only: the loss is multiplied by `scale` so that small gradients do not vanish."""

    scale: jax.Array  # float32 scalar
    good_updates: jax.Array  # int32 scalar, since the scale last changed


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """All that training changes, float32 but for counters.

    Its step is the loop's business: state k is the state after k updates.
    """

    params: Params
    opt_state: Any  # (optax state, LossScale)


def random_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: one for the initial weights, one for dropout."""
    weights_key, dropout_key = jax.random.split(jax.random.key(seed))
    return weights_key, dropout_key


def init_state(config: GPTConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state."""
    return _first_state(config, optimizer, init_params(config, random_keys(seed)[0]))


def _first_state(config: GPTConfig, optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    return TrainState(params, (optimizer.init(params), initial_loss_scale(config.dtype)))


def initial_loss_scale(dtype: str) -> LossScale:
    """Where the loss scale starts; it stays 1 in any type but float16."""
    scale = INITIAL_LOSS_SCALE if dtype == "float16" else 1.0
    return LossScale(jnp.asarray(scale, jnp.float32), jnp.asarray(0, jnp.int32))


def fresh_state(config: GPTConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state on every device of the mesh."""
    state = jax.jit(functools.partial(init_state, config, optimizer, seed), out_shardings=replicated(mesh))()
    jax_host_memory.give_back_freed_memory()  # the compiler's
    return state


def state_of(params: Params, config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state that starts from these parameters; they have to be on every device of the mesh already."""

    def fresh(params: Params) -> Any:  # the parameters stay where they are
        return _first_state(config, optimizer, params).opt_state

    return TrainState(params, jax.jit(fresh, out_shardings=replicated(mesh))(params))


def abstract_state(
    config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, tied_head: bool = True
) -> TrainState:
    """Shapes, dtypes and shardings of a state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(functools.partial(_first_state, config, optimizer), abstract_params(config, tied_head))
    return placed(shapes, replicated(mesh))


def placed(shapes: Any, sharding: NamedSharding) -> Any:
    """A tree of shapes and dtypes, as of `abstract_params`, with a sharding: what a checkpoint is restored into."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def in_own_memory(tree: Any) -> Any:
    """The same arrays, on a CPU copied one after the other to memory of XLA's own; those that were given are deleted.

    Of the arrays that orbax returns some share memory with numpy's, depending on where that lies. XLA cannot reuse such
    memory where an array is donated, so that the first step would take that much a second time.
    """
    leaves, structure = jax.tree.flatten(tree)
    for i, array in enumerate(leaves):
        if next(iter(array.devices())).platform == "cpu":
            leaves[i] = jnp.array(array, copy=True)
            array.delete()
    return jax.tree.unflatten(structure, leaves)


# ----------------------------------------------------------------------------------------------------------------------
# devices: parameters on each of them, rows spread over them


class Layout(NamedTuple):
    """How an iteration's rows go to the devices: `micro_batches` x (`devices` x `rows_per_device`) rows."""

    devices: int
    micro_batches: int
    rows_per_device: int


def lay_out(rows: int, batch_size: int, available_devices: int) -> Layout:
    """Spread `rows` over the most devices that divide them, at most `batch_size` rows a device at a time."""
    devices = max(n for n in range(1, available_devices + 1) if rows % n == 0)
    rows_each = rows // devices
    rows_at_once = next(b for b in range(min(batch_size, rows_each), 0, -1) if rows_each % b == 0)
    return Layout(devices, rows_each // rows_at_once, rows_at_once)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices in a row, along one axis named 'data'."""
    # Auto: outside of shard_map the compiler follows the arrays' shardings. Explicit has to be told at each lookup.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def shard_rows(rows_RT: np.ndarray, micro_batches: int, mesh: Mesh) -> jax.Array:
    """Host rows (R, T) -> device array (A, B, T), B spread over the mesh. Rows keep their order.

    Where several processes share the mesh, the rows are this process's own: `own_rows`.

    The reshape is done here, on the host: inside the compiled step it would lose the sharding.
    """
    rows_ABT = rows_RT.reshape(micro_batches, -1, rows_RT.shape[-1])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, "data", None)), rows_ABT)


def abstract_rows(layout: Layout, T: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What `shard_rows` gives for an iteration's rows, of all processes, without any rows."""
    A, B = layout.micro_batches, layout.devices * layout.rows_per_device
    return jax.ShapeDtypeStruct((A, B, T), jnp.int32, sharding=NamedSharding(mesh, P(None, "data", None)))


def own_rows(rows: int, micro_batches: int, mesh: Mesh) -> np.ndarray:
    """The numbers of the rows, of `rows` in all, that this process's devices compute: all, where it is alone."""
    devices = list(mesh.devices.flat)
    here = [number for number, device in enumerate(devices) if device.process_index == jax.process_index()]
    return np.arange(rows).reshape(micro_batches, len(devices), -1)[:, here].ravel()


def pad_rows(rows_RT: np.ndarray, batch_size: int, devices: int) -> tuple[np.ndarray, int]:
    """Repeat the last row until full micro-batches of at most `batch_size` rows a device come out: (rows, how many).

    Of rows or of their numbers alone. For evaluation, where losses are per row and the surplus is dropped again.
    """
    rows = len(rows_RT)
    per_micro_batch = devices * min(batch_size, -(-rows // devices))
    micro_batches = -(-rows // per_micro_batch)
    return rows_RT[np.minimum(np.arange(micro_batches * per_micro_batch), rows - 1)], micro_batches


# ----------------------------------------------------------------------------------------------------------------------
# the compiled steps


def train_step(
    state: TrainState,
    x_ABT: jax.Array,
    y_ABT: jax.Array,
    learning_rate: jax.Array,
    iteration: jax.Array,
    *,
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    scan_layers: bool = False,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from A micro-batches of B rows: ids and targets (A, B, T), learning_rate and iteration scalars.

    Pure; jit it with `compile_train_step`.

    Returns the new state and scalar metrics: `loss` (mean over the micro-batches, before the update), `grad_norm`
    (before clipping), `finite` and the `loss_scale` that was used. If the loss or the gradient is not finite, the state
    is kept as it was (float16: with half the loss scale). Dropout follows from (seed, iteration, micro-batch) and,
    where `axis` names the mesh axis that B is spread over (inside a shard_map), from the device.
    """
    assert x_ABT.shape == y_ABT.shape, f"inputs {x_ABT.shape} and targets {y_ABT.shape} differ in shape"
    A = x_ABT.shape[0]
    adam_state, loss_scale = state.opt_state
    is_scaled = config.dtype == "float16"

    def scaled_loss(params, x_BT, y_BT, key):
        loss = cross_entropy(forward(params, x_BT, config, dropout_key=key, scan_layers=scan_layers), y_BT).mean()
        return loss * loss_scale.scale if is_scaled else loss, loss

    def accumulate(carry, micro_batch):
        grads, loss = carry
        (_, micro_loss), micro_grads = jax.value_and_grad(scaled_loss, has_aux=True)(state.params, *micro_batch)
        return (jax.tree.map(jnp.add, grads, micro_grads), loss + micro_loss), None

    dropout_key = jax.random.fold_in(random_keys(seed)[1], iteration)
    if axis is not None:
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis))
    micro_batches = (x_ABT, y_ABT, jax.random.split(dropout_key, A))
    zero = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros((), jnp.float32))
    if A == 1:  # no loop around a single micro-batch
        (grads, loss), _ = accumulate(zero, jax.tree.map(lambda a: a[0], micro_batches))
    else:
        (grads, loss), _ = jax.lax.scan(accumulate, zero, micro_batches)
    if axis is not None:  # once an update, whatever the number of micro-batches
        grads, loss = jax.lax.pmean((grads, loss), axis)
    loss = loss / A
    denominator = A * loss_scale.scale if is_scaled else A
    grads = jax.tree.map(lambda g: g / denominator, grads)
    grad_norm = global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    directions, adam_state = optimizer.update(grads, adam_state, state.params, finite=finite)
    params = jax.tree.map(lambda p, d: jnp.where(finite, p - learning_rate * d, p), state.params, directions)
    metrics = {"loss": loss, "grad_norm": grad_norm, "finite": finite, "loss_scale": loss_scale.scale}
    if is_scaled:
        loss_scale = update_loss_scale(loss_scale, finite)
    return TrainState(params, (adam_state, loss_scale)), metrics


def update_loss_scale(loss_scale: LossScale, finite: jax.Array) -> LossScale:
    """Half after an overflow, never below 1; double after LOSS_SCALE_GROWTH_INTERVAL good updates in a row."""
    good = jnp.where(finite, loss_scale.good_updates + 1, 0)
    grow = good >= LOSS_SCALE_GROWTH_INTERVAL
    scale = jnp.where(finite, loss_scale.scale * jnp.where(grow, 2.0, 1.0), jnp.maximum(loss_scale.scale / 2, 1.0))
    return LossScale(scale, jnp.where(grow, 0, good))


def compile_train_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
):
    """`train_step` jitted; it takes the state's memory over (donation), so the old state is gone after a call.

    On several devices each computes the gradient of its own rows by itself, and these are averaged once an update.
    """
    step = functools.partial(train_step, config=config, optimizer=optimizer, seed=seed, scan_layers=scan_layers)
    if mesh is not None and mesh.size > 1:
        rows = P(None, "data", None)
        step = functools.partial(step, axis="data")
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), rows, rows, P(), P()), out_specs=P(), check_vma=False)
    return jax.jit(step, donate_argnums=0)


_one_compilation = threading.Lock()


def compile_ahead(jitted: Any, *arguments: Any) -> Future:
    """A jitted function compiled for such arguments, arrays or their shapes, while the caller goes on.

    result() of what is returned waits for it and is the function to call, or raises what the compiler raised. Several
    are compiled one after the other, as the compiler holds a hundred megabytes for each.
    On an accelerator it is done on return: there XLA tries out kernels as it compiles, and nothing may run beside them.
    """
    lowered = jitted.lower(*arguments)

    def compile_lowered() -> Any:
        with _one_compilation:
            compiled = lowered.compile()
            jax_host_memory.give_back_freed_memory()
        return compiled

    thread = ThreadPoolExecutor(max_workers=1)
    compiling = thread.submit(compile_lowered)
    thread.shutdown(wait=jax.default_backend() != "cpu")
    return compiling


def eval_losses(
    params: Params, x_ABT: jax.Array, y_ABT: jax.Array, *, config: GPTConfig, scan_layers: bool = False
) -> jax.Array:
    """Mean loss of each row, (A, B) float32, without dropout: a whole evaluation in one dispatch."""

    def one_batch(_, batch):
        x_BT, y_BT = batch
        return None, cross_entropy(forward(params, x_BT, config, scan_layers=scan_layers), y_BT).mean(axis=-1)

    return jax.lax.scan(one_batch, None, (x_ABT, y_ABT))[1]


def compile_eval(config: GPTConfig, mesh: Mesh | None = None, scan_layers: bool = False):
    """`eval_losses` jitted: (params, x_ABT, y_ABT) -> losses_AB. On several devices each takes its own rows.

    Every device then gets the losses of all, so that every process sees the same evaluation.
    """
    losses = functools.partial(eval_losses, config=config, scan_layers=scan_layers)
    if mesh is None or mesh.size == 1:
        return jax.jit(losses)
    rows = P(None, "data", None)
    losses = jax.shard_map(losses, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(None, "data"), check_vma=False)
    return jax.jit(losses, out_shardings=replicated(mesh))


def make_evaluate(
    config: GPTConfig,
    mesh: Mesh,
    params: Params,
    batches: Sequence[tuple[jax.Array, jax.Array]],
    rows: int,
    scan_layers: bool = False,
) -> Callable[[Params], list[float]]:
    """A function from parameters like these to the mean loss of each of the batches, in nats, each one dispatch.

    batches: pairs (x_ABT, y_ABT) of one shape, whose first `rows` rows count, as `pad_rows` fills up the rest.
    """
    eval_losses = compile_ahead(compile_eval(config, mesh, scan_layers), params, *batches[0])

    def mean_loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> float:
        losses_AB = eval_losses.result()(params, *batch)
        return float(np.asarray(losses_AB).reshape(-1)[:rows].mean())  # host-device sync

    return lambda params: [mean_loss(params, batch) for batch in batches]
