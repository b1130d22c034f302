"""Networks of random layers on images: jit, which chooses layouts and orders of its own, gives what the function does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchlift import functional_call, grad, jit, jvp, vmap


class Of(nn.Module):
    """A function of the output of layers, and of their input."""

    def __init__(self, f: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.f, self.layers = f, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.layers(x), x)


def conv(channels: int, out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


# Of the number of channels: layers, and the number of channels of what they give.
LAYERS = [
    lambda r, c: (conv(c, out := r.choice([8, 12, 16])), out),
    lambda r, c: (conv(c, c, groups=c, bias=False), c),
    lambda r, c: (nn.MaxPool2d(r.choice([2, 3]), r.choice([1, 2]), 1), c),
    lambda r, c: (nn.AdaptiveMaxPool2d(7), c),
    lambda r, c: (nn.AvgPool2d(2, 1), c),
    lambda r, c: (nn.AdaptiveAvgPool2d(9), c),
    lambda r, c: (nn.ReLU(), c),
    lambda r, c: (nn.GELU(), c),
    lambda r, c: (nn.GroupNorm(1, c), c),
    lambda r, c: (nn.BatchNorm2d(c).eval(), c),
    lambda r, c: (nn.ZeroPad2d((1, 0, 0, 1)), c),
    lambda r, c: (nn.Upsample(size=(12, 12), mode=r.choice(["nearest", "bilinear"])), c),
    lambda r, c: (Of(lambda y, x: torch.cat([x, y], 1), conv(c, c)), 2 * c),
    lambda r, c: (Of(lambda y, x: x + y, conv(c, c), nn.ReLU()), c),
    lambda r, c: (Of(lambda y, x: x.transpose(2, 3)), c),
    lambda r, c: (Of(lambda y, x: x.flip(1)[..., 1:]), c),
    lambda r, c: (Of(lambda y, x: x * x.mean((2, 3), keepdim=True) + x.amax(1, keepdim=True)), c),
    lambda r, c: (Of(lambda y, x: x.reshape(len(x), -1).softmax(-1).reshape(x.shape) * 7), c),
]


def network(seed: int) -> "tuple[nn.Module, Tensor]":
    r = random.Random(seed)
    torch.manual_seed(seed)
    channels = inputs = r.choice([1, 3, 16])
    layers: "list[nn.Module]" = [conv(channels, channels := 16)]
    for _ in range(r.randint(3, 8)):
        layer, channels = r.choice(LAYERS)(r, channels)
        layers.append(layer)
    layers.insert(r.randint(1, len(layers)), nn.MaxPool2d(2, 1))
    return nn.Sequential(*layers), torch.randn(3, inputs, 20, 20)


def check(f: Any, *args: Any) -> None:
    expected = tree_leaves(f(*args))
    compiled = jit(f)
    compiled(*args)
    # Some gradients are zero but for rounding (of a bias before a norm), and where two numbers in a window
    # are equal but for rounding, the gradient goes another way.
    scale = max(float(t.norm()) for t in expected)
    for want, got in zip(expected, tree_leaves(compiled(*args)), strict=True):
        assert float((want - got).norm()) < 2e-2 * (float(want.norm()) + 1e-2 * scale)
        assert want.shape == got.shape
        steps = [(a, b) for n, a, b in zip(want.shape, want.stride(), got.stride()) if n != 1]
        assert all(a == b for a, b in steps)


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int) -> None:
    module, x = network(seed)
    params = {name: p.detach() for name, p in module.named_parameters()}
    models = {name: torch.stack([p, 0.7 * p]) for name, p in params.items()}

    def f(params: "dict[str, Tensor]", x: Tensor) -> Tensor:
        return functional_call(module, params, (x,))

    def loss(params: "dict[str, Tensor]", x: Tensor) -> Tensor:
        return f(params, x).sin().sum()

    check(f, params, x)
    check(grad(loss), params, x)
    check(vmap(grad(loss), (0, None)), models, x)
    check(vmap(grad(lambda p, x: loss(p, x[None])), (None, 0)), params, x)
    check(lambda p, x: jvp(lambda p: f(p, x), (p,), (p,))[1], params, x)
