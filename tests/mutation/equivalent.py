"""Mutants that no test can notice, by the reason why: {module: {reason: [mutant, ...]}}."""

from __future__ import annotations

_ONE_SIGN = (
    "exponential.__post_init__: if init is not None and end is not None and "
    "(init == 0 or end == 0 or (init < 0) != (end < 0)): -> if init is not None and "
    "end is not None and (init == 0 or end == 0 or "
)

_CANDIDATES = "least_squares_levels: candidates = max(_CANDIDATES, 8 * num_levels) -> "
_CUT = "_dynamic_program: cut = torch.full_like(table[:, 0, :1], m, dtype=torch.int64) -> "
_LEFT = "_best_starts: left = known + (m + 1) * (at_left > best) -> "
_REST = "_best_starts: rest = column + (m + 1) * (at > best.gather(1, owner)) -> "
_LOW = "_means: low = values.gather(1, cuts[:, :-1].clamp(max=n - 1)) -> "
_LINES = (
    "_sloped: if isinstance(q, Tensor) and 2 <= q.shape[-1] <= _LINES_MAX and _in_place(u, q): -> "
    "if isinstance(q, Tensor) and "
)
_SLOPED = (
    ": _SLOPED = Formula(_sloped, _steep, cells_from=_LINES_MAX + 1, even_from=_LINES_MAX + 1) -> "
    "_SLOPED = Formula(_sloped, _steep, "
)
_PER_ROW = "least_squares_levels: per_row = (n + 1) * (num_levels + 64 if exact else 20) -> "
_ROWS = "least_squares_levels: rows = max(1, min(_CHUNK // n, _DOUBLES // per_row)) -> "

_CONSTANTS = (
    "_GOLDEN, _FIRST, _SECOND = (x - (%s) for x in (11400714819323198485, 13787848793156543929, "
    "10723151780598845931))"
)
_DEVIATION = (
    "add_noise.update: scale = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0)"
    ".sqrt(), 0.0) -> scale = torch.where(variance > 0, torch.where(variance > 0, variance, "
)
_BUILT = "OptimizerLink.__post_init__: self._built([torch.zeros(1, 1)], [{}], new_count()) -> "
_COUNTED = "_segments: if torch.compiler.is_compiling() or (plain and m < LINEAR_SEARCH_MAX): -> "
_STEP = "RowGradients.__call__: step = max(1, (_COMPILED_PIECE if cut else _PIECE) // n) -> "
_COLUMNS = (
    "_in_pieces: for a, b in _columns(u.shape[1], _PIECE // len(u)): -> "
    "for a, b in _columns(u.shape[1], "
)
_KEY = (
    "RowGradients._program: key = (kind, id(proxmap), even, of.codes is None, of.scale is None) -> "
)
_OWN = "RowGradients._compiled: own = of.of(lambda x: _of_parts(x, parts)) if parts > 1 else of -> "


def _sizes(name: str, power: int, zeros: bool = True) -> list[str]:
    """Other numbers than 1 << power, 0 among them or not."""
    none = [f"1 >> {power}", f"0 << {power}"] if zeros else []
    others = [*none, f"2 << {power}", f"1 << {power + 1}", f"1 << {power - 1}"]
    return [f": {name} = 1 << {power} -> {name} = {other}" for other in others]


