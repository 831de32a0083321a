"""What each parameter of a module is, and which are quantized."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, param_groups
from parq_fn.roles import KINDS, Role, roles


class TopKRouter(nn.Module):
    """As transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))


class Experts(nn.Module):
    """Two matrices for each of four experts, [expert, output, input] or turned."""

    def __init__(self, turned: bool, told: bool | None = None) -> None:
        super().__init__()
        up, down = ((8, 24), (12, 8)) if turned else ((24, 8), (8, 12))
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, *up))
        self.down_proj = nn.Parameter(torch.randn(4, *down))
        self.down_proj_bias = nn.Parameter(torch.zeros(4, 8))
        if told is not None:
            self.is_transposed = told


class Mixture(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.router, self.experts = TopKRouter(), Experts(turned)
        self.shared_expert = nn.Linear(8, 8)
        self.shared_expert_gate = nn.Linear(8, 1, bias=False)


class Conv1D(nn.Module):
    """As transformers has it: [input, output]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


class Adapted(nn.Module):
    """A layer that peft has put an adapter to."""

    adapter_layer_names = ("lora_A", "scale_of_one_s_own")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.scale_of_one_s_own = nn.Parameter(torch.ones(4, 4))


class Model(nn.Module):
    """Layers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.wpe = nn.Embedding(5, 8)
        self.mixture = Mixture()
        self.conv = nn.Conv2d(3, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 3)
        self.turned = Conv1D(6, 4)
        self.adapted = Adapted()
        self.norm = nn.LayerNorm((4, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 2, 8))
        self.gate = nn.Linear(8, 8)  # no experts beside it
        self.mixing = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def by_name(module: nn.Module) -> dict[str, Role]:
    return {role.name: role for role in roles(module)}


def test_each_parameter_has_its_role_once() -> None:
    module = Model()
    found = by_name(module)
    assert list(found) == [name for name, _ in module.named_parameters()]
    kinds = {name: role.kind for name, role in found.items()}
    assert set(kinds.values()) <= set(KINDS)
    assert kinds == {
        "cls_token": "table",
        "mixing": "other",
        "embed.weight": "embedding",
        "wpe.weight": "table",
        "mixture.router.weight": "router",
        "mixture.experts.gate_up_proj": "experts",
        "mixture.experts.down_proj": "experts",
        "mixture.experts.down_proj_bias": "bias",
        "mixture.shared_expert.weight": "weight",
        "mixture.shared_expert.bias": "bias",
        "mixture.shared_expert_gate.weight": "router",
        "conv.weight": "weight",
        "conv.bias": "bias",
        "up.weight": "weight",
        "up.bias": "bias",
        "turned.weight": "weight",
        "adapted.base_layer.weight": "weight",
        "adapted.lora_A.default.weight": "adapter",
        "adapted.scale_of_one_s_own": "adapter",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "gate.weight": "weight",
        "gate.bias": "bias",
    }
    assert found["embed.weight"].names == ("embed.weight", "head.weight")


def test_outputs_are_found_in_every_layout() -> None:
    found = {name: role.axis for name, role in by_name(Model()).items()}
    turned = {name: axis for name, axis in found.items() if axis != (0,)}
    assert turned == {
        "mixture.experts.gate_up_proj": (0, 1),
        "mixture.experts.down_proj": (0, 1),
        "up.weight": (1,),
        "turned.weight": (1,),
    }
    for experts, axis in (
        (Experts(True), (0, 2)),
        (Experts(True, told=True), (0, 2)),
        (Experts(False, told=True), (0, 2)),  # what the module says counts
        (Experts(True, told=False), (0, 1)),
    ):
        assert by_name(experts)["gate_up_proj"].axis == axis


def test_experts_are_transposed_where_their_shapes_can_be_read_in_no_other_way() -> None:
    """With the matrix before the activation once, or twice for a gate, whatever stands beside."""
    pairs = product(range(1, 7), repeat=2)
    sizes = [(k * inner, inner, hidden) for inner, hidden in pairs for k in (1, 2)]
    plain = {((into, hidden), (hidden, inner)) for into, inner, hidden in sizes}
    turned = {((hidden, into), (inner, hidden)) for into, inner, hidden in sizes}
    for i, (first, last) in enumerate(plain | turned):
        names = [("gate_up_proj", "down_proj"), ("w1", "w2"), ("in_proj", "out_proj")][i % 3]
        experts = OwnExperts(
            {n: torch.ones(1, *s) for n, s in zip(names, (first, last), strict=True)}
        )
        experts["bias_up"] = torch.ones(1, first[0])
        as_if = torch.ones(1, last[1], 2 * last[0])  # were it the one before
        experts["table"], other = as_if, nn.ParameterDict({"up": as_if})
        experts["core"] = torch.ones(1, first[1] // 2, first[0])  # were it the one after
        experts.register_module("other", other)
        axis = (0, 2) if (first, last) in turned - plain else (0, 1)
        assert {by_name(experts)[name].axis for name in names} == {axis}


def test_an_attribute_of_another_layer_makes_no_conv1d_of_transformers() -> None:
    layer = nn.Linear(3, 2)
    layer.nf = 2
    assert by_name(layer)["weight"].axis == (0,)


def test_outputs_of_transposed_convolutions_with_groups_are_told_or_refused() -> None:
    assert by_name(nn.ConvTranspose1d(4, 8, 3, groups=4))["weight"].axis == (0, 1)  # depthwise
    net = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 8, 3, groups=2))
    for call in (param_groups, lambda m: pf.sensitivity(m, pf.hard_prox(pf.lsbq(2)))):
        with pytest.raises(ValueError, match=r"'1.weight' is of a transposed .* shape \(4, 4, 3\)"):
            call(net)
    assert len(param_groups(net, {"1": None, "*": 2})) == 3


