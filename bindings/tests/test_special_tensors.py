"""Quantized and nested tensors: NOTE [nested and quantized tensors] in core/lifted_tensor.cc."""

import re

import pytest
import torch

import torchlift
from torchlift import TransformError, UnsupportedError, grad, vmap

N = 3


def quantized():
    return torch.quantize_per_tensor(torch.randn(N, 4), 0.1, 0, torch.qint8)


def nested(layout=torch.strided):
    return torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3, 1)], layout=layout)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"memory_budget": 2**20}])
def test_a_quantized_argument(options):
    text = (
        "argument 0 (x) is a quantized tensor (torch.qint8), over which vmap cannot map: operators "
        "on quantized tensors have no batching rules. Pass its dequantize(), or give in_dims=None "
        "for it if all examples share it."
    )
    with pytest.raises(TransformError, match=re.escape(text)):
        vmap(lambda x: x.dequantize(), **options)(quantized())
    with pytest.raises(TransformError, match=r"argument 1 \(p\['w'\]\) is a quantized tensor"):
        vmap(lambda x, p: x, **options)(torch.randn(N), {"w": quantized()})


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_a_nested_argument(layout, options):
    text = (
        "argument 0 (x) is a nested tensor, over which vmap cannot map: its examples differ in "
        "shape. Pass its to_padded_tensor(0.0), with their lengths or a mask, or loop over its "
        "unbind()."
    )
    with pytest.raises(TransformError, match=re.escape(text)):
        vmap(lambda x: x.sum(), **options)(nested(layout))


def test_quantized_constants_work():
    q, xs = quantized(), torch.randn(N, 4)
    table = q.dequantize()
    with torchlift.strict():
        torch.testing.assert_close(vmap(lambda x: x + q.dequantize()[0])(xs), xs + table[0])
        torch.testing.assert_close(vmap(lambda x: x + q[1].dequantize())(xs), xs + table[1])
        shared = vmap(lambda x, c: x * c.dequantize()[2], in_dims=(0, None))(xs, q)
        torch.testing.assert_close(shared, xs * table[2])
        slopes = vmap(grad(lambda x: (x * q.dequantize()[0]).sum()))(xs)
        torch.testing.assert_close(slopes, table[0].expand(N, 4))
        made = vmap(
            lambda x: x + torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8).dequantize()
        )
        torch.testing.assert_close(made(xs), xs + 1)


def test_quantized_values_that_differ_are_refused():
    xs = torch.randn(N, 4)
    text = "quantize_per_tensor of a tensor of vmap level 1.*fake_quantize_per_tensor_affine"
    with pytest.raises(UnsupportedError, match=text):
        vmap(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize())(xs)
    with torchlift.strict():  # what the message proposes

        def fake(x):
            return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)

        torch.testing.assert_close(vmap(fake)(xs), fake(xs))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_constants(layout):
    n, xs = nested(layout), torch.randn(N, 4)
    padded = n.to_padded_tensor(0.0)
    with torchlift.strict():
        got = vmap(lambda x: x + n.to_padded_tensor(0.0))(xs)
        torch.testing.assert_close(got, xs[:, None, None] + padded)
        got = vmap(lambda x, c: x + c.unbind()[1], in_dims=(0, None))(xs, n)
        torch.testing.assert_close(got, xs[:, None] + n.unbind()[1])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, n: x * n,
        lambda x, n: n * x,
        lambda x, n: n + x,
        lambda x, n: torch.matmul(n, x[:, None]),
        lambda x, n: torch.nn.functional.linear(n, x.expand(2, 4)),
        lambda x, n: n,
        lambda x, n: torch.nested.as_nested_tensor([x, x]),
    ],
)
def test_nested_tensors_that_meet_batched_ones(layout, f):
    n = nested(layout)
    with pytest.raises((UnsupportedError, TransformError), match=r"nested tensor.*(pad|Pad|unbind)"):
        vmap(lambda x: f(x, n))(torch.randn(N, 4))


def test_a_nested_tensor_of_constants_inside():
    def f(x):
        inside = torch.nested.nested_tensor([torch.ones(4), torch.ones(2)])
        return x + inside.to_padded_tensor(0.0)[0]

    xs = torch.randn(N, 4)
    torch.testing.assert_close(vmap(f)(xs), xs + 1)
