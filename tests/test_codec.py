"""What token ids mean (jax_codec.py): meta data, whoever wrote them, and codecs.

python -m pytest tests/test_codec.py
"""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_codec
from jax_codec import DataError, load_meta, make_codec

ROOT = Path(__file__).resolve().parents[1]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


TIKTOKEN_CACHE = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiktoken_cache"


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, protocol):
    proof = tmp_path / "proof"
    meta = {"vocab_size": 1, "itos": {0: "a"}, "stoi": {"a": 0}, "more": Bomb(f"touch {proof}")}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    with pytest.raises(DataError, match=r"meta\.pkl is refused.*system"):
        load_meta(tmp_path)
    assert not proof.exists()


CHAR_META = {
    "tokenizer": "char",
    "vocab_size": 2,
    "dtype": "uint16",
    "train_tokens": 9,
    "val_tokens": 9,
    "itos": ["a", "b"],
}


BAD_VALUES = [
    ("tokenizer", 1), ("vocab_size", 0), ("vocab_size", -1), ("vocab_size", "2"), ("vocab_size", True),
    ("vocab_size", 2.0), ("vocab_size", 3), ("vocab_size", 10**30), ("dtype", "int8"), ("dtype", []),
    ("train_tokens", -1), ("val_tokens", "9"), ("itos", None), ("itos", ["a"]), ("itos", ["a", 1]),
    ("itos", ["a", "a"]), ("itos", {"0": "a", "1": "b"}), ("itos", ["a", "\ud800"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_meta_with_a_bad_value_is_refused_in_one_line(tmp_path, key, value):
    (tmp_path / "meta.json").write_text(json.dumps({**CHAR_META, key: value}))
    with pytest.raises(DataError, match=r"meta\.json") as caught:
        load_meta(tmp_path)
    assert "\n" not in str(caught.value)


def test_truth_value_is_no_vocab_size(tmp_path):
    (tmp_path / "meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": true, "dtype": "uint16"}')
    with pytest.raises(DataError, match="vocab_size is True"):
        load_meta(tmp_path)


@pytest.mark.parametrize("key", ["tokenizer", "vocab_size", "dtype", "itos"])
def test_meta_without_a_key_is_refused(tmp_path, key):
    (tmp_path / "meta.json").write_text(json.dumps({k: v for k, v in CHAR_META.items() if k != key}))
    with pytest.raises(DataError, match=key):
        load_meta(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"\\ud800"', "NaN", "1" * 10_000, "\x00"])
def test_meta_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=r"meta\.json"):
        load_meta(tmp_path)


def assert_meta_is_valid_or_refused(folder: Path) -> None:
    try:
        meta = load_meta(folder)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert meta is not None
        assert jax_codec.check_meta(meta, "here") == meta


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Some bytes replaced, removed or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=9))
    return bytes(data)


@relaxed
@given(content=damaged(json.dumps(CHAR_META).encode()) | st.binary(max_size=50))
def test_damaged_meta_json_never_gives_anything_but_a_data_error(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    assert_meta_is_valid_or_refused(tmp_path)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@relaxed
@given(key=st.sampled_from(sorted(CHAR_META)), value=any_json)
def test_meta_json_with_any_value_anywhere_never_gives_anything_but_a_data_error(tmp_path, key, value):
    (tmp_path / "meta.json").write_text(json.dumps({**CHAR_META, key: value}))
    assert_meta_is_valid_or_refused(tmp_path)


NANOGPT_META = {"vocab_size": 3, "itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}


@settings(relaxed, max_examples=300)
@given(content=st.sampled_from([0, 2, 4]).flatmap(lambda protocol: damaged(pickle.dumps(NANOGPT_META, protocol))))
def test_damaged_meta_pkl_never_gives_anything_but_a_data_error(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    assert_meta_is_valid_or_refused(tmp_path)


@pytest.mark.parametrize(
    "meta",
    [None, [], {}, {"vocab_size": 1.0}, {**NANOGPT_META, "vocab_size": 2**70}, {**NANOGPT_META, "itos": {0: "a"}}],
)
def test_pickle_of_something_else_is_refused(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(DataError, match=r"meta\.pkl"):
        load_meta(tmp_path)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"vocab_size": 50}, {"tokenizer": "unknown", "vocab_size": 50, "dtype": "uint16"}),
        ({"vocab_size": 2, "itos": ["a", "b"]}, {**CHAR_META}),
        (OrderedDict(vocab_size=2, itos=OrderedDict([(1, "b"), (0, "a")])), {**CHAR_META}),
    ],
)
def test_metas_that_nanogpts_trainer_takes_are_enough(tmp_path, meta, expected):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert load_meta(tmp_path) == {key: expected[key] for key in expected if not key.endswith("_tokens")}


def test_pickle_that_asks_for_a_huge_memo_costs_nothing(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04}r\xff\xff\xff\xff.")  # memo index 2**32 - 1: 64 GB in C
    with pytest.raises(DataError, match=r"meta\.pkl"):
        load_meta(tmp_path)


# ---- codecs -------------------------------------------------------------------------------------------------


def gpt2_codec(monkeypatch) -> jax_codec.Codec:
    if TIKTOKEN_CACHE.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
    try:
        return make_codec(None)
    except DataError as error:
        pytest.skip(f"no GPT-2 tokenizer here and no network: {error}")


real_text = st.text(st.characters(exclude_categories=["Cs"]))


@relaxed
@given(alphabet=st.sets(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), data=st.data())
def test_char_codec_round_trips(alphabet, data):
    itos = sorted(alphabet)
    codec = make_codec({"tokenizer": "char", "vocab_size": len(itos), "dtype": "uint16", "itos": itos})
    text = data.draw(st.text(st.sampled_from(itos)))
    ids = codec.encode(text)
    assert Counter(ids) == Counter(itos.index(char) for char in text)
    assert codec.decode(ids) == codec.decode(np.array(ids, np.int32)) == text
    assert (codec.tokenizer, codec.vocab_size) == ("char", len(itos))


def test_char_codec_names_each_unknown_character_once():
    codec = make_codec(CHAR_META)
    with pytest.raises(DataError, match=r"vocabulary of 2: '\\n', 'x', 'é'$"):
        codec.encode("axéxa\nb\n")


@relaxed
@given(text=real_text)
def test_bytes_codec_round_trips(text):
    codec = make_codec({"tokenizer": "bytes", "vocab_size": 256, "dtype": "uint16"})
    assert codec.encode(text) == list(text.encode())
    assert codec.decode(codec.encode(text)) == text
    assert codec.vocab_size == 256


def test_bytes_codec_shows_half_a_character_as_a_replacement():
    codec = make_codec({"tokenizer": "bytes", "vocab_size": 256, "dtype": "uint16"})
    assert codec.decode([0x61, 0xC3]) == "a\ufffd"
    codec.encode("\udc80")  # a stray byte on the command line


@relaxed
@given(text=real_text)
def test_gpt2_codec_round_trips(text):
    with pytest.MonkeyPatch.context() as monkeypatch:
        codec = gpt2_codec(monkeypatch)
    assert codec.decode(codec.encode(text)) == text


def test_gpt2_codec_knows_end_of_text_and_nothing_above(monkeypatch):
    codec = gpt2_codec(monkeypatch)
    assert (codec.tokenizer, codec.vocab_size) == ("gpt2", 50257)
    assert codec.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert codec.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("bad", [-1, 50257, 50303, 2**40])
def test_no_codec_decodes_ids_it_does_not_know(monkeypatch, bad):
    for codec in (gpt2_codec(monkeypatch), make_codec(CHAR_META)):
        with pytest.raises(DataError, match=f"token id {bad} has no text"):
            codec.decode([0, bad])


def test_gpt2_codec_offline_says_how_to_fill_the_cache(tmp_path):
    code = "import jax_codec\ntry: jax_codec.make_codec(None)\nexcept jax_codec.DataError as error: print(error)"
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert "set TIKTOKEN_CACHE_DIR" in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "meta", [{}, {"tokenizer": "words", "vocab_size": 3, "dtype": "uint16"}, {**CHAR_META, "itos": None}]
)
def test_codec_of_bad_meta_is_refused(meta):
    with pytest.raises(DataError, match="codec"):
        make_codec(meta)
