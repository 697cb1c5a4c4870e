"""Checkpoints: save in the background, seal with a manifest, restore. The only orbax user.

What lies where, and which checkpoint is the one to take: `jax_run_dir.py`. orbax is imported where it is first needed,
which in a fresh run is after the first step (`Saver.prepare`): by then the compiler has given back its memory.
"""

import contextlib
import functools
import json
import logging
import shutil
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_console import complain
from jax_manifest import MANIFEST, find_fault, fsync, write_manifest
from jax_run_dir import (
    META_FILE,
    SCHEMA,
    CheckpointError,
    NotFiniteError,
    RemovedError,
    SaveError,
    find_checkpoint,
    read_meta,
    remove_step,
    steps_in,
)

SMALL = 1 << 22  # bytes; an array with fewer is saved joined to others, see _join_small. GPT-2's large ones have 7 MB
UNFINISHED = ".orbax-checkpoint-tmp"  # at the end of a folder's name: orbax's, and ours for best/


# ----------------------------------------------------------------------------------------------------------------------
# restoring


def restore(step_dir: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a step. items: name ('params', 'opt_state') -> tree of ShapeDtypeStruct with the shardings wanted.

    Restores straight into the shardings, on whatever devices. Raises CheckpointError if names, shapes or dtypes differ
    (orbax alone would cast silently), or if the step vanishes meanwhile.
    """
    import orbax.checkpoint as ocp

    path = step_dir.resolve()  # orbax refuses a relative path
    args, small = {}, dict[str, Any]()
    try:
        with _checkpointer() as checkpointer:
            on_disk = checkpointer.metadata(path).item_metadata
            for name, wanted in items.items():
                if name not in on_disk:
                    raise FileNotFoundError(path / name)
                small[name] = (on_disk[name].custom_metadata or {}).get("small")
                _check_leaves(path / name, _named(on_disk[name].tree), small[name] or {}, _named(wanted))
                target = wanted if small[name] is None else _joined_target(small[name], _named(wanted))
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
                args[name] = ocp.args.PyTreeRestore(target, restore_args=restore_args)
            restored = checkpointer.restore(path, args=ocp.args.Composite(**args))
    except (FileNotFoundError, ValueError, KeyError) as error:  # what tensorstore and orbax make of a missing file
        if isinstance(error, FileNotFoundError) or not (step_dir / MANIFEST).exists():  # which is removed first
            raise RemovedError(step_dir) from error
        raise
    return {
        name: restored[name] if small[name] is None else _part_joined(restored[name], small[name], wanted)
        for name, wanted in items.items()
    }


def restore_beside_a_trainer(
    out_dir: Path, which: str, step_dir: Path, items: dict[str, Any]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of a checkpoint, its meta and its arrays (`restore`), for those who only read a run.

    step_dir: what `find_checkpoint` gave for `which`. Where the run's trainer has removed it since, as newer ones came,
    it is the one that is meant now. Raises CheckpointError.
    """
    attempts = 1 if which.isdecimal() else 30
    while True:
        attempts -= 1
        try:
            return step_dir, read_meta(step_dir), restore(step_dir, items)
        except RemovedError:
            if attempts == 0:
                raise
            newer = find_checkpoint(out_dir, which)[0]
            complain(f"reading {newer}, since {step_dir} was removed meanwhile")
            step_dir = newer


def _check_leaves(path: Path, on_disk: dict[str, Any], small: dict[str, str], wanted: dict[str, Any]) -> None:
    """Whether what is on disk, small arrays beside the others, is what is wanted. All by name."""
    saved = {name: _described(x) for name, x in on_disk.items() if not name.startswith(JOINED)} | small
    expected = {name: _described(x) for name, x in wanted.items()}
    faults = [f"{name}: {saved.get(name, 'missing')}, expected {shape}" for name, shape in expected.items()]
    faults = [fault for fault, name in zip(faults, expected, strict=True) if saved.get(name) != expected[name]]
    faults += [f"{name}: unexpected" for name in saved if name not in expected]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(faults[:5])}{more}")


