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
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples import create_hdf5, qat_resnet_cifar10, qat_resnet_imagenet, qat_vit_imagenet
from examples.recipe import datasets, loading, rand_augment, transforms
from examples.recipe.deit import DeiT, DropPath
from examples.recipe.resnet import ResNet
from examples.recipe.resnet_cifar import CifarResNet
from examples.recipe.setup import annealing_of, optimizer_of, rate_of, views_of
from parq_fn.foundation.command import UserError
from tests.examples.data_sets import cifar_batches, image_folders

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

    return parse(recipe, more)


@pytest.mark.slow
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
    optimizer = optimizer_of(recipe, args, net, 100, begun=0)
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


@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
    st.booleans(),
)
def test_short_runs_have_rates_and_an_annealing_that_ends_in_them(
    epochs: int, steps: int, start: float, warmup: float, still: float, sgd: bool
) -> None:
    recipe = (qat_resnet_cifar10 if sgd else qat_vit_imagenet).RECIPE
    total = epochs * steps
    args = argparse.Namespace(
        epochs=epochs,
        anneal_start=start * epochs,
        anneal_end=epochs,
        warmup_epochs=warmup * epochs,
        const_lr_epochs=still * epochs,
        lr=0.1,
        lr_min=1e-3 * (not sgd),
        full_prec=False,
    )
    begin, end = annealing_of(args, steps)
    assert begin < end < total
    try:
        rate = rate_of(recipe, args, steps)
    except UserError:
        assert round(args.warmup_epochs * steps) + round(args.const_lr_epochs * steps) >= total
        return
    rates = [float(rate(step)) for step in range(total)]
    assert all(0 <= r <= 0.1 for r in rates)
    if sgd and not warmup and not still:
        for cut in recipe.cuts:  # every cut divides by ten, or it is of the first step
            place = max(1, round(cut * total))
            if place < total:
                made = sum(max(1, round(c * total)) <= place for c in recipe.cuts)
                assert rates[place] == pytest.approx(0.1 / 10**made)


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
    with pytest.raises(UserError, match="gave other bytes than expected"):
        datasets.download_cifar10(target, url, "0" * 32)
    assert not list(target.iterdir())
    datasets.download_cifar10(target, url, md5)
    assert [path.name for path in target.iterdir()] == [datasets.CIFAR_FOLDER]
    assert len(datasets.Cifar10(target, True)) == 10


def views(transform, seed: int = 0) -> loading.Views:
    return loading.Views(datasets.Shapes(40, 40, True), transform, seed, True)


LOCK = threading.Lock()


class Waiting(transforms.Evaluation):
    """Gives an image when the lock is free."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        with LOCK:
            return super().__call__(image)


class Stuck(transforms.Evaluation):
    """Gives none."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        time.sleep(600)
        return super().__call__(image)


