"""What a forward of a program leaves for its other passes."""

from __future__ import annotations

from typing import Any

import torch

from emr_kernels.linearize.plan import Plan


class Point:
    """The linear map at one input: what the forward left for the other passes."""

    def __init__(self, plan: Plan, size: int, calls: int) -> None:
        self.plan = plan
        self.residuals: list[Any] = [None] * calls
        self.dtypes: list[Any] = [None] * size
        self.operand_dtypes: list[torch.dtype | None] = [None] * calls
        self.device_type = "cpu"
        self.logits = torch.empty(0)
