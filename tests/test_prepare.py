"""The scripts that make data sets, run as users run them, on a copy, so that the checkout stays clean.

python -m pytest tests/test_prepare.py
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import jax_codec
import jax_data
from data.prepare_tools import split_text
from tests.preparing import INPUTS, assert_one_line, digests, environment, need_gpt2_tokenizer, prepare, prepare_well


def lay_shakespeare(repo: Path, name: str) -> Path:
    """Put input.txt into data/<name>, from the folder of test inputs or through the network."""
    if not (INPUTS / "tinyshakespeare.txt").exists():
        done = prepare(repo, f"{name}/prepare.py")
        if done.returncode:
            pytest.skip(f"no test inputs here and no network: {done.stderr}")
    else:
        (repo / "data" / name / "input.txt").write_bytes((INPUTS / "tinyshakespeare.txt").read_bytes())
    return repo / "data" / name


OFFLINE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
OFFLINE |= {"NO_PROXY": "", "no_proxy": ""}


# ---- the three small ones -----------------------------------------------------------------------------------


def test_shakespeare_char_is_nanogpts_data_set(repo):
    folder = lay_shakespeare(repo, "shakespeare_char")
    output = prepare_well(repo, "shakespeare_char/prepare.py", env=OFFLINE)
    assert "vocab size: 65\ntrain has 1,003,854 tokens\nval has 111,540 tokens" in output
    text = (folder / "input.txt").read_text()
    chars = sorted(set(text))
    assert pickle.loads((folder / "meta.pkl").read_bytes()) == {  # noqa: S301  # made a line above
        "vocab_size": 65,
        "itos": dict(enumerate(chars)),
        "stoi": {char: i for i, char in enumerate(chars)},
    }
    assert json.loads((folder / "meta.json").read_text()) == {
        "tokenizer": "char", "vocab_size": 65, "dtype": "uint16", "train_tokens": 1003854, "val_tokens": 111540,
        "itos": chars,
    }  # fmt: skip
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "val")])
    assert "".join(chars[i] for i in ids) == text
    jax_data.check_dataset(folder, 256, 65)


def test_shakespeare_has_nanogpts_token_counts(repo):
    need_gpt2_tokenizer(repo)
    folder = lay_shakespeare(repo, "shakespeare")
    output = prepare_well(repo, "shakespeare/prepare.py", env=OFFLINE)
    assert "train has 301,966 tokens\nval has 36,059 tokens" in output
    assert json.loads((folder / "meta.json").read_text()) == {
        "tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16", "train_tokens": 301966, "val_tokens": 36059,
    }  # fmt: skip
    assert (folder / "train.bin").stat().st_size == 2 * 301_966
    assert not (folder / "meta.pkl").exists()


def test_stdlib_char_needs_no_network_and_is_plain_ascii(repo):
    output = prepare_well(repo, "stdlib_char/prepare.py", env=OFFLINE)
    printed = dict(line.split(": ") for line in output.splitlines() if ": " in line)
    assert int(printed["files"].replace(",", "")) > 300
    assert int(printed["characters"].replace(",", "")) > 4_000_000
    meta = jax_codec.load_meta(repo / "data" / "stdlib_char")
    assert meta is not None
    assert meta["train_tokens"] + meta["val_tokens"] == int(printed["characters"].replace(",", ""))
    assert 0.03 < meta["val_tokens"] / meta["train_tokens"] < 0.3
    assert all(char.isascii() for char in meta["itos"])
    jax_data.check_dataset(repo / "data" / "stdlib_char", 1024, meta["vocab_size"])


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare", "stdlib_char", "openwebtext"])
def test_data_is_byte_identical_from_any_working_directory_and_lies_beside_the_script(repo, name):
    if name in ("shakespeare", "openwebtext"):
        need_gpt2_tokenizer(repo)
    folder = repo / "data" / name
    options = []
    if name.startswith("shakespeare"):
        (folder / "input.txt").write_text("own text, not Shakespeare's\n" * 20)
    if name == "openwebtext":
        (repo / "shards").mkdir()
        (repo / "shards" / "a.jsonl").write_text('{"text": "own text"}\n' * 40)
        options = [f"--source={repo / 'shards'}", "--num_proc=1", "--val_fraction=0.2"]
    prepare_well(repo, f"{name}/prepare.py", *options, cwd=repo)
    first = digests(folder)
    assert set(first) == {"train.bin", "val.bin", "meta.json"} | ({"meta.pkl"} if name.endswith("char") else set())
    for file in first:
        (folder / file).unlink()
    prepare_well(repo, f"{name}/prepare.py", *options, cwd=folder)
    assert digests(folder) == first
    prepare_well(repo, f"{name}/prepare.py", *options, cwd=repo.parent)  # over what is there
    assert digests(folder) == first
    assert not list(repo.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_offline_says_what_to_fetch_and_where_to_put_it(repo, name):
    done = prepare(repo, f"{name}/prepare.py", env=OFFLINE)
    target = repo / "data" / name / "input.txt"
    assert_one_line(done, "https://raw.githubusercontent.com/karpathy/char-rnn/", f"put it at {target}")
    assert not target.exists()


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare", "stdlib_char"])
def test_options_that_there_are_not_are_one_line_and_help_writes_nothing(repo, name):
    assert_one_line(prepare(repo, f"{name}/prepare.py", "--val_fraction=0.5"), "--val_fraction=0.5")
    assert f"python data/{name}/prepare.py" in prepare(repo, f"{name}/prepare.py", "--help").stdout
    assert not list((repo / "data" / name).glob("*.bin"))


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_own_input_that_is_not_utf8_or_empty_is_one_line(repo, name):
    need_gpt2_tokenizer(repo)
    (repo / "data" / name / "input.txt").write_bytes(b"abc\xff")
    assert_one_line(prepare(repo, f"{name}/prepare.py"), "input.txt is not UTF-8 (byte 0xff at offset 3)")
    (repo / "data" / name / "input.txt").write_bytes(b"")
    assert prepare(repo, f"{name}/prepare.py").returncode == 2


# ---- own text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spaces", range(15))
def test_no_end_of_text_is_cut_in_two(spaces):
    text = "-" * (40 - spaces) + "<|endoftext|>" + "-" * 60
    train, val = split_text(text, 0.6)
    assert train + val == text
    cut = int(len(text) * 0.4)
    end = 40 - spaces + len("<|endoftext|>")
    assert len(train) == (end if 40 - spaces < cut < end else cut)
    at_its_end = text[:end]
    train, val = split_text(at_its_end, 1 / end)  # the cut is in what the text ends with
    assert train + val == at_its_end and val == "<|endoftext|>"


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "bytes"])
def test_own_text_round_trips_with_every_tokenizer(repo, tmp_path, monkeypatch, tokenizer):
    if tokenizer == "gpt2":
        need_gpt2_tokenizer(repo)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", environment(repo).get("TIKTOKEN_CACHE_DIR", ""))
    text = "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich. 你好 😀\n" * 50
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    options = ("--input=book.txt", "--out=data/mine", f"--tokenizer={tokenizer}", "--val_fraction=0.25")
    output = prepare_well(repo, "prepare_text.py", *options, cwd=tmp_path)
    folder = tmp_path / "data" / "mine"
    codec = jax_codec.make_codec(jax_codec.load_meta(folder))
    cut = len(text) * 3 // 4
    for split, expected in (("train", text[:cut]), ("val", text[cut:])):
        ids = np.fromfile(folder / f"{split}.bin", np.uint16)
        assert codec.decode(ids.tolist()) == expected
        assert f"{split} has {len(ids):,} tokens" in output
    jax_data.check_dataset(folder, 16, codec.vocab_size)
    assert (folder / "meta.pkl").exists() == (tokenizer == "char")


def test_folder_is_read_in_sorted_order_with_hidden_files_left_out(repo, tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden/x", ".git/config", "c"):
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_text(f"[{name}]")
    need_gpt2_tokenizer(repo)
    for tokenizer, separator in (("bytes", "\n"), ("gpt2", "<|endoftext|>")):
        options = (f"--input={tmp_path / 'notes'}", f"--out={tmp_path / tokenizer}", f"--tokenizer={tokenizer}")
        prepare_well(repo, "prepare_text.py", *options, "--val_fraction=0.1")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", environment(repo).get("TIKTOKEN_CACHE_DIR", ""))
            codec = jax_codec.make_codec(jax_codec.load_meta(tmp_path / tokenizer))
        ids = [i for split in ("train", "val") for i in np.fromfile(tmp_path / tokenizer / f"{split}.bin", np.uint16)]
        assert codec.decode(ids) == f"[a/z.md]{separator}[b.txt]{separator}[c]"


def test_what_was_made_in_the_folder_of_the_text_is_not_text_the_next_time(repo, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("some text " * 30)
    made = []
    for _ in range(2):
        prepare_well(repo, "prepare_text.py", f"--input={tmp_path / 'notes'}", f"--out={tmp_path / 'notes'}")
        made.append(digests(tmp_path / "notes"))
    assert made[0] == made[1] and len(made[0]) == 4


def test_large_text_is_encoded_piece_by_piece_without_a_seam(repo, tmp_path):
    text = "".join(chr(97 + i * i % 23) for i in range(2**20 + 1000)) + "é" * 2**20
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    prepare_well(repo, "prepare_text.py", f"--input={tmp_path / 'large.txt'}", f"--out={tmp_path / 'out'}")
    itos = jax_codec.load_meta(tmp_path / "out")["itos"]  # type: ignore[index]
    ids = np.concatenate([np.fromfile(tmp_path / "out" / f"{split}.bin", np.uint16) for split in ("train", "val")])
    assert "".join(itos[i] for i in ids) == text


def test_own_text_that_cannot_be_used_is_one_line_and_exit_2(repo, tmp_path):
    files = {
        "bad": b"good \xc3( bad",
        "empty": b"",
        "tiny": b"a",
        "many": "".join(map(chr, range(0x10000, 0x21000))).encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    out = f"--out={tmp_path / 'out'}"
    cases: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        ((f"--input={tmp_path / 'bad'}", out), (f"{tmp_path / 'bad'} is not UTF-8", "offset 5")),
        ((f"--input={tmp_path / 'empty'}", out), ("holds no text",)),
        ((f"--input={tmp_path / 'folder'}", out), ("holds no text",)),
        ((f"--input={tmp_path / 'tiny'}", out), ("train.bin", "more text")),
        ((f"--input={tmp_path / 'many'}", out), ("69,632 distinct characters", "--tokenizer=bytes")),
        ((f"--input={tmp_path / 'none'}", out), ("no such file",)),
        ((f"--input={tmp_path / 'tiny'}", "--out="), ("--out", "is empty")),
        (("--input=", out), ("--input", "is empty")),
        ((f"--input={tmp_path / 'tiny'}",), ("--out",)),
        ((out,), ("--input",)),
        ((f"--input={tmp_path / 'tiny'}", out, "--tokenizer=words"), ("words", "char")),
        ((f"--input={tmp_path / 'tiny'}", out, "--val_fraction=1"), ("--val_fraction", "not between 0 and 1")),
        ((f"--input={tmp_path / 'tiny'}", out, "--val_fraction=x"), ("--val_fraction",)),
        ((f"--input={tmp_path / 'tiny'}", out, "--val_frac=0.5"), ("--val_frac",)),
        ((f"--input={tmp_path / 'many'}", f"--out={tmp_path / 'empty'}", "--tokenizer=bytes"), ("is a file",)),
    ]
    for options, words in cases:
        assert_one_line(prepare(repo, "prepare_text.py", *options), *words)
    assert not list(tmp_path.rglob("meta.json"))


def test_data_sets_in_a_folder_of_text_are_not_text(repo, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/one.txt").write_text("some text " * 100)
    (tmp_path / "notes/train.bin.txt").write_text("more text " * 100)
    for out in ("notes", "notes/deeper", "other", "third"):
        options = (f"--input={tmp_path / 'notes'}", f"--out={tmp_path / out}", "--tokenizer=bytes")
        done = prepare(repo, "prepare_text.py", *options)
        assert done.returncode == 0 and "files: 2\n" in done.stdout, done.stderr


def test_gpt2_tokenizer_that_cannot_be_fetched_is_one_line(repo, tmp_path):
    (tmp_path / "text").write_text("some text")
    options = (f"--input={tmp_path / 'text'}", f"--out={tmp_path / 'out'}", "--tokenizer=gpt2")
    done = prepare(repo, "prepare_text.py", *options, env={**OFFLINE, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")})
    assert_one_line(done, "set TIKTOKEN_CACHE_DIR")
