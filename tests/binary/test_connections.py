"""Cross-timestep connections: the blend, its memory, its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.errors import BidmError


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Conv2d(2, 2, 1)

    def forward(self, x, t):
        return self.block(x)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    network = Toy()
    connections = CrossTimestepConnections(["block"], timesteps=1000, buckets=100, initial=0.3)
    connections.attach(network)
    with torch.no_grad():
        connections.beta.copy_(torch.linspace(0, 0.99, 100)[:, None])
    return network


def test_first_step_is_plain_and_later_steps_blend(toy):
    plain, memory = copy.deepcopy(toy.block), {}
    plain._forward_hooks.clear()
    x1, x2 = torch.randn(2, 3, 2, 4, 4)
    t1, t2 = torch.tensor([995, 995, 995]), torch.tensor([0, 9, 509])
    with toy.connections.carrying(t1, memory):
        first = toy(x1, t1)
    assert torch.equal(first, plain(x1))
    with toy.connections.carrying(t2, memory):
        second = toy(x2, t2)
    beta = torch.tensor([0.0, 0.0, 0.50])[:, None, None, None]
    assert torch.allclose(second, (1 - beta) * plain(x2) + beta * first, atol=1e-6)
    assert torch.equal(memory["block"], second)


def test_outside_of_carrying_the_network_is_plain(toy):
    x = torch.randn(1, 2, 4, 4)
    t = torch.tensor([500])
    memory = {"block": torch.full((1, 2, 4, 4), 7.0)}
    with toy.connections.carrying(t, memory):
        blended = toy(x, t)
    assert not torch.allclose(toy(x, t), blended)


def test_fresh_rows_ignore_the_memory(toy):
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([500, 500])
    memory = {"block": torch.ones(2, 2, 4, 4)}
    plain = toy(x, t)
    with toy.connections.carrying(t, memory, fresh=torch.tensor([True, False])):
        y = toy(x, t)
    assert torch.equal(y[0], plain[0]) and not torch.allclose(y[1], plain[1])


def test_gradients_reach_beta_but_not_the_step_before(toy):
    previous = torch.randn(1, 2, 4, 4, requires_grad=True)
    x, t = torch.randn(1, 2, 4, 4), torch.tensor([300])
    plain = toy(x, t).detach()
    memory = {"block": previous.detach()}
    with toy.connections.carrying(t, memory):
        toy(x, t).sum().backward()
    expected = torch.zeros(100, 1)
    expected[30] = (previous.detach() - plain).sum()
    assert torch.allclose(toy.connections.beta.grad, expected, atol=1e-4)
    assert not memory["block"].requires_grad


def test_a_copied_network_uses_its_own_betas(toy):
    other = copy.deepcopy(toy)
    with torch.no_grad():
        other.connections.beta.zero_()
    x, t = torch.randn(1, 2, 4, 4), torch.tensor([900])
    memory = {"block": torch.ones(1, 2, 4, 4)}
    with other.connections.carrying(t, memory):
        y = other(x, t)
    assert torch.equal(y, other.block(x))


def test_an_unknown_block_is_named():
    with pytest.raises(BidmError, match=r"up\.9"):
        CrossTimestepConnections(["up.9"], timesteps=10).attach(Toy())