# ----------------------------------------------------------------------------------------------------------------------
# the form on disk: every array under the name of its path, the small ones of a dtype joined to one

JOINED = "joined."  # and the dtype: the name of such an array


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, like h.0.attn.c_attn.kernel, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _join_small(tree: Any, copy: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """A tree's arrays by name, the small ones joined in the tree's order; and which these are: name -> dtype[shape].

    orbax takes a millisecond of processor time for an array, however small it is. copy: the large ones are copies, too.
    """
    named = _named(tree)
    small = {name: array for name, array in named.items() if array.nbytes < SMALL}
    for array in (named if copy else small).values():
        array.copy_to_host_async()
    joined: dict[str, list[np.ndarray]] = {}
    for array in small.values():  # host-device sync
        joined.setdefault(f"{JOINED}{array.dtype}", []).append(np.asarray(array).ravel())
    arrays = {name: _to_host(array) if copy else array for name, array in named.items() if name not in small}
    arrays |= {name: np.concatenate(parts) for name, parts in joined.items()}
    return arrays, {name: _described(array) for name, array in small.items()}


def _to_host(array: Any) -> Any:
    """A copy as numpy's. It stays as it is when the array is donated."""
    # host-device sync. On a CPU numpy would look at the very memory that is going to be donated.
    on_cpu = next(iter(array.devices())).platform == "cpu"
    return np.array(array) if on_cpu else np.asarray(array)


def _joined_target(small: dict[str, str], wanted: dict[str, Any]) -> dict[str, Any]:
    """What orbax is to restore: the large arrays into their shardings, the joined ones to the host."""
    sizes: dict[np.dtype, int] = {}
    for name in small:
        sizes[wanted[name].dtype] = sizes.get(wanted[name].dtype, 0) + wanted[name].size
    joined = {f"{JOINED}{dtype}": np.empty(size, dtype) for dtype, size in sizes.items()}
    return {name: x for name, x in wanted.items() if name not in small} | joined


def _part_joined(arrays: dict[str, Any], small: dict[str, str], wanted: Any) -> Any:
    """The tree that is wanted, from its arrays by name with the small ones joined."""
    places, starts = _named(wanted), dict.fromkeys(arrays, 0)
    for name in filter(small.__contains__, places):
        place, joined = places[name], f"{JOINED}{places[name].dtype}"
        start, starts[joined] = starts[joined], starts[joined] + place.size
        values = arrays[joined][start : starts[joined]].reshape(place.shape)
        arrays[name] = jax.make_array_from_callback(place.shape, place.sharding, values.__getitem__)
    return jax.tree.unflatten(jax.tree.structure(wanted), [arrays[name] for name in places])


def _checkpointer() -> Any:
    """orbax for the items of a step, in this process alone: where several train, it would have each wait for all."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers
    from orbax.checkpoint.options import MultiprocessingOptions

    me = jax.process_index()
    alone = MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}")
    kinds = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()),
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),  # nobody writes to what we give it
    )

    def arrays() -> Any:  # a folder for each; weights hardly shrink by compression, and it takes longer than writing
        return ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_compression=False, multiprocessing_options=alone, type_handler_registry=kinds
        )

    # Every item is named, also those that are not asked for: orbax warns about items it has no handler for.
    handler = ocp.CompositeCheckpointHandler(
        params=arrays(),
        opt_state=arrays(),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


# ----------------------------------------------------------------------------------------------------------------------
# saving


class Saver:
    """Saves in the background, one at a time. What went wrong comes out of check, wait and close as a SaveError, or as
    a NotFiniteError where it is the weights that are wrong.

    The arrays are copied to the host (but for the last time), and all the rest happens in a thread of its own. orbax's
    asynchronous saving of device arrays would keep the training thread longer, and take twice the time of a CPU.
    """

    def __init__(self, out_dir: Path | None, keep: int):
        """out_dir None: nothing is saved, as in all processes but the first."""
        self._saving: tuple[int, Future] | None = None
        self._sealed: int | None = None  # the step that is whole already, while best/ is made of it
        self.saves = out_dir is not None
        if out_dir is None:
            return
        self.root, self.best = Path(out_dir).resolve() / "checkpoints", Path(out_dir).resolve() / "best"
        self.log = self.root.parent / "metrics.jsonl"
        self.keep = keep
        _leave_the_telling_to_us()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._has_failed = False
        for root in (self.root, self.best):
            root.mkdir(parents=True, exist_ok=True)
        self._finish_best()
        self._remove_leftovers()  # of a kill in the middle of a save

    def prepare(self) -> None:
        """Import orbax, so that the first save is as quick as the others, and an orbax that is broken shows early."""
        if self.saves:
            _ = self._orbax

    @functools.cached_property
    def _orbax(self) -> Any:
        return _checkpointer()

    def save(
        self, step: int, params: Any, opt_state: Any, meta: dict[str, Any], *, is_best: bool, last: bool = False
    ) -> None:
        """Start saving; returns once the arrays may be donated. With `is_best`, best/ becomes a copy of this step.

        `last` promises that nothing is donated any more: the arrays are then not copied first, which takes memory.

        Raises SaveError if the copy fails, or if the save before failed and nobody has asked (`wait`).
        """
        self.wait()
        if not self.saves:
            return
        copy = not last or jax.process_count() > 1  # of the arrays of several processes, orbax would want each to save
        try:
            items = {"params": _join_small(params, copy), "opt_state": _join_small(opt_state, copy)}
        except (RuntimeError, MemoryError) as error:  # XLA's own errors are RuntimeErrors
            raise SaveError(self.root / str(step), error) from error
        meta, self._sealed = {"schema": SCHEMA, "step": step, **meta}, None
        self._saving = step, self._thread.submit(self._save, step, items, meta, is_best)

    def copy_to_best(self, step: int, meta: dict[str, Any]) -> None:
        """Make best/ a copy of a step saved before, with what is known of it since then in the copy's meta."""
        self.wait()
        if self.saves:
            step_dir, self._sealed = self.root / str(step), step
            self._saving = step, self._thread.submit(lambda: self._make_best(self._copy_for_best(step_dir, meta)))

    def _save(self, step: int, items: dict[str, tuple[dict, dict]], meta: dict[str, Any], is_best: bool) -> None:
        step_dir = self.root / str(step)
        # The trainer knows that loss and gradient were finite, and not what the last update made of the weights.
        if not all(np.isfinite([a.min(), a.max()]).all() for a in map(np.asarray, items["params"][0].values())):
            raise NotFiniteError(step)
        import orbax.checkpoint as ocp

        args = {
            name: ocp.args.PyTreeSave(arrays, custom_metadata={"small": small})
            for name, (arrays, small) in items.items()
        }
        try:
            self._orbax.save(step_dir, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)), force=True)
            # If we are killed before the step is sealed (`write_manifest(step_dir)`), there is no such step. If after
            # that, the copy for best/ is whole, and `_finish_best` renames it (or there was no room for it, and a
            # resume makes it: `best_so_far`). It is not renamed earlier, since until the step is sealed, what is in
            # best/ might be all that there is of the run.
            copy = None
            with contextlib.suppress(OSError):  # where there is no room for it, the step itself is as good
                copy = self._copy_for_best(step_dir, {}) if is_best else None
            if self.log.exists():  # a checkpoint of step k promises that the log up to k is on disk
                with contextlib.suppress(OSError):  # a network disk that is full: weights matter more than their log
                    fsync(self.log)
            write_manifest(step_dir)
            self._sealed = step
            if copy is not None:
                self._make_best(copy)
        except BaseException:
            self._remove_leftovers()  # a full disk needs the room
            raise
        # What is newer than the step just saved was found damaged: it is no reason to remove a good one.
        older = [s for s in steps_in(self.root) if s <= step]
        for old in older[self.keep :]:
            _try_to_remove(self.root / str(old))
        if is_best and copy is None:
            self._make_best(self._copy_for_best(step_dir, {}))

    def _copy_for_best(self, step_dir: Path, meta: dict[str, Any]) -> Path:
        """A second copy on disk rather than a link: what damages one leaves the other. `meta` changes what it says."""
        temporary = self.best / f"{step_dir.name}{UNFINISHED}"
        try:
            shutil.copytree(step_dir, temporary, ignore=shutil.ignore_patterns("opt_state", f"{MANIFEST}*"))
            if meta:
                path = temporary / META_FILE
                path.write_text(json.dumps(json.loads(path.read_bytes()) | meta))
            write_manifest(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary

    def _make_best(self, copy: Path) -> None:
        target = copy.with_name(copy.name.removesuffix(UNFINISHED))
        if target.exists():
            remove_step(target)
        copy.rename(target)
        for old in steps_in(self.best):
            if old != int(target.name):
                _try_to_remove(self.best / str(old))

    def _finish_best(self) -> None:
        """What a kill left undone between a step's seal and the end of its copy's way to best/."""
        for copy in self.best.glob(f"*{UNFINISHED}"):
            if (self.root / copy.name.removesuffix(UNFINISHED) / MANIFEST).exists() and find_fault(copy) is None:
                self._make_best(copy)

    def _remove_leftovers(self) -> None:
        """Remove what was not saved to its end. Only while no save is under way."""
        for root in (self.root, self.best):
            unsealed = [root / str(step) for step in steps_in(root) if not (root / str(step) / MANIFEST).exists()]
            for leftover in [*root.glob(f"*{UNFINISHED}*"), *unsealed]:
                shutil.rmtree(leftover, ignore_errors=True)  # it does not count: no reason to fail

    def wait(self) -> None:
        """Until the save under way is through. Raises SaveError, once, if it failed."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        if (error := saving.exception()) is not None:
            self._has_failed = True
            if isinstance(error, NotFiniteError) and jax.process_count() == 1:
                raise error  # of several processes each will see it at the same step, in the loss
            raise SaveError((self.best if self._sealed == step else self.root) / str(step), error) from error

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile; never waits."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def close(self) -> None:
        """Finish the save under way and stop the thread."""
        if not self.saves:
            return
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if "_orbax" in vars(self):
                self._orbax.close()
            # A failed save ends at its first error; what else it was writing may come after the first clean-up.
            for _ in range(5 if self._has_failed else 0):
                self._remove_leftovers()
                time.sleep(0.1)


def _try_to_remove(step_dir: Path) -> None:
    """Remove an older checkpoint. That it cannot be removed is told, and no reason to doubt the one just saved."""
    try:
        remove_step(step_dir)
    except OSError as error:
        complain(f"note: {step_dir} is not needed any more and cannot be removed: {error}")


def _leave_the_telling_to_us() -> None:
    """A SaveError is the one line that a person gets: orbax, asyncio and tensorstore print tracebacks for the same."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_worth_telling)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # given up at the first error
    sys.unraisablehook = _all_but_late_answers


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Not a traceback, and not orbax's warning at each save that it has no files of several processes to merge."""
    return record.exc_info is None and "Skipping merge of OCDBT" not in record.getMessage()


def _all_but_late_answers(unraisable: Any, usual: Any = sys.__unraisablehook__) -> None:
    """sys.unraisablehook without what tensorstore tells an event loop that orbax has closed at the first error."""
    # `usual` was looked up at the start: when Python ends, `sys` may be gone before the last of them
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        usual(unraisable)
