"""Modules as functions: functional_call, stack_module_state."""

from __future__ import annotations

import functools
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchlift import _C, _buffers
from torchlift._errors import TransformError


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: "Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]",
    args: Any = None,
    kwargs: "dict[str, Any] | None" = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
    mutate_buffers: "str | None" = None,
    buffer_modes: "Mapping[str, str] | str" = "per_row",
) -> Any:
    """Calls `module` with other parameters and buffers in place of its own.

    Args:
        parameter_and_buffer_dicts: a dict from names ("layer.weight") to tensors, or a sequence of
            such dicts with no name in common. What is not named stays the module's own.
        args: the arguments: a tuple, or one argument that is not a tuple.
        kwargs: keyword arguments.
        tie_weights: a tensor that the module holds under several names is replaced under all of
            them when one is given.
        strict: every parameter and buffer must be given, with its shape and dtype. Names that the module
            does not have are always errors.
        mutate_buffers: "return" leaves the given buffers alone and returns (output, buffers), with a dict
            of all buffers as they are after the call. Under vmap every example has its own, also of a
            buffer that is not mapped over: BatchNorm in training mode works.
        buffer_modes: what is returned for a buffer then: "per_row", what each example (row of the innermost
            vmap) wrote; "shared", the mean of that over the rows (integers: the largest), one for all; or
            "frozen", what was given. One of these for all buffers, or a dict from names of buffers
            ("bn1.running_mean") or of modules ("bn1", or "" for the whole) to them; the longest name that
            fits decides.

    Where the module fails and a given tensor has another shape or dtype than the module's own, the error
    has a note that names it.

    In-place changes that the module makes to its buffers reach the given tensors; a buffer it
    assigns anew is put in the dict. The module itself is not changed: other threads see its own tensors all
    the while, and may call it, directly or by functional_call with other tensors, without waiting. So do
    threads that the module's forward starts: they see its own, not the given ones.

    >>> import torch, torchlift
    >>> model = torch.nn.Linear(2, 1)
    >>> params = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    >>> torchlift.functional_call(model, params, torch.tensor([3., 4.]))
    tensor([7.])
    """
    dicts = parameter_and_buffer_dicts
    sources = _as_dicts(dicts)
    if mutate_buffers is not None:
        if mutate_buffers != "return":
            raise TransformError(
                f'functional_call: mutate_buffers must be "return" or None, got {mutate_buffers!r}.'
            )
        call = functools.partial(
            functional_call, module, args=args, kwargs=kwargs, tie_weights=tie_weights, strict=strict
        )
        return _buffers.call_returning_buffers(call, module, sources, buffer_modes)
    if args is None:
        args = ()
    elif not isinstance(args, tuple):
        args = (args,)
    if strict:
        _check_strict(module, sources, tie_weights)
    try:
        result = _C.functional_call(module, sources, args, kwargs, tie_weights)
    except Exception as error:
        _note_unlike(error, module, sources)
        raise
    if result is not NotImplemented:
        return result
    merged = {name: tensor for source in sources for name, tensor in source.items()}
    return torch.nn.utils.stateless._functional_call(
        module, merged, args, kwargs, tie_weights=tie_weights, strict=strict
    )


def _note_unlike(
    error: Exception, module: nn.Module, sources: "tuple[dict[str, Tensor], ...]"
) -> None:
    """Says in an error which of the given tensors are not like the module's own."""
    lines = []
    own: "dict[str, Tensor]" = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    for source in sources:
        for name, value in source.items():
            mine = own.get(name)
            if not isinstance(value, Tensor) or mine is None or nn.parameter.is_lazy(mine):
                continue
            if (value.shape, value.dtype) != (mine.shape, mine.dtype):
                lines.append(
                    f"{name!r} is a tensor of shape {list(mine.shape)}, {mine.dtype}, in the module; given was "
                    f"one of shape {list(value.shape)}, {value.dtype}."
                )
    if lines and "given was" not in str(error):
        text = f"functional_call of {type(module).__name__}: " + " ".join(lines)
        if hasattr(error, "add_note"):
            if text not in getattr(error, "__notes__", ()):
                error.add_note(text)
        else:  # Python 3.10
            error.args = (f"{error}\n{text}", *error.args[1:])