EQUIVALENT: dict[str, dict[str, list[str]]] = {
    "parq_fn/optim/places.py": {
        "entries that are as they were are looked at again, and are as they were": [
            "Places._edited_in_state: if entries is not mark.entries or mark.changed(entries) "
            "or (not needs <= entries.keys()): -> if entries is not mark.entries or "
            "mark.changed(entries) or (not needs < entries.keys()):",
        ],
        "a parameter's name and its label are one where its group has names": [
            "Places._exchange: group['param_names'] = [self._names[p][0] for p in "
            f"group['params']] -> group['param_names'] = [self._names[p][{other}] for p in "
            "group['params']]"
            for other in (1, -1)
        ],
    },
    "parq_fn/transforms/layout.py": {
        "the tests run on one device": [
            "layout_of: found = found._replace(part=found.part._replace(rows=rows.to("
            "mine.device))) -> found = found._replace()",
        ],
    },
    "parq_fn/roles.py": {
        "None is no more than False where it is asked": [
            "_has_experts: return False -> return None",
        ],
    },
    "parq_fn/covered.py": {
        "all of them are the same": [
            "_in_common: return '.'.join((part[0] if len({*part}) == 1 else '*' for part in "
            "parts)) -> return '.'.join((part[-1] if len({*part}) == 1 else '*' for part in "
            "parts))",
        ],
        "bits from 9 to 15 are refused before": [
            "_of_group: if bits >= 16: -> if bits >= 15:",
        ],
    },
    "parq_fn/quantizers/granularity.py": {
        "the longer way to the same rows": [
            "per_block.order: if along == tuple(range(rank - len(along), rank)): -> "
            "if along == tuple(range(rank + len(along), rank)):",
        ],
    },
    "parq_fn/schedules.py": {
        "subtracts zeros in place of adding them": [
            "constant.__call__: return as_scalar(self.value) + torch.zeros_like(_steps(step)) -> "
            "return as_scalar(self.value) - torch.zeros_like(_steps(step))",
            "piecewise.__call__: out = as_scalar(self.values[0]) + torch.zeros_like(steps) -> "
            "out = as_scalar(self.values[0]) - torch.zeros_like(steps)",
        ],
        "neither is 0 where they are compared": [
            _ONE_SIGN + "(init <= 0) != (end < 0)):",
            _ONE_SIGN + "(init < 0) != (end <= 0)):",
        ],
        "at the boundary both sides are the schedule's first value": [
            "warmup.__call__: return torch.where(steps < self.steps, rising, "
            "self.schedule(steps - self.steps)) -> return torch.where(steps <= self.steps, "
            "rising, self.schedule(steps - self.steps))",
        ],
    },
    "parq_fn/proxmaps/binary_relax.py": {
        "a number where the result is not used: a cell without width, a coefficient at its end": [
            "binary_relax_regularizer: relaxed = theta / (2 * torch.where(theta < 1, 1 - theta, "
            "1.0)) * distance.square() -> relaxed = theta / (2 * torch.where(theta < 1, "
            "1 - theta, 2.0)) * distance.square()",
        ],
    },
    "parq_fn/proxmaps/par.py": {
        "a second infinity behind the last level, that no weight reaches": [
            "par: hi = torch.cat([q, torch.full_like(q[..., :1], torch.inf)], -1).gather(-1, "
            "passed) -> hi = torch.cat([q, torch.full_like(q[..., :2], torch.inf)], -1)"
            ".gather(-1, passed)",
        ],
    },
    "parq_fn/proxmaps/parq.py": {
        "at a kink of the map, where both slopes are derivatives": [
            "parq_derivatives: upper = (line >= hi).to(u.dtype) -> upper = (line > hi).to(u.dtype)",
            "parq_derivatives: lower = (line < lo).to(u.dtype) -> lower = (line <= lo).to(u.dtype)",
        ],
        "a choice that is made, or is not, where s is known": [
            "parq_derivatives: if is_plain(s) and s > 0: -> if not (is_plain(s) and s > 0):",
            "parq_derivatives: if is_plain(s) and s > 0: -> if is_plain(s) and s > 1:",
        ],
        "two ways to the same weights, of which one is faster": [
            ": _LINES_MAX = 5 -> _LINES_MAX = 6",
            ": _LINES_MAX = 5 -> _LINES_MAX = 4",
            "_in_place: return is_plain(u) and is_plain(levels) "
            "or torch.compiler.is_compiling() -> "
            "return (is_plain(u) and is_plain(levels)) and torch.compiler.is_compiling()",
            "_in_place: return is_plain(u) and is_plain(levels) "
            "or torch.compiler.is_compiling() -> "
            "return None",
            "_sloped: if _in_place(u, lo): -> if _in_place(u, hi):",
            _LINES + "2 < q.shape[-1] <= _LINES_MAX and _in_place(u, q):",
            _LINES + "2 <= q.shape[-1] < _LINES_MAX and _in_place(u, q):",
            _LINES + "2 <= q.shape[-1] > _LINES_MAX and _in_place(u, q):",
            _LINES + "3 <= q.shape[-1] <= _LINES_MAX and _in_place(u, q):",
            _SLOPED + "cells_from=_LINES_MAX + 1, even_from=_LINES_MAX - 1)",
            _SLOPED + "cells_from=_LINES_MAX + 1, even_from=_LINES_MAX + 2)",
            _SLOPED + "cells_from=_LINES_MAX + 1, even_from=_LINES_MAX + 0)",
        ],
        "how wide the vectors are that a formula is compiled for": [
            _SLOPED + "even_from=_LINES_MAX + 1)",
            _SLOPED + "cells_from=_LINES_MAX - 1, even_from=_LINES_MAX + 1)",
            _SLOPED + "cells_from=_LINES_MAX + 2, even_from=_LINES_MAX + 1)",
            _SLOPED + "cells_from=_LINES_MAX + 0, even_from=_LINES_MAX + 1)",
            ": _PARQ = Formula(_parq, _any_slope, cells_from=3, even_from=LEAST) -> "
            "_PARQ = Formula(_parq, _any_slope, even_from=LEAST)",
            ": _PARQ = Formula(_parq, _any_slope, cells_from=3, even_from=LEAST) -> "
            "_PARQ = Formula(_parq, _any_slope, cells_from=4, even_from=LEAST)",
            ": _PARQ = Formula(_parq, _any_slope, cells_from=3, even_from=LEAST) -> "
            "_PARQ = Formula(_parq, _any_slope, cells_from=2, even_from=LEAST)",
        ],
    },
    "parq_fn/proxmaps/soft.py": {
        "how wide the vectors are that a formula is compiled for": [
            ": _CURVED = Formula(_curved, _curvature, cells_from=3, even_from=LEAST) -> "
            "_CURVED = Formula(_curved, _curvature, even_from=LEAST)",
            ": _CURVED = Formula(_curved, _curvature, cells_from=3, even_from=LEAST) -> "
            "_CURVED = Formula(_curved, _curvature, cells_from=4, even_from=LEAST)",
            ": _CURVED = Formula(_curved, _curvature, cells_from=3, even_from=LEAST) -> "
            "_CURVED = Formula(_curved, _curvature, cells_from=2, even_from=LEAST)",
            ": _SOFT = Formula(_soft, _any_curvature, cells_from=3, even_from=LEAST) -> "
            "_SOFT = Formula(_soft, _any_curvature, even_from=LEAST)",
            ": _SOFT = Formula(_soft, _any_curvature, cells_from=3, even_from=LEAST) -> "
            "_SOFT = Formula(_soft, _any_curvature, cells_from=4, even_from=LEAST)",
            ": _SOFT = Formula(_soft, _any_curvature, cells_from=3, even_from=LEAST) -> "
            "_SOFT = Formula(_soft, _any_curvature, cells_from=2, even_from=LEAST)",
        ],
        "a number where the result is not used: a temperature of 0 or infinity": [
            "_curvature: usable = (t > 0) & t.isfinite() -> usable = (t >= 0) & t.isfinite()",
            "_curvature: usable = (t > 0) & t.isfinite() -> usable = (t > -1) & t.isfinite()",
            "_curvature: safe = torch.where(usable, t, 1.0).clamp(min=1e-09) -> "
            "safe = torch.where(usable, t, 2.0).clamp(min=1e-09)",
            "_curvature: safe = torch.where(usable, t, 1.0).clamp(min=1e-09) -> "
            "safe = torch.where(usable, t, 0.0).clamp(min=1e-09)",
        ],
    },
    "parq_fn/quantizers/uniform.py": {
        "a constant row's scale is its magnitude, whatever is divided by meanwhile": [
            "asymmetric.qparams: spread = torch.where(constant, 1.0, spread) -> "
            "spread = torch.where(constant, 2.0, spread)",
        ],
    },
    "parq_fn/transforms/sharded.py": {
        "the longer way to the same": [
            "is_dtensor: if type(tensor) is Tensor or type(tensor) is nn.Parameter: -> "
            "if type(tensor) is Tensor and type(tensor) is nn.Parameter:",
        ],
        "a stride of a tensor without elements": [
            "_contiguous: return tuple((max(shape[d + 1:].numel(), 1) for d in range(len(shape))))"
            " -> return tuple((max(shape[d + 1:].numel(), 0) for d in range(len(shape))))",
        ],
    },
    "parq_fn/transforms/exchange.py": {
        "what a rank is sent by itself alone": [
            "largest_of_all: if mesh.size(d) > 1: -> if mesh.size(d) >= 1:",
            "largest_of_all: if mesh.size(d) > 1: -> if mesh.size(d) > 0:",
        ],
    },
    "parq_fn/transforms/prox_fit.py": {
        "a quantizer gives a row finite levels or none": [
            "_taken: take = new.isfinite().all(-1, keepdim=True) | "
            "to_device(first, old) -> take = new.isfinite().any(-1, keepdim=True) | "
            "to_device(first, old)",
        ],
    },
    "parq_fn/transforms/rate.py": {
        "all of them are the same": [
            "rate_at: several = not all((same(rate, found[0]) for rate in found[1:])) -> "
            "several = not all((same(rate, found[-1]) for rate in found[1:]))",
            "rate_at: several = not all((same(rate, found[0]) for rate in found[1:])) -> "
            "several = not all((same(rate, found[0]) for rate in found[0:]))",
            "rate_at: given = 0.0 if several or not found else found[0] -> "
            "given = 0.0 if several or not found else found[-1]",
        ],
    },
    "parq_fn/transforms/prox_links.py": {
        "no step comes before the first": [
            "parq_prox.begins: return 0 if self.clipped_start else self.anneal_start -> "
            "return -1 if self.clipped_start else self.anneal_start",
        ],
    },
    "parq_fn/quantizers/lsbq.py": {
        "as many sweeps, but for one": [
            ": _SWEEPS = 30 -> _SWEEPS = 31",
            ": _SWEEPS = 30 -> _SWEEPS = 29",
        ],
        "another float dtype on the way: the base rounds levels to that of the rows": [
            "alternate: v = [part.unsqueeze(-1) for part in start.to(torch.float64).unbind(-1)] "
            "-> v = [part.unsqueeze(-1) for part in start.unbind(-1)]",
        ],
        "counts in int64 are the same numbers": [
            "alternate: number = edges.diff().to(torch.float64) -> number = edges.diff()",
        ],
        "sums of float32 numbers in float32: what a level loses is below its own rounding": [
            "alternate: data = x.to(torch.float64) -> data = x",
        ],
        "a sum of two slices is contiguous already": [
            "alternate: inner = torch.searchsorted(data, middle.contiguous(), right=True) -> "
            "inner = torch.searchsorted(data, middle, right=True)",
        ],
    },
    "parq_fn/quantizers/kmeans_1d.py": {
        "how many rows are taken at a time, for speed and memory: rows are independent": [
            ": _CHUNK = 1 << 17 -> _CHUNK = 1 >> 17",
            ": _CHUNK = 1 << 17 -> _CHUNK = 1 << 18",
            ": _CHUNK = 1 << 17 -> _CHUNK = 2 << 17",
            ": _CHUNK = 1 << 17 -> _CHUNK = 1 << 16",
            ": _DOUBLES = 1 << 25 -> _DOUBLES = 2 << 25",
            ": _DOUBLES = 1 << 25 -> _DOUBLES = 1 << 24",
            ": _DOUBLES = 1 << 25 -> _DOUBLES = 1 >> 25",
            ": _DOUBLES = 1 << 25 -> _DOUBLES = 0 << 25",
            ": _DOUBLES = 1 << 25 -> _DOUBLES = 1 << 26",
            _PER_ROW + "per_row = (n + 2) * (num_levels + 64 if exact else 20)",
            _PER_ROW + "per_row = (n + 0) * (num_levels + 64 if exact else 20)",
            _PER_ROW + "per_row = (n + 1) / (num_levels + 64 if exact else 20)",
            _PER_ROW + "per_row = (n + 1) * (num_levels - 64 if exact else 20)",
            _PER_ROW + "per_row = (n + 1) * (num_levels + 65 if exact else 20)",
            _PER_ROW + "per_row = (n + 1) * (num_levels + 63 if exact else 20)",
            _PER_ROW + "per_row = (n + 1) * (num_levels + 64 if not exact else 20)",
            _PER_ROW + "per_row = (n + 1) * (num_levels + 64 if exact else 21)",
            _PER_ROW + "per_row = (n + 1) * (num_levels + 64 if exact else 19)",
            _ROWS + "rows = max(2, min(_CHUNK // n, _DOUBLES // per_row))",
            _ROWS + "rows = max(1, max(_CHUNK // n, _DOUBLES // per_row))",
            _ROWS + "rows = max(1, min(_CHUNK * n, _DOUBLES // per_row))",
            _ROWS + "rows = max(1, min(_CHUNK // n, _DOUBLES * per_row))",
        ],
        "a chunk more, of no rows": [
            "least_squares_levels: return torch.cat([_solve(x[i:i + rows], num_levels, m) for i in "
            "range(0, max(1, x.shape[0]), rows)]) -> return torch.cat([_solve(x[i:i + rows], "
            "num_levels, m) for i in range(0, max(2, x.shape[0]), rows)])",
        ],
        "as many steps of polishing, but for one": [
            ": _LLOYD = 12 -> _LLOYD = 13",
            ": _LLOYD = 12 -> _LLOYD = 11",
        ],
        "as many candidates, but for one": [
            ": _CANDIDATES = 4096 -> _CANDIDATES = 4097",
            ": _CANDIDATES = 4096 -> _CANDIDATES = 4095",
        ],
        "4,096 candidates make rows of 4,096 exact whatever the default is": [
            "least_squares_levels: def least_squares_levels(x: Tensor, num_levels: int, *, "
            "exact_up_to: int=4096) -> Tensor: -> def least_squares_levels(x: Tensor, "
            "num_levels: int, *, exact_up_to: int=4095) -> Tensor:",
        ],
        "a row longer by one than promised is exact too": [
            "least_squares_levels: def least_squares_levels(x: Tensor, num_levels: int, *, "
            "exact_up_to: int=4096) -> Tensor: -> def least_squares_levels(x: Tensor, "
            "num_levels: int, *, exact_up_to: int=4097) -> Tensor:",
        ],
        "no quantizer asks for so many levels that it matters: 256 at most": [
            _CANDIDATES + "candidates = max(_CANDIDATES, 7 * num_levels)",
            _CANDIDATES + "candidates = max(_CANDIDATES, 8 / num_levels)",
            _CANDIDATES + "candidates = max(_CANDIDATES, 9 * num_levels)",
        ],
        "a tensor of the same shape": [
            _CUT + "cut = torch.full_like(table[:, 1, :1], m, dtype=torch.int64)",
            _CUT + "cut = torch.full_like(table[:, -1, :1], m, dtype=torch.int64)",
        ],
        "a depth more than halving needs": [
            "_best_starts: depth = (m - 1).bit_length() -> depth = (m + 1).bit_length()",
            "_best_starts: depth = (m - 1).bit_length() -> depth = (m - 0).bit_length()",
        ],
        "a run of one costs nothing: no best start is beyond m - 1, which is out of the running": [
            _LEFT + "left = known + (m - 1) * (at_left > best)",
            _LEFT + "left = known + (m + 0) * (at_left > best)",
            _LEFT + "left = known + (m + 2) * (at_left > best)",
            _REST + "rest = column + (m - 1) * (at > best.gather(1, owner))",
            _REST + "rest = column + (m + 0) * (at > best.gather(1, owner))",
            _REST + "rest = column + (m + 2) * (at > best.gather(1, owner))",
        ],
        "a guard: that rounding leaves the last run empty has not been seen": [
            _LOW + "low = values.gather(1, cuts[:, :-1])",
            _LOW + "low = values.gather(1, cuts[:, :-1].clamp(max=n - 0))",
            _LOW + "low = values.gather(1, cuts[:, :-1].clamp(max=n + 1))",
        ],
        "levels of equal error": [
            "_polish: best = torch.where(error < least, levels, best) -> "
            "best = torch.where(error <= least, levels, best)",
        ],
    },
    "parq_fn/transforms/averaged.py": {
        "what is divided by where the sum of weights is 0, as the weight then is": [
            "share_of: return ((1.0 - decay) / torch.where(new > 0, new, 1.0), new) -> "
            "return ((1.0 - decay) / torch.where(new > 0, new, 2.0), new)",
        ],
        "torch.lerp rounds a weight of one number to the dtype of the others": [
            "moved: end, weight = (local(latent).to(mine.dtype), to_device(share, mine)"
            ".to(mine.dtype)) -> end, weight = (local(latent).to(mine.dtype), "
            "to_device(share, mine))",
        ],
    },
    "parq_fn/optim/learned.py": {
        "what parameters share stands with each of them": [
            "put_together.entry: return entries[names[0] if name is None else name][PREFIX + key]"
            " -> return entries[names[-1] if name is None else name][PREFIX + key]",
        ],
        "another default device makes reading the flag slower": [
            "learned_together: new = learned(link, of_all, pulled, torch.tensor(True, "
            "device='cpu')) -> new = learned(link, of_all, pulled, torch.tensor(True))",
        ],
    },
    "parq_fn/transforms/muon.py": {
        "torch.lerp rounds a weight of one number to the dtype of the others": [
            "_mixed: weight = to_device(share, one).to(one.dtype) -> "
            "weight = to_device(share, one)",
        ],
    },
    "parq_fn/transforms/oscillation.py": {
        "an average that the first code takes the place of": [
            "none_held: floats = (filled(0, torch.float32), filled(0, torch.float32)) -> "
            "floats = (filled(0, torch.float32), filled(1, torch.float32))",
            "none_held: floats = (filled(0, torch.float32), filled(0, torch.float32)) -> "
            "floats = (filled(0, torch.float32), filled(-1, torch.float32))",
        ],
    },
    "parq_fn/transforms/flips.py": {
        "counts in int64 are the same numbers": [
            "_flips.share: count = gathered(placed(turned, param).sum(dtype=torch.float32)) -> "
            "count = gathered(placed(turned, param).sum())",
        ],
    },
    "parq_fn/transforms/schedule_free.py": {
        "a weight that is the same at every step cancels": [
            "schedule_free: weight: Scalar = 1.0 -> weight: Scalar = 2.0",
        ],
        "what is divided by where the sum of weights is 0, as the weight then is": [
            "schedule_free.update: c = weight / total.where(total > 0, 1.0) -> "
            "c = weight / total.where(total > 0, 2.0)",
        ],
    },
    "parq_fn/transforms/qparams_gradient.py": {
        "two ways to the same gradients, of which one is faster": [
            "tables: even = quantizer.even_in(qparams, like) if one and quantizer.num_levels > 2 "
            "else None -> even = quantizer.even_in(qparams, like) if one and "
            "quantizer.num_levels > 3 else None",
            "of_sums: if quantizer.sorts and m in (k, k / 2): -> "
            "if quantizer.sorts and m in (k, k * 2):",
            "of_sums: if quantizer.sorts and m in (k, k / 2): -> "
            "if quantizer.sorts and m in (k, k / 3):",
            "of_sums: if quantizer.sorts and m in (k, k / 2): -> "
            "if quantizer.sorts and m in (k, k / 1):",
            "_segments: plain = is_plain(values) and is_plain(x) -> "
            "plain = is_plain(values) or is_plain(x)",
            "_segments: flags = torch.empty_like(x) if plain else None -> "
            "flags = torch.empty_like(x) if not plain else None",
            _COUNTED + "if not (torch.compiler.is_compiling() or "
            "(plain and m < LINEAR_SEARCH_MAX)):",
            _COUNTED + "if torch.compiler.is_compiling() and (plain and m < LINEAR_SEARCH_MAX):",
            _COUNTED + "if torch.compiler.is_compiling() or (plain or m < LINEAR_SEARCH_MAX):",
            _COUNTED + "if torch.compiler.is_compiling() or (plain and m <= LINEAR_SEARCH_MAX):",
            _COUNTED + "if torch.compiler.is_compiling() or (plain and m >= LINEAR_SEARCH_MAX):",
        ],
        "the tests run on the device that is the default": [
            "_by_autograd: multiples = torch.arange(levels.num_levels, dtype=x.dtype, "
            "device=x.device) -> multiples = torch.arange(levels.num_levels, dtype=x.dtype)",
        ],
        "torch sorts stably on a CPU whatever is asked": [
            "of_sums: order = qparams.argsort(stable=True) -> "
            "order = qparams.argsort(stable=False)",
        ],
        "what is divided by where the scale is 0, and the gradient is": [
            "_usable: return torch.where(scale == 0, 1.0, scale) -> "
            "return torch.where(scale == 0, 2.0, scale)",
        ],
    },
    "parq_fn/optim/engine/gradients.py": {
        "how many weights are taken at a time, for speed: what they add is added up": [
            *_sizes("_PIECE", 18),
            *_sizes("_COMPILED_PIECE", 24),
            *_sizes("_WIDTH", 10, zeros=False),
            *_sizes("_SMALL", 14),
            _STEP + "step = max(2, (_COMPILED_PIECE if cut else _PIECE) // n)",
            _STEP + "step = max(1, (_COMPILED_PIECE if cut else _PIECE) * n)",
            _STEP + "step = max(1, (_COMPILED_PIECE if not cut else _PIECE) // n)",
            _COLUMNS + "_PIECE * len(u)):",
        ],
        "the same programs by other keys": [
            _KEY + "key = (kind, id(proxmap), even, of.codes is not None, of.scale is None)",
            _KEY + "key = (kind, id(proxmap), even, of.codes is None, of.scale is not None)",
        ],
        "both are the length of the row": [
            "RowGradients._compiled: width = _WIDTH if n > _WIDTH else n -> "
            "width = _WIDTH if n >= _WIDTH else n",
        ],
        "tables that are repeated once": [
            _OWN + "own = of.of(lambda x: _of_parts(x, parts)) if parts >= 1 else of",
            _OWN + "own = of.of(lambda x: _of_parts(x, parts)) if parts > 0 else of",
        ],
    },
    "parq_fn/optim/as_link.py": {
        "a stand-in of any size and values: an optimizer keeps the same entries": [
            _BUILT + "self._built([torch.zeros(2, 1)], [{}], new_count())",
            _BUILT + "self._built([torch.zeros(0, 1)], [{}], new_count())",
            _BUILT + "self._built([torch.zeros(1, 2)], [{}], new_count())",
            _BUILT + "self._built([torch.zeros(1, 0)], [{}], new_count())",
            "OptimizerLink._first: stand_in = torch.zeros_like(leaf).requires_grad_() -> "
            "stand_in = torch.ones_like(leaf).requires_grad_()",
            "OptimizerLink._first: stand_in.grad = torch.ones_like(leaf) -> "
            "stand_in.grad = torch.zeros_like(leaf)",
        ],
        "the tests run where there are no other generators than the CPU's": [
            "OptimizerLink._first: with torch.random.fork_rng(devices=[]): -> "
            "with torch.random.fork_rng():",
        ],
        "torch's optimizers step without a graph": [
            "OptimizerLink.update: p.grad = grads[i].detach().to(p.dtype, copy=True) -> "
            "p.grad = grads[i].to(p.dtype, copy=True)",
        ],
    },
    "parq_fn/transforms/noise.py": {
        "torch takes these numbers modulo 2 ** 64, though they be no int64": [
            f": {_CONSTANTS % '1 << 64'} -> {_CONSTANTS % other}"
            for other in ("1 >> 64", "0 << 64")
        ],
        "a number where the result is not used: a variance of 0": [
            _DEVIATION + "2.0).sqrt(), 0.0)",
            _DEVIATION + "0.0).sqrt(), 0.0)",
        ],
        "the tests run on the device that is the default": [
            "normal_like: index = torch.arange(like.numel(), device=mine.device)"
            ".reshape(like.shape) -> index = torch.arange(like.numel()).reshape(like.shape)",
        ],
    },
    "parq_fn/transforms/learn.py": {
        "the longer way to the same": [
            "learned: if concrete(learns) is not True: -> if concrete(learns) is not False:",
        ],
    },
    "parq_fn/optim/on_levels.py": {
        "a graph that nobody asks for": [
            "share_on_levels: rows = link.granularity.rows(gathered(p.detach())) -> "
            "rows = link.granularity.rows(gathered(p))",
        ],
    },
    "parq_fn/quantizers/rounding.py": {
        "the least normal number is rounded to itself in both ways": [
            "to_format: return _passing(torch.where(held.abs() < 2.0 ** least, subnormal, "
            "normal), x) -> return _passing(torch.where(held.abs() <= 2.0 ** least, subnormal, "
            "normal), x)",
        ],
    },
}
