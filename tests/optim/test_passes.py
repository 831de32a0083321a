"""The prox pass in its fast forms gives what the plain one gives, bit for bit."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import parq_fn as pf
from parq_fn import Prox, ProxState
from parq_fn.optim.engine import passes, programs
from parq_fn.optim.engine.passes import Job, Pass, plain, refit
from parq_fn.optim.engine.rows import Rows
from tests.helpers import sampled, spread

SPAN: dict[str, Any] = {"anneal_start": 2, "anneal_end": 10}
LINKS: dict[str, Any] = {
    "hard": lambda q, **more: pf.hard_prox(q, **more),
    "parq": lambda q, **more: pf.parq_prox(q, **SPAN, **more),
    "parq clipped": lambda q, **more: pf.parq_prox(q, clipped_start=True, **SPAN, **more),
    "soft": lambda q, **more: pf.soft_prox(q, **SPAN, **more),
    "binary_relax": lambda q, **more: pf.binary_relax_prox(q, **SPAN, **more),
    "proxquant": lambda q, **more: pf.proxquant_prox(q, strength=0.1, **SPAN, **more),
    "custom": lambda q, **more: pf.custom_prox(
        q, pf.proxmaps.binary_relax, pf.schedules.linear(0.0, 1.0, 0, 9), **more
    ),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu, id="gpu")]
SHAPES = [(3,), (), (64,), (2, 4), (64, 64), (40, 96), (1, 5), (5000,), (300, 700), (0, 4)]


def jobs_of(link: Prox, latents: list[Tensor], dtype: torch.dtype) -> list[Job]:
    made = []
    for latent in latents:
        rows = link.granularity.rows(latent)
        qparams = link.quantizer.fit(rows)
        weight = torch.full_like(latent, torch.nan, dtype=dtype)
        made.append(Job(latent, qparams, link.granularity, weight))
    return made


def state_at(link: Prox, step: int) -> ProxState:
    """As after the update with that count."""
    state = link.init([])._replace(
        count=torch.tensor(step), lr_sum=torch.tensor(1.7, dtype=torch.float64)
    )
    return link.advance(state, torch.tensor(0.25, dtype=torch.float64))


def both(fast: Pass, link: Prox, state: ProxState, jobs: list[Job]) -> None:
    """Asserts that both forms write the same, and nothing else."""
    wanted = [job._replace(weight=job.weight.clone()) for job in jobs]
    before = [(job.latent.clone(), job.qparams.clone()) for job in jobs]
    plain(link, state, wanted)
    fast(link, state, jobs)
    for job, want, (latent, qparams) in zip(jobs, wanted, before, strict=True):
        assert torch.equal(job.weight, want.weight), (link, job.latent.shape, state)
        assert job.weight.stride() == want.weight.stride()
        assert torch.equal(job.latent, latent)
        assert torch.equal(job.qparams, qparams)


@given(
    st.sampled_from(sorted(LINKS)),
    st.sampled_from([pf.lsbq(1), pf.lsbq(0), pf.uniform(2), pf.lsbq(4), pf.uniform(6)]),
    st.sampled_from([pf.per_tensor(), pf.per_channel()]),
    st.lists(st.sampled_from(SHAPES), max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 12),
    st.integers(0, 2**20),
)
def test_in_pieces_and_together(
    kind, quantizer, granularity, shapes, dtype, shrink, there, step, seed
) -> None:
    """There: as on a GPU, where larger ones are mapped together."""
    link = LINKS[kind](quantizer, granularity=granularity, shrink=shrink, learning_rate=0.1)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    latents = [torch.randn(shape, generator=generator, dtype=wide) for shape in shapes]
    with pytest.MonkeyPatch.context() as patch:
        if there:
            patch.setattr(passes, "_on_cpu", lambda _: False)
        both(Pass(), link, state_at(link, step), jobs_of(link, latents, dtype))


@pytest.mark.parametrize("n", [1023, 1024, 1 << 18, (1 << 18) + 1, (1 << 19) + 1500])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_any_length(n: int, rows: int) -> None:
    torch.manual_seed(0)
    link = LINKS["parq"](pf.lsbq(2), granularity=pf.per_channel())
    both(Pass(), link, state_at(link, 6), jobs_of(link, [torch.randn(rows, n)], torch.float32))


def test_a_latent_of_no_dimension_is_divided_in_its_own_dtype() -> None:
    """Found by a thorough run: it was promoted to the divisor's float64."""
    link = LINKS["binary_relax"](pf.lsbq(1), shrink=True, learning_rate=0.1)
    both(Pass(), link, state_at(link, 2), jobs_of(link, [torch.tensor(1.5410)], torch.float32))


