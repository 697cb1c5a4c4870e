"""The scripts that make data sets, run as users run them, on a copy, so that the checkout stays clean.

python -m pytest tests/test_prepare.py
"""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import jax_codec
import jax_data

ROOT = Path(__file__).resolve().parents[1]
INPUTS = Path(__file__).resolve().parents[2] / "shared" / "data"
OFFLINE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
OFFLINE |= {"NO_PROXY": "", "no_proxy": ""}


@pytest.fixture
def repo(tmp_path):
    """A copy of what preparing needs, in a folder whose name has a space."""
    copy = tmp_path / "my repo"
    ignored = shutil.ignore_patterns("*.bin", "*.pkl", "*.json", "input.txt*", "parts", "__pycache__", "*.tmp")
    shutil.copytree(ROOT / "data", copy / "data", ignore=ignored)
    for name in ("jax_data.py", "jax_codec.py"):
        shutil.copy(ROOT / name, copy)
    (tmp_path / "no_jax").mkdir()
    (tmp_path / "no_jax" / "jax.py").write_text("raise SystemExit('preparing data imported jax')")
    return copy


def environment(repo: Path, **more: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(repo.parent / "no_jax"), **more}
    if (INPUTS / "tiktoken_cache").is_dir():
        env.setdefault("TIKTOKEN_CACHE_DIR", str(INPUTS / "tiktoken_cache"))
    return env


def prepare(
    repo: Path, script: str, *options: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repo / "data" / script), *map(str, options)]
    return subprocess.run(
        command, cwd=cwd or repo, env=environment(repo, **(env or {})), capture_output=True, text=True, timeout=120
    )


def prepare_well(
    repo: Path, script: str, *options: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    done = prepare(repo, script, *options, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_one_line(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    lines = [
        line for line in done.stderr.splitlines() if line and "shards:" not in line
    ]  # the progress bar is no message
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.suffix in (".bin", ".json", ".pkl")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def lay_shakespeare(repo: Path, name: str) -> Path:
    """Put input.txt into data/<name>, from the folder of test inputs or through the network."""
    if not (INPUTS / "tinyshakespeare.txt").exists():
        done = prepare(repo, f"{name}/prepare.py")
        if done.returncode:
            pytest.skip(f"no test inputs here and no network: {done.stderr}")
    else:
        (repo / "data" / name / "input.txt").write_bytes((INPUTS / "tinyshakespeare.txt").read_bytes())
    return repo / "data" / name


@functools.cache
def gpt2_tokenizer_is_here(cache_dir: str) -> bool:
    code = "import tiktoken; tiktoken.get_encoding('gpt2')"
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": cache_dir} if cache_dir else None
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0


def need_gpt2_tokenizer(repo: Path) -> None:
    if not gpt2_tokenizer_is_here(environment(repo).get("TIKTOKEN_CACHE_DIR", "")):
        pytest.skip("no GPT-2 tokenizer here and no network")


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


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_own_input_that_is_not_utf8_or_empty_is_one_line(repo, name):
    need_gpt2_tokenizer(repo)
    (repo / "data" / name / "input.txt").write_bytes(b"abc\xff")
    assert_one_line(prepare(repo, f"{name}/prepare.py"), "input.txt is not UTF-8 (byte 0xff at offset 3)")
    (repo / "data" / name / "input.txt").write_bytes(b"")
    assert prepare(repo, f"{name}/prepare.py").returncode == 2


# ---- downloading --------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.content, from the byte asked for if ranges is set, and breaks off after limit bytes."""

    content = bytes(range(256)) * 4000
    ranges = True
    limit = 10**9
    asked: list[str]

    def do_GET(self):
        wanted = self.headers.get("Range", "")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : start + self.limit])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(**attributes):
    asked: list[str] = []
    handler = type("Handler", (Server,), {"asked": asked, **attributes})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file", asked
        server.shutdown()


def download(repo: Path, url: str, path: Path, content: bytes = Server.content) -> subprocess.CompletedProcess:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'data'); import prepare_tools as tools;"
        "tools.run(lambda: tools.download(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, url, str(path), hashlib.sha256(content).hexdigest()]
    env = environment(repo, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    return subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=60)


def test_download_goes_on_where_it_broke_off(repo, tmp_path):
    path, part = tmp_path / "file", tmp_path / "file.part"
    with serving(limit=300_000) as (url, asked):
        assert download(repo, url, path).returncode == 2
        have = part.stat().st_size
        assert 0 < have <= 300_000
        assert not path.exists()
    with serving() as (url, asked):
        assert download(repo, url, path).returncode == 0
        assert asked == [f"bytes={have}-"]
    assert path.read_bytes() == Server.content
    assert not part.exists()