@pytest.mark.rare
def test_a_worker_does_not_wait_for_a_thread_of_the_main_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by runs of these tests: one that was forked waited without end for a lock that a
    thread held at the fork."""
    monkeypatch.setattr(loading, "PATIENCE", 60.0)
    waiting = views(Waiting(40, Image.Resampling.BICUBIC, transforms.CIFAR))
    batches = loading.batches(waiting, [[loading.Key(0)]], 1, torch.device("cpu"), skip=False)
    with LOCK:
        assert next(batches).images.shape == (1, 3, 40, 40)
    batches.close()


@pytest.mark.rare
def test_a_worker_that_is_stuck_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a run of these tests: it was waited for without end."""
    monkeypatch.setattr(loading, "PATIENCE", 1.0)
    stuck = views(Stuck(40, Image.Resampling.BICUBIC, transforms.CIFAR))
    batches = loading.batches(stuck, [[loading.Key(0)]], 1, torch.device("cpu"), skip=False)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"images was lost.*timed out after 1.*--resume resumes"):
        next(batches)
    batches.close()
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("small", [True, False])
def test_random_views_of_an_image_depend_on_the_image_alone(small: bool) -> None:
    """On no image before it, and no generator is moved."""
    bicubic = Image.Resampling.BICUBIC
    transform = transforms.Training(40, bicubic, transforms.CIFAR, small, custom=True)
    keys = [loading.Key(i, epoch, copy) for i in (3, 5) for epoch in (0, 1) for copy in (0, 1)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = {key: views(transform)[key].image for key in keys}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = {key: views(transform)[key].image for key in reversed(keys)}
    assert all(torch.equal(once[key], again[key]) for key in keys)
    for index in (3, 5):
        own = [once[key] for key in keys if key.index == index]
        assert all(not torch.equal(a, b) for i, a in enumerate(own) for b in own[:i])
    other = views(transform, seed=1)[keys[0]].image
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
        shown, shares = transforms.mixed(images, labels, 10, "of", seed)
        again, same = transforms.mixed(images, labels, 10, "of", seed)
        assert torch.equal(shown, again)
        assert torch.equal(shares, same)
        torch.testing.assert_close(shares.sum(1), torch.ones(10))
        torch.testing.assert_close(shown.mean((1, 2, 3)), shares @ labels.float())
        whole = shown.flatten(1)
        seen.add(bool((whole == whole[:, :1]).all()))  # a mixture is the same all over
    assert seen == {True, False}


def drawn_image() -> torch.Tensor:
    return transforms.pixels(datasets.Shapes(5, 40, True).read(4)[0])


def test_rand_augment_applies_each_of_two_half_of_the_times() -> None:
    image, fill = drawn_image(), transforms.CIFAR.fill
    same, total = 0, 400
    for seed in range(total):
        with transforms.drawing(seed):
            seen = rand_augment.rand_augment(image, fill)
        assert seen.shape == image.shape
        assert 0 <= seen.min() <= seen.max() <= 1
        same += torch.equal(seen, image)
    assert abs(same / total - 0.25) < 0.08


def test_operations_of_rand_augment() -> None:
    """At a strength of 0.9, by what each of them is."""
    x, s = drawn_image()[None], 0.9
    do = {**rand_augment.COLORS, **rand_augment.PLACES}
    close = torch.testing.assert_close
    close(do["brightness"](x, s, 1.0), 1.81 * x)
    close(do["brightness"](x, s, -1.0), 0.19 * x)
    for name in ("color", "contrast", "sharpness"):
        more, less = (do[name](x, s, sign) - x for sign in (1.0, -1.0))
        close(more, -less, atol=1e-5, rtol=0)
        assert more.abs().max() > 0.05
    assert do["contrast"](x, s, 1.0).std() > x.std() > do["contrast"](x, s, -1.0).std()
    assert len(do["posterize"](x, s, 1.0).unique()) == 2  # one bit
    kept = x < 0.1
    assert torch.equal(do["solarize"](x, s, 1.0), torch.where(kept, x, 1 - x))
    added = do["solarize add"](x, s, 1.0) - x
    assert not added[x >= 0.5].any()
    close(added[x < 0.5], torch.full_like(added[x < 0.5], 0.9 * 110 / 255))
    close(do["auto contrast"](x, s, 1.0).amax((2, 3)), torch.ones(1, 3))
    # a white bar in the middle, by where it goes
    bar = torch.zeros(1, 3, 40, 40)
    bar[..., 10:30, 18:22] = 1
    across = torch.arange(40.0)
    for name, dim in (("translate x", 3), ("translate y", 2)):
        sides = [do[name](bar, s, sign).sum((0, 1, 5 - dim)) for sign in (1.0, -1.0)]
        ends = [float((side * across).sum() / side.sum()) for side in sides]
        assert abs(ends[0] - ends[1]) > 10
    turned = [do["rotate"](bar, s, sign) for sign in (1.0, -1.0)]
    close(turned[0].flip(3), turned[1], atol=1e-3, rtol=0)
    assert turned[0][..., 10, 18:22].mean() < 0.5  # its end has left
    slanted = do["shear x"](bar, s, 1.0)
    places = [float((slanted[0, 0, y] * across).sum() / slanted[0, 0, y].sum()) for y in (12, 27)]
    assert abs(places[0] - places[1]) == pytest.approx(0.27 * 15, abs=0.2)


def test_an_image_that_cannot_be_read_counts_once() -> None:
    class Bad(datasets.Shapes):
        def read(self, index: int):
            if index in (3, 4):
                raise datasets.Unreadable(f"image {index}")
            return super().read(index)

    bad, evaluation = (
        Bad(8, 16, True),
        transforms.Evaluation(16, Image.Resampling.BICUBIC, transforms.CIFAR),
    )
    keys = [loading.Key(i, 0, copy) for i in (2, 3, 4, 5) for copy in (0, 1, 2)]
    training = loading.Views(bad, evaluation, 0, True)
    batch = loading.gathered([training[key] for key in keys])
    assert batch.skipped == 2
    assert batch.problem == "image 3"
    assert batch.labels.tolist() == [2] * 3 + [5] * 9  # image 5 stands for those before it
    test = loading.Views(bad, evaluation, 0, False)
    batch = loading.gathered([test[loading.Key(i)] for i in (3, 4, -1)])  # none that is there
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.labels.tolist() == [-1, -1, -1]
    assert batch.skipped == 2


def test_images_that_are_no_files_are_unreadable(tmp_path: Path) -> None:
    image_folders(tmp_path, each=2, size=16)
    images = datasets.ImageFolder(tmp_path, True)
    file = images.file(0)
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(datasets.Unreadable, match=re.escape(str(file))):
        images.read(0)
    file.unlink()
    file.mkdir()
    with pytest.raises(datasets.Unreadable):
        images.read(0)


def test_test_images_are_cropped_but_those_of_cifar() -> None:
    for module, whole in ((qat_resnet_cifar10, True), (qat_resnet_imagenet, False)):
        recipe = module.RECIPE
        args = flags(recipe, "--data", "synthetic", "--image-size", "32")
        images = datasets.Shapes(4, 32, False)
        seen = views_of(recipe, args, images, False)[loading.Key(1)].image
        all_of_it = recipe.normal(transforms.pixels(images.read(1)[0]))
        assert torch.equal(seen, all_of_it) == whole
