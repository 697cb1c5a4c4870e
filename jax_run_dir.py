"""A run's directory: which checkpoints there are, which one is meant, what its `meta` says. Neither orbax nor jax.

    out_dir/checkpoints/<step>/{params,opt_state,meta}    the newest few; state `step` is the state after `step` updates
    out_dir/best/<step>/{params,meta}                     the one with the lowest validation loss
    .../<step>/MANIFEST.json                              size and sha256 of every other file; written last
    out_dir/config.json, metrics.jsonl                    every option of the run, every figure that it logged

A step without a manifest that verifies does not exist: orbax itself restores a flipped bit without a word. All this is
looked at before jax is imported, so that a bad command line is refused at once.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_manifest import MANIFEST, find_fault

SCHEMA = 4  # of the folder layout and of `meta`; a change of either raises it, and `migrate` gets a line
META_FILE = Path("meta", "metadata")  # where orbax's JSON handler puts `meta` in the folder of a step

# What `meta` holds, so that nonsense is told here and not somewhere in the trainer. None: may be null.
META_TYPES: dict[str, tuple[type | None, ...]] = {
    "step": (int,),
    "config": (dict,),  # every option of the run; the trainer checks each
    "model": (dict,),
    "tied_head": (bool,),
    "data": (dict, None),  # jax_data.outlines of the data set; None before schema 4
    "codec": (dict,),  # as in a data set's meta.json; jax_codec.check_meta knows it
    "best_val_loss": (float, int, None),
    "evaluated_at": (int, None),
    "wandb_run_id": (str, None),
    "bad_steps": (int,),
    "devices": (str, None),
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# GPTConfig's fields; not taken from there, since that would import jax
MODEL_TYPES: dict[str, tuple[type | None, ...]] = {
    **dict.fromkeys(SIZES, (int,)),
    "dropout": (float, int),
    "bias": (bool,),
    "gelu": (str,),
    "dtype": (str,),
}


class CheckpointError(Exception):
    """There is no checkpoint to use, or it does not fit. One line, for the person at the terminal."""


class RemovedError(CheckpointError):
    """A trainer that keeps only its newest checkpoints has removed the one that was being read."""

    def __init__(self, step_dir: Path):
        super().__init__(f"{step_dir} was removed while it was being read; run the same command again")


class NotFiniteError(Exception):
    """The weights of a step are not finite: training has diverged, and they are not saved."""

    def __init__(self, step: int):
        super().__init__(f"training diverged before step {step}: its weights are not finite")


class SaveError(Exception):
    """The checkpoint of a step, or its copy in best/, could not be written: the machine failed, not the user. Those
    before it are as good.

    It is here, not in jax_checkpoint.py, for the scripts to name it before they import orbax.
    """

    def __init__(self, step_dir: Path, cause: BaseException):
        if isinstance(cause, shutil.Error):  # of copytree, for every file that failed: from, to, why
            cause = OSError(cause.args[0][0][2])
        said = " ".join(f"{type(cause).__name__}: {cause}".split())
        if len(said) > 300:  # tensorstore names many paths, and the reason at the end
            said = f"{said[:100]} ... {said[-160:]}"
        super().__init__(f"saving checkpoint {step_dir} failed: {said}")
        self.step, self.of_best = int(step_dir.name), step_dir.parent.name == "best"


# ----------------------------------------------------------------------------------------------------------------------
# steps


def steps_in(root: Path) -> list[int]:
    """The step folders under `root`, newest first, sealed or not."""
    if not root.is_dir():
        return []
    names = [p.name for p in root.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", p.name) and p.is_dir()]
    return sorted(map(int, names), reverse=True)


def sealed_steps(out_dir: Path) -> list[int]:
    """The steps of checkpoints/ that were saved to their end, newest first; whether they verify is another question."""
    root = Path(out_dir) / "checkpoints"
    # Path.exists would raise where the folder may not be looked into
    return [step for step in steps_in(root) if os.path.exists(root / str(step) / MANIFEST)]


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """The newest step that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for step in steps_in(root):
        fault = find_fault(root / str(step))
        if fault is None:
            return root / str(step), skipped
        skipped.append(f"checkpoint {root / str(step)} skipped: {fault}")
    return None, skipped


