"""Prox maps and their regularizers, as functions: `parq_fn.proxmaps.maps` says what each is."""

from parq_fn.proxmaps.maps import (
    binary_relax,
    binary_relax_regularizer,
    clip,
    clip_regularizer,
    hard,
    hard_regularizer,
    interpolant,
    par,
    par_regularizer,
    parq,
    parq_regularizer,
    proxquant,
    proxquant_regularizer,
    soft,
    symmetric_slopes,
)

__all__ = [
    "binary_relax",
    "binary_relax_regularizer",
    "clip",
    "clip_regularizer",
    "hard",
    "hard_regularizer",
    "interpolant",
    "par",
    "par_regularizer",
    "parq",
    "parq_regularizer",
    "proxquant",
    "proxquant_regularizer",
    "soft",
    "symmetric_slopes",
]