def test_blocks_kernels_and_other_orders_of_memory() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(16, 8, 3, 3)
    latents = [
        kernel,
        kernel.to(memory_format=torch.channels_last),
        torch.randn(70, 90).t(),
        torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(2, 4).t(),
    ]
    link = LINKS["parq"](pf.lsbq(2), granularity=pf.per_channel())
    both(Pass(), link, state_at(link, 6), jobs_of(link, latents, torch.float32))
    link = LINKS["parq"](pf.lsbq(2), granularity=pf.per_block(32))
    latents = [torch.randn(96), torch.randn(3, 64), torch.randn(700, 320)]
    both(Pass(), link, state_at(link, 6), jobs_of(link, latents, torch.float32))


def test_what_is_not_finite_stays_in_its_row() -> None:
    torch.manual_seed(0)
    link = LINKS["parq"](pf.lsbq(2), granularity=pf.per_channel())
    jobs = jobs_of(link, [torch.randn(8, 16), torch.randn(4, 16), torch.randn(4, 9)], torch.float32)
    for job in jobs:
        job.latent[1, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    wanted = [job._replace(weight=job.weight.clone()) for job in jobs]
    state = state_at(link, 6)
    plain(link, state, wanted)
    Pass()(link, state, jobs)
    for job, want in zip(jobs, wanted, strict=True):
        torch.testing.assert_close(job.weight, want.weight, rtol=0, atol=0, equal_nan=True)
        assert int(job.weight.isnan().sum()) == 1


def test_counts_that_cannot_be_read_are_left_to_the_plain_form(monkeypatch) -> None:
    torch.manual_seed(0)
    link = LINKS["parq"](pf.lsbq(2))
    monkeypatch.setattr(passes, "concrete", lambda _: None)  # as of a count on a device
    both(Pass(), link, state_at(link, 6), jobs_of(link, [torch.randn(50, 99)], torch.float32))


VIEWS = {"view", "alias", "slice", "split_with_sizes"}


QUANTIZERS = [
    pf.lsbq(2),
    pf.lsbq(0),
    pf.lsbq(2, "optimal"),
    pf.lsbq(3, "alternating"),
    pf.lsbq(2, center=True),
    pf.uniform(3),
    pf.asymmetric(2),
    pf.max_uniform(3),
    pf.ternary_uniform(),
    pf.lloyd_max(2),
    pf.integer(3),
    pf.affine(2),
    pf.codebook.nf4,
    pf.gaussian(2),
    pf.mxfp4(),
    pf.nvfp4(),
    pf.stored(pf.asymmetric(3), torch.bfloat16),
]


@pytest.mark.slow
@given(
    st.sampled_from(QUANTIZERS),
    st.sampled_from([pf.per_tensor(), pf.per_channel(), pf.per_block(4)]),
    st.lists(st.sampled_from([(8, 8), (64,), (4, 16), (7, 12), (60, 4), (100, 40)]), max_size=9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
@example(
    quantizer=pf.lsbq(3, "alternating"),
    granularity=pf.per_tensor(),
    shapes=[(100, 40)],
    dtype=torch.float32,
    bad=False,
    there=False,
    seed=0,
)
def test_small_parameters_get_their_levels_together(
    quantizer, granularity, shapes, dtype, bad, there, seed
) -> None:
    """There: as on a GPU, where larger ones do."""
    link = LINKS["parq"](quantizer, granularity=granularity, shrink=True, learning_rate=0.1)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    latents = [torch.randn(shape, generator=generator, dtype=wide) for shape in shapes]
    if bad and latents:
        latents[0].view(-1)[0] = torch.nan
    for step in (0, 7):
        state = state_at(link, step)
        old = link.init([torch.ones_like(latent) for latent in latents]).qparams
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "_ON_CPU", passes._ON_CPU._replace(small=250))
            if there:
                patch.setattr(passes, "_on_cpu", lambda _: False)
                few = passes._FITTED_THERE._replace(at_once=5000)
                patch.setattr(passes, "_FITTED_THERE", few)
            found = refit(link, state, latents, old)
        for latent, qparams, got in zip(latents, old, found, strict=True):
            want = link.refit(state._replace(qparams=[qparams]), [latent]).qparams[0]
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 100, 255, 1000, 1023, 1024, 1500, 4096, 5000])
def test_a_row_has_the_levels_it_has_alone(n: int, device: str) -> None:
    """Sums over a row must not depend on how many rows there are, as they do on a GPU."""
    rows = torch.randn(9, n, generator=torch.Generator().manual_seed(n)).to(device)
    for quantizer in QUANTIZERS:
        whole = quantizer.whole(rows) if quantizer.num_whole else None  # what they have in common
        alone = torch.cat([quantizer.fit(row[None], whole) for row in rows])
        assert torch.equal(quantizer.fit(rows), alone), quantizer