def _as_dicts(given: Any) -> "tuple[dict[str, Tensor], ...]":
    if isinstance(given, dict):
        return (given,)
    if isinstance(given, Mapping):
        return (dict(given),)
    if not isinstance(given, Sequence):
        raise TransformError(
            f"functional_call: expected a dict of parameters and buffers, or a sequence of dicts, "
            f"got {type(given).__name__}."
        )
    sources = tuple(source if isinstance(source, dict) else dict(source) for source in given)
    seen: "set[str]" = set()
    for source in sources:
        for name in source:
            if name in seen:
                raise TransformError(
                    f"functional_call: {name!r} is in more than one of the dicts. Give each name once."
                )
            seen.add(name)
    return sources


def _check_strict(
    module: nn.Module, sources: "tuple[dict[str, Tensor], ...]", tie_weights: bool
) -> None:
    own = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    given = {name for source in sources for name in source}
    tied = {id(own[name]) for name in given if name in own} if tie_weights else set()
    missing = [name for name, t in own.items() if name not in given and id(t) not in tied]
    unexpected = sorted(given - own.keys())
    if missing or unexpected:
        raise TransformError(
            f"functional_call of {type(module).__name__} with strict=True: "
            f"missing names {missing}, unexpected names {unexpected}."
        )
    for source in sources:
        for name, value in source.items():
            if isinstance(value, Tensor) and (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
                raise TransformError(
                    f"functional_call of {type(module).__name__} with strict=True: {name!r} is a tensor of "
                    f"shape {list(own[name].shape)}, {own[name].dtype}, got one of shape "
                    f"{list(value.shape)}, {value.dtype}."
                )


def stack_module_state(
    models: "Sequence[nn.Module] | nn.ModuleList",
) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """The parameters and buffers of several models of one kind, stacked along a new first dim.

    Returns (params, buffers), to be mapped over: `vmap(lambda p, b, x: functional_call(model, (p,
    b), x), in_dims=(0, 0, None))`. Parameters require grad where the models' do.

    >>> import torch, torchlift
    >>> models = [torch.nn.Linear(2, 1) for _ in range(3)]
    >>> params, buffers = torchlift.stack_module_state(models)
    >>> params["weight"].shape
    torch.Size([3, 1, 2])
    """
    models = list(models)
    if not models:
        raise TransformError("stack_module_state: expected at least one model, got none.")
    if any(model.training is not models[0].training for model in models):
        raise TransformError(
            "stack_module_state: expected all models in training mode or all in eval mode. Call "
            ".train() or .eval() on each."
        )
    if any(type(model) is not type(models[0]) for model in models):
        kinds = ", ".join(sorted({type(model).__name__ for model in models}))
        raise TransformError(f"stack_module_state: expected models of one class, got {kinds}.")
    params = _stack("parameter", [dict(model.named_parameters()) for model in models])
    buffers = _stack("buffer", [dict(model.named_buffers()) for model in models])
    return params, buffers


def _stack(kind: str, states: "list[dict[str, Tensor]]") -> "dict[str, Tensor]":
    stacked = {}
    for name in dict.fromkeys(name for state in states for name in state):
        tensors = [state.get(name) for state in states]
        shapes = [None if t is None else list(t.shape) for t in tensors]
        if any(shape != shapes[0] for shape in shapes):
            raise TransformError(
                f"stack_module_state: {kind} {name!r} has shapes {shapes} in the models. They must "
                f"be built alike."
            )
        dtypes = [t.dtype for t in tensors]  # type: ignore[union-attr]
        if any(dtype != dtypes[0] for dtype in dtypes):
            raise TransformError(
                f"stack_module_state: {kind} {name!r} has dtypes {dtypes} in the models. Convert them to one."
            )
        requires_grad = [bool(t.requires_grad) for t in tensors]  # type: ignore[union-attr]
        if any(r is not requires_grad[0] for r in requires_grad):
            raise TransformError(
                f"stack_module_state: {kind} {name!r} requires grad in some models and not in others."
            )
        stacked[name] = (
            torch.stack(tensors).detach().requires_grad_(requires_grad[0])  # type: ignore[arg-type]
        )
    return stacked
