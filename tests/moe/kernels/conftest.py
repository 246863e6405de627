"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that serve tokens in blocks take blocks of 128, so that few tokens make several."""
    from xmoe_fairseq.moe.kernels import tiles

    monkeypatch.setattr(tiles, "MAX_SELECT_BLOCK", 128)
    monkeypatch.setattr(tiles, "LEAST_PLACE_BLOCK", 128)
    for blocks in (tiles.select_blocks, tiles.place_blocks):
        blocks.cache_clear()
        assert blocks(260)[:2] == (128, 3)
    yield
    for blocks in (tiles.select_blocks, tiles.place_blocks):
        blocks.cache_clear()
