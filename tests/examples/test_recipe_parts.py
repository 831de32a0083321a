"""Networks, images, orders and rates of the recipes, by their properties."""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import re
import shlex
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples import create_hdf5, qat_resnet_cifar10, qat_resnet_imagenet, qat_vit_imagenet
from examples.recipe import datasets, loading, transforms
from examples.recipe.deit import DeiT, DropPath
from examples.recipe.problem import Problem
from examples.recipe.resnet import ResNet
from examples.recipe.resnet_cifar import CifarResNet
from examples.recipe.training import optimizer_of, rate_of
from tests.examples.data_sets import cifar_batches

RECIPES = (qat_resnet_cifar10, qat_resnet_imagenet, qat_vit_imagenet)


def size(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_networks_have_their_parameters(depth: int, parameters: int) -> None:
    net = CifarResNet(depth, 10)
    assert size(net) == parameters
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_imagenet_networks_have_their_parameters(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        assert size(ResNet(depth, 1000)) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deit_tiny_patch16_224", 5_717_416),
        ("deit_small_patch16_224", 22_050_664),
        ("deit_base_patch16_224", 86_567_656),
    ],
)
def test_vision_transformers_have_their_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert size(DeiT(name, 1000)) == parameters


def test_shortcuts_of_option_a_pick_and_pad() -> None:
    block = CifarResNet(20, 10).layer2[0]
    x = torch.randn(2, 16, 8, 8)
    y = block.shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_stochastic_depth_keeps_the_mean_and_drops_whole_images() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2)
    y = DropPath(0.25)(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(y.amax((1, 2)), y.amin((1, 2)))
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(x), x)


# Which weights are quantized, at which rates.


def flags(recipe, *more: str) -> argparse.Namespace:
    from examples.recipe.flags import parse

    args = parse(recipe, more)
    args.begun = 0
    return args


@pytest.mark.parametrize(
    ("module", "full"),
    [
        (qat_resnet_cifar10, set()),
        (qat_resnet_imagenet, {"conv1.weight", "fc.weight"}),
        (qat_vit_imagenet, {"patch_embed.proj.weight", "head.weight", "cls_token", "pos_embed"}),
    ],
)
def test_the_published_parts_stay_in_full_precision(module, full: set[str]) -> None:
    recipe = module.RECIPE
    args = flags(recipe, "--arch", recipe.archs[0])
    net = recipe.build(args.arch, 10, args.image_size)
    optimizer = optimizer_of(recipe, args, net, 10)
    names = {p: name for name, p in net.named_parameters()}
    by_bits: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            by_bits["quant_bits" in group].add(names[p])
            bias = names[p].endswith("bias") or names[p] in recipe.undecayed
            assert (group["weight_decay"] == 0) == bias, names[p]
    assert {n for n in by_bits[False] if net.get_parameter(n).dim() > 1} == full
    assert all(net.get_parameter(n).dim() > 1 for n in by_bits[True])


def test_rates_are_those_of_the_published_recipes() -> None:
    def rates(module, *more: str) -> list[float]:
        recipe = module.RECIPE
        args = flags(recipe, *more)
        rate = rate_of(recipe, args, 10)
        return [float(rate(epoch * 10)) for epoch in range(args.epochs)]

    cifar = rates(qat_resnet_cifar10)
    expected = [0.1] * 80 + [0.01] * 40 + [1e-3] * 30 + [1e-4] * 50
    assert cifar == pytest.approx(expected)
    full = rates(qat_resnet_cifar10, "--full-prec")
    assert full == pytest.approx([0.1] * 100 + [0.01] * 50 + [1e-3] * 50)
    assert rates(qat_resnet_imagenet) == pytest.approx([0.1] * 30 + [0.01] * 30 + [1e-3] * 30)
    deit = rates(qat_vit_imagenet)
    assert deit[0] == pytest.approx(2e-6)
    assert deit[5] == pytest.approx(2e-3)
    assert all(a > b for a, b in itertools.pairwise(deit[5:281]))
    assert deit[280:] == pytest.approx([1e-8] * 20)


def test_the_commands_of_the_documentation_have_flags_that_are_known() -> None:
    text = (Path(create_hdf5.__file__).parent / "README.md").read_text()
    modules = {m.RECIPE.program: m for m in RECIPES}
    found = re.findall(r"-m examples\.(qat_\w+imagenet|qat_resnet_\w+) (--.*)", text)
    assert len(found) >= 9
    for program, written in found:
        line = written.replace("\\", "").split("`")[0]
        flags(modules[program].RECIPE, *shlex.split(line.replace("$", "")))


# Images.


def test_drawn_shapes_are_the_same_again_and_of_all_classes() -> None:
    train, test = (datasets.Shapes(200, 32, part) for part in (True, False))
    for i in (0, 17, 199):
        image, label = train.read(i)
        again, same = train.read(i)
        assert (np.asarray(image) == np.asarray(again)).all()
        assert label == same == i % 10
        assert (np.asarray(image) != np.asarray(test.read(i)[0])).any()
        assert image.size == (32, 32)


