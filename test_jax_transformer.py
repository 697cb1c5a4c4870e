"""Does it work on this machine? A self check in under a minute; pytest runs the same functions.

python test_jax_transformer.py
python test_jax_transformer.py --accelerator=True     a GPU or TPU against this machine's CPU
"""

import dataclasses
import functools
import importlib.metadata
import math
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

try:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import configurator
    import jax_checkpoint
    import jax_console
    import jax_run_dir
    import jax_train_utils as utils
    from jax_transformer import (
        GPT2_SIZES,
        GPTConfig,
        Params,
        abstract_params,
        cross_entropy,
        forward,
        num_params,
    )
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"✗ {missing}: `make check` installs what is needed, or `pip install -r requirements_jax.txt`")

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=12)
BIASED = dataclasses.replace(SMALL, bias=True)
OPTIMIZER = utils.make_optimizer(beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0)
TUNE = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1]  # what the small model learns to go on with; after a 3 one must look further back


full_precision = functools.partial(jax.default_matmul_precision, "highest")  # a GPU would round float32 to tf32


def random_params(config: GPTConfig) -> Params:
    """Parameters none of which is at its initial value: a bias of 0 or a gain of 1 would hide mistakes."""
    random = np.random.default_rng(0)
    shapes = abstract_params(config)
    return jax.tree.map(lambda a: ((a.ndim == 1) + 0.1 * random.standard_normal(a.shape)).astype(np.float32), shapes)


def random_ids(B: int = 2, T: int = SMALL.block_size) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, SMALL.vocab_size, (B, T), dtype=np.int32))


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params: Params, ids_BT: jax.Array, config: GPTConfig) -> jax.Array:
    with full_precision():
        return forward(params, ids_BT, config)


@functools.cache
def fresh_state() -> utils.TrainState:
    return utils.fresh_state(SMALL, OPTIMIZER, 1337, utils.make_mesh(jax.devices()[:1]))


@functools.cache
def compiled_step():
    return utils.compile_train_step(SMALL, OPTIMIZER, 1337)


# ----------------------------------------------------------------------------------------------------------------------
# the checks: asserts say what was seen, since there may be no pytest to show it


def test_packages_and_devices():
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint")]
    devices = jax.devices()
    if devices[0].platform == "cpu" and nvidia_smi_answers():
        print(
            "  warning: nvidia-smi sees a GPU, but JAX has only a CPU; for the GPU: make train JAX=cuda12 (or cuda13)"
        )
    print(f"  Python {platform.python_version()}, {', '.join(versions)}; {len(devices)} x {devices[0].device_kind}")
    assert float(jnp.arange(10).sum()) == 45, "the device cannot add"


def nvidia_smi_answers() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def test_parameter_counts():
    char = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)
    for config, millions in {char: 10.65, GPTConfig(): 123.59, GPT2_SIZES["gpt2"]: 123.65}.items():
        found = num_params(abstract_params(config)) / 1e6
        assert round(found, 2) == millions, f"{config} has {found:.2f}M parameters, not {millions}M"


def test_forward_shapes_and_dtypes():
    for dtype, ids_BT in {"float32": random_ids(), "bfloat16": random_ids(1, 5)}.items():
        config = dataclasses.replace(BIASED, dtype=dtype)
        logits_BTV = logits_of(random_params(config), ids_BT, config)
        assert logits_BTV.shape == (*ids_BT.shape, SMALL.vocab_size), f"logits have shape {logits_BTV.shape}"
        assert logits_BTV.dtype == jnp.dtype(dtype), f"logits are {logits_BTV.dtype}, not {dtype}"
        assert np.isfinite(np.asarray(logits_BTV, np.float32)).all(), f"{dtype} logits are not finite"


