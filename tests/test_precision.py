"""The ways of `bench_restore`'s pairs compute one thing, so that their times can be compared."""

from __future__ import annotations

import pytest
import torch
from precision import DTYPES, Products, rounded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def piece() -> Products:
    """More rows than a chunk has, and a last chunk that is not full."""
    piece = Products(72, 40, 200)
    piece.chunk = 64
    return piece


def right(piece: Products) -> torch.Tensor:
    rows = piece.rows.double() * piece.channels.double()
    return rows @ piece.weight.double() * piece.scale.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_is_near_float64(piece: Products, dtype: torch.dtype) -> None:
    """Floats as near as their dtype is, integers as near as weights of eight bits are."""
    bounds = {"floats": 2e-6 if dtype is torch.float32 else 6e-3, "ints": 2e-2}
    expected = right(piece)
    for way, bound in (*bounds.items(), ("ints_by_chunk", bounds["ints"])):
        piece.out[dtype].fill_(torch.nan)
        getattr(piece, way)(dtype)
        error = (piece.out[dtype].double() - expected).norm() / expected.norm()
        assert error < bound, way


def test_chunks_of_equal_channel_scales_give_what_the_whole_does(piece: Products) -> None:
    piece.ints(torch.float32)
    whole = piece.out[torch.float32].clone()
    piece.ints_by_chunk(torch.float32)
    assert torch.equal(piece.out[torch.float32], whole)


def test_rounded_weights_err_as_integer_products_do(piece: Products) -> None:
    """By them the loss of answers is measured, without an integer product in the library."""
    piece.ints(torch.float32)
    rows = piece.rows.double() * piece.channels.double()
    weight = rounded(piece.weight, piece.channels).double()
    found = rows @ weight * piece.scale.double()
    error = (piece.out[torch.float32].double() - found).norm() / found.norm()
    assert error < 1e-5
    assert (found - right(piece)).norm() / found.norm() > 1e-3
