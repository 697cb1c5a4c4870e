"""Python's own standard library as single characters: a data set that needs no download.

    python data/stdlib_char/prepare.py

Every tenth source file is for validation. The size depends on the Python version: 8 MB with 3.11.
"""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from prepare_tools import DataError, OneLineParser, read_text, run, write_text

# tests, other people's packages, tables of characters, and what only some installations have
LEFT_OUT = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def source_files(root: Path) -> list[Path]:
    """The ASCII-only source files of the standard library, in one fixed order."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [path for path in files if not LEFT_OUT & set(path.parts)]
    return [root / path for path in sorted(kept, key=Path.as_posix) if (root / path).read_bytes().isascii()]


def main() -> None:
    OneLineParser(description=__doc__).parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    if len(files) < 10:
        raise DataError(
            f"{root} holds {len(files)} source files, so this Python came without them: use another data set"
        )
    texts = [read_text(path) for path in files]
    print(f"files: {len(files):,}")
    val_texts = texts[9::10]
    del texts[9::10]
    write_text(Path(__file__).resolve().parent, "char", "".join(texts), "".join(val_texts))


if __name__ == "__main__":
    run(main)
