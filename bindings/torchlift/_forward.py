"""jvp and linearize."""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._grad import _Call, _structure
from torchlift._names import argument_label, describe


def jvp(
    func: Callable[..., Any],
    primals: "tuple[Any, ...]",
    tangents: "tuple[Any, ...]",
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> "tuple[Any, ...]":
    """Runs `func(*primals)` and pushes tangents of the primals forward to a tangent of the output.

    Args:
        func: a function of tensors or pytrees of tensors, which returns the like. With has_aux, it
            returns a pair (output, aux).
        primals: a tuple of its arguments; all of their leaves are tensors of a floating or complex
            dtype.
        tangents: a tuple of the same structure; each tensor has the shape and dtype of its primal.
        strict: raise if an output does not depend on the primals. Otherwise its tangent is zero.
        has_aux: whether `func` returns (output, aux).

    Returns:
        (output, tangent), or (output, tangent, aux). The tangent has the structure of the output.

    What `func` computes under no_grad or detaches is a constant, as it is to grad and vjp.

    Raises:
        TransformError (a ValueError): for primals or outputs that are no such tensors, and for
            tangents that do not fit them.

    >>> import torch, torchlift
    >>> torchlift.jvp(torch.sin, (torch.tensor(0.),), (torch.tensor(2.),))
    (tensor(0.), tensor(2.))
    >>> cube = lambda x: x ** 3
    >>> slope = lambda f: lambda x: torchlift.jvp(f, (x,), (torch.ones_like(x),))[1]
    >>> slope(slope(cube))(torch.tensor(2.))
    tensor(12.)
    """
    call = _Call("jvp", func, primals if isinstance(primals, tuple) else (primals,), {})
    leaves, given = check_tangents(call, primals, tangents)
    spec = _pytree.flatten(primals)[1]
    shape: "list[Any]" = []
    run = output_runner(call, lambda values: func(*spec.unflatten(values)), has_aux, shape)
    seen, pushed = _C.jvp_leaves(run, leaves, given)
    count, output_spec, aux_spec = shape
    filled = []
    for index, (value, tangent) in enumerate(zip(seen, pushed)):
        if tangent is None:
            if strict:
                path = _pytree.flatten_with_path(output_spec.unflatten(seen[:count]))[0][index]
                call.fail_output(
                    f"strict=True: the output{_pytree.format_path(path)} does not depend on any "
                    f"primal. Leave it out, or pass strict=False for a tangent of zeros."
                )
            with torch.no_grad():
                tangent = torch.zeros_like(value)
        filled.append(tangent)
    output, tangent = output_spec.unflatten(seen[:count]), output_spec.unflatten(filled)
    if has_aux:
        return output, tangent, aux_spec.unflatten(seen[count:])
    return output, tangent


def output_runner(
    call: _Call,
    func: "Callable[[list[torch.Tensor]], Any]",
    has_aux: bool,
    shape: "list[Any]",
) -> "Callable[[list[torch.Tensor]], tuple[list[Any], int]]":
    """func for the extension: (leaves, count). shape gets [count, output's spec, aux's spec]."""

    def run(values: "list[torch.Tensor]") -> "tuple[list[Any], int]":
        output = func(values)
        if isinstance(output, torch.Tensor) and not has_aux:
            shape[:] = [1, _pytree.LEAF, None]
            return [output], 1
        aux = None
        if has_aux:
            output, aux = call.split_aux(output)
        leaves, spec = _pytree.flatten(output)
        call.check_outputs(output, leaves)
        if not leaves:
            call.fail_output("the function returned no tensor. Return at least one.")
        aux_leaves, aux_spec = _pytree.flatten(aux) if has_aux else ([], None)
        shape[:] = [len(leaves), spec, aux_spec]
        return leaves + aux_leaves, len(leaves)

    return run


def check_tangents(
    call: _Call, primals: Any, tangents: Any
) -> "tuple[list[torch.Tensor], list[torch.Tensor]]":
    """The leaves of both."""
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, tuple):
            call.fail(
                f"{name} must be a tuple, with an entry for each argument of the function, got "
                f"{describe(value)}. For one argument pass ({name[:-1]},)."
            )
    if not primals:
        call.fail("there are no primals. Pass the arguments to differentiate.")
    leaves, spec = _pytree.flatten(primals)
    call.check_primals(leaves, lambda: _pytree.flatten_with_path(primals)[0])
    given, given_spec = _pytree.flatten(tangents)
    if given_spec != spec:
        call.fail(
            f"the tangents have structure {_structure(given_spec)}, but the primals have structure "
            f"{_structure(spec)}. Give one tangent for each tensor of the primals."
        )
    for index, (primal, tangent) in enumerate(zip(leaves, given)):
        if (
            isinstance(tangent, torch.Tensor)
            and tangent.shape == primal.shape
            and tangent.dtype == primal.dtype
            and tangent.device == primal.device
        ):
            continue
        argument, *path = _pytree.flatten_with_path(primals)[0][index]
        where = "the tangent of " + argument_label(call.func, argument, tuple(path))
        wanted = f"shape {list(primal.shape)} and dtype {primal.dtype}"
        if not isinstance(tangent, torch.Tensor):
            call.fail(
                f"{where} is {describe(tangent)}, but must be a tensor of {wanted}, like the primal."
            )
        if tangent.device != primal.device:
            call.fail(f"{where} is on {tangent.device}, but the primal is on {primal.device}.")
        fix = (
            f"Convert it with .to({primal.dtype})."
            if tangent.shape == primal.shape
            else "To push many tangents forward at once use vmap, or jacfwd."
        )
        call.fail(
            f"{where} has shape {list(tangent.shape)} and dtype {tangent.dtype}, but the primal has "
            f"{wanted}. {fix}"
        )
    return leaves, given