def test_causality():
    params, ids_BT = random_params(BIASED), random_ids()
    changed_BT = ids_BT.at[:, 7].set((ids_BT[:, 7] + 1) % SMALL.vocab_size)
    before_BTV, after_BTV = (np.asarray(logits_of(params, ids, BIASED)) for ids in (ids_BT, changed_BT))
    differs_T = (before_BTV != after_BTV).any(axis=(0, 2))
    assert not differs_T[:7].any(), f"token 7 changes the logits at positions {np.flatnonzero(differs_T[:7])} before it"
    assert differs_T[7:].all(), f"token 7 leaves the logits at positions {7 + np.flatnonzero(~differs_T[7:])} alone"


def test_gradients_are_finite_differences():
    config, ids_BT = dataclasses.replace(BIASED, dtype="float64"), random_ids()
    random = np.random.default_rng(2)
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, random_params(config))
        loss = jax.jit(lambda params: cross_entropy(forward(params, ids_BT[:, :-1], config), ids_BT[:, 1:]).mean())
        grads = jax.device_get(jax.jit(jax.grad(loss))(params))
        leaves, structure = jax.tree.flatten(params)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        for i, (path, grad) in enumerate(zip(paths, jax.tree.leaves(grads), strict=True)):
            direction = random.standard_normal(grad.shape)
            direction /= np.linalg.norm(direction)
            up, down = (
                float(
                    loss(jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]))
                )
                for step in (1e-5, -1e-5)
            )
            slope, expected = (up - down) / 2e-5, float((grad * direction).sum())
            assert math.isclose(slope, expected, rel_tol=1e-5, abs_tol=1e-8), f"{path}: {expected}, in truth {slope}"


def test_dropout():
    config = dataclasses.replace(BIASED, n_layer=1, dropout=0.3)
    params, ids_BT = random_params(config), random_ids()
    training = jax.jit(lambda key: forward(params, ids_BT, config, dropout_key=key))
    first, again, other = (np.asarray(training(jax.random.key(seed))) for seed in (1, 1, 2))
    assert (first == again).all(), "the same key drops something else"
    assert (first != other).any(), "another key drops the same"
    plain, no_rate = (logits_of(params, ids_BT, dataclasses.replace(config, dropout=p)) for p in (0.3, 0.0))
    assert np.array_equal(plain, no_rate), "something is dropped without a key"


@functools.cache
def trained() -> tuple[Params, list[float]]:
    """Parameters after learning the tune, and the loss of every update."""
    mesh = utils.make_mesh(jax.devices()[:1])
    state = jax.tree.map(jnp.copy, fresh_state())  # a step takes over the memory of the state it gets
    endless, width = np.array(TUNE * 4, np.int32), SMALL.block_size + 1
    windows_RW = np.stack([endless[start : start + width] for start in range(len(TUNE))])
    x_ABT, y_ABT = (utils.shard_rows(rows, 2, mesh) for rows in (windows_RW[:, :-1], windows_RW[:, 1:]))
    losses = []
    with full_precision():
        for iteration in range(100):
            learning_rate = utils.warmup_cosine(iteration, 1e-2, 10, 100, 1e-3)
            state, metrics = compiled_step()(state, x_ABT, y_ABT, np.float32(learning_rate), np.int32(iteration))
            losses.append(float(metrics["loss"]))
    return state.params, losses


def test_training_learns_a_tune():
    losses = trained()[1]
    untaught = math.log(SMALL.vocab_size)
    assert abs(losses[0] - untaught) < 0.2, f"the first loss is {losses[0]:.3f}, not about ln 12 = {untaught:.3f}"
    assert losses[-1] < 0.3, f"the loss went from {losses[0]:.3f} only to {losses[-1]:.3f}"


def test_trained_model_plays_the_tune_on():
    params, _ = trained()
    played = TUNE[:5]
    for _ in range(2 * len(TUNE)):  # greedy: the likeliest token each time
        window = played[-SMALL.block_size :]
        padded_BT = np.zeros((1, SMALL.block_size), np.int32)  # on the right, where the causal mask hides it
        padded_BT[0, : len(window)] = window
        played.append(int(logits_of(params, jnp.asarray(padded_BT), SMALL)[0, len(window) - 1].argmax()))
    assert played == (TUNE * 3)[: len(played)], f"it plays {played}"


