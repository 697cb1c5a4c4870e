"""Batches as a function of seed and step, and the loader that prefetches them (jax_data.py).

python -m pytest tests/test_data.py
"""

import json
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_data
from jax_codec import DataError
from jax_data import check_dataset, get_batch, prefetch, write_dataset
from tests.preparing import make_data

ROOT = Path(__file__).resolve().parents[1]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def starts_of(data_dir: Path, split: str, step: int, **options) -> list[int]:
    x_BT, _ = get_batch(data_dir, split, step, **options)
    return (x_BT[:, 0] - (20_000 if split == "val" else 0)).tolist()


# ---- batches ------------------------------------------------------------------------------------------------


def test_batch_is_int32_and_y_is_x_moved_on_by_one(tmp_path):
    make_data(tmp_path)
    x_BT, y_BT = get_batch(tmp_path, "train", 3, seed=1, batch_size=5, block_size=16)
    assert x_BT.shape == y_BT.shape == (5, 16)
    assert x_BT.dtype == y_BT.dtype == np.int32
    np.testing.assert_array_equal(y_BT, x_BT + 1)  # the tokens count upwards
    np.testing.assert_array_equal(x_BT, x_BT[:, :1] + np.arange(16))


@pytest.mark.parametrize("sampling", ["random", "epoch", "spread"])
def test_batch_depends_on_its_arguments_only(tmp_path, sampling):
    make_data(tmp_path)
    options = {"seed": 7, "batch_size": 4, "block_size": 8, "sampling": sampling}
    wanted = get_batch(tmp_path, "train", 11, **options)
    for step in (0, 500, 3):
        get_batch(tmp_path, "val", step, **options)
        get_batch(tmp_path, "train_eval", step, **options)
    wanted[0][:] = -1  # a caller may write into a batch: it is the caller's own
    again = get_batch(tmp_path, "train", 11, **options)
    assert again[0].min() >= 0
    np.testing.assert_array_equal(again[1], wanted[1])
    code = (
        "import sys; from jax_data import get_batch; import json;"
        f"print(json.dumps(get_batch(sys.argv[1], 'train', 11, **{options!r})[0].tolist()))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=True
    ).stdout
    assert json.loads(output) == again[0].tolist()


def test_row_does_not_depend_on_batch_size(tmp_path):
    make_data(tmp_path)
    few = starts_of(tmp_path, "train", 5, seed=3, batch_size=3, block_size=8)
    many = starts_of(tmp_path, "train", 5, seed=3, batch_size=40, block_size=8)
    assert many[:3] == few


def test_splits_steps_and_seeds_are_streams_of_their_own(tmp_path):
    make_data(tmp_path, n_train=1000, n_val=1000)
    for sampling in ("random", "epoch"):
        drawn = [
            tuple(starts_of(tmp_path, split, step, seed=seed, batch_size=8, block_size=8, sampling=sampling))
            for split in ("train", "val", "train_eval")
            for step in (0, 1)
            for seed in (0, 1)
        ]
        assert len(set(drawn)) == len(drawn)


def test_train_eval_reads_the_training_file_and_val_its_own(tmp_path):
    make_data(tmp_path)
    assert get_batch(tmp_path, "train_eval", 0, seed=0, batch_size=64, block_size=8)[1].max() < 1000
    assert get_batch(tmp_path, "val", 0, seed=0, batch_size=64, block_size=8)[0].min() >= 20_000


