"""The programs of products with codes: what is compiled for each kind of weight and of inputs.

Codes are taken by bytes, or by words of four bytes where blocks have fewer bytes than a vector:
then each word has units of its own, and is the lane of a vector. How a weight is made of units
says `product`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """What a program is made for."""

    form: str
    bits: int  # of a code
    inputs: int  # rows of inputs; 0 for the weight itself
    start: float  # f, or -1/2
    middle: bool  # whether there is a number m
    blocks: int  # of a row of the weight; words, where codes are taken by words
    size: int  # bytes of a block; 1 word
    word: int  # bytes that are taken together, 1 or 4


def turned_of(kind: Kind, x: Tensor, turn: Tensor) -> Tensor:
    """Inputs [inputs, n] by the places of their codes in a byte or word, scaled for them, and their
    sums in the last place: [places + 1, inputs, blocks, size]."""
    by_places = x.view(-1, 8 * kind.word // kind.bits).t()
    return (turn @ by_places).view(-1, kind.inputs, kind.blocks, kind.size)


_TURNS: dict[tuple[int, int], Tensor] = {}


def turn_of(kind: Kind) -> Tensor:
    """[places + 1, places]: what undoes the places of codes in their byte, on the diagonal, 1 of
    codes in words; below it ones."""
    key = kind.bits, kind.word
    if key not in _TURNS:
        places = torch.tensor(_places(kind))
        scales = 2.0**-places if kind.word == 1 else torch.ones(len(places))
        _TURNS[key] = torch.cat([scales.diag(), torch.ones(1, len(places))])
    return _TURNS[key]


def _terms(kind: Kind, codes: Tensor) -> list[Tensor]:
    """Of each unit the bytes or words that have its codes: [rows, blocks, size]."""
    flat = codes.reshape(-1)
    c = (flat.view(torch.int32) if kind.word == 4 else flat).view(-1, kind.blocks, kind.size)
    return {"even": [c], "additive": [c, c], "free": [c, c, c & (c >> 1)]}[kind.form]


def _masks(kind: Kind) -> list[int]:
    """Of each unit the mask of the lowest code of a byte or word."""
    return {"even": [2**kind.bits - 1], "additive": [1, 2], "free": [1, 2, 1]}[kind.form]


def _places(kind: Kind) -> list[int]:
    """Of codes in a byte or word, in bits."""
    return list(range(0, 8 * kind.word, kind.bits))


def product_of(kind: Kind) -> Callable[..., Tensor]:
    """(x [inputs, n], codes [bytes], turn, *units, middle if any) -> [inputs, rows]. A turn is that
    of `turn_of`."""
    masks, places, words = _masks(kind), _places(kind), kind.word == 4

    def product(x: Tensor, codes: Tensor, turn: Tensor, *units: Tensor) -> Tensor:
        fields = []
        for c, mask in zip(_terms(kind, codes), masks, strict=True):
            wide = c.to(torch.int32)
            at = [(wide >> p) & mask if words else wide & (mask << p) for p in places]
            fields.append([field.float() for field in at])
        turned = turned_of(kind, x, turn)
        found = []
        for i in range(kind.inputs):
            own, sums = turned[:-1, i], turned[-1, i]
            given = sums if kind.blocks > 1 else sums.sum()
            total = torch.zeros(())
            if kind.middle:
                last = units[-1].unsqueeze(-1) if kind.blocks > 1 else units[-1][:, 0]
                total = given * last
            for which, (taken, unit) in enumerate(zip(fields, units, strict=False)):
                times = 2 if which == 1 else 1  # the higher bit is taken as 2
                start = torch.zeros(()) if which == 2 else given * (kind.start * times)
                terms = [field * one for field, one in zip(taken, own, strict=True)]
                if kind.blocks > 1:
                    total = total + sum(terms, start) * (unit / times).unsqueeze(-1)
                else:
                    acc = sum(terms[1:], terms[0]).sum((1, 2))
                    total = total + (acc + start) * (unit / times)[:, 0]
            found.append(total.sum((1, 2)) if kind.blocks > 1 else total)
        return torch.stack(found)

    return product


def decoding_of(kind: Kind) -> Callable[..., Tensor]:
    """(codes [rows, bytes], marks, *units) -> the weights of these rows in the order of inputs,
    [rows, places, blocks, size], without their start and middle. Marks are those of `marks_of`."""
    masks, words = _masks(kind), kind.word == 4

    def decoding(codes: Tensor, marks: Tensor, *units: Tensor) -> Tensor:
        whole = torch.zeros(())
        for i, (c, mask, unit) in enumerate(zip(_terms(kind, codes), masks, units, strict=True)):
            wide = c.unsqueeze(1)
            at = (wide >> marks[i]) & mask if words else wide & marks[i]
            number = (unit / 2 if i == 1 else unit).view(-1, 1, kind.blocks, 1)
            whole = whole + at.float() * number
        return whole

    return decoding


def marks_of(kind: Kind) -> Tensor:
    """[units, places, 1, 1]: masks of the codes at each place of a byte, or places in a word."""
    masks, places = _masks(kind), _places(kind)
    if kind.word == 4:
        found = torch.tensor([places for _ in masks], dtype=torch.int32)
    else:
        found = torch.tensor([[m << p for p in places] for m in masks], dtype=torch.uint8)
    return found.view(*found.shape, 1, 1)
