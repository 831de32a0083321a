"""Noise from counters: normal, of the variance that is said, and a function of the state alone."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn.foundation.tree import tree_map


def noise(link: Any, params: Any, steps: int = 1) -> list[Any]:
    """That of each update."""
    state, found = link.init(params), []
    for _ in range(steps):
        updates, state = link.update(tree_map(torch.zeros_like, params), state, params)
        found.append(updates)
    return found


def test_it_is_normal_with_the_variance_that_is_said() -> None:
    n = 200000
    first, *_, last = noise(pf.add_noise(0.3, gamma=0.7, seed=1), {"w": torch.zeros(n).double()}, 4)
    for t, found in ((0, first["w"]), (3, last["w"])):
        z = found / math.sqrt(0.3 / (1 + t) ** 0.7)
        some = 5 / math.sqrt(n)  # of standard errors, so that one seed in a million is off
        assert abs(z.mean()) < some
        assert abs(z.square().mean() - 1) < some * math.sqrt(2)
        assert abs((z**3).mean()) < some * math.sqrt(15)
        assert abs((z**4).mean() - 3) < some * math.sqrt(96)
        points = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.5, 1.5, 3.0]).double()
        wanted = torch.special.ndtr(points)
        share = (z[:, None] <= points).double().mean(0)
        assert ((share - wanted).abs() < some / 2).all()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()


def test_steps_leaves_seeds_and_neighbours_are_independent() -> None:
    n = 100000
    params = {"a": torch.zeros(n), "b": torch.zeros(n)}
    one, two = noise(pf.add_noise(1.0), params, 2)
    (other,) = noise(pf.add_noise(1.0, seed=1), params)
    pairs = {
        "leaves": (one["a"], one["b"]),
        "steps": (one["a"], two["a"]),
        "seeds": (one["a"], other["a"]),
        "neighbours": (one["a"][1:], one["a"][:-1]),
        "squares": (one["a"][1:].square() - 1, one["a"][:-1].square() - 1),
    }
    for name, (x, y) in pairs.items():
        assert abs(_correlation(x, y)) < 5 / math.sqrt(n), name


def mixed(x: int) -> int:
    """What splitmix64 gives from the state x."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_every_number_is_as_splitmix64_and_box_and_muller_give_it() -> None:
    """So that a run that was saved goes on with the noise of the version that saved it."""
    assert mixed(1234567) == 6457827717110365317  # as published with the generator
    eta, gamma = lambda t: 0.3 * (t.double() + 1), lambda t: 0.5 + t.double()
    link = pf.add_noise(eta, gamma, torch.tensor(7).int())
    for t, found in enumerate(noise(link, {"w": torch.zeros(2, 3).double()}, 3)):
        key = mixed(mixed(mixed(7) + zlib.crc32(b"w")) + t)
        for i, number in enumerate(found["w"].flatten().tolist()):
            bits = mixed(mixed(i * 0x9E3779B97F4A7C15 + key))
            radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
            wanted = radius * math.cos(2 * math.pi * (bits % 2**32) / 2**32)
            wanted *= math.sqrt(0.3 * (t + 1) / (t + 1) ** (0.5 + t))
            assert number == pytest.approx(wanted, rel=1e-12)


def test_a_leaf_s_noise_is_its_own_whatever_else_there_is() -> None:
    torch.manual_seed(0)
    drawn = torch.random.get_rng_state()
    link = pf.add_noise(1.0, seed=2)
    (together,) = noise(link, {"x": [torch.zeros(3)], "w": torch.zeros(2, 4)})
    (alone,) = noise(link, {"w": torch.zeros(2, 4)})
    assert torch.equal(together["w"], alone["w"])
    assert torch.equal(torch.random.get_rng_state(), drawn)
    (narrow,) = noise(link, {"w": torch.zeros(2, 4, dtype=torch.bfloat16)})
    assert torch.equal(narrow["w"], alone["w"].bfloat16())


def test_vmap_over_seeds_is_the_loop_and_needs_no_randomness() -> None:
    params = {"w": torch.zeros(3, 5)}

    def drawn(seed: Any) -> Tensor:
        return noise(pf.add_noise(1.0, seed=seed), params, 2)[1]["w"]

    seeds = torch.tensor([0, 7, 8])
    batched = torch.vmap(drawn)(seeds)
    assert torch.equal(batched, torch.stack([drawn(int(seed)) for seed in seeds]))
    same = torch.vmap(lambda w: noise(pf.add_noise(1.0), {"w": w})[0]["w"])(torch.zeros(2, 3))
    assert torch.equal(same[0], same[1])


@pytest.mark.rare
def test_compiled_noise_is_the_eager_one() -> None:
    params = {"w": torch.zeros(64, 3)}
    link = pf.chain(pf.add_noise(1.0), pf.sgd(1.0))
    state = link.init(params)
    found, _ = torch.compile(link.update, fullgraph=True)(params, state, params)
    torch.testing.assert_close(found, link.update(params, state, params)[0])


def test_hyperparameters_have_derivatives_and_wrong_ones_are_refused() -> None:
    params = {"w": torch.zeros(50).double()}

    def total(eta: Tensor) -> Tensor:
        return noise(pf.add_noise(eta), params)[0]["w"].square().sum()

    eta = torch.tensor(0.5).double()
    torch.testing.assert_close(torch.func.grad(total)(eta), total(eta) / eta)
    assert not noise(pf.add_noise(0.0), params)[0]["w"].any()
    assert torch.func.grad(total)(torch.zeros_like(eta)) == 0
    assert pf.add_noise(1.0) == pf.add_noise(1.0, 0.55, 0)  # the paper's
    pf.add_noise(1.0, seed=2**63 - 1)
    with pytest.raises(ValueError, match="add_noise: gamma must lie in"):
        pf.add_noise(1.0, math.inf)
    with pytest.raises(ValueError, match=r"add_noise: seed must lie in 0\.\..*, got -1"):
        pf.add_noise(1.0, seed=-1)
    with pytest.raises(ValueError, match="add_noise: seed must lie"):
        pf.add_noise(1.0, seed=2**63)
    with pytest.raises(ValueError, match=r"add_noise: eta must lie in \[0, inf\), got -1.0"):
        pf.add_noise(-1.0)
    with pytest.raises(TypeError, match="add_noise: seed must be a whole number"):
        pf.add_noise(1.0, seed=0.5)
