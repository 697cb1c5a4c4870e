"""Which devices there are, and how rows spread over them (jax_devices.py, jax_train_utils.py).

python -m pytest tests/test_devices.py
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_devices
import jax_train_utils as utils

ROOT = Path(__file__).resolve().parents[1]


relaxed = settings(deadline=None, max_examples=200)


# ----------------------------------------------------------------------------------------------------------------------
# rows on devices

LAYOUTS = [  # rows, batch_size, devices there -> devices used, micro-batches, rows a device at a time
    ((32, 8, 1), (1, 4, 8)),  # nanoGPT on one device
    ((32, 8, 4), (4, 1, 8)),  # accumulation is global: more devices, fewer micro-batches
    ((32, 8, 8), (8, 1, 4)),
    ((480, 12, 8), (8, 5, 12)),  # GPT-2 on one node
    ((6, 6, 8), (6, 1, 1)),  # two devices are idle
    ((7, 4, 4), (1, 7, 1)),  # a prime number: one device, no more than 4 rows at a time, hence one
    ((64, 64, 3), (2, 1, 32)),
    ((1, 1, 8), (1, 1, 1)),
]


@pytest.mark.parametrize(("given_", "expected"), LAYOUTS)
def test_layout_of_known_cases(given_, expected):
    assert utils.lay_out(*given_) == expected


@relaxed
@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 16))
def test_layout_uses_the_most_devices_that_divide_the_rows(batch_size, accumulation, available):
    rows = batch_size * accumulation
    layout = utils.lay_out(rows, batch_size, available)
    assert layout.devices * layout.micro_batches * layout.rows_per_device == rows
    assert layout.devices <= available
    assert not any(rows % more == 0 for more in range(layout.devices + 1, available + 1))
    assert layout.rows_per_device <= batch_size
    rows_each = rows // layout.devices  # and no fewer micro-batches would do
    assert not any(rows_each % b == 0 for b in range(layout.rows_per_device + 1, min(batch_size, rows_each) + 1))


@relaxed
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9))
def test_padding_repeats_the_last_row_until_full_micro_batches_come_out(rows, batch_size, devices):
    rows_RT = np.arange(2 * rows).reshape(rows, 2)
    padded_RT, micro_batches = utils.pad_rows(rows_RT, batch_size, devices)
    np.testing.assert_array_equal(padded_RT[:rows], rows_RT)
    assert (padded_RT[rows:] == rows_RT[-1]).all()
    per_device, rest = divmod(len(padded_RT), micro_batches * devices)
    assert rest == 0 and 1 <= per_device <= batch_size
    assert len(padded_RT) - rows < devices * per_device  # never a micro-batch of padding alone


def test_padding_leaves_full_micro_batches_alone():
    rows_RT = np.arange(24).reshape(12, 2)
    padded_RT, micro_batches = utils.pad_rows(rows_RT, batch_size=4, devices=1)
    np.testing.assert_array_equal(padded_RT, rows_RT)
    assert micro_batches == 3


# ----------------------------------------------------------------------------------------------------------------------
# several devices: one process with eight virtual ones, as a process has its devices from its start

EIGHT_DEVICES = """
import json
import jax
import numpy as np
import jax_devices
import jax_train_utils as utils
from jax_transformer import GPTConfig

results = {"errors": {}, "runs": {}}
for device in ("toaster", "cuda:one", "cpu:-1", "cpu:8"):
    try:
        jax_devices.find_devices(device)
    except ValueError as error:
        results["errors"][device] = str(error)
