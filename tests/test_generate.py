"""jax_generate.py and jax_cache.py: against the uncached forward pass, and transformers.

python -m pytest tests/test_generate.py

The comparison with transformers is skipped where it is not installed: pip install -e ".[peers]"
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_cache
import jax_generate
from jax_cache import decoding_weights, forward_cached, init_cache
from jax_generate import generate, pad_left, stream
from jax_transformer import GPTConfig, Params, abstract_params, forward

W = 16
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=W, vocab_size=29, bias=True, gelu="tanh")
KEY = jax.random.key(7)
# What no padding, no position and no row has in common with another.
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]


@pytest.fixture(autouse=True, scope="module")
def several_segments():
    """A cache of 16 columns in segments of 4, 4 and 8; products in full float32 on any device; and, as everything is
    compiled and next to nothing computed, without XLA's optimisations."""
    jax_cache.FIRST_SEGMENT = 4
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax_cache.FIRST_SEGMENT = 64


def random_params(config: GPTConfig, seed: int = 0) -> Params:
    """No bias is 0 and no gain 1, the weights are wide, so that the likeliest token is so by far, and the positions
    most of all, so that it is not always the same."""
    random = np.random.default_rng(seed)

    def draw(path, a) -> np.ndarray:
        gain = 1.0 if path[-1].key == "scale" else 0.0
        width = 3 if path[0].key == "wpe" else 0.3
        return (gain + width * random.standard_normal(a.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


PARAMS = random_params(TINY)
SHALLOW = dataclasses.replace(TINY, n_layer=1)  # for what happens after the logits
SHALLOW_PARAMS = random_params(SHALLOW)
compiled_forward = jax.jit(forward, static_argnums=2)
compiled_cached = jax.jit(forward_cached, static_argnames=("config",))
uncached = jax.jit(lambda params, ids_BT, config, pads_B: forward_cached(params, ids_BT, config, None, pads_B)[0],
                   static_argnums=2)  # fmt: skip


def next_logits(params: Params, ids: list[int], config: GPTConfig = TINY) -> np.ndarray:
    """Logits (V,) after these ids, by the forward pass that training uses. Padded on the right: one compilation."""
    ids = ids[-config.block_size :]
    padded = np.zeros((1, config.block_size), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(compiled_forward(params, padded, config)[0, len(ids) - 1], np.float32)


def greedy_loop(params: Params, ids: list[int], number: int, config: GPTConfig = TINY) -> list[int]:
    """nanoGPT's way: the last block_size ids through the model, again and again."""
    ids = list(ids)
    for _ in range(number):
        ids.append(int(next_logits(params, ids, config).argmax()))
    return ids[-number:]


# ----------------------------------------------------------------------------------------------------------------------
# the cached forward pass


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_prefill_of_n_and_k_decodes_are_the_full_forward_pass(data):
    lengths = data.draw(st.lists(st.integers(1, W), min_size=2, max_size=2))
    n, seed = max(lengths), data.draw(st.integers(0, 99))
    random = np.random.default_rng(seed)
    rows = [random.integers(0, TINY.vocab_size, W).tolist() for _ in lengths]  # of which `length` are the prompt
    ids_BT, pads_B = pad_left([row[:length] for row, length in zip(rows, lengths, strict=True)], n)
    garbage = random.integers(0, TINY.vocab_size, (2, W - n))  # behind the prompt, in a full bucket
    weights = decoding_weights(PARAMS, TINY)
    logits_BV, cache = compiled_cached(
        weights, np.concatenate([ids_BT, garbage], 1).astype(np.int32), TINY, init_cache(TINY, 2), pads_B, last=n - 1
    )
    for column in range(n, W + 1):
        for b, pad in enumerate(pads_B):
            np.testing.assert_allclose(logits_BV[b], next_logits(PARAMS, rows[b][: column - pad]), atol=2e-5)
        if column < W:
            new_B1 = np.array([[row[column - pad]] for row, pad in zip(rows, pads_B, strict=True)], np.int32)
            logits_BV, cache = compiled_cached(weights, new_B1, TINY, cache, pads_B, column=np.int32(column))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_lower_precision_computes_in_it_and_stays_near_float32(dtype, tolerance):
    config = dataclasses.replace(TINY, dtype=dtype)
    ids_BT, pads_B = pad_left(PROMPTS, W)
    logits_BV = uncached(decoding_weights(PARAMS, config), ids_BT, config, pads_B)
    assert logits_BV.dtype == dtype
    expected_BV = np.stack([next_logits(PARAMS, prompt) for prompt in PROMPTS])
    scale = np.abs(expected_BV).max()
    np.testing.assert_allclose(np.float32(logits_BV) / scale, expected_BV / scale, atol=tolerance)
    weights = decoding_weights(PARAMS, config)
    assert weights["h"]["0"]["mlp"]["c_fc"]["kernel"].dtype == dtype
    assert weights["ln_f"]["scale"].dtype == jnp.float32  # as in forward


def test_the_cache_is_float32_on_a_cpu_and_as_wide_as_the_window():
    for config in (TINY, dataclasses.replace(TINY, dtype="bfloat16"), dataclasses.replace(TINY, block_size=19)):
        for keys, values in init_cache(config, 3):
            assert [a.shape for a in keys] == [a.shape for a in values]
            assert sum(a.shape[2] for a in keys) == config.block_size
            assert {a.dtype for a in keys + values} == {jnp.dtype("float32")}


IDS_B1, PADS_B = np.ones((2, 1), np.int32), np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"ids_BT": np.ones(2, np.int32)}, "2 dimensions"),
        ({"ids_BT": np.ones((2, 1), np.float32)}, "must be integers, not float32"),
        ({"ids_BT": np.ones((3, 1), np.int32)}, r"pads_B has shape \(2,\), and ids_BT 3 rows"),
        ({"ids_BT": np.ones((2, W + 1), np.int32), "column": 0}, "17 tokens do not fit in block_size=16"),
        ({"ids_BT": np.ones((2, 3), np.int32)}, "3 tokens at once must go to column 0"),
        ({"cache_of": (TINY, 3)}, "the cache is for 3 rows, not for 2"),
        ({"cache_of": (dataclasses.replace(TINY, n_layer=1), 2)}, "the cache has 1 layers, not n_layer=2"),
        ({"cache_of": (dataclasses.replace(TINY, block_size=12), 2)}, "the cache has 12 columns, not block_size=16"),
    ],
)
def test_what_a_wrong_call_would_break_is_refused(change, message):
    arguments = {"ids_BT": IDS_B1, "column": jnp.int32(3), "cache_of": (TINY, 2)} | change
    call = functools.partial(
        jax.eval_shape, functools.partial(forward_cached, config=TINY), decoding_weights(PARAMS, TINY),
        arguments["ids_BT"], cache=init_cache(*arguments["cache_of"]), pads_B=PADS_B,
    )  # fmt: skip
    if arguments["column"] is not None and not isinstance(arguments["column"], int):
        call = functools.partial(call, column=arguments["column"])
    if message is None:
        assert call()[0].shape == (2, TINY.vocab_size)
    else:
        with pytest.raises(AssertionError, match=message):
            call()


