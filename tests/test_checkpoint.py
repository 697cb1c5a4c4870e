"""jax_checkpoint and jax_run_dir: what is saved comes back bit for bit, and what was damaged is never used.

python -m pytest tests/test_checkpoint.py
"""

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_checkpoint
import jax_run_dir
from jax_checkpoint import Saver, restore, restore_beside_a_trainer
from jax_manifest import find_fault, write_manifest
from jax_run_dir import CheckpointError, NotFiniteError, RemovedError, SaveError, find_checkpoint, read_meta
from jax_train_utils import make_mesh, replicated
from tests.saving import ABOUT, optimizer_state, save_steps, tree


def abstract(arrays):
    sharding = replicated(make_mesh(jax.devices()[:1]))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("saved")
    save_steps(out_dir, {3: True, 7: False})
    return out_dir


@pytest.fixture
def out_dir(saved: Path, tmp_path: Path) -> Path:
    """A run to damage: checkpoints 3 and 7, of which 3 is the best."""
    return Path(shutil.copytree(saved, tmp_path / "out"))


def test_arrays_come_back_bit_for_bit_in_the_same_tree(out_dir):
    step_dir, skipped = find_checkpoint(out_dir)
    assert (step_dir.name, skipped) == ("7", [])
    wanted = {"params": abstract(tree(7)), "opt_state": abstract(optimizer_state(7))}
    restored = restore(step_dir, wanted)
    assert isinstance(restored["opt_state"], tuple) and type(restored["opt_state"][0]) is type(optimizer_state(7)[0])
    assert equal(restored, {"params": tree(7), "opt_state": optimizer_state(7)})


def test_parameters_can_be_restored_alone_from_latest_and_best(out_dir):
    for which, step in (("latest", 7), ("best", 3), ("3", 3)):
        assert equal(
            restore(find_checkpoint(out_dir, which)[0], {"params": abstract(tree(step))}), {"params": tree(step)}
        )


def test_meta_is_readable_without_orbax_and_names_its_step(out_dir):
    assert read_meta(find_checkpoint(out_dir)[0]) == ABOUT | {
        "schema": jax_run_dir.SCHEMA,
        "step": 7,
        "best_val_loss": 3.5,
    }
    assert jax_run_dir.best_val_loss(out_dir, val="of before schema 4") == 1.5


shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
dtypes = st.sampled_from(["float32", "bfloat16", "float16", "int32", "uint32", "bool"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=8), st.integers(1, 300))
def test_arrays_of_any_size_and_type_come_back_bit_for_bit_joined_or_not(sizes, small):
    rng, values = np.random.default_rng(0), []
    for shape, dtype in sizes:
        values.append(jnp.asarray(rng.integers(0, 2, shape) if dtype == "bool" else rng.normal(9, 4, shape), dtype))
    params = {"h": {str(i): {"w": value} for i, value in enumerate(values)}, "h-1": jnp.float32(1)}
    state = [tuple(values), {"count": jnp.int32(3)}]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax_checkpoint, "SMALL", small)
        saver = Saver(Path(folder), 1)
        saver.save(1, params, state, ABOUT, is_best=False, last=small % 2 == 0)
        saver.close()
        patch.setattr(jax_checkpoint, "SMALL", 64)  # what was joined is told by the checkpoint
        restored = restore(Path(folder, "checkpoints/1"), {"params": abstract(params), "opt_state": abstract(state)})
    assert equal(restored, {"params": params, "opt_state": state})


