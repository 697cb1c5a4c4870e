"""Make a data set of your own text: one UTF-8 file, or a folder of them.

    python data/prepare_text.py --input=book.txt --out=data/book --tokenizer=char
    python data/prepare_text.py --input=my_notes --out=data/notes --tokenizer=gpt2 --val_fraction=0.05
    python train_jax.py --dataset=book

Of a folder every file is read, in sorted order, hidden ones left out; for gpt2 an <|endoftext|> comes between them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prepare_tools import (
    END_OF_TEXT,
    DataError,
    OneLineParser,
    named_path,
    read_text,
    run,
    split_text,
    val_fraction,
    write_text,
)

MADE_HERE = ("train.bin", "val.bin", "meta.json", "meta.pkl")


def read_input(source: Path, separator: str, out: Path) -> str:
    """The text of a file, or of every file in a folder with separator between, but for data sets made there before."""
    if not source.exists():
        raise DataError(f"--input={source}: no such file or folder")
    if not source.is_dir():  # a file, or a pipe
        return read_text(source)
    inside = sorted((file.relative_to(source) for file in source.rglob("*") if file.is_file()), key=Path.as_posix)
    files = [source / file for file in inside if not any(part.startswith(".") for part in file.parts)]
    data_sets = {out.resolve(), *(file.parent.resolve() for file in files if file.name == "train.bin")}
    files = [file for file in files if not (file.name in MADE_HERE and file.parent.resolve() in data_sets)]
    print(f"files: {len(files):,}")
    return separator.join(read_text(file) for file in files)


def main() -> None:
    parser = OneLineParser(description="Make train.bin, val.bin and meta.json of your own text.")
    parser.add_argument("--input", type=named_path, required=True, help="a UTF-8 text file, or a folder of them")
    parser.add_argument("--out", type=named_path, required=True, help="the folder to write, such as data/mine")
    parser.add_argument("--tokenizer", choices=["char", "gpt2", "bytes"], default="char", help="what a token is")
    parser.add_argument("--val_fraction", type=val_fraction, default=0.1, help="the share at the end for validation")
    options = parser.parse_args()
    text = read_input(options.input, END_OF_TEXT if options.tokenizer == "gpt2" else "\n", options.out)
    if not text:
        raise DataError(f"--input={options.input} holds no text")
    write_text(options.out, options.tokenizer, *split_text(text, options.val_fraction))


if __name__ == "__main__":
    run(main)
