"""One arithmetic: rollout and learner give a token the same bits. What the library needs for it, and the probe of it.

On Intel processors MKL picks a kernel by the row count unless it is told not to; with MKL_CBWR=AUTO,STRICT every row
count gives a row the same bits, at about the same speed. Elsewhere rows padded to a multiple of 4 suffice, which
products here always are. The probe checks it on the shapes and the machine at hand; what it finds is reported, never
assumed.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from cispo.kernels.product import product

_PROBE_ROWS = (1, 3, 4, 16, 64, 252, 1000)


def prepare_products() -> None:
    """Ask MKL for row-independent products; must run in a process before its first product."""
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def row_dependent_shapes(weights_MK: Iterable[Tensor]) -> list[str]:
    """Shapes `M x K` among these weights for which a row's product changes bits with the number of rows beside it."""
    dependent = []
    for rows_by_columns in sorted({(w.shape[0], w.shape[1], w.dtype, w.device) for w in weights_MK}, key=str):
        m, k, dtype, device = rows_by_columns
        generator = torch.Generator().manual_seed(0)
        x_NK = torch.randn(max(_PROBE_ROWS), k, generator=generator).to(device, dtype)
        weight_MK = torch.randn(m, k, generator=generator).to(device, dtype)
        whole_NM = product(x_NK, weight_MK)
        if not all(torch.equal(product(x_NK[:rows], weight_MK), whole_NM[:rows]) for rows in _PROBE_ROWS):
            dependent.append(f"{m}x{k}")
    return dependent
