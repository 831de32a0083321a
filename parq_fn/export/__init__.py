"""What leaves training: packed weights, exact, in files that any byte's change is noticed in.

For other ecosystems see the modules `torchao`, `onnx`, `gguf` and `hugging_face` beside this one,
which need their packages.
"""

from parq_fn.export.file import load, save
from parq_fn.export.layers import dequantized, load_into, quantized
from parq_fn.export.listing import table
from parq_fn.export.packed_layer import PackedLayer
from parq_fn.export.packing import Entry, Packed, pack, pack_weight, stream, unpack

__all__ = [
    "Entry",
    "Packed",
    "PackedLayer",
    "dequantized",
    "load",
    "load_into",
    "pack",
    "pack_weight",
    "quantized",
    "save",
    "stream",
    "table",
    "unpack",
]
