"""Updates, saves, loads, refits, mask changes and dtype changes, interleaved at random.

A machine trains with a masked prox link and checks every state against the definition in plain
loops over Python floats.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle

import optree
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import parq_fn as pf
from parq_fn.foundation.tree import tree_leaves, tree_map
from parq_fn.foundation.value import value

MASKS = ["*", "matrix", ["matrix", "nested"], {"matrix": False, "nested": True, "vector": True}]
WIDE = [torch.float64, torch.float32]
GRIDS = [(-1.0, -0.3, 0.45, 1.3), (-0.7, 0.7), (-1.1, 0.0, 0.2)]


@value
class drifting(pf.Quantizer):
    """An irregular grid times the mean magnitude: nice grids hide arithmetic on increments."""

    grid: tuple[float, ...]

    @property
    def num_levels(self) -> int:
        return len(self.grid)

    def qparams(self, x: Tensor) -> Tensor:
        return x.abs().mean(-1, keepdim=True) * torch.tensor(self.grid, dtype=x.dtype)


def parq_by_hand(u: float, levels: list[float], s: float) -> float:
    """The definition, cell by cell."""
    if u <= levels[0] or u >= levels[-1]:
        return levels[0] if u <= levels[0] else levels[-1]
    i = max(i for i in range(len(levels) - 1) if levels[i] <= u)
    lo, hi = levels[i], levels[i + 1]
    middle = (lo + hi) / 2
    if s == 0:
        return hi if u > middle else lo
    return min(max(middle + (u - middle) / s, lo), hi)


class Training(RuleBasedStateMachine):
    @initialize(
        grid=st.sampled_from(GRIDS),
        start=st.integers(0, 4),
        length=st.integers(1, 6),
        warmup=st.integers(0, 3),
        period=st.integers(1, 4),
        mask=st.sampled_from(MASKS),
        seed=st.integers(0, 99),
    )
    def begin(self, grid, start, length, warmup, period, mask, seed) -> None:
        self.prox = pf.parq_prox(
            drifting(grid),
            anneal_start=start,
            anneal_end=start + length,
            warmup=min(warmup, start + length - 1),
            period=period,
            granularity=pf.per_channel(),
        )
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        self.params = {"matrix": draw(2, 3), "nested": [draw(1, 2, 2, 1)], "vector": draw(4)}
        self.use(mask)

    def use(self, mask) -> None:
        """A new mask begins its leaves anew: count 0, nothing fitted."""
        self.transform = pf.chain(pf.sgd(0.1, momentum=0.5), pf.masked(self.prox, mask))
        self.state = self.transform.init(self.params)
        self.count, self.fitted = 0, None

    @property
    def dtype(self) -> torch.dtype:
        return self.params["vector"].dtype

    @rule(scale=st.sampled_from([0.0, 1.0, -2.0]), seed=st.integers(0, 99))
    def update(self, scale: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        grads = tree_map(
            lambda p: (scale * torch.randn(p.shape, dtype=torch.float64, generator=generator)).to(
                p.dtype
            ),
            self.params,
        )
        before = copy.deepcopy((grads, self.state, self.params))
        updates, state = self.transform.update(grads, self.state, self.params)
        params = pf.apply_updates(self.params, updates)
        self.unchanged(before, (grads, self.state, self.params))
        assert optree.tree_structure(state) == optree.tree_structure(self.state)
        t, self.count = self.count, self.count + 1
        due = t >= self.prox.warmup and (t - self.prox.warmup) % self.prox.period == 0
        if due:
            self.fitted = None  # read anew below
        else:
            self.unchanged(pf.read(state, "qparams"), pf.read(self.state, "qparams"))
        self.state, self.params = state, params
        if due:
            self.fitted = pf.read(state, "qparams")
            for p, qparams in self.quantized(self.fitted):
                fresh = self.prox.quantizer.fit(self.prox.granularity.rows(p))
                assert torch.equal(fresh.reshape(qparams.shape), qparams)

    @rule(way=st.sampled_from(["torch", "pickle", "deepcopy"]))
    def save_and_load(self, way: str) -> None:
        kept = self.params, self.state
        if way == "torch":
            buffer = io.BytesIO()
            torch.save(kept, buffer)
            buffer.seek(0)
            loaded = torch.load(buffer, weights_only=False)
        elif way == "pickle":
            loaded = pickle.loads(pickle.dumps(kept))
        else:
            loaded = copy.deepcopy(kept)
        self.unchanged(kept, loaded)
        self.params, self.state = loaded
        assert pickle.loads(pickle.dumps(self.transform)) == self.transform

    @rule(period=st.integers(1, 4))
    def change_the_period(self, period: int) -> None:
        """A value replaced, the state kept: hyperparameters are not state."""
        self.prox = dataclasses.replace(self.prox, period=period)
        base, masked = self.transform.links
        self.transform = pf.chain(base, dataclasses.replace(masked, inner=self.prox))

    @rule(mask=st.sampled_from(MASKS))
    def change_the_mask(self, mask) -> None:
        self.use(mask)

    @precondition(lambda self: self.dtype == torch.float64)
    @rule()
    def narrow(self) -> None:
        self.params = tree_map(lambda p: p.float(), self.params)
        keep = self.state
        self.state = tree_map(
            lambda new, old: old.to(new.dtype), self.transform.init(self.params), keep
        )

    def unchanged(self, a, b) -> None:
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)

    def quantized(self, levels):
        """(param, its levels) for the leaves of the mask."""
        pairs = optree.tree_map(
            lambda p, q: (p, q) if isinstance(q, Tensor) else None, self.params, levels
        )
        return optree.tree_leaves(pairs, is_leaf=lambda n: isinstance(n, tuple))

    @invariant()
    def weights_are_the_map_of_the_latent(self) -> None:
        if not hasattr(self, "transform"):
            return
        weights = self.transform.weights(self.state, self.params)
        self.unchanged(weights, self.transform.weights(self.state, self.params))
        levels, t = pf.levels_of(self.transform, self.state), self.count - 1
        assert int(pf.read(self.state, "count")) == self.count
        active = t >= max(self.prox.warmup, self.prox.anneal_start)
        for name, p in self.params.items():
            leaf, w = (p[0], weights[name][0]) if name == "nested" else (p, weights[name])
            q = levels[name][0] if name == "nested" else levels[name]
            if not isinstance(q, Tensor) or not active:
                assert torch.equal(w, leaf)
                continue
            s = float(self.prox.coefficient(torch.tensor(t)))
            q = q.unsqueeze(0).flatten(0, -2)
            rows = leaf.reshape(q.shape[0], -1)
            tolerance = 1e-12 if self.dtype == torch.float64 else 1e-5
            for u, v, own in zip(
                rows.tolist(), w.reshape(rows.shape).tolist(), q.tolist(), strict=True
            ):
                for a, b in zip(u, v, strict=True):
                    expected = parq_by_hand(a, own, s)
                    margin = tolerance * (1 + abs(a)) / max(s, 1e-3)
                    assert math.isclose(b, expected, rel_tol=0, abs_tol=margin)
                    assert s > 0 or b in own


TestTraining = pytest.mark.slow(Training.TestCase)