def holds_foreign_config(out_dir: Path) -> bool:
    """Whether its config.json is another program's: that of a folder of weights, which a run would replace.

    Raises OSError if it is there and cannot be read.
    """
    try:
        options = json.loads((out_dir / "config.json").read_bytes())
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        return True
    return not isinstance(options, dict) or "init_from" not in options


def holds_run(out_dir: Path) -> bool:
    """Whether there is a checkpoint that verifies, the best one included."""
    return any(newest_good(out_dir / name)[0] is not None for name in ("checkpoints", "best"))


def find_checkpoint(out_dir: Path, which: str = "latest") -> tuple[Path, list[str]]:
    """The folder of the checkpoint asked for, and a line for each newer one that had to be skipped.

    which: 'latest' (the newest in checkpoints/ that verifies), 'best', or a step number, which is never replaced by
    another. Raises CheckpointError if there is none.
    """
    out_dir = Path(out_dir)
    if which in ("latest", "best"):
        root = out_dir / {"latest": "checkpoints", "best": "best"}[which]
        step_dir, skipped = newest_good(root)
        if step_dir is None:  # a trainer beside us may have replaced them all while they were being verified
            step_dir, skipped = newest_good(root)
        if step_dir is None:
            reasons = "; ".join(skipped) or "there is none; train first, or give the --out_dir of a run"
            if which == "latest" and (best := newest_good(out_dir / "best")[0]) is not None:
                reasons += f". {best} is whole, to evaluate and to sample from (--checkpoint=best)"
            if which == "best" and not skipped and (latest := newest_good(out_dir / "checkpoints")[0]) is not None:
                reasons = "there is none, as long as no evaluation is better than that of step 0, which is not saved. "
                reasons += f"--checkpoint=latest is {latest}"
            raise CheckpointError(f"no checkpoint that verifies in {root}: {reasons}")
        return step_dir, skipped
    if not which.isdecimal():
        raise CheckpointError(f"checkpoint={which!r} must be latest, best or a step number")
    candidates = [out_dir / root / str(int(which)) for root in ("checkpoints", "best")]
    step_dir = next((path for path in candidates if path.is_dir()), None)
    if step_dir is None:
        there = ", ".join(map(str, sorted({s for c in candidates for s in steps_in(c.parent)}))) or "none"
        raise CheckpointError(f"no checkpoint of step {which} in {out_dir}; there are: {there}")
    if fault := find_fault(step_dir):
        raise CheckpointError(f"checkpoint {step_dir} does not verify: {fault}")
    return step_dir, []


def read_meta(step_dir: Path) -> dict[str, Any]:
    """What was saved beside the arrays, in the form of today's schema: META_TYPES. Raises CheckpointError."""
    path = step_dir / META_FILE
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RemovedError(step_dir) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(meta, dict) or type(meta.get("schema")) is not int:
        raise CheckpointError(f"{path} is not a checkpoint's: it has no schema number")
    if not 1 <= meta["schema"] <= SCHEMA:
        newer = "; a newer version of this program wrote it" if meta["schema"] > SCHEMA else ""
        raise CheckpointError(f"{path} has schema {meta['schema']}, and this version reads 1 to {SCHEMA}{newer}")
    meta = migrate(meta)
    _check_types(path, meta, META_TYPES)
    _check_types(path, meta["model"], MODEL_TYPES)
    model = meta["model"]
    if set(model) != set(MODEL_TYPES) or min(model[key] for key in SIZES) < 1 or model["n_embd"] % model["n_head"]:
        raise CheckpointError(f"{path} is not a checkpoint's: there is no model {json.dumps(model)[:200]}")
    if str(meta["step"]) != step_dir.name:
        raise CheckpointError(f"{path} is of step {meta['step']}, but its folder is {step_dir.name}")
    return meta


