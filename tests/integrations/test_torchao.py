"""torchao's integer tensors: the same weights, saved and loaded, with 8-bit activations."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torchao", reason="needs torchao: pip install 'parq_fn[integrations]'")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own
    from torchao.prototype.mx_formats import kernels, mx_tensor, nvfp4_tensor
    from torchao.prototype.parq.quant import StretchedUnifTorchaoQuantizer, UnifTorchaoQuantizer
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

import torch
from torch import nn

import parq_fn as pf
from parq_fn.export import load, save
from parq_fn.export.torchao import to_torchao
from parq_fn.optim import QuantOptimizer, load_checkpoint, param_groups, save_checkpoint
from tests.export.helpers import EVEN as QUANTIZERS
from tests.export.helpers import fitted
from tests.helpers import python_blocks, run_blocks, spread
from tests.integrations.models import TOKENS, on_levels

EVEN = {
    pf.uniform(2): "int2",
    pf.uniform(4): "int4",
    pf.uniform(8, "max"): "int8",
    pf.lsbq(1): "int1",
    pf.lsbq(0): "int2",
    pf.max_uniform(4): "int4",
    pf.asymmetric(2): "int2",
    pf.integer(4): "int4",
    pf.gaussian(2): "int2",
    pf.asymmetric(4): "int4",
}
CUTS = [pf.per_tensor(), pf.per_channel(), pf.per_block(32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


PUBLISHED = [
    *((StretchedUnifTorchaoQuantizer(bits), pf.uniform(bits)) for bits in (1, 2, 3, 4)),
    *((UnifTorchaoQuantizer(), pf.integer(bits, "max_symmetric")) for bits in (2, 3, 4, 8)),
]


@pytest.mark.parametrize(
    ("published", "quantizer"),
    PUBLISHED,
    ids=lambda q: repr(q) if isinstance(q, pf.Quantizer) else "",
)
def test_the_quantizers_of_its_parq_are_ours(published, quantizer) -> None:
    """The same levels, bit for bit, and weights, but for ties, which it rounds to even."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weights, levels = published.quantize(x.clone(), quantizer.bits, dim=-1)
    assert torch.equal(levels.sort(-1).values, quantizer(x))
    clipped = x.abs() == x.abs().amax(-1, keepdim=True)  # on a midpoint, of max_symmetric
    assert torch.equal(weights[~clipped], quantizer.nearest(x, quantizer(x))[~clipped])


