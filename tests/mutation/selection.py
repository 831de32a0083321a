"""Which tests are run against a module's mutants: the most direct first, the others after them.

Left out are those that are slow or start processes of their own: the example, the README, the
kit on broken operators, and (by their mark) what compiles.
"""

from __future__ import annotations

from pathlib import Path

# The package itself is not imported: a mutant takes a module's place when it is imported first.
_PROXMAPS = Path(__file__).parents[2] / "parq_fn" / "proxmaps"
_MAPS = sorted(
    path.stem
    for path in _PROXMAPS.glob("*.py")
    if path.stem not in ("__init__", "proxmap", "levels", "tanh")
)

#: {module: (files run first, files run where those pass)}.
TESTS: dict[str, tuple[tuple[str, ...], ...]] = {}

_COMMON = ("tests/test_published_faults.py", "tests/test_torch_func.py")
_QUANTIZERS = (
    ("tests/test_quantizers.py", "tests/test_reference.py"),
    ("tests/laws/test_quantizers.py", "tests/test_checks.py", "tests/test_prox.py", *_COMMON),
)


def _select(module: str, first: tuple[str, ...], then: tuple[str, ...]) -> None:
    TESTS[module] = ((module, *first), then)


_select(
    "parq_fn/schedules.py",
    ("tests/test_schedules.py", "tests/laws/test_schedules.py", "tests/test_reference.py"),
    ("tests/test_checks.py", "tests/test_prox.py", *_COMMON),
)
_select(
    "parq_fn/quantizers/granularity.py",
    ("tests/test_granularity.py", "tests/test_axes.py"),
    ("tests/test_checks.py", "tests/test_prox.py", *_COMMON),
)
for _map in _MAPS:
    _select(
        f"parq_fn/proxmaps/{_map}.py",
        (
            "tests/test_proxmaps.py",
            "tests/test_levels.py",
            "tests/laws/test_proxmaps.py",
            "tests/test_reference.py",
        ),
        ("tests/test_prox.py", "tests/optim/test_passes.py", *_COMMON),
    )
_select(
    "parq_fn/proxmaps/proxmap.py",
    ("tests/test_proxmaps.py", "tests/test_levels.py"),
    ("tests/test_value.py", "tests/optim/test_passes.py", *_COMMON),
)
_select(
    "parq_fn/proxmaps/even.py",
    ("tests/test_even.py",),
    ("tests/optim/test_passes.py", "tests/test_prox.py", *_COMMON),
)
_select("parq_fn/quantizers/base.py", *_QUANTIZERS)
_select("parq_fn/quantizers/uniform.py", *_QUANTIZERS)
_select("parq_fn/quantizers/lsbq.py", *_QUANTIZERS)
_select("parq_fn/quantizers/lloyd_max.py", *_QUANTIZERS)
_select(
    "parq_fn/quantizers/reductions.py",
    ("tests/test_quantizers.py", "tests/test_tables.py"),
    ("tests/laws/test_quantizers.py", "tests/test_reference.py", *_COMMON),
)
for _name in ("integer", "affine", "gaussian", "codebook", "mxfp4", "nvfp4", "stored", "rounding"):
    _select(
        f"parq_fn/quantizers/{_name}.py",
        ("tests/test_tables.py", "tests/test_stored.py", "tests/test_whole.py", *_QUANTIZERS[0]),
        *_QUANTIZERS[1:],
    )
_select(
    "parq_fn/quantizers/kmeans_1d.py",
    ("tests/test_partition.py",),
    ("tests/test_quantizers.py", "tests/laws/test_quantizers.py"),
)
_PROX_LINKS = (
    ("tests/test_prox.py", "tests/test_checks.py"),
    (
        "tests/laws/test_training.py",
        "tests/laws/test_transformations.py",
        "tests/test_reference.py",
        "tests/test_convergence.py",
        "tests/test_stateful.py",
        *_COMMON,
    ),
)
_select(
    "parq_fn/transforms/estimators.py",
    ("tests/test_estimators.py",),
    ("tests/test_pullback.py", "tests/laws/test_transformations.py"),
)
_select("parq_fn/transforms/prox_link.py", *_PROX_LINKS)
_select("parq_fn/transforms/prox_links.py", *_PROX_LINKS)
_select(
    "parq_fn/transforms/rate.py",
    ("tests/test_wrong_use.py", "tests/test_prox.py"),
    ("tests/test_transformation.py", *_COMMON),
)
_TRANSFORMS = (
    ("tests/test_transformation.py", "tests/test_pullback.py", "tests/test_checks.py"),
    (
        "tests/laws/test_transformations.py",
        "tests/test_tree.py",
        "tests/test_modules.py",
        "tests/test_optimizers.py",
        "tests/test_prox.py",
        "tests/test_value.py",
        *_COMMON,
    ),
)
for _name in ("transformation", "chain", "masked", "partition", "train"):
    _select(f"parq_fn/transforms/{_name}.py", *_TRANSFORMS)
