"""The dtypes that artifacts and models may have, as torch knows them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from operators.core.header import DTypeName

DTYPES: Mapping[DTypeName, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
)