def test_small_arrays_are_joined_and_named_beside_the_large_ones(tmp_path):
    import orbax.checkpoint as ocp

    large = {"wte": jnp.arange(jax_checkpoint.SMALL // 4, dtype=jnp.float32)}
    saver = Saver(tmp_path, 1)
    saver.save(1, tree(0) | {"large": large}, optimizer_state(0), ABOUT, is_best=False)
    saver.close()
    with ocp.PyTreeCheckpointer() as checkpointer:  # as anyone reads an orbax checkpoint
        saved = checkpointer.restore((tmp_path / "checkpoints/1/params").resolve())
        metadata = checkpointer.metadata((tmp_path / "checkpoints/1/params").resolve())
    assert set(saved) == {"joined.float32", "large.wte"} and np.array_equal(saved["large.wte"], large["wte"])
    names = metadata.item_metadata.custom_metadata["small"]
    assert names == {f"h.{i}.kernel": "float32[4, 4]" for i in range(11)} | {"wte.embedding": "float32[7, 4]"}
    in_order = [leaf.ravel() for leaf in jax.tree.leaves(tree(0))]
    assert np.array_equal(saved["joined.float32"], np.concatenate(in_order))


def test_a_relative_directory_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps(Path("run"), {1: False})
    assert equal(restore(find_checkpoint(Path("run"))[0], {"params": abstract(tree(1))})["params"], tree(1))


def test_donating_right_after_save_does_not_change_what_is_saved(tmp_path):
    consume = jax.jit(lambda params: jax.tree.map(lambda a: a * 0 - 1, params), donate_argnums=0)
    params, saver = tree(5), Saver(tmp_path, 2)
    saver.save(5, params, optimizer_state(5), ABOUT, is_best=False)
    params = consume(params)
    saver.close()
    assert equal(restore(find_checkpoint(tmp_path)[0], {"params": abstract(tree(5))})["params"], tree(5))


def test_only_the_newest_are_kept_and_best_apart(tmp_path):
    save_steps(tmp_path, {1: True, 2: True, 3: False, 4: False, 5: False}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["2"]
    assert find_fault(tmp_path / "best" / "2") is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    params = tree(5)
    bad = {**params, "odd": jnp.asarray([1.0, np.inf, 2.0])}
    saver = Saver(tmp_path, 2)
    saver.save(4, params, optimizer_state(4), ABOUT, is_best=False)
    saver.save(5, bad, optimizer_state(5), ABOUT, is_best=True)
    with pytest.raises(NotFiniteError, match="training diverged before step 5: its weights are not finite"):
        saver.wait()
    saver.close()
    assert [path.name for path in tmp_path.rglob("[45]")] == ["4"]


def test_a_step_that_cannot_be_removed_is_a_note_and_no_failed_save(tmp_path, monkeypatch, capsys):
    def may_not(step_dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(step_dir))

    monkeypatch.setattr(jax_checkpoint, "remove_step", may_not)
    save_steps(tmp_path, {1: True, 2: True}, keep=1)
    said = capsys.readouterr().err
    for which, root in (("latest", "checkpoints"), ("best", "best")):
        assert find_checkpoint(tmp_path, which)[0].name == "2"
        assert f"{tmp_path / root / '1'} is not needed any more and cannot be removed" in said


def test_a_backup_beside_the_steps_is_not_taken_for_one(tmp_path):
    save_steps(tmp_path, {1: False, 2: False})
    for name in ("0002", "2.old", "٣"):
        shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / name)
    save_steps(tmp_path, {3: False, 4: False}, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0002", "2.old", "3", "4", "٣"]
    assert find_checkpoint(tmp_path)[0].name == "4"


def test_readers_beside_a_trainer_take_the_newest_step_where_theirs_is_removed(tmp_path, capsys):
    save_steps(tmp_path, {1: True, 2: False, 3: False}, keep=2)
    wanted = {"params": abstract(tree(1))}
    step_dir, meta, restored = restore_beside_a_trainer(tmp_path, "latest", tmp_path / "checkpoints" / "1", wanted)
    assert (step_dir.name, meta["step"]) == ("3", 3) and equal(restored["params"], tree(3))
    assert "checkpoints/3, since" in capsys.readouterr().err
    with pytest.raises(RemovedError, match=r"checkpoints/1 was removed while it was being read; run the same"):
        restore_beside_a_trainer(tmp_path, "1", tmp_path / "checkpoints" / "1", wanted)


def test_a_step_that_is_removed_file_by_file_while_it_is_read_is_told_as_removed(tmp_path, monkeypatch):
    save_steps(tmp_path, {1: False, 2: False}, keep=2)
    check = jax_checkpoint._check_leaves

    def remove_then_check(path, *rest) -> None:
        if path.parent.name == "1":
            jax_run_dir.remove_step(path.parent)
        check(path, *rest)

    monkeypatch.setattr(jax_checkpoint, "_check_leaves", remove_then_check)
    wanted = {"params": abstract(tree(1))}
    step_dir = restore_beside_a_trainer(tmp_path, "latest", tmp_path / "checkpoints" / "1", wanted)[0]
    assert step_dir.name == "2"


def test_a_step_saved_before_can_become_the_best(out_dir):
    saver = Saver(out_dir, 2)
    saver.copy_to_best(7, {"best_val_loss": 1.25, "evaluated_at": 7})
    saver.close()
    best_dir = find_checkpoint(out_dir, "best")[0]
    assert [p.name for p in (out_dir / "best").iterdir()] == [best_dir.name] == ["7"]
    saved = read_meta(out_dir / "checkpoints" / "7")
    assert read_meta(best_dir) == saved | {"best_val_loss": 1.25, "evaluated_at": 7} != saved


# ----------------------------------------------------------------------------------------------------------------------
# damage


def files_of(step_dir: Path) -> list[Path]:
    return sorted(p for p in step_dir.rglob("*") if p.is_file() and p.stat().st_size)


def flip_a_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, delete])
def test_any_damage_to_any_file_is_found_and_the_one_before_is_used(out_dir, damage):
    newest = out_dir / "checkpoints" / "7"
    for i, path in enumerate(files_of(newest)):
        original = path.read_bytes()
        damage(path, random.Random(i))
        step_dir, skipped = find_checkpoint(out_dir)
        assert step_dir.name == "3", f"{damage.__name__} of {path.relative_to(newest)} went unnoticed"
        assert len(skipped) == 1 and str(newest) in skipped[0]
        path.write_bytes(original)
    assert find_checkpoint(out_dir)[0] == newest  # whole again


def test_two_hundred_random_damages_are_all_found_and_the_step_before_is_used(out_dir):
    newest, rng = out_dir / "checkpoints" / "7", random.Random(20)
    for count in range(200):
        path = rng.choice(files_of(newest))
        original, damage = path.read_bytes(), rng.choice([flip_a_bit, truncate, delete])
        damage(path, rng)
        step_dir, skipped = find_checkpoint(out_dir)
        assert step_dir.name == "3", f"damage {count}, {damage.__name__} of {path.name}, went unnoticed"
        assert len(skipped) == 1
        path.write_bytes(original)
    assert find_checkpoint(out_dir) == (newest, [])


def test_a_step_without_manifest_does_not_exist(out_dir):
    (out_dir / "checkpoints/7/MANIFEST.json").unlink()
    step_dir, skipped = find_checkpoint(out_dir)
    assert step_dir.name == "3" and "never finished" in skipped[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '{"files": 3, "checksum": "x"}', '{"files": {}}'])