def test_its_four_bit_floats_are_ours() -> None:
    """Scales and weights of MXFP4 and NVFP4, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator) * torch.logspace(-2, 1, 64)[:, None]

    def numbers(data):
        return kernels.f4_unpacked_to_f32(kernels.unpack_uint4(data.view(torch.uint8)))

    scales, data = mx_tensor.to_mx(x, torch.float4_e2m1fn_x2, 32)
    rows, quantizer = pf.per_block(32).rows(x), pf.mxfp4()
    found = quantizer.nearest(rows, quantizer(rows))
    assert torch.equal(quantizer.rounded(quantizer.fit(rows)), scales.float().view(-1, 1))
    assert torch.equal(found, numbers(data).view(-1, 32) * scales.float().view(-1, 1))

    whole = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    scales, data = nvfp4_tensor.nvfp4_quantize(x, 16, whole)
    rows, two = pf.per_block(16).rows(x), pf.nvfp4()
    qparams = two.fit(rows)
    found = two.nearest(rows, two.levels(qparams))
    assert torch.equal(qparams[:, 1], whole.expand(len(rows)))
    assert torch.equal(two.block_scale(qparams), scales.float().view(-1, 1))
    assert torch.equal(found, numbers(data).view(-1, 16) * (scales.float().view(-1, 1) * whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", CUTS, ids=repr)
@pytest.mark.parametrize("quantizer", EVEN, ids=repr)
def test_weights_and_outputs_are_equal(quantizer, granularity, dtype, tmp_path: Path) -> None:
    net, quantized, packed = on_levels(quantizer, granularity, dtype)
    save(packed, tmp_path / "packed")
    made = to_torchao(net, load(tmp_path / "packed"))
    for layer, expected in ((made.linear, quantized.linear), (made.conv, quantized.conv)):
        assert isinstance(layer.weight, IntxUnpackedToInt8Tensor)
        assert str(layer.weight.target_dtype) == f"torch.{EVEN[quantizer]}"
        assert torch.equal(layer.weight.dequantize(), expected.weight)
    assert made.head.weight is made.lookup.weight
    with torch.no_grad():
        assert torch.equal(made(TOKENS), quantized(TOKENS))

    torch.save(made.state_dict(), tmp_path / "state")
    again = copy.deepcopy(net)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True), assign=True)
    with torch.no_grad():
        assert torch.equal(again(TOKENS), quantized(TOKENS))


@pytest.mark.parametrize("granularity", CUTS, ids=repr)
def test_activations_in_8_bits(granularity) -> None:
    net, quantized, packed = on_levels(pf.uniform(4), granularity)
    made = to_torchao(net, packed, int8_activations=True)
    x = torch.randn(20, 64)
    with torch.no_grad():
        got, exact = made.linear(x), quantized.linear(x)
    step = (x.amax(-1) - x.amin(-1)).max() / 255  # of the inputs' quantization, half of it off
    off = 0.51 * step * quantized.linear.weight.abs().sum(-1).max()
    assert 0 < (got - exact).abs().max() <= off
    assert made.conv.weight.activation_quantization is None


def test_uneven_levels_are_refused_or_rounded() -> None:
    net, quantized, packed = on_levels(pf.lsbq(2), pf.per_channel())
    with pytest.raises(ValueError, match=r"'lookup\.weight': levels of row \d+, .* are not multip"):
        to_torchao(net, packed)
    with pytest.warns(UserWarning, match=r"rounded, off by up to 0\.00\d+ of the largest"):
        made = to_torchao(net, packed, rounded=True)
    weight = quantized.linear.weight
    off = (made.linear.weight.dequantize() - weight).abs().amax(-1)
    assert bool((off <= weight.abs().amax(-1) / 127 * 0.51).all())


def test_zero_points_and_scales_that_do_not_fit(tmp_path: Path) -> None:
    levels = torch.tensor([[122.0, 127.0], [1.0, 50.0]])
    net = nn.Linear(2, 2, bias=False)
    made = to_torchao(net, {"weight": pf.export.pack_weight(levels, levels)})
    assert torch.equal(made.weight.dequantize(), levels)
    huge = torch.tensor([[-3e38, 3e38]]).expand(2, 2)
    with pytest.raises(ValueError, match="'weight': levels are not finite, or not in the format's"):
        to_torchao(net, {"weight": pf.export.pack_weight(huge.contiguous(), huge[:1])})
    with pytest.raises(ValueError, match=r"'weight' is torch\.float64, expected 32 bits or less"):
        to_torchao(net, {"weight": pf.export.pack_weight(levels.double(), levels.double())})


def test_layers_that_torchao_cannot_run_stay_in_float() -> None:
    net = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    packed: dict = {}
    for name, p in net.named_parameters():
        if p.dim() > 1:
            p.data = torch.where(p >= 0, 0.25, -0.25)
            packed[name] = pf.export.pack_weight(p, torch.tensor([[-0.25, 0.25]]))
        else:
            packed[name] = p.detach()
    x = torch.randn(2, 3, 32)
    left = "to_torchao: self_attn.in_proj_weight, self_attn.out_proj.weight are unpacked, 16,384"
    with pytest.warns(UserWarning, match=left):
        made = to_torchao(net, packed)
    torch.testing.assert_close(made(x), net(x))
    assert isinstance(made.linear1.weight, IntxUnpackedToInt8Tensor)
    assert torch.equal(made.self_attn.in_proj_weight, net.self_attn.in_proj_weight)


class Doubled(nn.Linear):
    """Computes something of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """Computes what nn.Linear does."""