def test_a_token_is_written_in_place_and_the_old_state_is_gone():
    jax.config.update("jax_disable_most_optimizations", False)
    state, lowered = decode_of_two_rows()
    copies = re.findall(r"= (f32\[2,2,[48],8\])\S* copy\(", lowered.compile().as_text())
    jax.config.update("jax_disable_most_optimizations", True)
    assert copies == []  # of a segment; of these widths
    weights, keys = decoding_weights(PARAMS, TINY), jax.random.split(KEY, 2)
    jax_generate._decode(weights, state, np.int32(2), keys, jnp.zeros(0, jnp.int32), **STATIC)
    assert state.cache[0][0][0].is_deleted()


STATIC = {"config": TINY, "sampling": jax_generate.Sampling(0.0, None, None, None, TINY.vocab_size)}


def decode_of_two_rows():
    ids_BT, pads_B = pad_left(PROMPTS[:2], 8)
    keys, none = jax.random.split(KEY, 2), jnp.zeros(0, jnp.int32)
    weights = decoding_weights(PARAMS, TINY)
    state = jax_generate._prefill(weights, ids_BT, pads_B, np.int32(8), keys, none, **STATIC)
    return state, jax_generate._decode.lower(weights, state, np.int32(2), keys, none, **STATIC)


# ----------------------------------------------------------------------------------------------------------------------
# generate