def test_download_starts_again_where_the_server_cannot_go_on(repo, tmp_path):
    (tmp_path / "file.part").write_bytes(b"begun")
    with serving(ranges=False) as (url, _):
        assert download(repo, url, tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == Server.content


def test_download_killed_after_its_last_byte_is_only_verified(repo, tmp_path):
    (tmp_path / "file.part").write_bytes(Server.content)
    with serving() as (url, _):
        assert download(repo, url, tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == Server.content


def test_download_of_another_file_is_refused(repo, tmp_path):
    with serving() as (url, _):
        done = download(repo, url, tmp_path / "file", content=b"what we expect")
    assert done.returncode == 2
    assert "sha256 differs" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("file*"))


# ---- own text -----------------------------------------------------------------------------------------------


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


def test_gpt2_tokenizer_that_cannot_be_fetched_is_one_line(repo, tmp_path):
    (tmp_path / "text").write_text("some text")
    options = (f"--input={tmp_path / 'text'}", f"--out={tmp_path / 'out'}", "--tokenizer=gpt2")
    done = prepare(repo, "prepare_text.py", *options, env={**OFFLINE, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")})
    assert_one_line(done, "set TIKTOKEN_CACHE_DIR")


# ---- openwebtext, on a small stand-in -----------------------------------------------------------------------


def documents(shard: int) -> list[str]:
    return [f"Document {i} of shard {shard}, {'and so on ' * (i % 7)}<|endoftext|>" for i in range(100)]


def lay_shards(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        lines = [json.dumps({"text": text}) for text in documents(shard)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def owt(repo: Path) -> Path:
    need_gpt2_tokenizer(repo)
    return repo / "data" / "openwebtext"


def test_openwebtext_holds_every_document_once_with_an_end_of_text_each(repo, tmp_path):
    import tiktoken

    folder, source = owt(repo), lay_shards(tmp_path / "source", 3)
    (source / "z.txt").write_text("a document of its own")
    output = prepare_well(repo, "openwebtext/prepare.py", f"--source={source}", "--num_proc=2", "--val_fraction=0.1")
    meta = jax_codec.load_meta(folder)
    assert meta is not None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", environment(repo).get("TIKTOKEN_CACHE_DIR", ""))
        bpe = tiktoken.get_encoding("gpt2")
    found = {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", np.uint16)
        assert ids[-1] == 50256
        assert len(ids) == meta[f"{split}_tokens"]
        assert f"{split} has {len(ids):,} tokens" in output
        found[split] = [
            bpe.decode(piece[piece != 50256]) for piece in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]
        ]
    expected = [text for shard in range(3) for text in documents(shard)] + ["a document of its own"]
    assert sorted(found["train"] + found["val"]) == sorted(expected)
    assert 10 <= len(found["val"]) <= 60
    assert not (folder / "parts").exists()
    jax_data.check_dataset(folder, 64, 50257)


def test_openwebtext_killed_and_resumed_is_identical_and_does_no_finished_shard_again(repo, tmp_path):
    folder, source = owt(repo), lay_shards(tmp_path / "source", 3)
    options = (f"--source={source}", "--num_proc=1", "--val_fraction=0.1")
    prepare_well(repo, "openwebtext/prepare.py", *options)
    uninterrupted = digests(folder)
    for file in uninterrupted:
        (folder / file).unlink()

    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(  # the third shard waits for ever
        "import json, time; load = json.loads\n"
        "def loads(text):\n"
        "    if b'shard 2' in text[:60]: time.sleep(1000)\n"
        "    return load(text)\n"
        "json.loads = loads\n"
    )
    command = [sys.executable, str(folder / "prepare.py"), *options]
    env = environment(repo)
    env["PYTHONPATH"] += os.pathsep + str(slow)
    process = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: (folder / "parts" / "00001.train").exists())
    os.kill(process.pid, signal.SIGKILL)  # the main process only: its workers must not live on
    process.wait()
    wait_until(lambda: not group_lives(process.pid))
    assert not (folder / "train.bin").exists()
    assert not (folder / "meta.json").exists()

    assert "2 of 3 shards are done already" in prepare_well(repo, "openwebtext/prepare.py", *options)
    assert digests(folder) == uninterrupted
    other = (f"--source={source}", "--num_proc=3", "--val_fraction=0.1")
    assert "0 of 3 shards" in prepare_well(repo, "openwebtext/prepare.py", *other)
    assert digests(folder) == uninterrupted


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_openwebtext_parts_of_other_settings_are_not_used(repo, tmp_path):
    folder, source = owt(repo), lay_shards(tmp_path / "source", 1)
    (folder / "parts").mkdir()
    (folder / "parts" / "00000.train").write_bytes(b"\x07\x07")
    (folder / "parts" / "settings.json").write_text('{"seed": 1}')
    output = prepare_well(repo, "openwebtext/prepare.py", f"--source={source}", "--num_proc=1", "--val_fraction=0.1")
    assert "0 of 1 shards are done already" in output
    assert np.fromfile(folder / "train.bin", np.uint16).size > 100


def test_openwebtext_reads_parquet(repo, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "source").mkdir()
    parquet.write_table(pyarrow.table({"text": [*documents(0), None]}), tmp_path / "source" / "0.parquet")
    folder = owt(repo)
    prepare_well(
        repo, "openwebtext/prepare.py", f"--source={tmp_path / 'source'}", "--num_proc=1", "--val_fraction=0.1"
    )
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "val")])
    assert (ids == 50256).sum() == 100


def test_openwebtext_that_cannot_be_made_is_one_line_and_exit_2(repo, tmp_path):
    owt(repo)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    cases: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        ((f"--source={tmp_path / 'source'}", "--num_proc=1"), ("0.jsonl, line 2", '"text"')),
        ((f"--source={tmp_path / 'nowhere'}",), ("nowhere is not a folder",)),
        ((f"--source={repo / 'data' / 'shakespeare'}",), ("holds no .parquet, .jsonl or .txt",)),
        (("--num_proc=0",), ("--num_proc=0",)),
        (("--num_proc=many",), ("--num_proc",)),
        (("--val_fraction=2",), ("--val_fraction",)),
    ]
    for options, words in cases:
        assert_one_line(prepare(repo, "openwebtext/prepare.py", *options), *words)


