"""What of a checkpoint is no tensor, read without running what a file says.

torch.distributed.checkpoint pickles such entries, and reads them as pickle does, which calls
whatever a file names. Here nothing is called but what torch.load(weights_only=True) calls, with
what torch.serialization.add_safe_globals has allowed, and what makes queues, sets, times and arrays
of numpy: plain values, tensors and collections of them.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import io
import pickle
import pickletools
import zipfile
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from parq_fn.foundation.torch_private import values_in_files

_BUILTINS = ("builtins", "__builtin__")
_PLAIN = "set frozenset complex bytearray range slice dict list tuple int float str bool bytes"
_KNOWN = {
    **{(module, name): getattr(builtins, name) for name in _PLAIN.split() for module in _BUILTINS},
    ("collections", "deque"): collections.deque,
    ("collections", "defaultdict"): collections.defaultdict,
    **{("datetime", kind.__name__): kind for kind in (datetime.datetime, datetime.timedelta)},
}
_ARRAYS = ("_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype")
_OF_NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric")


class Unpickler(pickle.Unpickler):
    """Base of those of checkpoints: of what is all in memory, or a file that can be read twice.

    Raises pickle.UnpicklingError for a pickle that numbers a place of its memo beyond its bytes, as
    one flipped bit does: Python makes room for all places before it, up to some 60 GB.
    """

    def __init__(self, file: Any, **options: Any) -> None:
        start = file.tell()
        content = file.read()
        for operation, place, _ in pickletools.genops(content):
            if operation.name.endswith("PUT") and int(str(place)) > len(content):
                raise pickle.UnpicklingError(f"place {place} of the memo of {len(content)} bytes")
        file.seek(start)
        super().__init__(file, **options)


class _Unpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {**values_in_files(), **_KNOWN}
        if (module, name) in known:
            return known[module, name]
        if module in _OF_NUMPY and name in _ARRAYS:
            return super().find_class(module, name)
        if module == "numpy.dtypes" and name.endswith("DType"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


_PICKLE = SimpleNamespace(
    __name__=__name__,
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def restricted(file: io.BytesIO, what: str) -> Any:
    """What was saved to a file; raises ValueError where it is more than values.

    what: the entry, in messages.
    """
    try:
        if zipfile.is_zipfile(file) and _is_a_program(file):
            raise pickle.UnpicklingError("a program of TorchScript")
        file.seek(0)
        return torch.load(file, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{what} of the checkpoint holds {error}, which is more than values; where you trust "
            "it, allow its class by torch.serialization.add_safe_globals([...])"
        ) from None


def _is_a_program(file: io.BytesIO) -> bool:
    names = zipfile.ZipFile(file).namelist()
    return any(name.endswith("/constants.pkl") for name in names)


class Planner(DefaultLoadPlanner):
    """torch's own, which reads no entry but as `restricted` does."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts an entry that is no tensor where it belongs."""
        restricted(value, f"the entry {read_item.dest_index.fqn!r}")
        value.seek(0)
        super().load_bytes(read_item, value)
