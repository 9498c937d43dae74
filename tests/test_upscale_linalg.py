"""Factoring deltas: against the full SVD in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upscale.building.linalg import OVERSAMPLE, factor
from upscale.errors import NonFiniteError


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(o, i, seed=0, power=1.0):
    """A matrix with the singular values 1, 2^-p, 3^-p ..."""
    n = min(o, i)
    u, v = (torch.linalg.qr(randn(side, n, seed=seed + k).double()).Q for k, side in enumerate((o, i)))
    return (u * torch.arange(1, n + 1).double() ** -power @ v.T).float()


def truncated(delta, rank):
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def product(low):
    return low.up.double() @ low.down.double()


def left(delta, low):
    return float((delta.double() - product(low)).norm())


SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 100), st.integers(0, 9))
def test_exact_is_the_truncated_svd(shape, rank, seed):
    delta = decaying(*shape, seed=seed)
    low = factor(delta, rank, exact=True)
    assert low.down.shape == (min(rank, *shape), shape[1])
    assert low.up.shape == (shape[0], min(rank, *shape))
    torch.testing.assert_close(product(low), truncated(delta, rank), atol=2e-6, rtol=0)
    values = low.up.double().norm(dim=0)  # largest first
    torch.testing.assert_close(values, torch.linalg.svdvals(delta.double())[: len(values)], atol=2e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 100), st.booleans(), st.integers(0, 9))
def test_rows_are_orthonormal_and_norms_are_measured(shape, rank, exact, seed):
    delta = randn(*shape, seed=seed)  # a flat spectrum: the hardest for a sketch
    low = factor(delta, rank, exact=exact, seed=seed)
    r = low.down.shape[0]
    assert r == min(rank, *shape)
    torch.testing.assert_close(low.down @ low.down.T, torch.eye(r), atol=1e-5, rtol=0)
    norm = float(delta.double().norm())
    assert abs(low.norm - norm) <= 1e-5 * norm
    assert abs(low.left - left(delta, low)) <= 1e-5 * norm


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(60, 200), st.integers(60, 200)),
    st.integers(1, 32),
    st.floats(0.5, 2.0),
    st.integers(0, 9),
)
def test_sketch_keeps_the_energy_of_the_svd(shape, rank, power, seed):
    delta = decaying(*shape, seed=seed, power=power)
    low = factor(delta, rank, seed=seed)
    best = float(truncated(delta, rank).norm() ** 2)
    kept = float(product(low).norm() ** 2)
    assert best * 0.995 <= kept <= best * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(200, 80), (80, 200), (120, 120)])
def test_sketch_finds_an_exactly_low_rank_delta(shape):
    delta = randn(shape[0], 5) @ randn(5, shape[1], seed=1)
    low = factor(delta, 8)
    assert min(shape) > 8 + OVERSAMPLE, "the sketch must be taken"
    assert low.down.shape[0] == 5
    assert low.up.shape[1] == 5
    torch.testing.assert_close(low.up @ low.down, delta, atol=1e-4, rtol=1e-5)
    assert left(delta, low) <= 1e-5 * low.norm
    assert low.left <= 1e-5 * low.norm


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (40, 40), (1, 9), (9, 1), (1, 1)])
def test_full_rank_reconstructs(shape, exact):
    delta = randn(*shape)
    low = factor(delta, 10_000, exact=exact)
    assert low.down.shape[0] == min(shape)
    torch.testing.assert_close(low.up @ low.down, delta, atol=1e-5, rtol=1e-5)
    assert low.left <= 1e-5 * low.norm


@pytest.mark.parametrize("exact", [True, False])
def test_zero_delta_has_rank_0(exact):
    low = factor(torch.zeros(50, 60), 4, exact=exact)
    assert low.down.shape == (0, 60)
    assert low.up.shape == (50, 0)
    assert (low.norm, low.left) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_raises(bad):
    delta = randn(40, 50)
    delta[3, 4] = bad
    with pytest.raises(NonFiniteError, match=r"\[40, 50\].*NaN or infinite"):
        factor(delta, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_computed_in_float32(dtype):
    delta = decaying(100, 70).to(dtype)
    low, same = factor(delta, 9), factor(delta.float(), 9)
    assert low.down.dtype == low.up.dtype == torch.float32
    assert torch.equal(low.down, same.down)
    assert torch.equal(low.up, same.up)
    assert delta.dtype == dtype


@pytest.mark.parametrize("shape", [(100, 70), (70, 100)])
def test_the_seed_decides_every_bit(shape):
    delta = randn(*shape)
    torch.manual_seed(1)
    one = factor(delta, 4, seed=3)
    torch.manual_seed(2)  # the global generator has no part in it
    two = factor(delta, 4, seed=3)
    other = factor(delta, 4, seed=4)
    assert torch.equal(one.down, two.down)
    assert torch.equal(one.up, two.up)
    assert (one.norm, one.left) == (two.norm, two.left)
    assert not torch.equal(one.down, other.down)


def test_tiny_and_huge_deltas_keep_their_scale():
    delta = decaying(80, 60)
    for scale in (1e-12, 1e12):
        low = factor(delta * scale, 6)
        assert low.down.shape[0] == 6
        torch.testing.assert_close((low.up / scale) @ low.down, factor(delta, 6).up @ factor(delta, 6).down)
        assert abs(low.left - left(delta * scale, low)) <= 1e-5 * low.norm
