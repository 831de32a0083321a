"""Prox maps, each a value in a file of its own, and their regularizers; `parq_fn.proxmaps.proxmap`
says what a map is."""

from parq_fn.proxmaps.binary_relax import binary_relax, binary_relax_regularizer
from parq_fn.proxmaps.clip import clip, clip_regularizer
from parq_fn.proxmaps.hard import hard, hard_regularizer
from parq_fn.proxmaps.par import par, par_regularizer, symmetric_slopes
from parq_fn.proxmaps.parq import interpolant, parq, parq_regularizer
from parq_fn.proxmaps.proxmap import ProxMap, prox_map
from parq_fn.proxmaps.proxquant import proxquant, proxquant_regularizer
from parq_fn.proxmaps.soft import soft

#: All maps of this library: what is listed here is under the laws and in their table.
MAPS = (hard, clip, parq, soft, binary_relax, proxquant, par)

__all__ = [
    "MAPS",
    "ProxMap",
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
    "prox_map",
    "proxquant",
    "proxquant_regularizer",
    "soft",
    "symmetric_slopes",
]