def test_accumulation_equals_the_full_batch():
    shape = (10, SMALL.block_size + 1)
    tokens_RW = np.random.default_rng(3).integers(0, SMALL.vocab_size, shape, dtype=np.int32)
    metrics = []
    for micro_batches in (1, 2):
        x_ABT, y_ABT = (rows.reshape(micro_batches, -1, shape[1] - 1) for rows in (tokens_RW[:, :-1], tokens_RW[:, 1:]))
        with full_precision():
            state = jax.tree.map(jnp.copy, fresh_state())
            _, seen = compiled_step()(state, x_ABT, y_ABT, np.float32(1e-3), np.int32(0))
        metrics.append({name: float(value) for name, value in seen.items()})
    for name in ("loss", "grad_norm"):
        whole, split = (seen[name] for seen in metrics)
        assert math.isclose(whole, split, rel_tol=1e-5), f"{name} is {whole} of one batch, {split} of its two halves"


def test_checkpoint_comes_back_bit_for_bit():
    state, mesh = fresh_state(), utils.make_mesh(jax.devices()[:1])
    about: dict = {"config": {}, "model": dataclasses.asdict(SMALL), "codec": {}, "best_val_loss": None}
    about |= {"evaluated_at": None, "wandb_run_id": None, "bad_steps": 0, "devices": None}
    about |= {"tied_head": True, "data": None}
    with tempfile.TemporaryDirectory() as folder:
        saver = jax_checkpoint.Saver(Path(folder), keep=1)
        saver.save(7, state.params, state.opt_state, about, is_best=False)
        saver.close()
        step_dir, skipped = jax_run_dir.find_checkpoint(Path(folder))
        assert not skipped, skipped
        assert jax_run_dir.read_meta(step_dir)["model"] == about["model"], "the meta data did not come back"
        wanted = utils.abstract_state(SMALL, OPTIMIZER, mesh)
        restored = jax_checkpoint.restore(step_dir, {"params": wanted.params, "opt_state": wanted.opt_state})
    back = utils.TrainState(**restored)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(back), strict=True):
        same = a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert same, f"{jax.tree_util.keystr(path)} came back changed"


# ----------------------------------------------------------------------------------------------------------------------
# --accelerator=True: what a GPU or TPU computes, against float32 on the CPU. Not named test_: pytest has no accelerator

WIDE = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=512, bias=True)  # heads of 64, as GPT-2's
UNBIASED = dataclasses.replace(WIDE, n_head=6, n_embd=384, bias=False)  # on a Hopper GPU its MLP is kernels of our own


@functools.partial(jax.jit, static_argnums=2)
def logits_and_gradients(params: Params, ids_BT: jax.Array, config: GPTConfig):
    """Logits (B, T, V) of all but the last ids, and the gradients of the mean loss, by the path `forward` takes."""

    def loss_of(params: Params):
        logits_BTV = forward(params, ids_BT[:, :-1], config)
        return cross_entropy(logits_BTV, ids_BT[:, 1:]).mean(), logits_BTV

    grads, logits_BTV = jax.grad(loss_of, has_aux=True)(params)
    return logits_BTV, grads


def computed_on(device: jax.Device, config: GPTConfig) -> dict[str, np.ndarray]:
    """Logits and gradients of one model and batch, float64, by name."""
    ids_BT = np.random.default_rng(1).integers(0, config.vocab_size, (4, config.block_size + 1), dtype=np.int32)
    with full_precision():
        logits_BTV, grads = logits_and_gradients(*jax.device_put((random_params(config), ids_BT), device), config)
    leaves = jax.tree_util.tree_flatten_with_path({"logits": logits_BTV, "gradient": grads})[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x, np.float64) for path, x in leaves}


