"""Which tokens may be drawn (jax_generate.py: warp): against numpy and transformers.

python -m pytest tests/test_drawing.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
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


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


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
