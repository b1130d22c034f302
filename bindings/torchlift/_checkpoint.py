"""checkpoint: a function whose insides are computed again in the backward pass.

The work is done in C++ (autodiff/checkpoint.h), on lists of tensors.
"""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError, UnsupportedError
from torchlift._names import function_name

_POLICIES = {"nothing": 0, "products": 1}
_NAMED = 2


class save_names:
    """A policy of `checkpoint`: keep the products that the function gives one of these names.

    >>> import torchlift
    >>> torchlift.save_names("q", "k")
    save_names('q', 'k')
    """

    def __init__(self, *names: str) -> None:
        for name in names:
            if not isinstance(name, str):
                raise TransformError(f"[save_names] names must be strings, got {name!r}.")
        self.names = names

    def __repr__(self) -> str:
        return f"save_names({', '.join(map(repr, self.names))})"


def checkpoint_name(x: torch.Tensor, name: str) -> torch.Tensor:
    """x. In a checkpoint with the policy `save_names(name)`, the matrix product or convolution that
    x is the result of is kept. A name on another value has no effect.

    >>> import torch, torchlift
    >>> layer = lambda x, w: torchlift.checkpoint_name(x @ w, "product").sin()
    >>> torchlift.checkpoint(layer, torch.zeros(1), torch.zeros(1), policy=torchlift.save_names("product"))
    tensor(0.)
    """
    if not isinstance(x, torch.Tensor) or not isinstance(name, str):
        raise TransformError(
            f"[checkpoint_name] expected a tensor and a string, got {type(x).__name__} and {name!r}."
        )
    return _C.checkpoint_name(x, name)


def checkpoint(
    func: Callable[..., Any],
    *args: Any,
    policy: "str | save_names" = "nothing",
    **kwargs: Any,
) -> Any:
    """`func(*args, **kwargs)`, of which only the arguments are kept for the backward pass.

    What func computed on the way is computed again when the gradient comes: memory for time. The
    value is the same, and so are all derivatives, under grad, vjp, jvp, Jacobians, Hessians and vmap
    in any nesting, and with Tensor.backward(). What func closes over (a module's parameters) gets its
    gradient too. When func runs again, random numbers, autocast and grad modes are as they were, and
    so are the levels of vmap around.

    Args:
        func: a function of pytrees; the tensors in them are its arguments. It must do the same
            when it runs again: pure but for random numbers.
        policy: what is kept besides the arguments. "nothing"; "products", the results of matrix
            products and convolutions; `save_names(...)`, those of them that func marks by
            `checkpoint_name`.

    Raises:
        UnsupportedError: func writes into an argument. From the backward pass: an argument was
            written into since, func did something else when it ran again, or it closes over a tensor
            of a vmap (or ran in a jvp) that has ended.

    >>> import torch, torchlift
    >>> def deep(x):
    ...     for _ in range(3):
    ...         x = torchlift.checkpoint(torch.sin, x)
    ...     return x
    >>> torchlift.grad(deep)(torch.tensor(1.0))
    tensor(0.2645)
    """
    if not callable(func):
        raise TransformError(f"[checkpoint] the first argument must be a function, got {func!r}.")
    if isinstance(policy, save_names):
        keep, names = _NAMED, list(policy.names)
    elif isinstance(policy, str) and policy in _POLICIES:
        keep, names = _POLICIES[policy], []
    else:
        raise TransformError(
            f"[checkpoint] policy must be 'nothing', 'products' or save_names(...), got {policy!r}."
        )
    leaves, spec = _pytree.flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[i] for i in where]
    # The function lives as long as the graph does; it must not hold the tensors twice.
    constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    first: "list[Any]" = []

    def run(given: "list[torch.Tensor]") -> "list[torch.Tensor]":
        filled = list(constants)
        for i, tensor in zip(where, given):
            filled[i] = tensor
        positional, keywords = spec.unflatten(filled)
        result, result_spec = _pytree.flatten(func(*positional, **keywords))
        found = [leaf for leaf in result if isinstance(leaf, torch.Tensor)]
        if first:
            if first[0] != len(found):
                raise UnsupportedError(
                    f"[checkpoint] {function_name(func)} returned {first[0]} tensors when it ran "
                    f"first, and {len(found)} when it ran again. It must do the same each time."
                )
        else:
            rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in result]
            first.extend([len(found), rest, [isinstance(x, torch.Tensor) for x in result], result_spec])
        return found

    outputs = iter(_C.checkpoint_leaves(run, tensors, keep, names))
    _, rest, is_tensor, result_spec = first
    del first[1:]
    return result_spec.unflatten(
        [next(outputs) if tensor else leaf for leaf, tensor in zip(rest, is_tensor)]
    )