@pytest.mark.parametrize("prompt", [*PROMPTS, list(range(W)), list(range(25))], ids=len)
def test_greedy_tokens_are_the_uncached_loops_up_to_the_window_and_past_it(prompt, capsys):
    assert generate(PARAMS, TINY, [prompt], max_new_tokens=24, temperature=0, key=KEY) == [
        greedy_loop(PARAMS, prompt, 24)
    ]
    said = capsys.readouterr()
    assert said.out == ""
    expected = "the longest prompt has 25 tokens: only the last 16 fit in the model's window\n"
    assert said.err == (expected if len(prompt) > W else "")


def test_a_head_of_its_own_is_what_the_tokens_come_from():
    head = {"embedding": PARAMS["wte"]["embedding"][::-1]}
    params = PARAMS | {"lm_head": head}
    tokens = greedy_loop(params, [1, 2, 3], 8)
    assert generate(params, TINY, [[1, 2, 3]], max_new_tokens=8, temperature=0, key=KEY) == [tokens]
    assert tokens != greedy_loop(PARAMS, [1, 2, 3], 8)


def test_sampled_tokens_are_drawn_from_the_uncached_logits_with_the_rows_own_key():
    drawn = generate(PARAMS, TINY, PROMPTS, max_new_tokens=14, temperature=1.7, key=KEY)
    for row, (prompt, new_ids) in enumerate(zip(PROMPTS, drawn, strict=True)):
        ids = list(prompt)
        for j in range(14):  # the third row leaves the window on the way, the second does not
            key = jax.random.fold_in(jax.random.fold_in(KEY, row), j)
            sums = np.cumsum(np.exp(np.float64(next_logits(PARAMS, ids)) / 1.7))
            ids.append(int(np.searchsorted(sums, float(jax.random.uniform(key)) * sums[-1], side="right")))
        assert new_ids == ids[len(prompt) :]


def test_a_row_is_the_same_alone_and_in_a_batch():
    options: dict[str, Any] = {
        "max_new_tokens": 14,
        "temperature": 1.5,
        "top_k": 12,
        "top_p": 0.95,
        "min_p": 0.01,
        "key": KEY,
    }
    prompts = [PROMPTS[0][:5], PROMPTS[2][:8]]  # of one bucket
    together = generate(SHALLOW_PARAMS, SHALLOW, prompts, **options)
    assert together == [
        generate(SHALLOW_PARAMS, SHALLOW, [prompt], first_row=row, **options)[0] for row, prompt in enumerate(prompts)
    ]
    same_prompt = generate(SHALLOW_PARAMS, SHALLOW, [prompts[0]] * 2, **options)
    assert same_prompt[0] == together[0] != same_prompt[1]


@pytest.mark.parametrize("tokens_per_dispatch", [1, 3, 32])
def test_a_stream_has_the_same_tokens_however_they_are_cut(tokens_per_dispatch):
    options: dict[str, Any] = {"max_new_tokens": 21, "temperature": 1.5, "key": KEY, "stop_tokens": [11, 17]}
    rows: list[list[int]] = [[], [], []]
    for chunk in stream(SHALLOW_PARAMS, SHALLOW, PROMPTS, tokens_per_dispatch=tokens_per_dispatch, **options):
        assert max(map(len, chunk)) <= tokens_per_dispatch
        for row, ids in zip(rows, chunk, strict=True):
            row.extend(ids)
    assert rows == generate(SHALLOW_PARAMS, SHALLOW, PROMPTS, **options)


def test_a_row_ends_before_its_stop_token_and_the_others_go_on():
    full = [greedy_loop(PARAMS, prompt, 24) for prompt in PROMPTS]
    stops = [full[0][3], full[2][5]]
    expected = [next((ids[:i] for i in range(24) if ids[i] in stops), ids) for ids in full]
    assert [len(ids) for ids in expected] != [24] * 3  # or nothing is tested
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "key": KEY}
    assert generate(PARAMS, TINY, PROMPTS, stop_tokens=stops, **options) == expected
    everything = list(range(TINY.vocab_size))
    chunks = list(stream(PARAMS, TINY, PROMPTS, stop_tokens=everything, **options))
    assert chunks == [[[], [], []]]  # all rows stopped at once, and nothing more was computed


def test_the_device_stops_as_soon_as_all_rows_have():
    row = greedy_loop(PARAMS, PROMPTS[0], 9)
    stop = next(i for i in row[2:] if i not in row[:2])
    ids_BT, pads_B = pad_left([PROMPTS[0]], 8)
    weights, keys, stops = decoding_weights(PARAMS, TINY), jax.random.split(KEY, 1), jnp.array([stop])
    state = jax_generate._prefill(weights, ids_BT, pads_B, np.int32(8), keys, stops, **STATIC)
    _, new_BC, ran = jax_generate._decode(weights, state, np.int32(8), keys, stops, **STATIC)
    assert int(ran) == row.index(stop) and new_BC[0, int(ran) - 1] == stop


