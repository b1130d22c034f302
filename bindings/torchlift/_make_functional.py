"""Modules taken apart: make_functional, combine_state_for_ensemble, extract_state, load_state.

make_functional and its kin have the signatures and results of functorch 0.2. New code has less to carry
around with functional_call and extract_state, which work on dicts of names.
"""

from __future__ import annotations

import copy
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchlift._errors import TransformError
from torchlift._functional import functional_call, stack_module_state


class _Functional:
    """A module without state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.stateless_model = model
        self.param_names = tuple(name for name, _ in model.named_parameters())
        self.buffer_names = tuple(name for name, _ in model.named_buffers())

    def _named(self, kind: str, names: "tuple[str, ...]", given: Any) -> "dict[str, Tensor]":
        values = tuple(given)
        if len(values) != len(names):
            raise TransformError(
                f"{self!r}: expected {len(names)} {kind}, got {len(values)}. Give one for each of "
                f"{list(names)}."
            )
        return dict(zip(names, values))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.stateless_model).__name__})"


class FunctionalModule(_Functional):
    """f(params, *args, **kwargs): what make_functional returns.

    >>> import torch, torchlift
    >>> f, params = torchlift.make_functional(torch.nn.Linear(2, 1))
    >>> f
    FunctionalModule(Linear)
    """

    def __call__(self, params: "Sequence[Tensor]", *args: Any, **kwargs: Any) -> Any:
        state = self._named("parameters", self.param_names, params)
        return functional_call(self.stateless_model, state, args, kwargs)


class FunctionalModuleWithBuffers(_Functional):
    """f(params, buffers, *args, **kwargs): what make_functional_with_buffers returns.

    >>> import torch, torchlift
    >>> f, params, buffers = torchlift.make_functional_with_buffers(torch.nn.BatchNorm1d(3))
    >>> f.buffer_names
    ('running_mean', 'running_var', 'num_batches_tracked')
    """

    def __call__(
        self, params: "Sequence[Tensor]", buffers: "Sequence[Tensor]", *args: Any, **kwargs: Any
    ) -> Any:
        state = self._named("parameters", self.param_names, params)
        state.update(self._named("buffers", self.buffer_names, buffers))
        return functional_call(self.stateless_model, state, args, kwargs)


def _copies(model: nn.Module, disable_autograd_tracking: bool) -> Any:
    """(a copy of the model, its parameters, its buffers)."""
    stateless = copy.deepcopy(model)
    params = tuple(stateless.parameters())
    if disable_autograd_tracking:
        for param in params:
            param.requires_grad_(False)
    return stateless, params, tuple(stateless.buffers())


def make_functional(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> "tuple[FunctionalModule, tuple[Tensor, ...]]":
    """(f, params) with f(params, *args) what model(*args) is. The model is copied.

    Args:
        disable_autograd_tracking: params do not require grad. Transforms do not need it.

    A model with buffers is an error: use make_functional_with_buffers.

    >>> import torch, torchlift
    >>> f, params = torchlift.make_functional(torch.nn.Linear(2, 1))
    >>> f([torch.ones(1, 2), torch.zeros(1)], torch.tensor([3., 4.]))
    tensor([7.])
    """
    if next(model.buffers(), None) is not None:
        raise TransformError(
            f"make_functional({type(model).__name__}): the model has buffers. Use "
            f"make_functional_with_buffers(model) instead."
        )
    stateless, params, _ = _copies(model, disable_autograd_tracking)
    return FunctionalModule(stateless), params


def make_functional_with_buffers(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> "tuple[FunctionalModuleWithBuffers, tuple[Tensor, ...], tuple[Tensor, ...]]":
    """(f, params, buffers) with f(params, buffers, *args) what model(*args) is. The model is copied.

    >>> import torch, torchlift
    >>> f, params, buffers = torchlift.make_functional_with_buffers(torch.nn.BatchNorm1d(3).eval())
    >>> f(params, buffers, torch.zeros(1, 3)).tolist()
    [[0.0, 0.0, 0.0]]
    """
    stateless, params, buffers = _copies(model, disable_autograd_tracking)
    return FunctionalModuleWithBuffers(stateless), params, buffers


def combine_state_for_ensemble(
    models: "Sequence[nn.Module] | nn.ModuleList",
) -> "tuple[FunctionalModuleWithBuffers, tuple[Tensor, ...], tuple[Tensor, ...]]":
    """(f, params, buffers) of several models of one kind, stacked along a new first dim.

    `vmap(f, in_dims=(0, 0, None))(params, buffers, x)` runs them all on x. The params do not require grad,
    as in functorch; call requires_grad_() on them, or use Ensemble, to train.

    >>> import torch, torchlift
    >>> models = [torch.nn.Linear(2, 1) for _ in range(3)]
    >>> f, params, buffers = torchlift.combine_state_for_ensemble(models)
    >>> torchlift.vmap(f, in_dims=(0, 0, None))(params, buffers, torch.ones(2)).shape
    torch.Size([3, 1])
    """
    models = list(models)
    params, buffers = stack_module_state(models)
    stateless = copy.deepcopy(models[0])
    func = FunctionalModuleWithBuffers(stateless)
    detached = [tuple(t.detach() for t in state.values()) for state in (params, buffers)]
    return func, detached[0], detached[1]


def extract_state(
    module: nn.Module, *, detach: bool = True
) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """(params, buffers) of a module as dicts from names to tensors that share memory with it.

    A tensor the module holds under several names (a tied weight) is there once. With detach=False they
    are the module's very tensors, with their requires_grad.

    >>> import torch, torchlift
    >>> params, buffers = torchlift.extract_state(torch.nn.Linear(2, 1))
    >>> list(params), params["weight"].requires_grad
    (['weight', 'bias'], False)
    """
    params: "dict[str, Tensor]" = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    if detach:
        params = {name: t.detach() for name, t in params.items()}
        buffers = {name: t.detach() for name, t in buffers.items()}
    return params, buffers


def load_state(
    module: nn.Module,
    state: "Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]",
    *,
    strict: bool = True,
) -> None:
    """Copies a state (a dict of names, or several) into the module's own tensors, in place.

    Nothing is changed when a name is unknown, missing (with strict), of another shape or dtype, or when two names
    of one tensor have different values: TransformError.

    >>> import torch, torchlift
    >>> model = torch.nn.Linear(1, 1)
    >>> torchlift.load_state(model, {"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    >>> model(torch.tensor([2.0])).item()
    2.0
    """
    sources = [state] if isinstance(state, Mapping) else list(state)
    merged = {name: value for source in sources for name, value in source.items()}
    own: "dict[str, Tensor]" = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    given = {id(own[name]) for name in merged if name in own}
    missing = [name for name, t in own.items() if id(t) not in given]
    unexpected = sorted(merged.keys() - own.keys())
    kind = type(module).__name__
    if unexpected or (strict and missing):
        raise TransformError(
            f"load_state of {kind}: missing names {missing if strict else []}, unexpected names "
            f"{unexpected}."
        )
    for name, value in merged.items():
        if value.shape != own[name].shape:
            raise TransformError(
                f"load_state of {kind}: {name!r} has shape {list(own[name].shape)}, got "
                f"{list(value.shape)}."
            )
        if value.dtype != own[name].dtype:
            raise TransformError(
                f"load_state of {kind}: {name!r} has dtype {own[name].dtype}, got {value.dtype}. Convert it by to()."
            )
    given_as: "dict[int, str]" = {}
    for name, value in merged.items():
        first = given_as.setdefault(id(own[name]), name)
        if merged[first] is not value and not torch.equal(merged[first], value):
            raise TransformError(
                f"load_state of {kind}: {first!r} and {name!r} are one tensor in the module, but got different "
                f"values. Give one of them."
            )
    with torch.no_grad():
        for name, value in merged.items():
            own[name].copy_(value)
