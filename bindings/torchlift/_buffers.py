"""Buffers as results of functional_call."""

from __future__ import annotations

from typing import Any, Callable, Mapping

from torch import Tensor, nn

from torchlift import _C
from torchlift._errors import TransformError

_MODES = ("per_row", "shared", "frozen")


def call_returning_buffers(
    call: "Callable[[Any], Any]",
    module: nn.Module,
    sources: "tuple[dict[str, Tensor], ...]",
    modes: "Mapping[str, str] | str",
) -> "tuple[Any, dict[str, Tensor]]":
    """(output, buffers). call(dicts) runs the module; it is given copies of all buffers."""
    names = _names(module)
    mode_of = _modes(module, names, modes)
    given: "dict[str, Tensor]" = dict(module.named_buffers())
    for source in sources:
        for name, value in source.items():
            if name in names and value is not None:
                given[names[name]] = value
    copies = {name: _C.copy_per_row(value) for name, value in given.items()}
    others = tuple({k: v for k, v in source.items() if k not in names} for source in sources)
    output = call((*others, copies))
    return output, {name: _result(mode_of[name], given[name], copies[name]) for name in given}


def _names(module: nn.Module) -> "dict[str, str]":
    """From every name of a buffer to the first name of the same tensor."""
    first = {id(t): name for name, t in module.named_buffers()}
    return {name: first[id(t)] for name, t in module.named_buffers(remove_duplicate=False)}


def _result(mode: str, given: Tensor, copy: Tensor) -> Tensor:
    if mode == "frozen":
        return given
    return _C.share_over_rows(copy) if mode == "shared" else copy


def _modes(
    module: nn.Module, names: "dict[str, str]", modes: "Mapping[str, str] | str"
) -> "dict[str, str]":
    """The mode of each buffer."""
    wanted = {"": modes} if isinstance(modes, str) else dict(modes)
    found = {name: ("", "per_row") for name in names}
    for part, mode in wanted.items():
        if mode not in _MODES:
            raise TransformError(
                f"functional_call: buffer_modes[{part!r}] must be one of {list(_MODES)}, got {mode!r}."
            )
        inside = [n for n in names if n == part or part == "" or n.startswith(part + ".")]
        if not inside and part != "":
            raise TransformError(
                f"functional_call: buffer_modes names {part!r}, but {type(module).__name__} has no buffer of "
                f"that name and no module of that name with buffers."
            )
        for name in inside:
            if len(part) >= len(found[name][0]):
                found[name] = (part, mode)
    return {name: mode for name, (_, mode) in found.items()}