def test_cifar_is_read_as_it_is_written(tmp_path: Path) -> None:
    cifar_batches(tmp_path, train=50, test=20)
    for train, count in ((True, 50), (False, 20)):
        read, drawn = datasets.Cifar10(tmp_path, train), datasets.Shapes(50, 32, train)
        assert len(read) == count
        for i in (0, 13, count - 1):
            assert (np.asarray(read.read(i)[0]) == np.asarray(drawn.read(i)[0])).all()
            assert read.read(i)[1] == drawn.read(i)[1]


@pytest.fixture
def archive(tmp_path: Path):
    """(address, md5) of an archive on this machine."""
    source = cifar_batches(tmp_path / "source", train=10, test=5)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(source / datasets.CIFAR_FOLDER, datasets.CIFAR_FOLDER)
    data = packed.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *unused: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", hashlib.md5(data).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


def test_downloads_are_checked(archive, tmp_path: Path) -> None:
    url, md5 = archive
    target = tmp_path / "target"
    with pytest.raises(Problem, match="gave other bytes than expected"):
        datasets.download_cifar10(target, url, "0" * 32)
    assert not list(target.iterdir())
    datasets.download_cifar10(target, url, md5)
    assert [path.name for path in target.iterdir()] == [datasets.CIFAR_FOLDER]
    assert len(datasets.Cifar10(target, True)) == 10


def views(transform, seed: int = 0) -> loading.Views:
    return loading.Views(datasets.Shapes(40, 40, True), transform, seed, True)


@pytest.mark.parametrize("small", [True, False])
def test_what_is_drawn_of_an_image_hangs_on_the_image_alone(small: bool) -> None:
    """On no image before it, and no generator is moved."""
    bicubic = Image.Resampling.BICUBIC
    transform = transforms.Training(40, bicubic, transforms.CIFAR, small, custom=True)
    keys = [loading.Key(i, epoch, copy) for i in (3, 5) for epoch in (0, 1) for copy in (0, 1)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = {key: views(transform)[key][0] for key in keys}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = {key: views(transform)[key][0] for key in reversed(keys)}
    assert all(torch.equal(once[key], again[key]) for key in keys)
    for index in (3, 5):
        own = [once[key] for key in keys if key.index == index]
        assert all(not torch.equal(a, b) for i, a in enumerate(own) for b in own[:i])
    other = views(transform, seed=1)[keys[0]][0]
    assert not torch.equal(other, once[keys[0]])


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_processes_share_the_images_of_a_step(
    count: int, each: int, world: int, repeats: int
) -> None:
    """Together they take the batches of one process alone, each image once and a copy at a time."""
    size = each * world
    alone = loading.training_keys(count, size, 0, 7, repeats, 0, 1)
    parts = [loading.training_keys(count, size, 0, 7, repeats, r, world) for r in range(world)]
    assert len(alone) == count // size
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(key for part in parts for key in part[step])
        assert all(len(part[step]) == each for part in parts)
    keys = [key for batch in alone for key in batch]
    assert len(set(keys)) == len(keys)
    tests = [loading.evaluation_keys(count, size, r, world) for r in range(world)]
    shapes = {tuple(map(len, part)) for part in tests}
    assert len(shapes) == 1
    there = [key.index for part in tests for batch in part for key in batch if key.index >= 0]
    assert sorted(there) == list(range(count))


def test_mixed_images_show_two_and_say_their_shares() -> None:
    images = torch.stack([torch.full((3, 8, 8), float(i)) for i in range(10)])
    labels = torch.arange(10)
    seen = set()
    for seed in range(20):
        mix = transforms.mixed(images, labels, seed)
        again = transforms.mixed(images, labels, seed)
        assert all(map(torch.equal, mix, again))
        means = mix.images.mean((1, 2, 3))
        torch.testing.assert_close(means, torch.lerp(labels.float(), mix.second.float(), mix.share))
        whole = mix.images.flatten(1)
        seen.add(bool((whole == whole[:, :1]).all()))  # a mixture is the same all over
    assert seen == {True, False}


def test_the_loss_of_mixed_images_is_that_of_both_labels() -> None:
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    labels, second, share = torch.arange(5) % 4, torch.tensor([1, 1, 0, 2, 3]), torch.rand(5)
    soft = torch.zeros(5, 4)
    soft[range(5), labels] += 1 - share
    soft[range(5), second] += share
    mix = transforms.Mixed(torch.empty(0), second, share)
    got = transforms.loss_of(scores, labels, mix, 0.1)
    want = torch.nn.functional.cross_entropy(scores, soft, label_smoothing=0.1)
    torch.testing.assert_close(got, want)