def test_padding_of_the_vocabulary_is_never_drawn():
    options: dict[str, Any] = {"max_new_tokens": 15, "temperature": 50.0, "key": KEY}
    assert max(generate(SHALLOW_PARAMS, SHALLOW, [[6]], **options)[0]) > 20
    assert max(generate(SHALLOW_PARAMS, SHALLOW, [[6]], vocab_size=20, **options)[0]) < 20
    logits_BV = jnp.tile(jnp.arange(29.0), (500, 1))  # the padding would be likeliest
    for temperature, top_k in ((0.0, None), (50.0, 200), (50.0, 25), (0.1, None)):
        sampling = jax_generate.Sampling(temperature, top_k, 0.99, 0.01, 20)
        drawn_B = jax_generate.draw(logits_BV, jax.random.split(KEY, 500), 0, sampling)
        assert drawn_B.max() == 19


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 5e-324])
def test_as_little_probability_as_a_float_can_say_is_the_likeliest_token(top_p):
    options: dict[str, Any] = {"max_new_tokens": 5, "key": KEY, "vocab_size": 20}
    greedy = generate(SHALLOW_PARAMS, SHALLOW, PROMPTS, temperature=0, **options)
    assert generate(SHALLOW_PARAMS, SHALLOW, PROMPTS, top_p=top_p, **options) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("largest", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_token(temperature, largest):
    embedding_VD = SHALLOW_PARAMS["wte"]["embedding"].copy()
    embedding_VD[25] = largest  # of a token that no prompt has
    untied = SHALLOW_PARAMS | {"lm_head": {"embedding": embedding_VD}}
    with pytest.raises(FloatingPointError, match="after 7 tokens of row 0 the logits are not finite"):
        generate(untied, SHALLOW, PROMPTS, max_new_tokens=2, temperature=temperature, key=KEY)
    padding = generate(untied, SHALLOW, PROMPTS, max_new_tokens=2, temperature=temperature, vocab_size=25, key=KEY)
    assert [len(ids) for ids in padding] == [2, 2, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"n_layer": 1}, r"h\.1"), ({"n_layer": 3}, r"h\.2"), ({"bias": False}, r"h\.0\.attn\.c_attn\.bias"),
     ({"block_size": 64}, r"wpe"), ({"vocab_size": 50}, "wte")],
)  # fmt: skip
def test_parameters_of_another_model_are_refused(change, named):
    with pytest.raises(AssertionError, match=f"params do not fit config: {named}"):
        generate(PARAMS, dataclasses.replace(TINY, **change), PROMPTS, max_new_tokens=1, key=KEY)


def test_numbers_may_be_numpys_and_stop_tokens_any():
    options: dict[str, Any] = {"max_new_tokens": np.int64(4), "top_k": np.int32(5), "top_p": np.float32(0.9)}
    new_ids = generate(SHALLOW_PARAMS, SHALLOW, PROMPTS, stop_tokens={-1, 2**40}, key=KEY, **options)
    assert [len(ids) for ids in new_ids] == [4, 4, 4]
    with pytest.raises(TypeError, match="integer"):
        stream(SHALLOW_PARAMS, SHALLOW, PROMPTS, max_new_tokens=2.5, key=KEY)  # type: ignore[arg-type]


def test_frequencies_are_the_models_probabilities():
    rows, temperature = 4000, 3.0
    first = generate(PARAMS, TINY, [[3, 1, 4]] * rows, max_new_tokens=1, temperature=temperature, top_k=10, key=KEY)
    logits = next_logits(PARAMS, [3, 1, 4]).astype(np.float64) / temperature
    kept = logits >= np.sort(logits)[-10]
    expected = np.where(kept, np.exp(logits), 0) / np.exp(logits[kept]).sum()
    counts = np.bincount(np.array(first)[:, 0], minlength=TINY.vocab_size)
    deviations = np.sqrt(rows * expected * (1 - expected))
    assert (counts[~kept] == 0).all()
    assert (np.abs(counts - rows * expected) <= 4.5 * deviations + 1e-9).all()  # by chance once in 10^5


