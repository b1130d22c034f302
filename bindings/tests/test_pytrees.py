"""Pytrees: optree's nodes, and torch's own."""

import collections
import dataclasses

import optree
import pytest
import torch
from torch.utils import _pytree as torch_pytree

from torchlift import grad, vjp, vmap

Point = collections.namedtuple("Point", ["x", "y"])


@dataclasses.dataclass
class TorchNode:
    w: torch.Tensor
    b: torch.Tensor


torch_pytree.register_dataclass(TorchNode)


@optree.dataclasses.dataclass(namespace="torchlift")
class OptreeNode:
    w: torch.Tensor
    name: str = optree.dataclasses.field(pytree_node=False, default="n")


class Custom:
    def __init__(self, a, b):
        self.a, self.b = a, b


torch_pytree.register_pytree_node(
    Custom, lambda c: ([c.a, c.b], None), lambda children, _: Custom(*children)
)

A, B = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)


def first_two(tree):
    leaves = torch_pytree.tree_leaves(tree) if not isinstance(tree, OptreeNode) else [tree.w]
    return leaves


@pytest.mark.parametrize(
    "make",
    (
        lambda a, b: {"b": b, "a": a},
        lambda a, b: collections.OrderedDict(b=b, a=a),
        lambda a, b: collections.defaultdict(list, b=b, a=a),
        lambda a, b: Point(a, b),
        lambda a, b: [a, (b, [])],
        lambda a, b: collections.deque([a, b]),
        lambda a, b: TorchNode(a, b),
        lambda a, b: Custom(a, b),
        lambda a, b: OptreeNode(a, "tag"),
        lambda a, b: {"outer": [TorchNode(a, b), {"in": Custom(a, b)}]},
    ),
    ids=("dict", "OrderedDict", "defaultdict", "namedtuple", "nested", "deque", "dataclass", "custom",
         "optree", "mixed"),
)
class TestNodes:
    def test_through_vmap(self, make):
        out = vmap(lambda t: t)(make(A, B))
        assert type(out) is type(make(A, B))
        for got, want in zip(first_two(out), first_two(make(A, B))):
            torch.testing.assert_close(got, want)

    def test_vmap_sees_one_example(self, make):
        def f(tree):
            assert all(leaf.shape == (2,) for leaf in first_two(tree))
            return first_two(tree)[0] * 2

        want = first_two(make(A, B))[0] * 2
        torch.testing.assert_close(vmap(f)(make(A, B)), want)

    def test_gradient_has_the_structure(self, make):
        got = grad(lambda t: sum((leaf**2).sum() for leaf in first_two(t)))(make(A, B))
        assert type(got) is type(make(A, B))
        for g, leaf in zip(first_two(got), first_two(make(A, B))):
            torch.testing.assert_close(g, 2 * leaf)

    def test_vjp(self, make):
        out, pull = vjp(lambda t: t, make(A, B))
        (got,) = pull(make(torch.ones_like(A), torch.ones_like(B)))
        assert type(out) is type(got) is type(make(A, B))
        assert all(torch.equal(g, torch.ones_like(g)) for g in first_two(got))

    def test_vmap_of_grad(self, make):
        got = vmap(grad(lambda t: sum((leaf**2).sum() for leaf in first_two(t))))(make(A, B))
        for g, leaf in zip(first_two(got), first_two(make(A, B))):
            torch.testing.assert_close(g, 2 * leaf)


def test_key_order_is_kept():
    for tree in ({"b": A, "a": B}, collections.OrderedDict(b=A, a=B)):
        assert list(vmap(lambda t: t)(tree)) == ["b", "a"]
        assert list(grad(lambda t: t["a"].sum() + t["b"].sum())(tree)) == ["b", "a"]
        assert list(vjp(lambda t: t, tree)[0]) == ["b", "a"]


def test_static_fields_are_kept():
    assert vmap(lambda t: t)(OptreeNode(A, "tag")).name == "tag"


def test_in_dims_for_torch_nodes():
    got = vmap(lambda t, x: t.w * x, in_dims=(None, 0))(TorchNode(torch.ones(2), B), A)
    torch.testing.assert_close(got, A)
    got = vmap(lambda t: t.w * t.b, in_dims=(TorchNode(0, None),))(TorchNode(A, torch.ones(2)))
    torch.testing.assert_close(got, A)


def test_named_tuple_results_of_torch():
    values, indices = vmap(lambda x: torch.max(x, 0))(A)
    torch.testing.assert_close(values, A.max(1).values)
    assert torch.equal(indices, A.max(1).indices)


def test_argnums_into_nodes():
    got = grad(lambda p: (p.x * p.y).sum(), argnums=(0, "y"))(Point(A, B))
    torch.testing.assert_close(got, A)
    got = grad(lambda p: (p.w * p.b).sum(), argnums=(0, "w"))(TorchNode(A, B))
    torch.testing.assert_close(got, B)
    got = grad(lambda p: (p[0]["w"] * p[1]).sum(), argnums=((0, 0, "w"), (0, 1)))([{"w": A}, B])
    torch.testing.assert_close(got, (B, A))


def test_out_dims_for_nodes():
    got = vmap(lambda x: Point(x, x), out_dims=Point(1, 0))(A)
    assert got.x.shape == (2, 3) and got.y.shape == (3, 2)
