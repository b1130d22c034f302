"""Pytrees: optree, and what torch.utils._pytree knows besides.

None is a leaf, as in torch.utils._pytree. optree is imported on first use: most calls take the path
in C++ that needs no pytrees, and `import torchlift` stays cheap.
"""

from __future__ import annotations

import threading
from typing import Any, Callable

import torch
from torch.utils import _pytree as torch_pytree

_NAMESPACE = "torchlift"
_lock = threading.Lock()
_SCALARS = (torch.Tensor, int, float, bool, complex, str, type(None), torch.dtype, torch.device)


def _optree() -> Any:
    import optree

    return optree


def _names_of(node: Any, tree: Any, count: int) -> "tuple[Any, ...]":
    """What the children of a node are called: the fields of a dataclass, else 0, 1..."""
    if getattr(node, "flatten_with_keys_fn", None) is None:
        return tuple(range(count))
    keys = [key for key, _ in node.flatten_with_keys_fn(tree)[0]]
    return tuple(getattr(key, "name", i) for i, key in enumerate(keys))


def _register(cls: type) -> None:
    """Teaches optree a node type of torch.utils._pytree, once."""
    node = torch_pytree.SUPPORTED_NODES[cls]

    def flatten(tree: Any) -> "tuple[Any, Any, Any]":
        children, context = node.flatten_fn(tree)
        children = tuple(children)
        return children, _Context(context), _names_of(node, tree, len(children))

    def unflatten(context: Any, children: Any) -> Any:
        return node.unflatten_fn(list(children), context.value)

    with _lock:
        try:
            _optree().register_pytree_node(cls, flatten, unflatten, namespace=_NAMESPACE)
        except ValueError:
            pass  # Another thread was faster.


class _Context:
    """optree compares contexts when it compares structures; a torch context may be of any type."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return repr(self.value)


def _learn(leaves: "list[Any]") -> bool:
    """Registers the types among the leaves that torch would take apart; False if there are none."""
    unknown = {
        type(leaf)
        for leaf in leaves
        if not isinstance(leaf, _SCALARS) and type(leaf) in torch_pytree.SUPPORTED_NODES
    }
    for cls in unknown:
        _register(cls)
    return bool(unknown)


class _Leaf:
    """The treespec of a leaf, without optree."""

    @staticmethod
    def unflatten(leaves: "list[Any]") -> Any:
        return leaves[0]


LEAF = _Leaf()


def flatten(tree: Any) -> "tuple[list[Any], Any]":
    """(leaves, treespec); the treespec has unflatten(leaves)."""
    while True:
        leaves, spec = _optree().tree_flatten(tree, none_is_leaf=True, namespace=_NAMESPACE)
        if not _learn(leaves):
            return leaves, spec


def flatten_with_path(tree: Any) -> "tuple[list[tuple[Any, ...]], list[Any], Any]":
    """(paths, leaves, treespec)."""
    flatten(tree)
    return _optree().tree_flatten_with_path(tree, none_is_leaf=True, namespace=_NAMESPACE)


def flatten_one_level(tree: Any) -> "tuple[list[Any], list[Any]] | None":
    """(children, entries) of a node; None for a leaf."""
    flatten(tree)
    optree = _optree()
    if optree.tree_is_leaf(tree, none_is_leaf=True, namespace=_NAMESPACE):
        return None
    one = optree.tree_flatten_one_level(tree, none_is_leaf=True, namespace=_NAMESPACE)
    return list(one[0]), list(one[2])


def tree_map(function: Callable[..., Any], tree: Any) -> Any:
    leaves, spec = flatten(tree)
    return spec.unflatten([function(leaf) for leaf in leaves])


def format_path(path: "tuple[Any, ...]") -> str:
    """`['w'][0]` for ('w', 0)."""
    return "".join(f"[{entry!r}]" for entry in path)


class PrefixError(Exception):
    """`prefix` does not fit a tree, at `path`."""

    def __init__(self, path: "tuple[Any, ...]", prefix: Any, tree: Any) -> None:
        super().__init__(path, prefix, tree)
        self.path, self.prefix, self.tree = path, prefix, tree


def _is_none_field(node: Any, entry: Any) -> bool:
    return isinstance(entry, str) and getattr(node, entry, node) is None


def broadcast_prefix(
    prefix: Any, tree: Any, path: "tuple[Any, ...]" = ()
) -> "list[tuple[tuple[Any, ...], Any, Any, bool]]":
    """For every leaf of tree: (its path, the leaf of prefix above it, it, whether they are level).

    A leaf of prefix (an int or None) stands for the whole subtree in its place.
    """
    if prefix is None or isinstance(prefix, int):
        if type(tree) is torch.Tensor:
            return [(path, prefix, tree, True)]
        paths, leaves, _ = flatten_with_path(tree)
        return [(path + below, prefix, leaf, not below) for below, leaf in zip(paths, leaves)]
    dims = flatten_one_level(prefix)
    children = flatten_one_level(tree)
    same_kind = type(prefix) is type(tree) or {type(prefix), type(tree)} <= {list, tuple}
    mapping_like = isinstance(prefix, dict) and isinstance(tree, dict)
    if dims is None or children is None or not (same_kind or mapping_like):
        raise PrefixError(path, prefix, tree)
    by_entry = dict(zip(dims[1], dims[0]))
    # torch leaves fields that are None out of a dataclass's children.
    absent = [entry for entry in children[1] if entry not in by_entry]
    if type(prefix) is type(tree) and all(_is_none_field(prefix, entry) for entry in absent):
        by_entry.update(dict.fromkeys(absent))
    if set(by_entry) != set(children[1]):
        raise PrefixError(path, prefix, tree)
    found = []
    for child, entry in zip(*children):
        found += broadcast_prefix(by_entry[entry], child, (*path, entry))
    return found
