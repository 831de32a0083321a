"""A number that tells prox links apart, which a saved state holds of those it was trained with."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parq_fn.foundation.scalar import as_scalar
from parq_fn.transforms.prox_link import Prox

#: Counts at which functions are asked, up to some millions.
_COUNTS = [0, 1]
while _COUNTS[-1] < 5_000_000:
    _COUNTS.append(_COUNTS[-1] + _COUNTS[-2])

#: Fields of links that came after states with digests were saved: None says nothing of them.
_LATER = {"pull", "learn", "hold", "total_steps"}


def digest(*links: Prox) -> Tensor:
    """[], int64: of what links are, the same for links that compute the same with equal numbers.

    A number counts by its value (1, 1.0, numpy's and a tensor without dimensions are one), a tensor
    by its dtype, shape and elements, a tuple of one by what is in it, an object by its class and
    attributes. A function counts by its name and, where it takes a count of updates, as a schedule
    does, by five digits of what it gives for counts up to some millions; of other functions two
    that have one name are not told apart.

    >>> from parq_fn import hard_prox, lsbq, per_channel
    >>> bool(digest(hard_prox(lsbq(2))) == digest(hard_prox(lsbq(3))))
    False
    >>> links = [hard_prox(lsbq(2), granularity=per_channel(axis)) for axis in (0, (0,))]
    >>> bool(digest(links[0]) == digest(links[1]))
    True
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functions, which are called where they are to be told
        text = "\n".join(_text(link, ()) for link in links)
    found = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return torch.tensor(int.from_bytes(found[:8], "big", signed=True), device="cpu")


def are_same_links(mine: Any, saved: Any) -> bool:
    """Whether two digests are equal, or one of them is none."""
    try:
        return mine is None or int(saved) == int(mine)
    except Exception:  # it is None, or no number, which loading refuses as it does of all entries
        return True


def _text(got: Any, within: tuple[int, ...]) -> str:
    """within: what it is in, so that an object in itself ends."""
    if id(got) in within:
        return "itself"
    inner = partial(_text, within=(*within, id(got)))
    if isinstance(got, Tensor):
        flat = got.detach().flatten().tolist()
        shape = tuple(got.shape)
        return f"{got.dtype}{shape}{list(map(inner, flat))}" if shape else inner(flat[0])
    if got is None or isinstance(got, bool | str | bytes | complex | type):
        return got.__name__ if isinstance(got, type) else repr(got)
    if isinstance(got, int | np.integer):
        return str(int(got))
    if isinstance(got, float | np.floating):
        number = float(got)
        return str(int(number)) if number.is_integer() else number.hex()
    if isinstance(got, np.ndarray):
        return f"array{got.shape}{inner(got.tolist())}"
    if isinstance(got, list | tuple):
        return inner(got[0]) if len(got) == 1 else f"[{', '.join(map(inner, got))}]"
    if isinstance(got, dict):
        return f"{{{', '.join(sorted(f'{inner(k)}: {inner(v)}' for k, v in got.items()))}}}"
    if isinstance(got, set | frozenset):
        return f"{{{', '.join(sorted(map(inner, got)))}}}"
    if isinstance(got, partial):
        return f"partial({inner(got.func)}, {inner(got.args)}, {inner(got.keywords)})"
    if isinstance(got, MethodType):
        return f"{inner(got.__self__)}.{got.__name__}"
    if isinstance(got, FunctionType | BuiltinFunctionType):
        return f"{got.__name__}({', '.join(_values(got))})"
    if hasattr(got, "__dict__"):
        own = {k: x for k, x in vars(got).items() if not (x is None and k in _LATER)}
        return f"{type(got).__name__}({inner(own)})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(got))  # where an object lies


def _values(function: Callable[..., Any]) -> list[str]:
    """What a function gives for counts of updates; none where it takes none."""
    found = []
    for count in _COUNTS:
        try:
            got = as_scalar(function(torch.tensor(count, device="cpu"))).double().flatten()
        except Exception:  # whatever it raises of what it does not take
            break
        found += [f"{one:.5g}" for one in got[:16].tolist()]
    return found