def test_openwebtext_without_its_packages_says_what_to_install(repo):
    owt(repo)
    (repo.parent / "no_jax" / "huggingface_hub.py").write_text("raise ImportError(name='huggingface_hub')")
    assert_one_line(prepare(repo, "openwebtext/prepare.py"), "`pip install huggingface_hub pyarrow`", "--source=DIR")


@pytest.mark.parametrize(
    ("on_main", "on_convert", "outcome"),
    [
        (["plain_text/train-0.parquet"], [], "main"),
        (["openwebtext.py"], ["plain_text/train/0000.parquet"], "refs/convert/parquet"),
        (["openwebtext.py"], ["plain_text/partial-train/0000.parquet"], "only a part"),
        (["openwebtext.py"], ["README.md"], "no Parquet files"),
    ],
)
def test_openwebtext_takes_the_hubs_parquet_from_where_it_lies(repo, tmp_path, on_main, on_convert, outcome):
    """With a stand-in for the hub, whose real answers a test cannot depend on."""
    folder, source = owt(repo), lay_shards(tmp_path / "source", 1)
    stand_ins = repo.parent / "no_jax"
    (stand_ins / "pyarrow").mkdir()
    (stand_ins / "pyarrow" / "__init__.py").touch()
    (stand_ins / "pyarrow" / "parquet.py").touch()
    (stand_ins / "huggingface_hub.py").write_text(
        "class HfApi:\n"
        "    def list_repo_files(self, repo, *, repo_type, revision):\n"
        f"        return {{'main': {on_main!r}, 'refs/convert/parquet': {on_convert!r}}}[revision]\n"
        "def snapshot_download(repo, *, repo_type, revision, allow_patterns):\n"
        "    print('from', revision, allow_patterns)\n"
        f"    return {str(source)!r}\n"
    )
    done = prepare(repo, "openwebtext/prepare.py", "--num_proc=1", "--val_fraction=0.1")
    if outcome in ("main", "refs/convert/parquet"):
        assert done.returncode == 0, done.stderr
        assert f"from {outcome} {on_main if outcome == 'main' else on_convert}" in done.stdout
        assert (folder / "meta.json").exists()
    else:
        assert_one_line(done, outcome, "--source=DIR")


@pytest.mark.slow
def test_openwebtext_stopped_by_ctrl_c_says_how_to_go_on_and_leaves_no_process(repo, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "0.jsonl")  # a shard that never comes ...
    folder = owt(repo)
    (tmp_path / "slow").mkdir()  # ... and passes for a file
    (tmp_path / "slow" / "sitecustomize.py").write_text("from pathlib import Path\nPath.is_file = Path.exists\n")
    env = environment(repo)
    env["PYTHONPATH"] += os.pathsep + str(tmp_path / "slow")
    command = [sys.executable, str(folder / "prepare.py"), f"--source={source}", "--num_proc=1"]
    process = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with open(source / "0.jsonl", "w"):  # opens when a worker has begun to read
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "prepare.py: stopped; run the same command again to go on"
    assert "Traceback" not in stderr
    wait_until(lambda: not group_lives(process.pid))