@pytest.mark.parametrize("kind", [Doubled, Named])
def test_subclasses_are_integers_where_they_leave_forward_alone(kind: type[nn.Linear]) -> None:
    net, x = nn.Sequential(kind(8, 4, bias=False)), torch.ones(2, 8)
    net[0].weight.data = torch.where(net[0].weight >= 0, 0.25, -0.25)
    entry = pf.export.pack_weight(net[0].weight.detach(), torch.tensor([[-0.25, 0.25]]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = to_torchao(net, {"0.weight": entry})
    assert isinstance(made[0].weight, IntxUnpackedToInt8Tensor) == (kind is Named)
    assert bool(told) == (kind is Doubled)
    torch.testing.assert_close(made(x), net(x))


def faked(weights: bool = False, symmetric: bool = False) -> nn.Module:
    """A network whose layers quantize what they are given, as torchao trains it."""
    own = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=symmetric)
    more = IntxFakeQuantizeConfig(torch.int4, "per_channel") if weights else None
    layers = [nn.Linear(32, 64), nn.Linear(64, 32)]
    first, last = (FakeQuantizedLinear.from_linear(layer, own, more) for layer in layers)
    return nn.Sequential(first, nn.ReLU(), last)


@pytest.mark.parametrize("quantizer", [pf.uniform(2), pf.integer(4), pf.lsbq(0)], ids=repr)
def test_activations_are_quantized_in_training_as_they_are_afterwards(quantizer) -> None:
    torch.manual_seed(0)
    net = faked()
    groups = param_groups(net, {"*": 2})
    for group in groups:
        if group.pop("quant_bits", None):
            group["prox"] = pf.hard_prox(quantizer, period=1, granularity=pf.per_channel())
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.01))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
    made = to_torchao(net, pf.export.pack(net, optimizer), int8_activations=True)
    assert [type(layer) for layer in made] == [nn.Linear, nn.ReLU, nn.Linear]
    assert isinstance(made[2].weight, IntxUnpackedToInt8Tensor)
    x = torch.randn(16, 32)
    with torch.no_grad():
        assert torch.equal(made(x), net(x))


def test_activations_that_are_quantized_otherwise_afterwards_are_refused_by_name() -> None:
    net = faked()
    packed = {name: p.detach() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"layer '0' is a FakeQuantizedLinear with activations"):
        to_torchao(net, packed)
    with pytest.raises(ValueError, match=r"layer '0' .* with activations of .*SYMMETRIC"):
        to_torchao(faked(symmetric=True), packed, int8_activations=True)
    with pytest.raises(ValueError, match=r"layer '0' .* weights are quantized a second time"):
        to_torchao(faked(weights=True), packed, int8_activations=True)


@pytest.mark.slow
def test_the_page_s_way_from_training_to_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "notebooks" / "howto" / "export.md").read_text()
    names = run_blocks(python_blocks(page))
    assert str(names["integers"][0].weight.target_dtype) == "torch.int4"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_are_kept_plain(shape: tuple[int, int]) -> None:
    net = nn.Sequential(nn.Linear(*reversed(shape), bias=False))
    packed = {"0.weight": pf.export.pack_weight(torch.zeros(shape), torch.ones(1, 1))}
    assert to_torchao(net, packed)[0].weight.shape == shape


def test_rows_that_torchao_has_no_scales_for_are_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 4, bias=False))
    levels = torch.tensor([[-1.0, 1.0]]).repeat(2, 1)
    packed = {"0.weight": pf.export.pack_weight(torch.ones(4, 6), levels)}
    with pytest.raises(ValueError, match=r"its shape is \(4, 6\) and it has 2 rows of levels"):
        to_torchao(net, packed)


@pytest.mark.parametrize(("quantizer", "dtype"), spread(QUANTIZERS, DTYPES), ids=repr)
@pytest.mark.parametrize("granularity", CUTS, ids=repr)
def test_scales_and_zero_points_are_those_of_the_state(quantizer, dtype, granularity) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=draw) * torch.logspace(-2, 2, 6)[:, None]
    packed, mapped, qparams = fitted(quantizer, granularity, weight.to(dtype))
    made = to_torchao(nn.Linear(64, 6, bias=False, dtype=dtype), {"weight": packed}).weight
    assert torch.equal(made.dequantize(), mapped)
    step = quantizer.grid(qparams).step
    assert torch.equal(made.scale, step.reshape(-1, made.scale.shape[1]).expand(6, -1))
    if isinstance(quantizer, pf.asymmetric):
        zero = qparams[:, 1].reshape(-1, made.scale.shape[1]).expand(6, -1)
        assert torch.equal(made.zero_point.float(), zero - 2 ** (quantizer.bits - 1))
        assert str(made.target_dtype) == f"torch.int{quantizer.bits}"


