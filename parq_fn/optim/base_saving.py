"""How the optimizer that QuantOptimizer wraps saves and loads its state.

Most do as torch's do. Some save more than entries of parameters: entries of `state` that are of no
parameter, keys that their own `state_dict()` adds. Some save entries in another form than they keep
them. So where a class has a `state_dict` or `load_state_dict` of its own, or hooks, these are
called, with latents for parameters; and what is of no parameter is saved with the first group,
under "base_state", which every way of saving an optimizer's groups keeps:

    {"state": {entries of no parameter}, key that state_dict() adds: value, ...}
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import saves_by_itself
from parq_fn.optim.base_optimizer import beyond_parameters
from parq_fn.optim.state import BEYOND, Entries, Group

_STANDARD = ("state", "param_groups")
_NAMES = ("params", "param_names")

Rows = list[tuple[Tensor, Entries | None]]
Latents = dict[Tensor, Tensor]


def saved(
    base: Optimizer, latents: Latents, entries: dict[Tensor, Entries]
) -> tuple[dict[Tensor, Entries], list[Group], Entries]:
    """(entries of the base as it saves them, its groups, what it saves besides).

    entries: the base's own, of each parameter.
    """
    beyond = beyond_parameters(base)
    if not saves_by_itself(base):
        return entries, base.param_groups, {"state": beyond} if beyond else {}
    params = [p for group in base.param_groups for p in group["params"]]
    with _seen_by_the_base(base, latents):
        base.state = defaultdict(dict, beyond)
        base.state.update((latents[p], dict(own)) for p, own in entries.items() if own)
        got = base.state_dict()
    state = got.get("state", {})
    own = {p: state.get(i, {}) for i, p in enumerate(params)}
    more = {key: one for key, one in got.items() if key not in _STANDARD}
    beyond = {key: one for key, one in state.items() if not isinstance(key, int)}
    return own, got["param_groups"], {**({"state": beyond} if beyond else {}), **more}


def beyond_of(state_dict: dict[str, Any]) -> Entries:
    """What a saved state holds that is of no parameter: of ours, or of the base's own."""
    found: Entries = {key: got for key, got in state_dict.items() if key not in _STANDARD}
    params = {name for group in state_dict["param_groups"] for name in group["params"]}
    of_none = {key: got for key, got in state_dict["state"].items() if key not in params}
    if of_none:
        found["state"] = of_none
    for group in state_dict["param_groups"]:
        found |= group.get(BEYOND, {})
    return found


def restored(
    base: Optimizer, latents: Latents, rows: Rows, groups: list[Group], beyond: Entries
) -> Rows:
    """Loads into the base what is of no parameter; returns the rows of its own entries as it loads
    them, and puts into the groups what it puts there.

    rows: (parameter, its saved entries, or None where the base is to have none).
    beyond: of the saved state.
    Raises ValueError, and changes nothing, for what is missing and what the base refuses.
    """
    kind, itself = type(base).__name__, saves_by_itself(base)
    known = saved(base, latents, {})[2] if itself else {"state": beyond_parameters(base)}
    lacking = sorted(
        [*map(str, known.keys() - {"state"} - beyond.keys())]
        + [*map(str, known.get("state", {}).keys() - beyond.get("state", {}).keys())]
    )
    if lacking:
        raise ValueError(
            f"loaded state dict has no {', '.join(lacking)}, which {kind} keeps besides the "
            "entries of parameters; save the optimizer by its state_dict() or by save_checkpoint"
        )
    beyond = copy.deepcopy(beyond)
    if not itself:
        base.state.update(beyond.get("state", {}))
        return rows
    position = {p: i for i, (p, _) in enumerate(rows)}
    given = {
        "state": {
            **beyond.pop("state", {}),
            **{i: dict(own) for i, (_, own) in enumerate(rows) if own is not None},
        },
        "param_groups": [
            {
                **{k: copy.deepcopy(v) for k, v in {**group, **got}.items() if k not in _NAMES},
                "params": [position[p] for p in group["params"]],
            }
            for group, got in zip(base.param_groups, groups, strict=True)
        ],
        **beyond,
    }
    with _seen_by_the_base(base, latents):
        try:
            base.load_state_dict(given)
        except Exception as error:
            raise ValueError(
                f"loaded state dict: {kind}.load_state_dict raised {type(error).__name__}: {error}"
            ) from error
        state, changed = base.state, base.param_groups
        found = [(p, own and _exact(state.get(latents[p], {}), own)) for p, own in rows]
        for got, new in zip(groups, changed, strict=True):
            got.update((key, one) for key, one in new.items() if key not in _NAMES)
        more = beyond_parameters(base)
    for key in beyond_parameters(base):
        del base.state[key]
    base.state.update(more)
    return found


def _exact(made: Entries, given: Entries) -> Entries:
    """Entries as the base has loaded them, but as they were saved where they are of the same form:
    torch casts them to the parameter's dtype, and makes others of strings and queues."""
    return {
        key: given[key] if key in given and _form(given[key]) == _form(got) else got
        for key, got in made.items()
    }


def _form(got: Any) -> Any:
    return (type(got), got.shape) if isinstance(got, Tensor) else Tensor not in type(got).__mro__


@contextmanager
def _seen_by_the_base(base: Optimizer, latents: Latents) -> Iterator[None]:
    """The base with latents for parameters; after it state and groups are as before, and where
    something is raised all else too."""
    kept, groups = dict(vars(base)), base.param_groups
    contents = [dict(group) for group in groups]
    try:
        with torch.no_grad():
            for group in groups:
                group["params"] = [latents[p] for p in group["params"]]
            yield
    except Exception:
        vars(base).clear()
        vars(base).update(kept)
        raise
    finally:
        base.state, base.param_groups = kept["state"], groups
        for group, content in zip(groups, contents, strict=True):
            group.clear()
            group.update(content)