def check_against_cpu(device: jax.Device, config: GPTConfig, dtype: str, tolerance: float) -> None:
    """All numbers of a tensor within `tolerance` of float32 on the CPU, as the length of the difference vector.

    In relation to the tensor's own length. The biases of the keys are left out: a softmax does not see them, so that
    their gradient is rounding alone.
    """
    D, worst = config.n_embd, (0.0, "")
    seen = computed_on(device, dataclasses.replace(config, dtype=dtype))
    expected = computed_on(jax.devices("cpu")[0], config)
    for name, wanted in expected.items():
        found = seen[name]
        if name.endswith("c_attn.bias"):
            found, wanted = (np.delete(x, slice(D, 2 * D)) for x in (found, wanted))
        assert np.isfinite(found).all(), f"{dtype}: {name} is not finite"
        worst = max(worst, (float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)), name))
    biases = "biases" if config.bias else "no biases"
    print(f"  {dtype}, {biases}, on {device.device_kind}: {worst[1]} is off the most, by {worst[0]:.1e} of its length")
    assert worst[0] <= tolerance, f"{dtype}: {worst[1]} is off by {worst[0]:.1e} of its length, more than {tolerance}"


def accelerator_float32_is_the_cpus(device: jax.Device) -> None:
    check_against_cpu(device, WIDE, "float32", 1e-4)


def accelerator_bfloat16_is_near_the_cpus_float32(device: jax.Device) -> None:
    for config in (WIDE, UNBIASED):
        check_against_cpu(device, config, "bfloat16", 0.05)  # 8 bits of mantissa, through two layers and back


def accelerator_attention_does_not_look_ahead(device: jax.Device) -> None:
    config = dataclasses.replace(WIDE, dtype="bfloat16")
    ids_BT = np.random.default_rng(2).integers(0, WIDE.vocab_size, (2, WIDE.block_size), dtype=np.int32)
    changed_BT = ids_BT.copy()
    changed_BT[:, 70] = (ids_BT[:, 70] + 1) % WIDE.vocab_size
    params = jax.device_put(random_params(config), device)
    before_BTV, after_BTV = (
        np.asarray(logits_of(params, jax.device_put(ids, device), config)) for ids in (ids_BT, changed_BT)
    )
    differs_T = (before_BTV != after_BTV).any(axis=(0, 2))
    assert not differs_T[:70].any(), f"token 70 changes the logits at {np.flatnonzero(differs_T[:70])} before it"
    assert differs_T[70:].all(), "token 70 changes too little after it"


ACCELERATOR_CHECKS = (
    accelerator_float32_is_the_cpus,
    accelerator_bfloat16_is_near_the_cpus_float32,
    accelerator_attention_does_not_look_ahead,
)

# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckConfig:
    """Every option of the self check."""

    accelerator: bool = False  # check the GPU or TPU against the CPU, rather than the installation


def main() -> int:
    config = configurator.parse(CheckConfig)
    checks: list[Callable[[], None]] = [value for name, value in globals().items() if name.startswith("test_")]
    if config.accelerator:
        device = jax.devices()[0]
        if device.platform == "cpu":
            print("no accelerator: JAX sees only a CPU, so there is nothing to check (see JAX_README.md, Installation)")
            return 0
        checks = [functools.partial(check, device) for check in ACCELERATOR_CHECKS]
        print(f"  {device.device_kind} against {jax.devices('cpu')[0].device_kind}")
    failed = []
    for check in checks:
        name = getattr(check, "func", check).__name__.removeprefix("test_").replace("_", " ")
        start = time.perf_counter()
        try:
            check()
        except Exception as error:  # noqa: BLE001  # whatever it is, the other checks may tell more
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"✗ {name}: {type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})")
            failed.append(name)
        else:
            print(f"✓ {name} ({time.perf_counter() - start:.1f} s)", flush=True)
    if failed:
        print(f"✗ {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
        return 1
    print(f"The {'accelerator' if config.accelerator else 'JAX transformer library'} is working correctly.")
    print("✓ ALL TESTS PASSED!")
    return 0


if __name__ == "__main__":
    jax_console.run_script(main)
