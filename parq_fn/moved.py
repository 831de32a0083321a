"""Modules by the names that they had before the package had folders.

`import parq_fn.value`, `from parq_fn.prox import ProxState` and pickles that name classes so find
the same objects where they stand now. Type checkers do not know these names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: {old name: the module that it is now, or those that its names are in}, within this package.
MOVED = {
    "value": "foundation.value",
    "scalar": "foundation.scalar",
    "checks": "foundation.checks",
    "interval": "foundation.checks",
    "tree": "foundation.tree",
    "traits": "foundation.traits",
    "formulas": "proxmaps.proxmap proxmaps.hard proxmaps.clip proxmaps.parq proxmaps.soft"
    " proxmaps.binary_relax proxmaps.proxquant",
    "levels": "proxmaps.levels",
    "tanh": "proxmaps.tanh",
    "granularity": "quantizers.granularity",
    "transformation": "transforms.transformation transforms.chain transforms.masked"
    " transforms.partition transforms.train",
    "links": "transforms.links transforms.clipping",
    "wrappers": "transforms.wrappers",
    "optimizers": "transforms.optimizers",
    "prox": "transforms.prox_link transforms.prox_links transforms.prox_state",
    "sharded": "transforms.sharded",
    "optim.parts": "optim.leafwise",
    "optim.passes": "optim.engine.passes",
    "optim.programs": "optim.engine.programs",
    "optim.rows": "optim.engine.rows",
    "display": "show.display",
    "plot": "show.plot",
}
#: {module that is still there: where classes of it stand now}.
_PARTED = {"transforms.prox_link": "transforms.prox_state"}


def former_names(cls: type) -> list[str]:
    """The names under which states and pickles of before know a class.

    >>> from parq_fn import ProxState
    >>> former_names(ProxState)
    ['parq_fn.prox.ProxState', 'parq_fn.transforms.prox_link.ProxState']
    """
    own = cls.__module__.removeprefix(f"{__package__}.")
    names = [*MOVED.items(), *_PARTED.items()]
    old = [name for name, now in names if own in now.split()]
    return [f"{__package__}.{name}.{cls.__qualname__}" for name in old]


class _Moved(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        package, _, name = fullname.partition(".")
        known = package == __package__ and name in MOVED
        return ModuleSpec(fullname, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix(f"{__package__}.")
        found = [importlib.import_module(f"{__package__}.{now}") for now in MOVED[name].split()]
        if len(found) == 1:
            sys.modules[module.__name__] = found[0]  # import takes the module from there
            return
        for one in found:
            names = {key: got for key, got in vars(one).items() if not key.startswith("__")}
            vars(module).update(names)


sys.meta_path.insert(0, _Moved())  # before those that may find files of another version
