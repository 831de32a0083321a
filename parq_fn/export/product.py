"""The product of inputs and a packed weight, with no weight of full width in memory.

A row of the weight is blocks, each with k levels of its own. With the code c of a weight, whose
bits are b_0 and b_1 where there are two, the weight is

    even      u (c + f) + m                                    evenly spaced levels
    additive  u (b_0 - 1/2) + v (b_1 - 1/2) + m                four levels, such as lsbq's
    free      u (b_0 - 1/2) + v (b_1 - 1/2) + w b_0 b_1 + m    any four levels

with numbers u, v, w and m of the block and one number f for the whole weight. So the product of a
block is a few sums over its bytes, with the numbers outside of them. Where levels are symmetric m
is 0; four levels are additive where the gap of the upper two is that of the lower two.

Inputs are put in the order of the bytes, those of the first code of each byte first, so that both
are read one after another. A code that stands s bits up in its byte is taken by a mask, as 2^s c,
and its input is multiplied by 2^-s, which is exact. A matrix with these numbers does both at once,
and with a row of ones sums the inputs of each byte too.

Up to four rows of inputs are one pass over the codes. For more of them tiles of the weight that
stay in the processor's cache are decoded, and torch's own product takes each.

Sums are in float32 and in another order than torch's. The error of an output is at most a few units
in the last place of float32 of sum_i |x_i| max_j |l_j|, l the levels of the output's row. An input
that is not finite may make all outputs of its row NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from parq_fn.export.codes import decode, encode, width
from parq_fn.export.packing import decoded
from parq_fn.export.product_programs import (
    Kind,
    decoding_of,
    marks_of,
    product_of,
    turn_of,
    turned_of,
)
from parq_fn.foundation.torch_private import (
    compiled,
    counted_writes,
    in_function_transform,
    in_script_tracer,
    in_tracer,
    is_of_compiler,
)

#: Weights of a layer from which on its product is faster so than by decoding it first.
LEAST = 1 << 16
_DTYPES = torch.float32, torch.bfloat16, torch.float16
#: Rows of inputs that one pass over the codes serves.
MOST_ROWS = 4
_TILE = 1 << 21  # weights that are decoded at a time
_VECTOR = 16  # bytes of a block that a processor takes at a time
_OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}  # a product and a sum, rounded once


class Numbers(NamedTuple):
    """What levels are made of, in float32."""

    form: str  # even, additive or free
    units: tuple[Tensor, ...]  # u, or u and v, or u, v and w: [rows, lanes of a row] each
    start: float  # f, or -1/2
    middle: Tensor | None  # m: as units; None where it is 0


def numbers_of(levels: Tensor, rows: int, lanes: int = 1) -> Numbers | None:
    """The numbers of levels [r, k] of a weight of so many rows, units so many times for each block;
    None where no form has them to two units in the last place of the largest magnitude of their
    block.

    >>> made = numbers_of(torch.tensor([[-3.0, -1.0, 1.0, 3.0], [-6.0, -2.0, 2.0, 6.0]]), 2)
    >>> made.form, made.units, made.start, made.middle
    ('even', (tensor([[2.],
            [4.]]),), -1.5, None)
    """
    r, k = levels.shape
    wide = levels.detach().double()
    close = 2.0**-22 * wide.abs().amax(-1)

    def kept(numbers: Tensor) -> Tensor:
        return numbers.float().expand(max(r, rows)).reshape(rows, -1).contiguous()

    def repeated(*numbers: Tensor) -> tuple[Tensor, ...]:
        return tuple(kept(own).repeat_interleave(lanes, 1) for own in numbers)

    unit = (wide[:, -1] - wide[:, 0]) / max(k - 1, 1)
    at = torch.arange(k, device=levels.device)
    if bool(((wide[:, :1] + unit.unsqueeze(1) * at - wide).abs().amax(-1) <= close).all()):
        most = unit.argmax()
        start = float((2 * wide[most, 0] / unit[most]).round() / 2) if bool(unit[most] > 0) else 0.0
        if bool(((start * unit - wide[:, 0]).abs() <= close).all()):
            return Numbers("even", repeated(unit), start, None)
        return Numbers("even", repeated(unit), 0.0, *repeated(wide[:, 0]))
    if k != 4:
        return None
    u, v = wide[:, 1] - wide[:, 0], wide[:, 2] - wide[:, 0]
    w = wide[:, 3] - wide[:, 2] - u
    middle = wide[:, 0] + (u + v) / 2
    own = None if bool((middle.abs() <= close).all()) else repeated(middle)[0]
    if bool((w.abs() <= close).all()):
        return Numbers("additive", repeated(u, v), -0.5, own)
    return Numbers("free", repeated(u, v, w), -0.5, own)


_KNOWN: MutableMapping[Tensor, tuple[Any, Numbers | None]] = WeakIdKeyDictionary()


def _numbers(levels: Tensor, rows: int, lanes: int) -> Numbers | None:
    """The same, kept until the levels are written to; of levels that count no writes not kept."""
    writes = counted_writes(levels)
    if writes < 0:
        return numbers_of(levels, rows, lanes)
    state = writes, levels.data_ptr(), rows, lanes
    known = _KNOWN.get(levels)
    if known is None or known[0] != state:
        _KNOWN[levels] = known = state, numbers_of(levels, rows, lanes)
    return known[1]


def fits(shape: tuple[int, ...], r: int, k: int) -> bool:
    """Whether codes of a matrix of this shape, with levels [r, k], can be taken so: those of a
    block fill bytes of their own, and vectors or words of them where a row has several blocks."""
    bits = width(k)
    if len(shape) != 2 or bits not in (1, 2, 4, 8) or not r or (r > 1 and r % shape[0]):
        return False
    blocks = max(r // shape[0], 1)
    size = shape[1] // blocks * bits  # of a block
    whole = size > 0 and size % 8 == 0
    return whole and (blocks == 1 or size // 8 >= _VECTOR or size % 32 == 0)


def takes(x: Tensor, levels: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the product of these inputs with a weight of this shape, with levels [r, k], is
    faster so than by decoding it first; False of tensors that stand for others."""
    if type(x) is not Tensor or not x.is_cpu or in_script_tracer():
        return False
    if x.dtype != levels.dtype or x.dtype not in _DTYPES:
        return False
    own = fits(shape, *levels.shape) and shape[0] * shape[1] >= LEAST and x.shape[-1:] == shape[1:]
    if not own or torch.is_autocast_enabled("cpu"):
        return False
    return torch.compiler.is_dynamo_compiling() or not (in_tracer() or in_function_transform())


