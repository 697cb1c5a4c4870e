"""The manifest of a checkpoint: what its files were when it was saved. Written last; without it there is no checkpoint.

<step>/MANIFEST.json    {"files": {name: {"size", "sha256"}}, "checksum": sha256 of "files"}
"""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "MANIFEST.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())  # orbax does not: without it a manifest could outlive the bytes it vouches for
    return digest


def _checksum(files: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Bring a file to the disk, or the entries of a folder: a new or renamed file is only safe with these."""
    if os.name != "posix" and path.is_dir():  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(step_dir: Path) -> None:
    """Vouch for every file of a finished step. From the rename on, the step exists."""
    paths = sorted(p for p in step_dir.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {p.relative_to(step_dir).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in paths}
    temporary = step_dir / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump({"files": files, "checksum": _checksum(files)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(step_dir / MANIFEST)
    fsync(step_dir)
    fsync(step_dir.parent)


def find_fault(step_dir: Path) -> str | None:
    """What is wrong with a step, or None: every byte of every file is as it was sealed."""
    try:
        manifest = json.loads((step_dir / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["checksum"] != _checksum(files):
            return f"{MANIFEST} is damaged"
        for name, expected in files.items():
            path = step_dir / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} is damaged (its sha256 differs)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its save never finished"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not JSON, or JSON of another form
        return f"{MANIFEST} is damaged"
    return None