def test_words_in_other_words_say_nothing() -> None:
    net = nn.ModuleDict({"composite": nn.ModuleDict({"embed": nn.Embedding(4, 3)})})
    net["embed_positions"] = nn.Embedding(4, 3)
    net["unbiased"] = nn.ParameterDict(
        {"weight_unbiased": torch.ones(2, 2), "bias_k": torch.ones(2, 2)}
    )
    assert {name: role.kind for name, role in by_name(net).items()} == {
        "composite.embed.weight": "embedding",
        "embed_positions.weight": "table",
        "unbiased.weight_unbiased": "weight",
        "unbiased.bias_k": "bias",
    }


def test_parametrizations_are_seen_through() -> None:
    """A layer keeps its class's layout, and what its weight is made of is named."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.ConvTranspose1d(2, 3, 2))
    nn.utils.parametrize.register_parametrization(net[1], "bias", nn.Identity())
    found = by_name(net)
    assert found["1.weight"][3:] == ("weight", (1,))
    made = {name for name, role in found.items() if role.kind == "made into a weight"}
    assert made == {
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        "1.parametrizations.bias.original",
    }


class OwnNorm(nn.ParameterDict):
    """A norm by its name alone."""


class OwnExperts(nn.ParameterDict):
    """Experts by their name alone, all in one matrix."""


def test_norms_and_experts_are_known_by_the_names_of_their_classes() -> None:
    net = nn.Sequential(
        OwnNorm({"scale": torch.ones(3)}),
        nn.ParameterDict({"scale": torch.ones(3)}),
        OwnExperts({"up": torch.ones(6, 2)}),
        nn.ParameterDict({"up": torch.ones(6, 2)}),
    )
    assert [role.kind for role in roles(net)] == ["norm", "vector", "experts", "other"]


def test_routers_and_experts_are_known_by_names_beside_and_above() -> None:
    net = nn.ModuleDict({"gate": nn.Linear(2, 2, bias=False)})
    net["experts"] = nn.ModuleDict({"cross": nn.Bilinear(2, 2, 2, bias=False)})
    net["experts"]["all"] = nn.ParameterDict({"up": torch.ones(3, 2, 2)})
    net["experts"]["kernel"] = nn.Conv1d(2, 2, 3, bias=False)
    assert {name: role.kind for name, role in by_name(net).items()} == {
        "gate.weight": "router",
        "experts.cross.weight": "weight",
        "experts.all.up": "experts",
        "experts.kernel.weight": "weight",
    }
    assert by_name(net["experts"])["all.up"].kind == "other"
    net["experts"]["all"].num_experts = 3
    assert by_name(net["experts"])["all.up"].kind == "experts"
    under = nn.ModuleDict({"experts": nn.ParameterDict({"up": torch.ones(3, 2, 2)})})
    assert by_name(under)["experts.up"].kind == "experts"
    alone = nn.ModuleDict({"expert_gate": nn.Linear(2, 2)})
    assert by_name(alone)["expert_gate.weight"].kind == "weight"


def test_weights_that_hooks_make_are_seen_through_by_what_the_layer_has() -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)))
    net.append(nn.ParameterDict({"weight_v": torch.ones(2, 2)}))
    kinds = {name: role.kind for name, role in by_name(net).items()}
    assert kinds == {
        "0.bias": "bias",
        "0.weight_orig": "made into a weight",
        "1.weight_v": "weight",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_floats_of_16_bits_or_more_are_weights_and_no_others(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    (role,) = by_name(nn.ParameterDict({"weight": weight})).values()
    assert (role.kind == "weight") == (dtype.itemsize == 2)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((1, 4), False), ((4, 1, 1), False), ((2, 1, 2), True), ((1, 1), False)]
)
def test_a_matrix_is_longer_than_one_along_two_dimensions(shape: Any, matrix: bool) -> None:
    (role,) = by_name(nn.ParameterDict({"weight": torch.ones(shape)})).values()
    assert role.is_matrix == matrix


def test_experts_are_masked_and_routers_and_adapters_are_not() -> None:
    module = Model()
    with pytest.warns(UserWarning, match="leaves alone 'mixing', which may be weights"):
        mask = pf.weight_mask(module)
    chosen = {name for name, taken in mask.items() if taken}
    kinds = by_name(module)
    assert chosen == {n for n, role in kinds.items() if role.kind in ("weight", "experts")}


def test_coverage_adds_up_to_the_module() -> None:
    module = Model()
    total = sum(p.numel() for p in module.parameters())
    mask = pf.weight_mask(module, "mixing")
    groups = param_groups(module, {"embed": 4, "*": 2})
    link = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())
    for by in (mask, groups, QuantOptimizer(torch.optim.SGD(groups, lr=0.1), link)):
        found = pf.coverage(module, by)
        assert found.total == total == sum(row.numel for row in found.rows)
        assert found.quantized == sum(row.numel for row in found.rows if row.quantized)
        assert found.share == found.quantized / total
        assert str(found).splitlines()[-1].split()[:3] == ["all", "23", f"{total:,}"]


def test_tables_have_columns_and_parameters_that_differ_by_numbers_in_one_row() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 8), nn.LayerNorm(8))
    lines = str(pf.coverage(net, pf.weight_mask(net))).splitlines()
    assert lines == [
        "parameter  count  shape   weights  how               bytes",
        "*.weight       2  [8, 4]       64  quantized             ?",
        "*.bias         2  [8]          16  bias                 64",
        "2.weight          [8]           8  norm                 32",
        "2.bias            [8]           8  norm                 32",
        "all            6               96  66.7 % quantized      ?",
    ]
    assert pf.coverage(nn.Identity(), {}).share == 0.0


def test_coverage_counts_codes_and_the_numbers_of_rows() -> None:
    net = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 5), nn.Linear(5, 5, dtype=torch.bfloat16))
    three = {"params": [net[0].weight], "prox": pf.hard_prox(pf.lsbq(0))}
    block = pf.hard_prox(pf.affine(3), granularity=pf.per_block(3))
    rest = {"params": [net[0].bias, net[1].bias, net[2].weight]}  # and a bias left out
    groups = [three, {"params": [net[1].weight], "prox": block}, rest]
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1))
    found = pf.coverage(net, optimizer)
    rows = {row.name: row for row in found.rows}
    assert rows["0.weight"].nbytes == -(-96 // 5) + 4 * pf.lsbq(0).num_qparams
    assert rows["1.weight"].nbytes == -(-30 * 3 // 8) + 10 * 4 * pf.affine(3).num_qparams
    assert rows["2.weight"].nbytes == 25 * 2
    assert rows["2.bias"].how == "not in the optimizer"
    assert not rows["2.bias"].quantized
    assert found.nbytes == sum(row.nbytes or 0 for row in found.rows)
    assert pf.coverage(net, pf.weight_mask(net)).nbytes is None


@pytest.mark.parametrize("cut", [pf.per_channel(), pf.per_block(2), pf.per_tensor()])
@pytest.mark.parametrize(
    "own", [{}, {"quant_axis": 1}, {"quant_block_size": 4, "quant_bits": 0}, {"quant_bits": 16}]
)
def test_coverage_reads_groups_as_the_optimizer_does(cut: Any, own: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    link = pf.hard_prox(pf.lsbq(2), granularity=cut)
    groups = [{"params": [("0.weight", net[0].weight)], "prox": link, **own}]
    groups.append({"params": [("1.weight", net[1].weight)], "prox": link})
    shown = str(pf.coverage(net, groups))
    optimizer = QuantOptimizer(torch.optim.SGD([{**group} for group in groups], lr=0.1))
    assert shown == str(pf.coverage(net, optimizer))


def test_coverage_shows_links_that_an_optimizer_took_out_of_its_groups_and_masks_of_any_name() -> (
    None
):
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    groups = [
        {"params": [net[0].weight], "prox": pf.hard_prox(pf.lsbq(2))},
        {"params": [net[1].weight]},
    ]
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1))
    row, other = pf.coverage(net, optimizer.param_groups).rows
    assert (row.how, row.quantized, row.nbytes) == (repr(pf.hard_prox(pf.lsbq(2))), True, None)
    assert not other.quantized
    net[1].weight = net[0].weight
    for name in ("0.weight", "1.weight"):
        (row,) = pf.coverage(net, {name: True}).rows
        assert row.quantized


def test_coverage_reads_groups_of_one_parameter_as_torch_does() -> None:
    net = nn.Linear(2, 2)
    found = pf.coverage(net, [{"params": net.weight, "quant_bits": 2}, {"params": [net.bias]}])
    assert [row.how for row in found.rows] == ["2 bits", "bias"]


def test_coverage_reads_transformations_and_prints_alike_rows_once() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    link = pf.hard_prox(pf.uniform(3), granularity=pf.per_channel())
    transform = pf.chain(pf.sgd(0.1), pf.masked(link, pf.weight_mask(net, "11")))
    found = pf.coverage(net, TransformOptimizer(net.named_parameters(), transform))
    assert found.quantized == 11 * 16
    shown = str(found)
    assert "*.weight      11  [4, 4]      176  uniform(3), per_channel()" in shown
    assert "in full precision" in shown
    assert "<td>*.weight</td>" in found._repr_html_()


def _refusing() -> nn.Module:
    net = nn.Linear(2, 2)
    net.whole = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    return net


NET = _refusing()
NO_BLOCKS = "coverage: parameter 'weight': block size 3 does not divide the last dimension"
WHOLE = r"coverage: parameter 'whole' has dtype torch\.int64, expected a floating one"


def _group(name: str = "weight", **keys: Any) -> list[dict[str, Any]]:
    return [{"params": [NET.get_parameter(name)], **keys}]


@pytest.mark.parametrize(
    ("by", "error", "match"),
    [
        ({"nobody": True}, ValueError, "the mask names nobody, which are no parameters"),
        (3, TypeError, "expected a mask such as weight_mask"),
        ([], ValueError, "have no parameter of the module"),
        (["a"], TypeError, "expected a mask"),
        (_group(prox=pf.hard_prox(pf.lsbq(2), granularity=pf.per_block(3))), ValueError, NO_BLOCKS),
        (_group(prox=pf.lsbq(2)), TypeError, r"group 0 has prox=lsbq\(2\), expected a prox link"),
        (_group(quant_bits=2.5), ValueError, r"group 0 has quant_bits=2\.5, expected"),
        (_group("whole", quant_bits=2), TypeError, WHOLE),
        ({"whole": True}, TypeError, WHOLE),
        ([{"params": iter([nn.Linear(2, 2).weight])}], TypeError, "with lists of params"),
        (torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), TypeError, "a QuantOptimizer"),
    ],
)
def test_coverage_refuses_what_says_nothing(by: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pf.coverage(NET, by)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        pf.coverage("net", by)  # type: ignore[arg-type] # what is refused
