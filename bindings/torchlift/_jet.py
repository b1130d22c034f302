"""jet: Taylor mode."""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._forward import output_runner
from torchlift._grad import _Call, _structure
from torchlift._names import argument_label, describe


def jet(
    func: Callable[..., Any],
    primals: "tuple[Any, ...]",
    series: "tuple[Any, ...]",
    *,
    has_aux: bool = False,
) -> "tuple[Any, ...]":
    """Runs `func(*primals)` and pushes derivatives of the primals along a curve forward, to any order.

    The curve x(t) goes through the primals at t = 0, and the series are its derivatives there. What
    comes out are the derivatives of func(x(t)): those that a nest of jvps would compute, in one run
    of func and without the nest's exponential cost (Taylor-mode differentiation).

    Args:
        func: a function of tensors or pytrees of tensors, which returns the like. With has_aux, it
            returns a pair (output, aux).
        primals: a tuple of its arguments; all of their leaves are tensors of a floating or complex
            dtype.
        series: a tuple of the same structure. For a tensor of shape [...] it has one of shape
            [K, ...] and the same dtype: the derivatives of order 1, 2, ..., K, stacked. K is the
            same for all of them. None in place of a tensor or of a whole argument: it does not
            depend on t.
        has_aux: whether `func` returns (output, aux).

    Returns:
        (output, series), or (output, series, aux). The series have the structure of the output; each
        tensor of shape [...] has one of shape [K, ...]. They are derivatives: not divided by j!.

    What `func` computes under no_grad or detaches is a constant, as it is to jvp; so is what it
    draws at random. `func` gets copies of the primals, which it may write into.

    Raises:
        TransformError (a ValueError): for primals or outputs that are no such tensors, and for
            series that do not fit them.
        UnsupportedError: for an operator without a derivative formula of forward mode, and for
            functions with derivatives of their own (torch.autograd.Function, custom_jvp...).

    >>> import torch, torchlift
    >>> x, v = torch.tensor(0.), torch.tensor([1., 0., 0.])  # x(t) = t
    >>> torchlift.jet(torch.sin, (x,), (v,))
    (tensor(0.), tensor([ 1.,  0., -1.]))
    """
    call = _Call("jet", func, primals if isinstance(primals, tuple) else (primals,), {})
    leaves, given, order = _check_series(call, primals, series)
    spec = _pytree.flatten(primals)[1]
    shape: "list[Any]" = []
    run = output_runner(call, lambda values: func(*spec.unflatten(values)), has_aux, shape)
    seen, expanded = _C.jet_leaves(run, leaves, given, order)
    count, output_spec, aux_spec = shape
    filled = []
    for value, each in zip(seen, expanded):
        if each is None:
            with torch.no_grad():
                each = value.new_zeros([order, *value.shape])
        filled.append(each)
    output, derivatives = output_spec.unflatten(seen[:count]), output_spec.unflatten(filled)
    if has_aux:
        return output, derivatives, aux_spec.unflatten(seen[count:])
    return output, derivatives


def _check_series(
    call: _Call, primals: Any, series: Any
) -> "tuple[list[torch.Tensor], list[torch.Tensor | None], int]":
    """The leaves of both, and the order."""
    for name, value in (("primals", primals), ("series", series)):
        if not isinstance(value, tuple):
            call.fail(
                f"{name} must be a tuple, with an entry for each argument of the function, got "
                f"{describe(value)}. For one argument pass ({name.rstrip('s')},)."
            )
    if not primals:
        call.fail("there are no primals. Pass the arguments to expand.")
    leaves, spec = _pytree.flatten(primals)
    call.check_primals(leaves, lambda: _pytree.flatten_with_path(primals)[0])
    given, given_spec = _pytree.flatten(_with_constants(primals, series))
    if given_spec != spec:
        call.fail(
            f"the series have structure {_structure(given_spec)}, but the primals have structure "
            f"{_structure(spec)}. Give one tensor, of the derivatives stacked, for each tensor of "
            f"the primals; None for a constant."
        )
    order: "int | None" = None
    first = ""
    for index, (primal, each) in enumerate(zip(leaves, given)):
        if each is None:
            continue
        _check_one(call, primals, index, primal, each)
        if order is not None and each.shape[0] != order:
            call.fail(
                f"{_place(call, primals, index)} has {each.shape[0]} derivatives, but {first} has "
                f"{order}. All series must have the same order: pad the shorter one with zeros."
            )
        if order is None:
            order, first = each.shape[0], _place(call, primals, index)
    if order is None:
        call.fail(
            "there is no series, so the order is not known. Give the derivatives of at least one "
            "primal, as a tensor of shape [order, ...the primal's shape]."
        )
    return leaves, given, order


def _with_constants(primals: "tuple[Any, ...]", series: "tuple[Any, ...]") -> "tuple[Any, ...]":
    """series, with None for each tensor of an argument for which there is None."""
    if len(primals) != len(series):
        return series
    return tuple(
        _pytree.tree_map(lambda leaf: None, primal) if each is None else each
        for primal, each in zip(primals, series)
    )


def _place(call: _Call, primals: Any, index: int) -> str:
    argument, *path = _pytree.flatten_with_path(primals)[0][index]
    return "the series of " + argument_label(call.func, argument, tuple(path))


def _check_one(
    call: _Call, primals: Any, index: int, primal: torch.Tensor, each: Any
) -> None:
    if (
        isinstance(each, torch.Tensor)
        and each.dim() == primal.dim() + 1
        and each.shape[1:] == primal.shape
        and each.dtype == primal.dtype
        and each.device == primal.device
    ):
        return
    where = _place(call, primals, index)
    wanted = f"shape {['K', *primal.shape]} and dtype {primal.dtype}".replace("'", "")
    if not isinstance(each, torch.Tensor):
        call.fail(
            f"{where} is {describe(each)}, but must be a tensor of {wanted}: the derivatives of "
            f"order 1, 2, ..., K, stacked (torch.stack)."
        )
    if each.device != primal.device:
        call.fail(f"{where} is on {each.device}, but the primal is on {primal.device}.")
    fix = (
        f"Convert it with .to({primal.dtype})."
        if each.shape[1:] == primal.shape and each.dim() == primal.dim() + 1
        else "Stack the derivatives of order 1, 2, ..., K in a new first dim (torch.stack)."
    )
    call.fail(
        f"{where} has shape {list(each.shape)} and dtype {each.dtype}, but must have {wanted}. {fix}"
    )
