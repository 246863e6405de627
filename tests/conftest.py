"""Without a GPU, kernels run in Triton's interpreter. Tests with the longest time limits come first.

Triton reads the variable when it is first imported. The order lets all processes of pytest-xdist end together: a test
of minutes that one of them began last would leave the others without work.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    usual = float(config.getini("timeout"))

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker else usual

    items.sort(key=limit, reverse=True)
