"""Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is first imported, whoever does that."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
