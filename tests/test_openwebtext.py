"""OpenWebText from a small stand-in: every document once, killed and gone on with, and what cannot be made.

python -m pytest tests/test_openwebtext.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jax_codec
import jax_data
from tests.preparing import assert_one_line, digests, environment, need_gpt2_tokenizer, prepare, prepare_well


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


@pytest.mark.parametrize("settings", ['{"seed": 1}', '{"se', "[]"])
def test_openwebtext_parts_of_other_settings_are_not_used(repo, tmp_path, settings):
    folder, source = owt(repo), lay_shards(tmp_path / "source", 1)
    (folder / "parts").mkdir()
    (folder / "parts" / "00000.train").write_bytes(b"\x07\x07")
    (folder / "parts" / "settings.json").write_text(settings)
    output = prepare_well(repo, "openwebtext/prepare.py", f"--source={source}", "--num_proc=1", "--val_fraction=0.1")
    assert "0 of 1 shards are done already" in output
    assert np.fromfile(folder / "train.bin", np.uint16).size > 100


def test_openwebtext_does_only_those_shards_again_that_changed(repo, tmp_path):
    folder, source = owt(repo), lay_shards(tmp_path / "source", 3)
    options = (f"--source={source}", "--num_proc=1", "--val_fraction=0.1")
    whole = source / "2.jsonl"
    text = whole.read_text()
    whole.write_text(text + "no JSON\n")
    assert_one_line(prepare(repo, "openwebtext/prepare.py", *options), "line 101: not a JSON object")
    for part in (folder / "parts").glob("*.train"):
        assert part.stem in ("00000", "00001")
        np.array([7, 50256], np.uint16).tofile(part)  # to be known again
    whole.write_text(text + "\n  \n")  # lines that are blank are no documents, and no mistake
    output = prepare_well(repo, "openwebtext/prepare.py", *options)
    assert "2 of 3 shards are done already" in output
    ids = np.fromfile(folder / "train.bin", np.uint16)
    assert ids[:4].tolist() == [7, 50256, 7, 50256] and np.count_nonzero(ids == 50256) > 80


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
