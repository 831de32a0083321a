"""What a packed model takes, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parq_fn.export.given import check_packed
from parq_fn.export.packing import Packed
from parq_fn.foundation.columns import columns


def table(packed: Mapping[str, Packed | Tensor]) -> str:
    """Layer, shape, bits, granularity, bytes and compression against float32, as text. Raises
    TypeError for what is no packed model.

    >>> from parq_fn.export import pack_weight
    >>> print(table({"w": pack_weight(torch.ones(4, 8), torch.tensor([[-1.0, 1.0]]))}))
    layer  shape   dtype    bits  granularity  bytes  of float32
    w      [4, 8]  float32     1                  12        9.4%
    all                                           12        9.4%
    """
    check_packed("table", packed)
    rows = [("layer", "shape", "dtype", "bits", "granularity", "bytes", "of float32")]
    total = full = 0
    for name, entry in packed.items():
        tensor = entry.levels if isinstance(entry, Packed) else entry
        count = torch.Size(entry.shape).numel()
        size = entry.num_bytes if isinstance(entry, Packed) else count * entry.element_size()
        bits = entry.bits if isinstance(entry, Packed) else 8 * entry.element_size()
        granularity = entry.granularity if isinstance(entry, Packed) else "-"
        kind = str(tensor.dtype).removeprefix("torch.")
        share = f"{100 * size / max(1, 4 * count):.1f}%"
        rows.append(
            (name, str(list(entry.shape)), kind, f"{bits:g}", granularity, f"{size:,}", share)
        )
        total, full = total + size, full + 4 * count
    rows.append(("all", "", "", "", "", f"{total:,}", f"{100 * total / max(1, full):.1f}%"))
    return columns(rows, (0, 1, 2, 4))