results["all"], results["one"], results["mps"] = (len(jax_devices.find_devices(d)) for d in ("cpu", "cpu:3", "mps"))
results["id"] = jax_devices.find_devices("cpu:3")[0].id

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("/backend_compile_duration") else None
)
config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=13)
optimizer = utils.make_optimizer(beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0)
ROWS = 16
for available, batch_size in ((1, 4), (4, 2), (8, 4)):
    layout = utils.lay_out(ROWS, batch_size, available)
    mesh = utils.make_mesh(jax.devices()[: layout.devices])
    state = utils.fresh_state(config, optimizer, 0, mesh)
    step, losses = utils.compile_train_step(config, optimizer, 0, mesh), []
    compilations = []
    for iteration in range(5):
        tokens_RW = np.random.default_rng(iteration).integers(0, 13, (ROWS, 9), dtype=np.int32)
        pair = tokens_RW[:, :-1], tokens_RW[:, 1:]
        x_ABT, y_ABT = (utils.shard_rows(rows, layout.micro_batches, mesh) for rows in pair)
        compiled_before = len(compiled)
        state, metrics = step(state, x_ABT, y_ABT, np.float32(1e-2), np.int32(iteration))
        jax.block_until_ready(state)  # virtual CPU devices deadlock when steps are dispatched ahead
        losses.append(float(metrics["loss"]))
        compilations.append(len(compiled) - compiled_before)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(np.asarray(x_ABT).reshape(ROWS, 8), tokens_RW[:, :-1])
    for shard in x_ABT.addressable_shards:  # each device has its own rows of every micro-batch, whole
        assert shard.data.shape == (layout.micro_batches, layout.rows_per_device, 8), shard.data.shape
    for leaf in jax.tree.leaves(state.params):
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1
    # 13 rows of evaluation, which no number of devices but one divides
    x_RT, y_RT = tokens_RW[:13, :-1], tokens_RW[:13, 1:]
    padded = [utils.pad_rows(rows, batch_size, layout.devices) for rows in (x_RT, y_RT)]
    sharded = [utils.shard_rows(rows, micro_batches, mesh) for rows, micro_batches in padded]
    program = step.lower(state, x_ABT, y_ABT, np.float32(1e-2), np.int32(0)).compile().as_text()
    before_entry, entry = program.split("ENTRY")
    row_losses = utils.compile_eval(config, mesh)(state.params, *sharded)
    results["runs"][available] = {
        "layout": layout, "losses": losses, "compilations": compilations,
        "eval": np.asarray(row_losses).ravel()[:13].tolist(),
        "all_reduces": [part.count(" all-reduce(") for part in (before_entry, entry)],
    }
print(json.dumps(results))
"""


def run_python(code: str, **environment: str) -> str:
    """What a process of its own prints on stdout."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def eight_devices() -> dict:
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    return json.loads(run_python(EIGHT_DEVICES, **devices, JAX_DISABLE_MOST_OPTIMIZATIONS="1").splitlines()[-1])


def test_losses_do_not_depend_on_the_number_of_devices():
    one, four, eight = (eight_devices()["runs"][n] for n in ("1", "4", "8"))
    assert [run["layout"] for run in (one, four, eight)] == [[1, 4, 4], [4, 2, 2], [8, 1, 2]]
    assert max(abs(np.diff(one["losses"]))) > 1e-3  # there is something to compare
    for run in (four, eight):
        np.testing.assert_allclose(run["losses"], one["losses"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(run["eval"], one["eval"], rtol=0, atol=1e-5)


def test_devices_exchange_gradients_once_an_update_not_once_a_micro_batch():
    runs = eight_devices()["runs"]
    assert runs["4"]["layout"][1] == 2  # so there is a loop over micro-batches, which is no part of ENTRY
    assert [runs[n]["all_reduces"][0] for n in "148"] == [0, 0, 0]
    assert [runs[n]["all_reduces"][1] > 0 for n in "148"] == [False, True, True]


def test_step_is_compiled_once_on_any_number_of_devices():
    # A step that returned its state placed otherwise than it took it would be compiled again.
    for run in eight_devices()["runs"].values():
        assert run["compilations"] == [1, 0, 0, 0, 0]


def test_a_cpu_is_described_with_its_cores(monkeypatch):
    cpu = jax.devices("cpu")[:1]
    for cores, text in ((1, "1 x cpu (1 core)"), (8, "1 x cpu (8 cores)")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert jax_devices.described(cpu) == text


def test_device_option_picks_one_or_all_of_a_kind():
    results = eight_devices()
    assert (results["all"], results["one"], results["id"], results["mps"]) == (8, 1, 3, 8)


def test_device_option_that_names_nothing_is_refused_and_named():
    errors = eight_devices()["errors"]
    assert errors.keys() == {"toaster", "cuda:one", "cpu:-1", "cpu:8"}
    assert all(device in error and "\n" not in error for device, error in errors.items())
    assert "8 such devices" in errors["cpu:8"]


def test_missing_kind_of_device_is_refused_in_one_line():
    code = """
import jax_devices
try:
    print("found", jax_devices.find_devices("tpu"))
except ValueError as error:
    print(error)
"""
    printed = run_python(code)
    if printed.startswith("found"):
        pytest.skip("this machine has a TPU")
    assert printed.startswith("device=tpu: JAX finds no such device")
    assert printed.count("\n") == 1
