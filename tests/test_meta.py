"""What lies beside the arrays of a checkpoint: of this version, of those before, and nonsense in its place.

python -m pytest tests/test_meta.py
"""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator
import jax_run_dir
from jax_manifest import write_manifest
from jax_run_dir import CheckpointError, find_checkpoint, read_meta
from tests.saving import ABOUT, save_steps

FIXTURES = Path(__file__).resolve().parent / "fixtures"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("saved")
    save_steps(out_dir, {7: False})
    return out_dir


@pytest.fixture
def out_dir(saved: Path, tmp_path: Path) -> Path:
    """A run to change: checkpoint 7."""
    return Path(shutil.copytree(saved, tmp_path / "out"))


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
    first = {key: value for key, value in today.items() if key not in ("bad_steps", "devices", "tied_head", "data")} | {
        "schema": 1
    }
    path.write_text(json.dumps(first))
    assert read_meta(path.parents[1]) == today  # no update was skipped, no devices were noted, heads were tied


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
    if "core" not in about["devices"]:  # which versions up to 4 did not say
        assert "resuming on" not in done.stdout
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = {str(r["iter"]): r["loss"] for r in records if "loss" in r}
    assert len(losses) == recipe.STEPS + recipe.MORE
    assert losses == pytest.approx(expected, rel=1e-5)  # another processor rounds otherwise


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