def test_a_zero_point_beyond_8_bits_is_refused_by_name() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) + 300
    packed, mapped, _ = fitted(pf.asymmetric(4), pf.per_channel(), weight)
    net = nn.Linear(64, 6, bias=False)
    with pytest.raises(
        ValueError, match=r"'weight': levels of row \d.*\(their zero point is -\d+\)"
    ):
        to_torchao(net, {"weight": packed})
    with pytest.warns(UserWarning, match="rounded, off by up to"):
        made = to_torchao(net, {"weight": packed}, rounded=True)
    assert float((made.weight.dequantize() - mapped).abs().max()) <= 305 / 127 / 2


# Optimizers with 8-bit, 4-bit and float8 states


class Wide(nn.Module):
    """A weight of 4,096 elements, from which on torchao codes states, and a small one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide, self.small = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.wide(x).tanh())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8", "Adam4bit"])
def test_optimizers_with_coded_states_train_wrapped_as_alone_and_are_resumed(
    name: str, tmp_path: Path
) -> None:
    import torchao.optim

    def base_of(net: Wide, bits: int | None) -> torch.optim.Optimizer:
        weights = {"params": [net.wide.weight, net.small.weight]}
        groups = [weights | ({} if bits is None else {"quant_bits": bits})]
        groups.append({"params": [net.wide.bias, net.small.bias]})
        return getattr(torchao.optim, name)(groups, lr=1e-2)

    def trained(net: Wide, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
        for step in range(steps):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    late = pf.parq_prox(pf.lsbq(2), anneal_start=1000, anneal_end=2000)
    mid = pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=9, period=2)
    with torch.compiler.set_stance("force_eager"):
        alone, net, other, third = Wide(0), Wide(0), Wide(1), Wide(1)
        expected = trained(alone, base_of(alone, None), 3)
        assert all(
            map(torch.equal, expected, trained(net, QuantOptimizer(base_of(net, 2), late), 3))
        )
        optimizer = QuantOptimizer(base_of(net, 2), mid)
        trained(net, optimizer, 3)
        resumed = QuantOptimizer(base_of(other, 2), mid)
        resumed.load_state_dict(optimizer.state_dict())
        other.load_state_dict(net.state_dict())
        save_checkpoint(tmp_path / "last", net, optimizer)
        fresh = QuantOptimizer(base_of(third, 2), mid)
        load_checkpoint(tmp_path / "last", third, fresh)
        expected = trained(net, optimizer, 3)
        assert all(map(torch.equal, expected, trained(other, resumed, 3)))
        assert all(map(torch.equal, expected, trained(third, fresh, 3)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_coded_states_beside_latents_in_bfloat16_are_resumed(name: str) -> None:
    import torchao.optim

    mid = pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=9, period=2)

    def built(seed: int) -> tuple[Wide, QuantOptimizer]:
        net = Wide(seed).to(torch.bfloat16)
        groups = [{"params": [*net.wide.parameters()], "quant_bits": 2}]
        groups.append({"params": [*net.small.parameters()]})
        base = getattr(torchao.optim, name)(groups, lr=1e-2)
        return net, QuantOptimizer(base, mid, latent_dtype=torch.bfloat16)

    def trained(net: Wide, optimizer: QuantOptimizer, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x.to(torch.bfloat16)).square().mean().backward()
            optimizer.step()

    with torch.compiler.set_stance("force_eager"):
        (net, optimizer), (other, resumed) = built(0), built(1)
        trained(net, optimizer, 3)
        entries = optimizer.state[net.wide.weight]
        assert type(entries["exp_avg"]) is not torch.Tensor  # it is coded
        assert entries["latent"].dtype == torch.bfloat16
        resumed.load_state_dict(optimizer.state_dict())
        other.load_state_dict(net.state_dict())
        trained(net, optimizer, 3)
        trained(other, resumed, 3)
        assert all(map(torch.equal, net.parameters(), other.parameters()))
