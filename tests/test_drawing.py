"""How the next token is drawn (jax_generate.py: warp, likeliest, pick): against numpy and transformers.

The latter is skipped where it is not installed: pip install -e ".[peers]"

python -m pytest tests/test_drawing.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jax_generate
from jax_generate import warp

pytestmark = pytest.mark.usefixtures("exact_and_quick")

KEY = jax.random.key(7)


def numpy_mask(logits: np.ndarray, temperature, top_k, top_p, min_p) -> np.ndarray | None:
    """The tokens that stay, one row in float64; None where rounding could decide."""
    logits = logits.astype(np.float64) / temperature
    if top_k is not None:
        logits = np.where(logits < np.sort(logits)[-min(top_k, len(logits))], -np.inf, logits)

    def probabilities():
        p = np.exp(logits - logits.max())
        return p / p.sum()

    if top_p is not None and top_p < 1:
        p = probabilities()
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]  # of all that are likelier
        if np.abs(before - top_p).min() < 1e-4:
            return None
        logits[order[before >= top_p]] = -np.inf
    if min_p:
        p = probabilities()
        if np.abs(p - min_p * p.max()).min() < 1e-6:
            return None
        logits = np.where(p < min_p * p.max(), -np.inf, logits)
    return logits > -np.inf


SETTINGS = st.tuples(
    st.floats(0.05, 5),
    st.none() | st.sampled_from([1, 2, 5, 20, 200]),
    st.none() | st.sampled_from([0.01, 0.3, 0.9, 0.99, 1.0]),
    st.none() | st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), SETTINGS)
def test_tokens_that_may_be_drawn_are_those_of_the_definitions(seed, choice):
    logits_BV = np.random.default_rng(seed).normal(0, 3, (4, 37)).astype(np.float32)
    logits_BV[0, 5:9] = logits_BV[0].max() - 1  # equals are kept or dropped together by top_k and min_p
    if choice[2] is not None:
        logits_BV[0, 5:9] += np.arange(4) / 5
    warped_BV = np.asarray(warp(jnp.asarray(logits_BV), *choice))
    for logits, warped in zip(logits_BV, warped_BV, strict=True):
        mask = numpy_mask(logits, *choice)
        if mask is not None:
            assert (np.isfinite(warped) == mask).all()
            expected = (logits.astype(np.float64) - logits.max()) / choice[0]
            np.testing.assert_allclose(warped[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_a_tiny_temperature_takes_the_likeliest_token_and_gives_no_nan():
    likeliest_B = np.argmax(logits_BV := np.random.default_rng(0).normal(0, 3, (4, 37)), axis=1)
    for temperature in (1e-45, 1e-30, 1e-6):
        for top_k, top_p, min_p in ((None, None, None), (3, 0.9, 0.1)):
            sampling = jax_generate.Sampling(temperature, top_k, top_p, min_p, 37)
            drawn_B = jax_generate.draw(jnp.asarray(logits_BV), jax.random.split(KEY, 4), 0, sampling)
            assert drawn_B.tolist() == likeliest_B.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), SETTINGS)
def test_masks_are_those_of_transformers(transformers, seed, choice):
    import torch

    process = transformers.generation.logits_process
    temperature, top_k, top_p, min_p = choice
    warpers = [process.TemperatureLogitsWarper(temperature)]
    warpers += [process.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [process.TopPLogitsWarper(top_p)] if top_p and top_p < 1 else []
    warpers += [process.MinPLogitsWarper(min_p)] if min_p else []
    logits_BV = np.random.default_rng(seed).normal(0, 3, (4, 50)).astype(np.float32)
    theirs_BV = torch.tensor(logits_BV)
    for warper in warpers:
        theirs_BV = warper(None, theirs_BV)
    ours_BV = np.asarray(warp(jnp.asarray(logits_BV), *choice))
    for logits, ours, theirs in zip(logits_BV, ours_BV, theirs_BV.numpy(), strict=True):
        if numpy_mask(logits, *choice) is not None:
            assert (np.isfinite(ours) == np.isfinite(theirs)).all()


def test_likeliest_is_argmax_also_of_equals_and_of_a_nan():
    random = np.random.default_rng(0)
    logits_BV = random.integers(0, 9, (50, 29)).astype(np.float32)  # most rows have their largest several times
    logits_BV[0], logits_BV[1, 5:], logits_BV[2, 3] = -np.inf, -np.inf, np.inf
    np.testing.assert_array_equal(jax_generate.likeliest(jnp.asarray(logits_BV)), logits_BV.argmax(axis=-1))
    assert 0 <= int(jax_generate.likeliest(jnp.full((1, 29), jnp.nan))[0]) < 29


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.1, 1.0]), min_size=1, max_size=300).filter(any), st.integers(0))
@example([1e-7] * 200 + [0.0] * 100, 2**23 - 1)
@example([0.0] * 100 + [1.0] + [0.0] * 100, 2**23 - 1)
def test_a_token_of_probability_0_is_never_picked_whatever_the_random_number(probabilities, seed):
    row_V = np.zeros(300, np.float32)  # always as many, so that it compiles once
    row_V[: len(probabilities)] = np.array(probabilities) / sum(probabilities)
    # jax.random.uniform gives multiples of 2^-23: the least, the largest, and any
    uniform_B = np.array([0, 2**23 - 1, seed % 2**23], np.float32) / np.float32(2**23)
    picked_B = jax.jit(jax_generate.pick)(jnp.tile(row_V, (3, 1)), jnp.asarray(uniform_B))
    assert (row_V[picked_B] > 0).all()
    sums = np.cumsum(np.float64(row_V))
    before_B, after_B = (sums - row_V)[picked_B], sums[picked_B]
    assert (before_B - 1e-5 <= uniform_B * sums[-1]).all() and (uniform_B * sums[-1] <= after_B + 1e-5).all()