def philox(key: tuple[int, int], n: int) -> list[int]:
    """Philox4x64-10 in plain integers, after Salmon et al. 2011: n numbers from counter 1 on, as numpy does."""
    mask, drawn = 2**64 - 1, []
    for counter in range(1, n // 4 + 2):
        a, b, c, d = counter, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = (right >> 64) ^ b ^ k0, right & mask, (left >> 64) ^ d ^ k1, left & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        drawn += [a, b, c, d]
    return drawn[:n]


@pytest.mark.parametrize(("split", "tag"), [("train", 0), ("val", 1), ("train_eval", 2)])
@pytest.mark.parametrize(("seed", "step"), [(1337, 0), (1337, 4999), (0, 1), (2**32 - 1, 600_000)])
def test_starts_equal_an_independent_computation(tmp_path, split, tag, seed, step):
    make_data(tmp_path, n_train=1000, n_val=1000)
    raw = philox((seed ^ (tag << 32), step), 6)
    by_hand = [int(Fraction(bits >> 11, 2**53) * (1000 - 8)) for bits in raw]
    assert starts_of(tmp_path, split, step, seed=seed, batch_size=6, block_size=8) == by_hand


def test_starts_stay_what_they_were(tmp_path):
    """Golden values: another sampler would silently change every run that is resumed."""
    make_data(tmp_path, n_train=1000, n_val=1000)
    assert starts_of(tmp_path, "train", 0, seed=1337, batch_size=4, block_size=8) == GOLDEN["train"]
    assert starts_of(tmp_path, "val", 7, seed=1337, batch_size=4, block_size=8) == GOLDEN["val"]
    epoch = starts_of(tmp_path, "train", 31, seed=1337, batch_size=4, block_size=8, sampling="epoch")
    assert epoch == GOLDEN["epoch"]  # 124 blocks: the second epoch's first four


GOLDEN = {"train": [912, 976, 112, 820], "val": [269, 388, 706, 809], "epoch": [952, 144, 288, 464]}


@pytest.mark.parametrize("n_tokens", [9, 10, 13])
def test_every_start_can_be_drawn_and_the_last_token_is_reached(tmp_path, n_tokens):
    make_data(tmp_path, n_train=n_tokens)
    x_BT, y_BT = get_batch(tmp_path, "train", 0, seed=0, batch_size=500, block_size=8)
    assert set(x_BT[:, 0].tolist()) == set(range(n_tokens - 8))
    assert y_BT.max() == n_tokens - 1


@relaxed
@given(
    n_tokens=st.integers(2, 60),
    block_size=st.integers(1, 20),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
)
def test_epoch_visits_each_block_once(tmp_path, n_tokens, block_size, batch_size, seed):
    block_size = min(block_size, n_tokens - 1)
    blocks = (n_tokens - 1) // block_size
    folder = tmp_path / str(n_tokens)
    if not folder.exists():
        make_data(folder, n_train=n_tokens)
    options = {"seed": seed, "batch_size": batch_size, "block_size": block_size, "sampling": "epoch"}
    steps = -(-3 * blocks // batch_size)
    starts = [start for step in range(steps) for start in starts_of(folder, "train", step, **options)]
    for epoch in range(3):
        visited = starts[epoch * blocks : (epoch + 1) * blocks]
        assert sorted(visited) == [block * block_size for block in range(blocks)]


@relaxed
@given(n_tokens=st.integers(2, 60), batch_size=st.integers(1, 80), seed=st.integers(0, 2**32 - 1))
def test_spread_takes_one_crop_from_each_of_batch_size_equal_stretches(tmp_path, n_tokens, batch_size, seed):
    folder = tmp_path / str(n_tokens)
    if not folder.exists():
        make_data(folder, n_train=n_tokens)
    starts = starts_of(folder, "train", 0, seed=seed, batch_size=batch_size, block_size=1, sampling="spread")
    stretch = Fraction(n_tokens - 1, batch_size)
    assert all(i * stretch - 1 < start < (i + 1) * stretch for i, start in enumerate(starts))


def test_spread_draws_anywhere_in_a_stretch(tmp_path):
    make_data(tmp_path, n_train=41)
    options = {"batch_size": 4, "block_size": 1, "sampling": "spread"}
    drawn = {start for seed in range(200) for start in starts_of(tmp_path, "train", 0, seed=seed, **options)}
    assert drawn == set(range(40))


def test_epochs_differ_in_order(tmp_path):
    make_data(tmp_path)
    first, second = (
        starts_of(tmp_path, "train", k, seed=0, batch_size=124, block_size=8, sampling="epoch") for k in (0, 1)
    )
    assert sorted(first) == sorted(second)
    assert first != second != sorted(second)


def test_file_prepared_again_in_place_is_read_anew_and_not_reopened_meanwhile(tmp_path):
    options: dict[str, Any] = {"seed": 0, "batch_size": 4, "block_size": 8}
    make_data(tmp_path)
    jax_data._map_windows.cache_clear()
    for step in range(5):
        get_batch(tmp_path, "train", step, **options)
    assert jax_data._map_windows.cache_info().misses == 1
    write_dataset(tmp_path, "gpt2", 50257, np.full(1000, 42), np.full(1000, 43))  # the same sizes
    assert (get_batch(tmp_path, "train", 0, **options)[0] == 42).all()
    write_dataset(tmp_path, "gpt2", 70_000, np.full(1000, 69_999), np.full(1000, 43), dtype="uint32")
    assert (get_batch(tmp_path, "train", 0, **options)[0] == 69_999).all()


def test_uint32_ids_are_read_whole(tmp_path):
    write_dataset(tmp_path, "other", 200_000, 100_000 + np.arange(100), np.arange(100), dtype="uint32")
    check_dataset(tmp_path, 8, 200_000)
    assert get_batch(tmp_path, "train", 0, seed=0, batch_size=2, block_size=8)[0].min() >= 100_000


def test_batch_of_missing_or_short_data_is_an_error_of_one_line(tmp_path):
    with pytest.raises(DataError, match=r"train\.bin is missing: run"):
        get_batch(tmp_path, "train", 0, seed=0, batch_size=1, block_size=8)
    make_data(tmp_path, n_train=8)
    with pytest.raises(DataError, match="8 tokens, too few for block_size 8"):
        get_batch(tmp_path, "train", 0, seed=0, batch_size=1, block_size=8)
    good: dict[str, Any] = {"split": "val", "step": 0, "seed": 0, "batch_size": 1, "block_size": 8}
    for wrong in ({"split": "test"}, {"sampling": "shuffle"}):
        with pytest.raises(ValueError, match="unknown"):
            get_batch(tmp_path, **{**good, **wrong})


def test_module_does_not_import_jax():
    code = "import sys, jax_data; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- prefetching --------------------------------------------------------------------------------------------


def test_prefetch_yields_every_step_in_order():
    batches = prefetch(lambda step: step * step, start=5)
    assert [next(batches) for _ in range(50)] == [step * step for step in range(5, 55)]
    batches.close()


def test_prefetch_makes_nothing_past_its_end():
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step

    assert list(prefetch(make, 5, 9)) == made == [5, 6, 7, 8]
    assert list(prefetch(make, 9, 9)) == [] and len(made) == 4


def test_prefetch_is_at_most_two_ahead():
    made: list[int] = []
    enough = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 2:
            enough.set()
        return step

    batches = prefetch(make, start=0)
    assert next(batches) == 0
    assert enough.wait(30)  # steps 1 and 2 are made while 0 is in use ...
    time.sleep(0.1)  # a thread that ran further ahead would show here
    batches.close()
    assert made == [0, 1, 2]  # ... and no more


def test_prefetch_raises_the_threads_exception_where_the_batch_is_asked_for():
    def make(step: int) -> int:
        if step == 2:
            raise DataError("the disk is gone")
        return step

    batches = prefetch(make, start=0)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError, match="the disk is gone"):
        next(batches)
    with pytest.raises(StopIteration):  # and asking again does not hang
        next(batches)


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_prefetch_ends_its_thread_when_the_consumer_stops_early(leave):
    threads: list[threading.Thread] = []

    def make(step: int) -> int:
        threads.append(threading.current_thread())
        return step

    batches = prefetch(make, start=0)
    next(batches)
    if leave == "close":
        batches.close()
    del batches
    threads[0].join(30)
    assert not threads[0].is_alive()


def test_program_that_leaves_a_prefetcher_running_ends():
    code = "from jax_data import prefetch; batches = prefetch(lambda step: step, 0); next(batches); raise SystemExit(7)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 7
