"""jax_checkpoint and jax_run_dir: what is saved comes back bit for bit, and what was damaged is never used.

python -m pytest tests/test_checkpoint.py
"""

import dataclasses
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import jax_checkpoint
import jax_run_dir
from jax_checkpoint import Saver, restore
from jax_manifest import find_fault, write_manifest
from jax_run_dir import CheckpointError, SaveError, find_checkpoint, read_meta
from jax_train_utils import make_mesh, replicated


def tree(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "wte": {"embedding": jax.random.normal(keys[0], (7, 4))},
        "h": {str(i): {"kernel": jax.random.normal(jax.random.fold_in(keys[1], i), (4, 4))} for i in range(11)},
    }


def optimizer_state(seed: int) -> tuple:
    import optax

    return optax.adam(1e-3).init(tree(seed)), {"scale": jnp.float32(seed)}


def abstract(arrays):
    sharding = replicated(make_mesh(jax.devices()[:1]))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


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
}  # fmt: skip


def save_steps(out_dir: Path, steps: dict[int, bool], keep: int = 2) -> None:
    """steps: step -> is it the best so far."""
    saver = Saver(out_dir, keep)
    for step, is_best in steps.items():
        saver.save(step, tree(step), optimizer_state(step), ABOUT | {"best_val_loss": step / 2}, is_best=is_best)
    saver.close()


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
    assert jax_run_dir.best_val_loss(out_dir) == 1.5


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


def test_a_step_saved_before_can_become_the_best(out_dir):
    saver = Saver(out_dir, 2)
    saver.copy_to_best(7)
    saver.close()
    assert find_checkpoint(out_dir, "best")[0].name == "7"
    assert [p.name for p in (out_dir / "best").iterdir()] == ["7"]


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


def test_another_schema_or_step_in_meta_is_refused(out_dir):
    path, newer = out_dir / "checkpoints/7/meta/metadata", jax_run_dir.SCHEMA + 1
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"schema": newer}))
    with pytest.raises(CheckpointError, match=f"has schema {newer}, and this version reads 1 to .*; a newer version"):
        read_meta(path.parents[1])
    path.write_text(json.dumps(meta | {"step": 8}))
    with pytest.raises(CheckpointError, match="is of step 8, but its folder is 7"):
        read_meta(path.parents[1])


def test_meta_of_the_first_schema_is_read_as_today_s(out_dir):
    path = out_dir / "checkpoints/7/meta/metadata"
    today = read_meta(path.parents[1])
    first = {key: value for key, value in today.items() if key not in ("bad_steps", "devices")} | {"schema": 1}
    path.write_text(json.dumps(first))
    assert read_meta(path.parents[1]) == today  # no update was skipped in that run, and no devices were noted


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


# ----------------------------------------------------------------------------------------------------------------------
# upgrades, and what only looks like a checkpoint

FIXTURES = Path(__file__).resolve().parent / "fixtures"


@pytest.mark.parametrize("schema", range(2, jax_run_dir.SCHEMA + 1))
def test_run_of_a_released_version_goes_on_with_the_losses_it_had_then(tmp_path, environment, schema):
    spec = importlib.util.spec_from_file_location("golden_run", FIXTURES / "golden_run.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.write_data(tmp_path)
    shutil.copytree(FIXTURES / f"golden_run_{schema}", tmp_path / "out")
    about = json.loads((tmp_path / f"out/checkpoints/{recipe.STEPS}/meta/metadata").read_text())
    assert about["schema"] == schema
    expected = json.loads((tmp_path / "out/losses.json").read_text())
    resume = ("--init_from=resume", "--out_dir=out", f"--max_iters={recipe.STEPS + recipe.MORE}")
    done = subprocess.run(
        [sys.executable, str(FIXTURES.parents[1] / "train_jax.py"), *resume],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"Resuming training from out/checkpoints/{recipe.STEPS}\n" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = {str(r["iter"]): r["loss"] for r in records if "loss" in r}
    assert len(losses) == recipe.STEPS + recipe.MORE
    assert losses == pytest.approx(expected, rel=1e-5)  # another processor rounds otherwise


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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def reseal(step_dir: Path, content: bytes) -> None:
    (step_dir / "meta/metadata").write_bytes(content)
    (step_dir / "MANIFEST.json").unlink()
    write_manifest(step_dir)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_nonsense_in_meta_under_a_good_manifest_is_one_line(out_dir, monkeypatch, data):
    """Any value in any place of meta: read, or refused with a line; and so for the options that are taken from it."""
    import jax_options
    import train_jax

    step_dir = out_dir / "checkpoints/7"
    good = ABOUT | {"schema": jax_run_dir.SCHEMA, "step": 7, "config": dataclasses.asdict(train_jax.TrainConfig())}
    meta: dict[str, Any] = json.loads(json.dumps(good))
    where = data.draw(st.sampled_from([None, "config", "model", "codec"]))
    inside = meta if where is None else meta[where]
    for key in data.draw(st.sets(st.sampled_from(sorted(inside)) | st.text(max_size=5), min_size=1, max_size=3)):
        inside[key] = data.draw(json_values)
    reseal(step_dir, json.dumps(meta).encode())
    assert find_checkpoint(out_dir)[0] == step_dir
    monkeypatch.setattr(sys, "argv", ["train_jax.py", "--init_from=resume"])
    try:
        options, _ = jax_options.inherit_options(train_jax.TrainConfig(), step_dir, read_meta(step_dir))
    except (CheckpointError, configurator.ConfigError) as error:
        assert "\n" not in str(error)
    else:
        kinds = {f.name: type(getattr(train_jax.TrainConfig(), f.name)) for f in dataclasses.fields(options)}
        assert all(type(getattr(options, name)) is kind for name, kind in kinds.items())


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"7", b"{}", b'{"schema": true}', b"\xff", b"[" * 100_000])
def test_meta_that_is_no_object_is_one_line(out_dir, content):
    reseal(out_dir / "checkpoints/7", content)
    with pytest.raises(CheckpointError, match="meta/metadata"):
        read_meta(find_checkpoint(out_dir)[0])


def test_model_of_meta_is_gptconfig():
    from jax_transformer import GPTConfig

    assert set(jax_run_dir.MODEL_TYPES) == {field.name for field in dataclasses.fields(GPTConfig)}
    assert all(type(field.default) in jax_run_dir.MODEL_TYPES[field.name] for field in dataclasses.fields(GPTConfig))


def test_meta_of_the_trainer_has_what_read_meta_asks_for_and_nothing_else(finished):
    meta = read_meta(find_checkpoint(finished)[0])
    assert set(meta) == {*jax_run_dir.META_TYPES, "schema"}