def test_no_new_tokens_are_none():
    assert generate(PARAMS, TINY, PROMPTS, max_new_tokens=0, key=KEY) == [[], [], []]
    assert [len(ids) for ids in generate(PARAMS, TINY, PROMPTS, max_new_tokens=1, key=KEY)] == [1, 1, 1]


def test_a_window_of_one_token():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=1, vocab_size=11)
    params = random_params(config)
    new_ids = generate(params, config, [[5], [2, 7]], max_new_tokens=6, temperature=0, key=KEY)
    assert new_ids == [greedy_loop(params, [5], 6, config), greedy_loop(params, [2, 7], 6, config)]


def test_prefill_compiles_once_a_bucket_and_decode_once_for_any_prompts(caplog):
    config = dataclasses.replace(TINY, vocab_size=31, n_layer=1)  # that no other test compiles
    params = random_params(config)
    random = np.random.default_rng(0)
    lengths = [(1, 1), (2, 1), (3, 4), (4, 2), (5, 8), (7, 1), (6, 6), (9, 1), (16, 16), (11, 2), (40, 3), (12, 16)]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for pair in lengths:
            prompts = [random.integers(0, 31, length).tolist() for length in pair]
            generate(
                params, config, prompts, max_new_tokens=20, key=jax.random.key(pair[0]), stop_tokens=[int(pair[1])]
            )
    compiled = re.findall(r"Compiling jit\((_prefill|_decode|decoding_weights)\)", caplog.text)
    # Buckets 1, 2, 4, 8 and 16. Decode in the window, and past it.
    assert {name: compiled.count(name) for name in set(compiled)} == {
        "_prefill": 5,
        "_decode": 2,
        "decoding_weights": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts: give at least one"),
        ({"prompts": [[1], []]}, "prompt 1 is empty: the model needs at least one token to go on from"),
        ({"prompts": [[1], [2, 29]]}, "prompt 1 has token id 29, which is not in the vocabulary of 29"),
        ({"prompts": [[-1]]}, "prompt 0 has token id -1, which is not in the vocabulary of 29"),
        ({"prompts": [[20]], "vocab_size": 20}, "prompt 0 has token id 20, which is not in the vocabulary of 20"),
        ({"vocab_size": 30}, "vocab_size=30 must be at least 1 and at most the model's 29"),
        ({"top_k": 0}, "top_k=0 must be at least 1, or None for all tokens"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1 must be at least 0 and at most 1"),
        ({"min_p": float("nan")}, "min_p=nan must be at least 0 and at most 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and not negative"),
        ({"temperature": float("inf")}, "temperature=inf must be finite and not negative"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must not be negative"),
    ],
)
def test_a_bad_request_is_refused_at_once_with_one_message(change, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 3, "key": KEY} | change
    prompts = arguments.pop("prompts")
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(PARAMS, TINY, prompts, **arguments)  # before the first token is asked for


# ----------------------------------------------------------------------------------------------------------------------
# beside transformers


def test_greedy_continuations_are_those_of_transformers_also_of_left_padded_prompts(transformers):
    import torch

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=29, bos_token_id=None, eos_token_id=None,
            activation_function="gelu_new",
        )
    ).eval()  # fmt: skip
    config = dataclasses.replace(TINY, block_size=64)
    params = random_params(config, seed=3)
    with torch.no_grad():
        for name, tensor in model.transformer.named_parameters():
            tensor.copy_(torch.tensor(hf_tensor(params, name)))
    width = max(map(len, PROMPTS))
    ids_BT, pads_B = pad_left(PROMPTS, width)
    theirs = model.generate(
        torch.tensor(ids_BT).long(), attention_mask=torch.tensor(np.arange(width) >= pads_B[:, None]).long(),
        max_new_tokens=40, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    ours = generate(params, config, PROMPTS, max_new_tokens=40, temperature=0, key=KEY)
    assert ours == theirs[:, width:].tolist()


def hf_tensor(params: Params, name: str) -> np.ndarray:
    """The parameter that transformers calls transformer.h.0.attn.c_attn.weight and the like."""
    *path, leaf = name.split(".")
    node = functools.reduce(lambda node, key: node[key], path, params)
    if leaf == "bias":
        return node["bias"]
    (key,) = node.keys() - {"bias"}  # embedding, kernel or scale
    return node[key].T if path[-2:] == ["mlp", "c_proj"] else node[key]