def test_a_malformed_manifest_is_damage_not_a_crash(out_dir, content):
    (out_dir / "checkpoints/7/MANIFEST.json").write_text(content)
    assert find_checkpoint(out_dir)[0].name == "3"


def test_an_explicit_step_is_never_replaced_by_another(out_dir):
    (out_dir / "checkpoints/7/meta/metadata").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/7 does not verify: meta/metadata is missing"):
        find_checkpoint(out_dir, "7")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*; there are: 3, 7"):
        find_checkpoint(out_dir, "5")
    with pytest.raises(CheckpointError, match="must be latest, best or a step number"):
        find_checkpoint(out_dir, "newest")


def test_nothing_that_verifies_is_an_error_that_says_why(out_dir, tmp_path):
    for step in (3, 7):
        (out_dir / f"checkpoints/{step}/MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint that verifies in .*7 skipped: .*3 skipped: "):
        find_checkpoint(out_dir)
    shutil.rmtree(out_dir / "best")
    assert not jax_run_dir.holds_run(out_dir)
    save_steps(tmp_path, {3: False})
    with pytest.raises(
        CheckpointError, match=r"no evaluation is better than .* --checkpoint=latest is .*checkpoints/3"
    ):
        find_checkpoint(tmp_path, "best")
    with pytest.raises(CheckpointError, match="there is none; train first"):
        find_checkpoint(tmp_path / "nowhere")


