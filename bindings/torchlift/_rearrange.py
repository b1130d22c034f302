"""rearrange: reshapes and permutes a tensor by names of its dims, as einops and torch.func."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from torchlift._errors import TransformError

_TOKENS = re.compile(r"\s*(\(|\)|\.\.\.|[A-Za-z_][A-Za-z0-9_]*|\d+)")


@dataclass
class _Side:
    """One side of a pattern: dims, each a group of names; "..." is a group of its own."""

    groups: "list[list[str]]"

    def names(self) -> "list[str]":
        return [name for group in self.groups for name in group]


def _parse(pattern: str, text: str) -> _Side:
    groups: "list[list[str]]" = []
    inside: "list[str] | None" = None
    position = 0
    while text[position:].strip():
        match = _TOKENS.match(text, position)
        if match is None:
            raise _error(pattern, f"{text[position:].strip()[0]!r} is not part of a pattern")
        position, token = match.end(), match.group(1)
        if token == "(":
            if inside is not None:
                raise _error(pattern, "a parenthesis stands within another")
            inside = []
        elif token == ")":
            if inside is None:
                raise _error(pattern, "a parenthesis is closed that was not opened")
            groups.append(inside)
            inside = None
        elif token.isdigit() and token != "1":
            raise _error(pattern, f"the only number allowed is 1, got {token}")
        elif inside is not None:
            inside.extend([] if token == "1" else [token])
        else:
            groups.append([] if token == "1" else [token])
    if inside is not None:
        raise _error(pattern, "a parenthesis is not closed")
    side = _Side(groups)
    repeated = [name for name in side.names() if side.names().count(name) > 1]
    if repeated:
        raise _error(pattern, f"{repeated[0]!r} stands twice on one side")
    return side


def _error(pattern: str, what: str) -> TransformError:
    return TransformError(f"[rearrange] pattern {pattern!r}: {what}.")


def rearrange(
    tensor: "torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]",
    pattern: str,
    **axes_lengths: int,
) -> torch.Tensor:
    """Transposes, splits and joins dims by name.

    Args:
        tensor: a tensor, or a list of tensors, which are stacked along a new first dim.
        pattern: `"b (h w) c -> b c h w"`: the same names on both sides; a group in parentheses is
            one dim; `...` stands for any dims; `1` (or `()`) is a dim of size 1.
        axes_lengths: sizes of names; of each group all but one.

    >>> import torch, torchlift
    >>> torchlift.rearrange(torch.zeros(2, 12, 3), "b (h w) c -> b c h w", h=3).shape
    torch.Size([2, 3, 3, 4])
    """
    if not isinstance(tensor, torch.Tensor):
        tensor = torch.stack(list(tensor))
    left_text, arrow, right_text = pattern.partition("->")
    if not arrow or "->" in right_text:
        raise _error(pattern, "there must be one '->'")
    left, right = _parse(pattern, left_text), _parse(pattern, right_text)
    if set(left.names()) != set(right.names()):
        (odd, *_) = sorted(set(left.names()) ^ set(right.names()))
        raise _error(pattern, f"{odd!r} stands on one side only")
    unknown = [name for name in axes_lengths if name not in left.names()]
    if unknown:
        raise _error(pattern, f"a size is given for {unknown[0]!r}, which is not in it")
    left, right = _without_dots(pattern, left, right, tensor.dim())
    sizes = _sizes(pattern, left, tensor, axes_lengths)
    names = left.names()
    split = tensor.reshape([sizes[name] for name in names])
    permuted = split.permute([names.index(name) for name in right.names()])
    out: "list[int]" = []
    for group in right.groups:
        size = 1
        for name in group:
            size *= sizes[name]
        out.append(size)
    return permuted.reshape(out)


def _without_dots(
    pattern: str, left: _Side, right: _Side, dim: int
) -> "tuple[_Side, _Side]":
    """Both sides with names in place of "..."."""
    if ["..."] not in left.groups:
        if "..." in left.names():
            raise _error(pattern, "'...' on the left must not be in parentheses")
        if len(left.groups) != dim:
            raise _error(pattern, f"its left side has {len(left.groups)} dims, the tensor {dim}")
        return left, right
    rest = dim - len(left.groups) + 1
    if rest < 0:
        raise _error(pattern, f"its left side has {len(left.groups) - 1} dims, the tensor {dim}")
    dots = [f"...{i}" for i in range(rest)]

    def expanded(side: _Side) -> _Side:
        groups: "list[list[str]]" = []
        for group in side.groups:
            if group == ["..."]:
                groups.extend([name] for name in dots)
            else:
                groups.append([n for name in group for n in (dots if name == "..." else [name])])
        return _Side(groups)

    return expanded(left), expanded(right)


def _sizes(
    pattern: str, left: _Side, tensor: torch.Tensor, given: "dict[str, int]"
) -> "dict[str, int]":
    sizes = dict(given)
    for dim, group in enumerate(left.groups):
        size, known = tensor.size(dim), 1
        open_names = [name for name in group if name not in given]
        for name in group:
            known *= given.get(name, 1)
        if len(open_names) > 1:
            raise _error(pattern, f"give the sizes of all but one of {', '.join(group)}")
        if open_names:
            if known == 0 or size % known:
                raise _error(pattern, f"dim {dim} has size {size}, no multiple of {known}")
            sizes[open_names[0]] = size // known
        elif known != size:
            raise _error(pattern, f"dim {dim} has size {size}, expected {known}")
    return sizes