def migrate(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` of any schema since 1 in the form of SCHEMA, one step after the other. Pure."""
    if meta["schema"] == 1:  # before updates could be skipped, and before a change of devices was told
        meta = meta | {"schema": 2, "bad_steps": 0, "devices": None}
    if meta["schema"] == 2:  # before small arrays were joined, which `restore` sees for itself
        meta = meta | {"schema": 3}
    if meta["schema"] == 3:  # before there were heads of their own, and a change of the data was told
        meta = meta | {"schema": 4, "tied_head": True, "data": None}
    return meta


def _check_types(path: Path, values: dict[str, Any], types: dict[str, tuple[type | None, ...]]) -> None:
    for key, allowed in types.items():
        kind = None if values.get(key) is None else type(values[key])
        if key not in values or kind not in allowed or (kind is int and values[key] < 0):
            shown = json.dumps(values[key])[:40] if key in values else "missing"
            raise CheckpointError(f"{path} is not a checkpoint's: {key} is {shown}")


def best_val_loss(out_dir: Path, val: str) -> float | None:
    """The validation loss of what best/ holds, if anything that verifies, and if it is of the validation data whose
    outline is `val` (jax_data.outlines). Raises CheckpointError as `read_meta`."""
    best_dir = newest_good(out_dir / "best")[0]
    meta = None if best_dir is None else read_meta(best_dir)
    return meta["best_val_loss"] if meta is not None and _evaluated_on(meta, val) else None


def _evaluated_on(meta: dict[str, Any], val: str) -> bool:
    return meta["data"] is None or meta["data"].get("val.bin") == val


def best_so_far(
    out_dir: Path, meta: dict[str, Any], evaluations: Mapping[int, float], val: str
) -> tuple[float | None, bool]:
    """The validation loss to beat for a run that goes on from a step, and whether best/ should be this step and is not.

    meta: the step's, which says what is the lowest so far. evaluations: iteration -> validation loss, as logged. val:
    as in `best_val_loss`; where the validation data are others now, there is nothing to beat.
    What best/ holds may be ahead of meta, where a newer checkpoint was damaged. Or it is damaged, gone or could not be
    written; then it is what best/ still holds that has to be beaten. That of step 0 is remembered, and never saved.
    Prints a line where best/ has lost a checkpoint, or the data are others. Raises CheckpointError as `read_meta`.
    """
    step, remembered, on_disk = meta["step"], meta["best_val_loss"], best_val_loss(out_dir, val)
    if remembered is not None and not _evaluated_on(meta, val):
        print(f"note: the validation data are others now, so best/ begins anew; the lowest loss was {remembered:.4f}")
        return on_disk, False
    if remembered is None or (on_disk is not None and on_disk <= remembered):
        return on_disk, False
    evaluated_at = next((k for k, loss in evaluations.items() if loss == remembered), 0)
    if evaluated_at in (0, step):
        return remembered, evaluated_at == step > 0
    print(f"{out_dir / 'best'} has lost the checkpoint of step {evaluated_at}: what it holds now is the one to beat")
    return on_disk, False


# ----------------------------------------------------------------------------------------------------------------------
# removing


def remove_step(step_dir: Path) -> None:
    """Remove a checkpoint, whatever is left of it."""
    (step_dir / MANIFEST).unlink(missing_ok=True)  # first, so that a half-removed step does not exist
    shutil.rmtree(step_dir)


def remove_run(out_dir: Path) -> None:
    """Remove the four things that make a run, and nothing else."""
    for folder in (out_dir / "checkpoints", out_dir / "best"):
        if folder.is_symlink():  # to a larger disk, where the next run belongs, too
            for inside in folder.iterdir():
                shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    for path in (out_dir / "config.json", out_dir / "metrics.jsonl"):
        if path.is_dir() and not path.is_symlink():  # whoever made it one
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