def test_folders_that_are_no_steps_are_ignored(out_dir):
    for name in ("notes", "8.orbax-checkpoint-tmp", "-5", "٣"):
        (out_dir / "checkpoints" / name).mkdir()
    (out_dir / "checkpoints" / "99").write_text("a file")
    assert find_checkpoint(out_dir) == (out_dir / "checkpoints" / "7", [])


def test_a_new_saver_removes_what_a_kill_left_and_saves_over_an_unfinished_step(out_dir):
    shutil.copytree(out_dir / "checkpoints/7", out_dir / "checkpoints/9.orbax-checkpoint-tmp")
    shutil.copytree(out_dir / "checkpoints/7", out_dir / "checkpoints/9")
    (out_dir / "checkpoints/9/MANIFEST.json").unlink()
    save_steps(out_dir, {9: False})
    assert sorted(p.name for p in (out_dir / "checkpoints").iterdir()) == ["7", "9"]
    assert equal(restore(find_checkpoint(out_dir)[0], {"params": abstract(tree(9))})["params"], tree(9))


def test_a_damaged_newer_step_does_not_cost_the_good_one_just_saved(out_dir):
    flip_a_bit(files_of(out_dir / "checkpoints/7")[0], random.Random(0))
    save_steps(out_dir, {5: False}, keep=1)
    assert find_checkpoint(out_dir)[0].name == "5"


def test_best_is_copied_before_the_step_that_promises_it_is_sealed(tmp_path, monkeypatch):
    sealed = []

    def note_and_write(path: Path) -> None:
        sealed.append(path.parent.name)
        write_manifest(path)

    monkeypatch.setattr(jax_checkpoint, "write_manifest", note_and_write)
    save_steps(tmp_path, {3: True})
    assert sealed == ["best", "checkpoints"]


def test_best_is_made_once_there_is_room_where_there_was_none_before_older_steps_went(tmp_path, monkeypatch):
    copytree, attempts = shutil.copytree, []

    def copy(step_dir: Path, *args: Any, **options: Any) -> None:
        if isinstance(step_dir, Path):  # not copytree's own call for a folder in it
            attempts.append(sorted(p.name for p in step_dir.parent.iterdir()))
            if len(attempts[-1]) > 1:
                raise OSError(28, "No space left on device")
        copytree(step_dir, *args, **options)

    save_steps(tmp_path, {1: True}, keep=1)
    monkeypatch.setattr(jax_checkpoint.shutil, "copytree", copy)
    save_steps(tmp_path, {2: True}, keep=1)
    assert attempts == [["1", "2"], ["2"]]
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["2"] and find_fault(tmp_path / "best/2") is None