def widened(codes: Tensor, levels: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes and levels of a matrix that can be taken so, where other codes make them so, else as
    they are: three levels are the first of four, codes of 3 bits take 4, those of 5 to 7 take 8.

    What is added are levels that no code stands for, above the others and evenly spaced.
    """
    (r, k), bits = levels.shape, width(levels.shape[1])
    wider = 4 if k == 3 else {3: 9, 5: 129, 6: 129, 7: 129}.get(bits, k)
    if wider == k or not fits(shape, r, wider) or numbers_of(levels, shape[0]) is None:
        return codes, levels
    wide = levels.double()
    unit = (wide[:, -1:] - wide[:, :1]) / (k - 1)
    more = wide[:, -1:] + unit * torch.arange(1, wider - k + 1, device=levels.device)
    whole = decode(codes, torch.Size(shape).numel(), k)
    return encode(whole, wider), torch.cat([levels, more.to(levels.dtype)], 1)


#: By kind, and what a compiler makes programs of their own for.
_PROGRAMS: dict[tuple[Kind, int, bool], Callable[..., Tensor]] = {}
_FAILED: list[Kind] = []  # what could not be compiled


def multiplied(x: Tensor, codes: Tensor, levels: Tensor, rows: int) -> Tensor:
    """x W^T of inputs [..., n] and a packed weight W [rows, n], summed in float32 and rounded to
    the dtype of the inputs.

    The weight is decoded first for levels of no form, and where nothing can be compiled, with a
    warning.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        made: Tensor = packed_product(x, codes, levels, rows)
        return made
    return _multiplied(x, codes, levels, rows)


@torch.no_grad()
def _multiplied(x: Tensor, codes: Tensor, levels: Tensor, rows: int) -> Tensor:
    n, (r, k) = x.shape[-1], levels.shape
    blocks, bits = max(r // rows, 1), width(k)
    size = n // blocks * bits // 8  # bytes of a block
    by_words = blocks > 1 and size < _VECTOR
    lanes = size // 4 if by_words else 1
    numbers = _numbers(levels, rows, lanes)
    if numbers is None or not x.numel() or _FAILED:
        return functional.linear(x, decoded(codes, levels, (rows, n)).to(x.dtype))
    form, units, start, middle = numbers
    inputs = x.numel() // n
    cut = (blocks * lanes, 1, 4) if by_words else (blocks, size, 1)
    kind = Kind(form, bits, inputs, start, middle is not None, *cut)
    given = units if middle is None else (*units, middle)
    flat = x.reshape(inputs, n).float().contiguous()
    try:
        if inputs <= MOST_ROWS:
            y = _program(kind)(_at_start(flat), _at_start(codes), turn_of(kind), *given)
        else:
            y = _by_tiles(kind, flat, codes, given)
    except RuntimeError as error:
        if not is_of_compiler(error):
            raise
        _FAILED.append(kind)
        warnings.warn(
            "packed layers decode their weights before each product: "
            + str(error).partition("\n")[0],
            stacklevel=2,
        )
        return functional.linear(x, decoded(codes, levels, (rows, n)).to(x.dtype))
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def _at_start(tensor: Tensor) -> Tensor:
    """It at the start of its own memory: a compiler tells memory that begins there from other, and
    words are read where a word can begin."""
    return tensor.clone() if tensor.storage_offset() else tensor


packed_product = torch.library.custom_op(
    "parq_fn::packed_product",
    _multiplied,
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor levels, int rows) -> Tensor",
)


@packed_product.register_fake
def _(x: Tensor, codes: Tensor, levels: Tensor, rows: int) -> Tensor:
    del codes, levels
    return x.new_empty(*x.shape[:-1], rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, codes, levels, rows = inputs
    ctx.save_for_backward(codes, levels)
    ctx.shape = rows, x.shape[-1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    codes, levels = ctx.saved_tensors
    return grad @ decoded(codes, levels, ctx.shape).to(grad.dtype), None, None, None


@packed_product.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, *own: Any) -> tuple[Tensor, int]:
    del info
    if in_dims[1:3] != (None, None):
        raise NotImplementedError(
            "vmap over packed weights: take parq_fn.export.dequantized(module)"
        )
    made: Tensor = packed_product(x.movedim(in_dims[0], 0), *own)
    return made, 0


packed_product.register_autograd(_gradient, setup_context=_save)


def _by_tiles(kind: Kind, x: Tensor, codes: Tensor, units: tuple[Tensor, ...]) -> Tensor:
    """The same with some rows of the weight at a time."""
    turned = turned_of(kind, x, turn_of(kind)).flatten(2)
    *places, sums = turned.transpose(0, 1).unbind(1)
    inputs = torch.cat(places, 1)
    number = len(units) - kind.middle
    of_sums = kind.start * sum(units[1 : min(number, 2)], units[0])
    of_sums = of_sums + units[-1] if kind.middle else of_sums
    sums = sums.view(kind.inputs, kind.blocks, -1).sum(-1)
    rows = max(_TILE // inputs.shape[1], 1)
    program, marks = _program(kind._replace(inputs=0)), marks_of(kind)
    codes = codes.view(-1, kind.blocks * kind.size * kind.word)
    y = functional.linear(sums, of_sums)
    for first in range(0, len(codes), rows):
        tiles = (part[first : first + rows] for part in (codes, *units[:number]))
        own, *numbers = map(_at_start, tiles)
        tile = program(own, marks, *numbers).flatten(1)
        y[:, first : first + rows].addmm_(inputs, tile.t())
    return y


def _program(kind: Kind) -> Callable[..., Tensor]:
    key = kind, torch.get_num_threads(), torch.is_inference_mode_enabled()
    if key not in _PROGRAMS:
        formula = product_of(kind) if kind.inputs else decoding_of(kind)
        _PROGRAMS[key] = compiled(formula, _OPTIONS, dynamic=None)
    return _PROGRAMS[key]
