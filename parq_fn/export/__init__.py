"""What leaves training: packed weights, exact, in files that any byte's change is noticed in."""

from parq_fn.export.file import load, save, table
from parq_fn.export.layers import PackedLayer, load_into, quantized
from parq_fn.export.packing import Packed, pack, pack_weight, unpack

__all__ = [
    "Packed",
    "PackedLayer",
    "load",
    "load_into",
    "pack",
    "pack_weight",
    "quantized",
    "save",
    "table",
    "unpack",
]