_LEARNING = ("tests/test_learn.py", "tests/optim/test_learned.py")
_select("parq_fn/transforms/learn.py", _LEARNING[:1], _LEARNING[1:])
_select("parq_fn/transforms/qparams_gradient.py", _LEARNING[:1], _LEARNING[1:])
_select(
    "parq_fn/transforms/prox_pullback.py",
    ("tests/test_pullback.py", "tests/test_learn.py"),
    (
        *("tests/test_estimators.py", "tests/test_oscillation.py", "tests/optim/test_pullback.py"),
        *("tests/test_exchange.py", "tests/optim/test_learned.py"),
    ),
)
_select("parq_fn/transforms/oscillation.py", ("tests/test_oscillation.py",), _LEARNING[1:])
_select(
    "parq_fn/transforms/averaged.py",
    ("tests/test_averaged.py", "tests/test_wrong_use.py"),
    ("tests/test_transformation.py", "tests/optim/test_lent_weights.py", *_COMMON),
)
for _name in ("lion", "muon", "lookahead", "schedule_free"):
    _select(
        f"parq_fn/transforms/{_name}.py",
        ("tests/test_optimizers.py", "tests/test_averaged.py", "tests/test_wrong_use.py"),
        ("tests/laws/test_transformations.py", *_TRANSFORMS[0], *_COMMON),
    )
_select(
    "parq_fn/transforms/conditionally.py",
    ("tests/test_transformation.py", "tests/test_pullback.py", "tests/test_wrong_use.py"),
    ("tests/laws/test_transformations.py", *_COMMON),
)
for _name in ("noise", "flips"):
    _select(
        f"parq_fn/transforms/{_name}.py",
        (f"tests/test_{_name}.py", "tests/test_wrong_use.py", "tests/test_exchange.py"),
        ("tests/test_pullback.py", "tests/laws/test_transformations.py"),
    )
for _name in ("layout", "lines", "exchange", "collective", "agreement", "sharded"):
    _select(
        f"parq_fn/transforms/{_name}.py",
        ("tests/test_layout.py", "tests/test_exchange.py"),
        ("tests/test_learn.py", "tests/test_averaged.py"),
    )
for _name in ("prox_fit", "prox_state"):
    _select(
        f"parq_fn/transforms/{_name}.py",
        ("tests/test_prox.py", "tests/test_exchange.py", "tests/test_learn.py"),
        (*_LEARNING[1:], "tests/test_pullback.py"),
    )
_select(
    "parq_fn/transforms/clipping.py",
    ("tests/test_optimizers.py", "tests/test_transformation.py"),
    _TRANSFORMS[1],
)
_select(
    "parq_fn/optim/learned.py",
    _LEARNING[1:],
    ("tests/test_oscillation.py", "tests/optim/test_parts.py"),
)
_STORE = (
    ("edits", "loading", "changed_parameters", "edited_state", "lent_weights", "groups"),
    ("built_wrong", "frozen", "parts", "narrow_latents", "old_states", "quantized"),
)
for _name in ("places", "latents", "saved"):
    _files, _others = (tuple(f"tests/optim/test_{name}.py" for name in some) for some in _STORE)
    _select(f"parq_fn/optim/{_name}.py", _files, _others)
_select("parq_fn/optim/engine/gradients.py", _LEARNING[:1], _LEARNING[1:])
_select(
    "parq_fn/optim/as_link.py",
    ("tests/optim/test_as_link.py", "tests/test_wrong_use.py", "tests/test_optimizers.py"),
    ("tests/laws/test_transformations.py",),
)
for _name, _tests in {
    "export/packed_layer": ("export/test_packed_modules", "export/test_layers"),
    "optim/narrow_latents": ("optim/test_narrow_latents",),
    "transforms/stochastic_rounding": ("optim/test_narrow_latents", "test_noise"),
    "optim/prox_partition": ("optim/test_mixed_links", "optim/test_own_links"),
    "optim/flip_counter": ("test_flips",),
    "optim/param_groups": ("optim/test_param_groups", "test_covered"),
    "integrations/trainer": ("integrations/test_trainer",),
    "roles": ("test_covered", "test_modules", "optim/test_param_groups"),
    "covered": ("test_covered", "optim/test_param_groups"),
    "sensitivities": ("test_allocation", "test_covered"),
    "allocation": ("test_allocation", "test_plot"),
}.items():
    _files = tuple(f"tests/{test}.py" for test in _tests)
    _select(f"parq_fn/{_name}.py", _files, ("tests/test_wrong_use.py", "tests/test_messages.py"))