@needs_gpu
def test_on_a_gpu_larger_parameters_get_their_levels_together() -> None:
    torch.manual_seed(0)
    shapes = [(300, 700), (2, 4), (700, 300), (300, 700), (50_000,), (8,), (300, 700)]
    latents = [torch.randn(shape, device="cuda") for shape in shapes]
    for quantizer in QUANTIZERS:
        for granularity in (pf.per_tensor(), pf.per_channel()):
            link = LINKS["parq"](quantizer, granularity=granularity)
            state = state_at(link, 7)
            old = link.init([torch.ones_like(latent) for latent in latents]).qparams
            for latent, qparams, got in zip(
                latents, old, refit(link, state, latents, old), strict=True
            ):
                want = link.refit(state._replace(qparams=[qparams]), [latent]).qparams[0]
                assert torch.equal(got, want), (quantizer, latent.shape)


class Counting(TorchDispatchMode):
    """Counts the operations that are dispatched, views aside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def operations(count: int, shapes: list[tuple[int, ...]]) -> int:
    """That a pass over so many parameters of each shape takes."""
    torch.manual_seed(0)
    link = LINKS["parq"](pf.lsbq(2))
    latents = [torch.randn(shape) for shape in shapes for _ in range(count)]
    state, jobs = state_at(link, 6), jobs_of(link, latents, torch.float32)
    with Counting() as seen:
        Pass()(link, state, jobs)
    return seen.count


def test_many_small_parameters_take_the_operations_of_one() -> None:
    one = operations(1, [(16, 16)])
    assert operations(200, [(16, 16)]) <= one + 8
    assert operations(100, [(16, 16), (15, 17)]) <= one + 8  # 256 and 255 elements
    assert operations(100, [(16, 16), (5,), (40, 40)]) <= 6 * (one + 8)  # widths, and batches


# Compiled: what is slow to compile is compiled once.


SPLITS = ["halved", "grouped", "whole"]


def split_by(how: str, patch: pytest.MonkeyPatch) -> None:
    """Splits what is large before it is mapped, whatever its size and device."""
    patch.setattr(programs, "_LARGE", 1 << 20 if how == "whole" else 2)
    if how == "grouped":
        patch.setattr(programs, "_GROUP", 1 << 6)
        patch.setattr(programs, "_on_cpu", lambda _: False)


@pytest.fixture(params=sampled(SPLITS, 1))
def split(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    split_by(request.param, monkeypatch)
    return str(request.param)


#: A link and a step for each formula that a program is made of.
FORMULAS = {
    "hard": ("hard", 6),
    "clip": ("parq clipped", 1),
    "parq": ("parq", 6),
    "soft": ("soft", 6),
    "binary_relax, near the latent": ("binary_relax", 3),
    "binary_relax, near the level": ("binary_relax", 9),
    "proxquant": ("proxquant", 6),
    "custom": ("custom", 6),
}
SINGLE = [(64, 64), (60, 90), (5000,), (8, 8), (64,), (63,), (3, 6000), (3, 140_000)]


CASES = spread(
    list(FORMULAS), [pf.per_tensor(), pf.per_channel()], SPLITS, [SINGLE, SINGLE + SINGLE]
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formula", "granularity", "how", "shapes", "code"),
    [
        *(pytest.param(*case, True, marks=pytest.mark.rare) for case in sampled(CASES, 1)),
        *((*case, False) for case in sampled(CASES, 4)),
    ],
    ids=lambda x: f"{len(x)} parameters" if isinstance(x, list) else str(x),
)
def test_compiled(
    formula: str, granularity: pf.Granularity, how: str, shapes: Any, code: bool, request: Any
) -> None:
    """Parameters of one shape share calls; a transposed one, and large ones, are cut.

    code: whether it is generated, or what was traced is run as it stands.
    """
    if not code:
        request.getfixturevalue("graphs_alone")
    split_by(how, request.getfixturevalue("monkeypatch"))
    torch.manual_seed(0)
    kind, step = FORMULAS[formula]
    latents = [*(torch.randn(shape) for shape in shapes), torch.randn(90, 70).t()]
    link = LINKS[kind](pf.lsbq(2), granularity=granularity)
    both(Pass(compile=True), link, state_at(link, step), jobs_of(link, latents, torch.float32))


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_alone")
def test_what_one_pass_has_compiled_serves_its_later_steps() -> None:
    """Before annealing, in it, and after it, when the formula is another."""
    torch.manual_seed(0)
    fast, link = Pass(compile=True), LINKS["parq"](pf.lsbq(1), granularity=pf.per_channel())
    for step in (0, 3, 6, 12, 13):
        jobs = jobs_of(link, [torch.randn(64, 90)], torch.float32)
        both(fast, link, state_at(link, step), jobs)


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.rare
def test_one_program_serves_every_step_shape_and_learning_rate(split: str) -> None:
    torch.manual_seed(0)
    fast = Pass(compile=True)
    link = LINKS["parq"](pf.lsbq(2), granularity=pf.per_channel(), shrink=True, learning_rate=0.1)

    def run(step: int, shapes: list[tuple[int, ...]]) -> None:
        jobs = jobs_of(link, [torch.randn(shape) for shape in shapes], torch.float32)
        state = state_at(link, step)
        state = state._replace(lr_sum=state.lr_sum + step)
        both(fast, link, state, jobs)

    # one, and two of one shape: of short rows, whose levels are made in the loop, of long ones,
    # which have theirs, and of one row
    shapes = [(64, 96), (50, 100), (50, 100), (9, 5000), (5, 6000), (5, 6000)]
    run(3, [*shapes, (1, 5000), (1, 5000), (1, 6000)])
    others = [(64, 96), (33, 777), (128, 65), (7, 5001), (1, 4999), (2, 6000), (3, 5000)]
    others += [(1, 7000), (33, 777), (1, 7000), (3, 5000), (33, 777)]
    if split == "grouped":  # a program for each length of rows, and number of parameters
        others = [(64, 96), (62, 96), (600, 96), (1600, 100), (1600, 100), (50, 100), (50, 100)]
        others += [(1, 4999), (1, 4999), (1, 6000)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (4, 5, 8):
            run(step, others)


def test_parameters_are_mapped_in_twos(monkeypatch) -> None:
    """Of one shape and dtype, and each once; on a GPU in runs of up to four."""
    shapes = [(4, 6), (5, 6), (4, 6), (4, 6), (6, 4), (5, 6), (4, 6), (4, 6)]
    wholes = [
        Rows(torch.empty(shape), torch.empty(shape[0], 2), torch.empty(shape)) for shape in shapes
    ]
    wholes.append(wholes[0]._replace(qparams=torch.empty(4, 3)))
    wholes.append(wholes[0]._replace(weight=torch.empty(4, 6, dtype=torch.bfloat16)))
    places = {id(whole): i for i, whole in enumerate(wholes)}

    def found() -> list[list[int]]:
        return [[places[id(part)] for part in parts] for parts in programs._alike(wholes)]

    assert found() == [[0, 2], [1, 5], [3, 6], [4], [7], [8], [9]]
    monkeypatch.setattr(programs, "_on_cpu", lambda _: False)
    assert found() == [[0, 2, 3, 6], [1, 5], [4], [7], [8], [9]]
    wholes = [wholes[0]._replace(latent=torch.empty(4, 6)) for _ in range(21)]
    places = {id(whole): i for i, whole in enumerate(wholes)}
    runs = found()
    assert [len(run) for run in runs] == [4, 4, 4, 4, 4, 1]
    assert [i for run in runs for i in run] == list(range(21))


@pytest.mark.parametrize("split", [programs._halved, programs._grouped])
def test_parts_and_what_is_left_are_the_whole(split, monkeypatch) -> None:
    monkeypatch.setattr(programs, "_GROUP", 4)
    for r, n in [(1, 2), (1, 7), (1, 8), (2, 3), (3, 1), (5, 4), (8, 2), (9, 2), (7, 3), (5, 6)]:
        latent = torch.arange(r * n).view(r, n)
        levels = torch.arange(2 * r).view(r, 2)
        for bound in (None, levels[:, :1]):
            empty = torch.full_like(latent, -1)
            whole = Rows(latent, None, empty, levels, bound)
            if bound is None:
                whole = whole._replace(qparams=levels, levels=None)
            parts, rest = split(whole)
            assert len({part.latent.shape for part in parts}) <= 1
            if parts[0].latent.dim() > 2:
                (groups,) = parts
                assert groups.latent[0].numel() % 4 == 0
                parts = [Rows._make(x if x is None else programs._flat(x) for x in groups)]
            for part in [*parts, *([] if rest is None else [rest])]:
                assert part.latent.numel()
                assert (part.weight == -1).all()  # written to by no part before
                part.weight.copy_(part.latent)
                first = part.latent[:, 0] // n
                assert torch.equal(part.table, levels[first])
                assert (part.bound is None) == (bound is None)
                assert part.bound is None or torch.equal(part.bound, part.table[:, :1])
            assert torch.equal(whole.weight, latent)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("kind", "granularity", "count"),
    sampled(
        itertools.product(
            ["hard", "parq", "soft", "binary_relax", "proxquant"],
            [pf.per_tensor(), pf.per_channel()],
            [1, 2],
        ),
        2,
    ),
)
def test_a_program_maps_two_in_one_loop(kind: str, granularity, count: int, monkeypatch) -> None:
    """Both halves of a parameter, or two parameters."""
    monkeypatch.setattr(programs, "_LARGE", 2)
    torch.manual_seed(0)
    link = LINKS[kind](pf.lsbq(2), granularity=granularity)
    jobs = jobs_of(link, [torch.randn(64, 96) for _ in range(count)], torch.float32)
    uncached = torch._inductor.config.patch(fx_graph_cache=False)  # else no code is generated
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        _, sources = run_and_get_code(Pass(compile=True), link, state_at(link, 6), jobs)
    # over weights, several at a time; those that make levels go over rows
    loops = sum(len(re.findall(r"\+=static_cast<int64_t>\((?!1L)\d+L\)", s)) for s in sources)
    assert loops == 1, sources


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.rare
@pytest.mark.usefixtures("split")
def test_memory_of_any_order_takes_no_program_of_its_own() -> None:
    """Each order took one of eight that a compiler makes of a function before it gives up."""
    torch.manual_seed(0)
    x = torch.randn
    latents = [
        *(x(5000, 1), x(5000, 4), x(90, 100).t(), x(100, 200)[:, :90], x(100, 180)[:, ::2]),
        *(x(64, 8, 3, 3).to(memory_format=torch.channels_last), x(180, 100).t()[:, ::2]),
        *(x(5000, 2)[:, :1], x(200, 180)[::2, ::2], x(4, 5000), x(90, 90), x(70, 80)),
    ]
    link = LINKS["hard"](pf.lsbq(2), granularity=pf.per_channel())
    jobs = jobs_of(link, latents, torch.float32)
    for job, latent in zip(jobs, latents, strict=True):
        assert job.weight.stride() == torch.full_like(latent, 0.0).stride()
    strided = [
        job._replace(weight=torch.full(job.weight.shape[::-1], torch.nan).t())
        for job in jobs
        if job.weight.dim() == 2
    ]
    both(Pass(compile=True), link, state_at(link, 12), [*jobs, *strided])


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.slow
@torch.no_grad()
def test_parameters_of_any_rank_take_one_program() -> None:
    """Rows are views, and for each kind of what they are views of there was a program."""
    shapes = [(80, 90), (8192,), (1, 9000), (20, 20, 25), (20, 1, 500), (1, 20, 500)]
    shapes += [(64, 32, 3, 3), (64, 1, 10, 10), (1, 64, 10, 10), (4, 8, 5, 8, 5)]
    torch.manual_seed(0)
    link = LINKS["hard"](pf.lsbq(2), granularity=pf.per_tensor())
    fast = Pass(compile=True)

    def step(shape: tuple[int, ...]) -> None:
        (job,) = jobs_of(link, [torch.randn(shape)], torch.float32)
        job = job._replace(weight=torch.nn.Parameter(job.weight))
        both(fast, link, state_at(link, 12), [job])

    step(shapes[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in shapes:
            step(shape)


@needs_gpu
@pytest.mark.parametrize("kind", ["hard", "parq", "soft", "binary_relax", "proxquant", "custom"])
def test_on_a_gpu_weights_are_those_on_a_cpu(kind: str, monkeypatch) -> None:
    """Bit for bit, eager and compiled: of the same latents and levels."""
    monkeypatch.setattr(programs, "_LARGE", 1 << 13)
    torch.manual_seed(0)
    shapes = [(70, 576), (60, 90), (50_000,), (8, 8), (63,), *[(70, 576)] * 12, (60, 90)]
    latents = [*(torch.randn(shape) for shape in shapes), torch.randn(90, 700).t()]
    latents[0][0, :4] = torch.tensor([1e-41, -1e-40, 0.0, -0.0])
    fast = [Pass(compile=compiled) for compiled in (False, True)]
    for k, granularity in ((2, pf.per_tensor()), (3, pf.per_channel())):
        link = LINKS[kind](
            pf.lsbq(k), granularity=granularity, shrink=kind == "parq", learning_rate=0.1
        )
        for step in (3, 12):
            state, jobs = state_at(link, step), jobs_of(link, latents, torch.float32)
            plain(link, state, jobs)
            there = [
                job._replace(
                    latent=job.latent.cuda(), qparams=job.qparams.cuda(), weight=job.weight.cuda()
                )
                for job in jobs
            ]
            for one in fast:
                both(one, link, state, there)
                for job, moved in zip(jobs, there, strict=True):
                    assert torch.equal(job.weight, moved.weight.cpu()), (link, step, one.compile)


def test_what_a_compiler_is_given_is_contiguous() -> None:
    """Latents, levels and weights in any order of memory; each order would take a program."""
    for shape in ((6, 8), (4, 3, 2, 2)):
        latent = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
        weight = torch.full_like(latent, torch.nan)
        for granularity in (pf.per_tensor(), pf.per_channel(), pf.per_channel(axis=1)):
            levels = torch.randn(4, granularity.shape(latent)[0]).t()
            rows = passes._rows_of(Job(latent, levels, granularity, weight), contiguous=True)
            assert all(x.is_contiguous() for x in rows if x is not None), granularity


# Maps of a user's own.


def centered(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
    """Looks at the whole of a row, and refuses an empty one."""
    return u / u.abs().amax(-1, keepdim=True) * c.to(u.dtype) + levels[..., :1]


class twice(pf.parq_prox):
    """A map instead of the one that it inherits."""

    def proxmap(self, u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        return 2 * pf.proxmaps.parq(u, levels, coefficient)


class Unhashable:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None

    def __call__(self, u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
        return pf.proxmaps.binary_relax(u, levels, c)


@pytest.mark.parametrize(
    ("map_", "compiled"),
    [
        *itertools.product([centered, Unhashable(), "twice"], [False]),
        *(
            pytest.param(map_, True, marks=pytest.mark.slow)
            for map_ in sampled([centered, Unhashable(), "twice"], 1)
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", type(x).__name__),
)
@pytest.mark.usefixtures("graphs_alone")
def test_a_map_of_ones_own_sees_whole_rows(map_, compiled: bool) -> None:
    torch.manual_seed(0)
    granularity = pf.per_channel()
    if map_ == "twice":
        link: Prox = twice(pf.lsbq(2), granularity=granularity, **SPAN)
    else:
        link = pf.custom_prox(pf.lsbq(2), map_, 0.5, granularity=granularity)
    assert not link.elementwise
    shapes = [(3, 5), (3, 7), (2048,), (1, 2049), (300, 500)]
    jobs = jobs_of(link, [torch.randn(shape) for shape in shapes], torch.float32)
    wanted = [job._replace(weight=job.weight.clone()) for job in jobs]
    for step in (6, 12):
        state = state_at(link, step)
        plain(link, state, wanted)
        Pass(compile=compiled)(link, state, jobs)
        for job, want in zip(jobs, wanted, strict=True):
            torch.testing.assert_close(job.weight, want.weight, rtol=1e-6, atol=1e-6)


def test_no_piece_is_empty() -> None:
    for shape in [(1, 1024), (1, 2048), (2, 1 << 18), (1, 1025), (3, 7)]:
        latent = torch.ones(shape)
        pieces = list(passes._pieces(Rows(latent, None, latent.clone(), torch.ones(shape[0], 2))))
        assert all(piece.latent.numel() for piece in pieces)
        assert sum(piece.latent.numel() for piece in pieces) == latent.numel()