def test_what_has_to_be_beaten_is_what_best_holds_or_an_evaluation_that_was_never_saved(tmp_path):
    def best_so_far(step, remembered, evaluations, val="old"):
        meta = {"step": step, "best_val_loss": remembered, "data": {"val.bin": "old"}}
        return jax_run_dir.best_so_far(tmp_path, meta, evaluations, val)

    assert best_so_far(10, 2.0, {0: 2.0, 10: 3.0}) == (2.0, False)  # of step 0 there is no checkpoint
    assert best_so_far(10, 2.0, {}) == (2.0, False)  # without a log nobody knows better
    assert best_so_far(10, 2.0, {0: 3.0, 10: 2.0}) == (2.0, True)
    assert best_so_far(20, 2.0, {0: 3.0, 10: 2.0, 20: 2.5}) == (None, False)  # lost
    saver = Saver(tmp_path, 2)
    about = ABOUT | {"best_val_loss": 2.0, "data": {"val.bin": "old"}}
    saver.save(10, tree(10), optimizer_state(10), about, is_best=True)
    saver.close()
    assert best_so_far(20, 2.0, {0: 3.0, 10: 2.0, 20: 2.5}) == (2.0, False)
    assert best_so_far(5, 2.2, {0: 3.0, 5: 2.2}) == (2.0, False)  # ahead of a checkpoint gone back to
    assert best_so_far(20, 1.5, {0: 3.0, 10: 2.0, 20: 1.5}) == (1.5, True)
    assert best_so_far(30, 1.5, {0: 3.0, 10: 2.0, 20: 1.5, 30: 1.6}) == (2.0, False)
    assert best_so_far(20, 2.0, {0: 3.0, 10: 2.0, 20: 2.5}, val="new") == (None, False)
    assert best_so_far(20, None, {}, val="new") == (None, False)


def test_a_copy_that_a_kill_kept_from_becoming_best_becomes_it_if_its_step_exists(tmp_path):
    save_steps(tmp_path, {3: True})
    for is_sealed in (True, False):
        (tmp_path / "best/3").rename(tmp_path / "best/3.orbax-checkpoint-tmp")
        if not is_sealed:
            (tmp_path / "checkpoints/3/MANIFEST.json").unlink()
        Saver(tmp_path, 2).close()
        assert [p.name for p in (tmp_path / "best").iterdir()] == ["3"] * is_sealed
    assert not jax_run_dir.holds_run(tmp_path)


def test_a_good_best_alone_is_a_run(out_dir):
    shutil.rmtree(out_dir / "checkpoints")
    assert jax_run_dir.holds_run(out_dir)
    with pytest.raises(CheckpointError, match=r"there is none.*best/3 is whole.*--checkpoint=best"):
        find_checkpoint(out_dir)


def test_a_step_removed_while_it_is_read_is_one_line(out_dir):
    shutil.rmtree(out_dir / "checkpoints/7/params")
    with pytest.raises(CheckpointError, match="was removed while it was being read"):
        restore(out_dir / "checkpoints/7", {"params": abstract(tree(7))})


# ----------------------------------------------------------------------------------------------------------------------
# what does not fit


def test_another_shape_dtype_or_tree_is_refused_by_name(out_dir):
    step_dir = find_checkpoint(out_dir)[0]
    other_shape = tree(7) | {"wte": {"embedding": jnp.zeros((8, 4))}}
    with pytest.raises(CheckpointError, match=r"wte\.embedding: float32\[7, 4\], expected float32\[8, 4\]"):
        restore(step_dir, {"params": abstract(other_shape)})
    other_dtype = tree(7) | {"wte": {"embedding": jnp.zeros((7, 4), jnp.bfloat16)}}
    with pytest.raises(CheckpointError, match=r"wte\.embedding: float32\[7, 4\], expected bfloat16\[7, 4\]"):
        restore(step_dir, {"params": abstract(other_dtype)})
    with pytest.raises(CheckpointError, match=r"wpe\.embedding: missing, expected"):
        restore(step_dir, {"params": abstract(tree(7) | {"wpe": {"embedding": jnp.zeros((2, 4))}})})
    with pytest.raises(CheckpointError, match=r"wte\.embedding: unexpected"):
        restore(step_dir, {"params": abstract({"h": tree(7)["h"]})})


def test_a_save_that_fails_in_the_background_is_told_by_the_next_call(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 2)

    def disk_full(step_dir: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax_checkpoint, "write_manifest", disk_full)
    saver.save(1, tree(1), optimizer_state(1), ABOUT, is_best=False)
    with pytest.raises(SaveError, match="No space left on device"):
        saver.wait()
    saver.close()
    assert not jax_run_dir.holds_run(tmp_path)
