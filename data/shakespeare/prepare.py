"""Tiny shakespeare as GPT-2 tokens, for finetuning GPT-2 (config/finetune_shakespeare.py).

    python data/shakespeare/prepare.py

Uses input.txt beside this file where there is one, otherwise downloads it (1 MB).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from prepare_tools import OneLineParser, run, shakespeare_text, split_text, write_text


def main() -> None:
    OneLineParser(description=__doc__).parse_args()
    here = Path(__file__).resolve().parent
    write_text(here, "gpt2", *split_text(shakespeare_text(here), val_fraction=0.1))


if __name__ == "__main__":
    run(main)
