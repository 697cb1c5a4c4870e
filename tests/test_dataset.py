"""What is written, found and checked of a data set (jax_data.py).

python -m pytest tests/test_dataset.py
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_data
from jax_codec import DataError, load_meta
from jax_data import check_dataset, find_data_dir, write_dataset
from tests.preparing import make_data

# ---- checking a data set ------------------------------------------------------------------------------------


def test_check_accepts_good_data(tmp_path):
    check_dataset(make_data(tmp_path), block_size=299, vocab_size=20_300)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_check_names_a_missing_file_and_the_command(tmp_path, name):
    (make_data(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing: run `python .*prepare_text.py --input=FILE"):
        check_dataset(tmp_path, 8, 50257)
    (tmp_path / "prepare.py").touch()
    with pytest.raises(DataError, match=f"run `python {tmp_path / 'prepare.py'}`"):
        check_dataset(tmp_path, 8, 50257)


@pytest.mark.parametrize(("size", "dtype"), [(0, "uint16"), (1999, "uint16"), (398, "uint32")])
def test_check_refuses_a_size_that_is_no_number_of_tokens(tmp_path, size, dtype):
    os.truncate(make_data(tmp_path, dtype=dtype) / "train.bin", size)
    with pytest.raises(DataError, match=rf"train\.bin has {size:,} bytes.*{dtype} tokens.*cut short"):
        check_dataset(tmp_path, 8, 50257)


def test_check_refuses_a_file_cut_between_tokens(tmp_path):
    os.truncate(make_data(tmp_path) / "val.bin", 500)
    with pytest.raises(DataError, match=r"val\.bin holds 250 tokens, but meta\.json says 300"):
        check_dataset(tmp_path, 8, 50257)


def test_check_wants_more_tokens_than_a_block(tmp_path):
    make_data(tmp_path, n_val=100)
    check_dataset(tmp_path, 99, 50257)
    with pytest.raises(DataError, match=r"val\.bin holds 100 tokens, too few for block_size 100"):
        check_dataset(tmp_path, 100, 50257)


def test_check_refuses_uint32_ids_that_nothing_declares(tmp_path):
    make_data(tmp_path, dtype="uint32")
    (tmp_path / "meta.json").unlink()
    with pytest.raises(DataError, match="uint32"):
        check_dataset(tmp_path, 8, 50304)


@pytest.mark.parametrize("offset", [0, 70, 999])
def test_check_names_file_offset_and_id_of_the_first_token_out_of_range(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(jax_data, "SCAN_WINDOW", 64)
    ids = np.zeros(1000, np.uint16)
    ids[[offset, 999]] = 65, 66 if offset < 999 else 65
    write_dataset(tmp_path, "gpt2", 50257, ids, ids[:10])
    with pytest.raises(
        DataError, match=rf"train\.bin: token id 65 at offset {offset} is not below the vocab_size of 65"
    ):
        check_dataset(tmp_path, 8, 65)
    check_dataset(tmp_path, 8, 67)


def test_check_of_a_large_file_looks_at_both_ends_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr(jax_data, "SCAN_WINDOW", 10)
    monkeypatch.setattr(jax_data, "FULL_SCAN_TOKENS", 50)
    seen = {i for start in jax_data._scan_starts(1001) for i in range(start, start + 10)}
    assert {0, 1000} < seen
    assert len(seen) == 50
    ids = np.zeros(1001, np.uint16)
    ids[1000] = 99
    write_dataset(tmp_path, "gpt2", 50257, ids, ids[:20])
    with pytest.raises(DataError, match="id 99 at offset 1000"):
        check_dataset(tmp_path, 8, 99)


# ---- finding a data set -------------------------------------------------------------------------------------


def test_data_set_is_found_here_then_beside_the_module_then_by_path(tmp_path, monkeypatch):
    here, product, elsewhere = tmp_path / "here", tmp_path / "product", tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(jax_data, "__file__", str(product / "jax_data.py"))
    make_data(elsewhere)
    assert find_data_dir(str(elsewhere)) == elsewhere
    assert find_data_dir("../elsewhere") == Path("../elsewhere")
    make_data(product / "data" / "mine")
    assert find_data_dir("mine") == product / "data" / "mine"
    make_data(here / "data" / "mine")
    assert find_data_dir("mine") == Path("data/mine")


def test_data_set_that_is_missing_names_the_command_and_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax_data, "__file__", str(tmp_path / "jax_data.py"))
    make_data(tmp_path / "data" / "mine")
    with pytest.raises(
        DataError, match=r"no data set 'other': run `python .*--out=data/other.*\(prepared here: mine\)"
    ):
        find_data_dir("other")
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "prepare.py").touch()
    with pytest.raises(DataError, match=r"run `python data/other/prepare\.py`"):
        find_data_dir("other")


# ---- meta data ----------------------------------------------------------------------------------------------


def test_meta_is_none_where_there_is_none(tmp_path):
    assert load_meta(tmp_path) is None


def test_written_meta_is_read_back(tmp_path):
    meta = write_dataset(tmp_path, "char", 3, [0, 1, 2, 0], [2], itos=["a", "b", "é"])
    assert meta == {
        "tokenizer": "char", "vocab_size": 3, "dtype": "uint16", "train_tokens": 4, "val_tokens": 1,
        "itos": ["a", "b", "é"],
    }  # fmt: skip
    assert load_meta(tmp_path) == meta
    assert not list(tmp_path.glob("*.tmp"))


def test_meta_json_wins_over_meta_pkl_which_alone_says_the_same(tmp_path):
    write_dataset(tmp_path, "char", 3, [0, 1], [2], itos=["a", "b", "c"])
    (tmp_path / "meta.json").unlink()
    from_pickle = {"tokenizer": "char", "vocab_size": 3, "dtype": "uint16", "itos": ["a", "b", "c"]}
    assert load_meta(tmp_path) == from_pickle
    write_dataset(tmp_path, "bytes", 256, [0, 1], [2])
    assert load_meta(tmp_path) == {
        "tokenizer": "bytes", "vocab_size": 256, "dtype": "uint16", "train_tokens": 2, "val_tokens": 1,
    }  # fmt: skip
    assert not (tmp_path / "meta.pkl").exists()  # it described the characters that were here before


def test_ids_may_come_in_pieces(tmp_path):
    pieces = (np.arange(start, start + 10) for start in (0, 10, 20))
    meta = write_dataset(tmp_path, "bytes", 256, pieces, iter([np.arange(9)]))
    assert (meta["train_tokens"], meta["val_tokens"]) == (30, 9)
    assert np.fromfile(tmp_path / "train.bin", np.uint16).tolist() == list(range(30))


def test_writing_refuses_ids_out_of_range_no_tokens_and_a_file_in_the_way(tmp_path):
    with pytest.raises(DataError, match="ids from 0 to 300"):
        write_dataset(tmp_path / "a", "bytes", 256, [0, 300], [1])
    with pytest.raises(DataError, match=r"nothing to write to .*val\.bin"):
        write_dataset(tmp_path / "b", "bytes", 256, [0, 1], [])
    assert not [path for path in tmp_path.rglob("*") if path.name in ("train.bin", "val.bin", "meta.json")]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        write_dataset(tmp_path / "file", "bytes", 256, [0, 1], [1])
    with pytest.raises(DataError, match="does not fit uint16"):
        write_dataset(tmp_path / "c", "other", 70_000, [0, 1], [1])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80), st.binary(max_size=80), st.sampled_from(["uint16", "uint32", None]), st.integers(1, 70_000)
)
def test_any_bytes_as_token_files_are_a_data_error_or_can_be_trained_on(tmp_path, train, val, dtype, vocab_size):
    meta = {"tokenizer": "bytes", "vocab_size": min(vocab_size, 2**16), "dtype": dtype}
    (tmp_path / "meta.json").unlink(missing_ok=True)
    if dtype is not None:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "train.bin").write_bytes(train)
    (tmp_path / "val.bin").write_bytes(val)
    try:
        jax_data.check_dataset(tmp_path, 4, vocab_size)
    except jax_data.DataError as error:
        assert "\n" not in str(error)
        return
    for split in ("train", "val", "train_eval"):
        x_BT, _ = jax_data.get_batch(tmp_path, split, 3, seed=1, batch_size=2, block_size=4, vocab_size=vocab_size)
        assert x_BT.shape == (2, 4) and x_BT.max() < vocab_size
