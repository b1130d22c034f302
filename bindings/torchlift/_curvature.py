"""hvp, vhp, ggn_vp, laplacian, hessian_diag and linearize."""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._chunks import check_chunks
from torchlift._errors import TransformError
from torchlift._forward import check_tangents, output_runner
from torchlift._grad import _Argnums, _Call, vjp
from torchlift._jacobian import Selection, select
from torchlift._names import wraps


def hvp(
    func: Callable[..., Any],
    primals: "tuple[Any, ...]",
    tangents: "tuple[Any, ...]",
    *,
    has_aux: bool = False,
) -> "tuple[Any, ...]":
    """The Hessian of `func`, which returns one number, times the tangents: forward over reverse mode.

    Args:
        func: returns a real tensor without dims; with has_aux, a pair of that and anything else.
        primals, tangents: tuples of the arguments and of tangents for them, as in `jvp`.

    Returns:
        (value, product), or (value, product, aux). The product is a tuple like primals.

    >>> import torch, torchlift
    >>> x = torch.tensor([1., 3.])
    >>> torchlift.hvp(lambda x: x[0] * x[1] ** 2, (x,), (torch.tensor([1., 0.]),))[1]
    (tensor([0., 6.]),)
    """
    call = _Call("hvp", func, _as_tuple(primals), {})
    leaves, given = check_tangents(call, primals, tangents)
    spec = _pytree.flatten(primals)[1]
    shape: "list[Any]" = []
    gradients = _gradients(call, lambda values: func(*spec.unflatten(values)), has_aux, shape)

    def run(duals: "list[torch.Tensor]") -> "tuple[list[Any], int]":
        return gradients(duals), len(leaves)

    seen, pushed = _C.jvp_leaves(run, leaves, given)
    product = spec.unflatten(
        [torch.zeros_like(leaf) if t is None else t for leaf, t in zip(leaves, pushed)]
    )
    return _with_aux(seen[len(leaves) :], product, shape[0] if has_aux else None)


def vhp(
    func: Callable[..., Any],
    primals: "tuple[Any, ...]",
    cotangents: "tuple[Any, ...]",
    *,
    has_aux: bool = False,
) -> "tuple[Any, ...]":
    """Like `hvp`, by reverse over reverse mode: for functions that have no forward mode.

    >>> import torch, torchlift
    >>> x = torch.tensor([1., 3.])
    >>> torchlift.vhp(lambda x: x[0] * x[1] ** 2, (x,), (torch.tensor([1., 0.]),))[1]
    (tensor([0., 6.]),)
    """
    call = _Call("vhp", func, _as_tuple(primals), {})
    leaves, given = check_tangents(call, primals, cotangents)
    spec = _pytree.flatten(primals)[1]
    shape: "list[Any]" = []
    gradients = _gradients(call, lambda values: func(*spec.unflatten(values)), has_aux, shape)
    seen, pullback = _C.vjp_leaves(gradients, leaves)
    tensors = sum(isinstance(leaf, torch.Tensor) for leaf in seen)
    padded = given + [None] * (tensors - len(given))
    product = spec.unflatten(pullback.pull(padded, True))
    return _with_aux(seen[len(leaves) :], product, shape[0] if has_aux else None)


def ggn_vp(
    func: Callable[..., Any],
    loss: Callable[..., Any],
    primals: "tuple[Any, ...]",
    tangents: "tuple[Any, ...]",
) -> "tuple[Any, Any]":
    """The generalised Gauss-Newton matrix times the tangents: J^T H J v.

    J is the Jacobian of `func`, H the Hessian of `loss`, which takes func's output and returns one
    number, at that output. (N. Schraudolph, "Fast curvature matrix-vector products for second-order
    gradient descent", 2002.)

    Returns:
        (func's output, product). The product is a tuple like primals.

    >>> import torch, torchlift
    >>> x = torch.tensor([1., 3.])
    >>> torchlift.ggn_vp(lambda x: 2 * x, lambda y: (y ** 2).sum(), (x,), (x,))[1]
    (tensor([ 8., 24.]),)
    """
    call = _Call("ggn_vp", func, _as_tuple(primals), {})
    leaves, given = check_tangents(call, primals, tangents)
    spec = _pytree.flatten(primals)[1]
    shape: "list[Any]" = []
    inner = output_runner(call, lambda values: func(*spec.unflatten(values)), False, shape)

    def run(values: "list[torch.Tensor]") -> "list[Any]":
        outputs, pushed = _C.jvp_leaves(inner, values, given)
        return outputs + [torch.zeros_like(y) if t is None else t for y, t in zip(outputs, pushed)]

    seen, pullback = _C.vjp_leaves(run, leaves)
    count, output_spec, _ = shape
    output, pushed = output_spec.unflatten(seen[:count]), output_spec.unflatten(seen[count:])
    _, (curved,) = hvp(loss, (output,), (pushed,))
    cotangents = _pytree.flatten(curved)[0] + [None] * count
    return output, spec.unflatten(pullback.pull(cotangents, True))


def laplacian(
    func: Callable[..., Any],
    argnums: Any = 0,
    *,
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
    samples: "int | None" = None,
) -> Callable[..., Any]:
    """A function that computes the sum of all second derivatives of each number `func` returns.

    Exact, and without a Hessian: `func` runs once for all directions (with chunk_size, once for that
    many; with memory_budget, for as many as fit), and with D of them carries its value, D first
    derivatives and one sum of second derivatives along (R. Li et al., "A Computational Framework for
    Neural Network-based Variational Monte Carlo with Forward Laplacian", 2023). With `samples`, an
    estimate instead: the mean of the second derivatives along so many random directions of signs
    (M. Hutchinson, 1990).

    A function that calls what has no Taylor series (a torch.autograd.Function, a custom_jvp) is called
    a second time, and differentiated by forward over forward mode.

    Returns:
        A function of the same arguments. The result has the structure and shapes of func's output.

    >>> import torch, torchlift
    >>> torchlift.laplacian(lambda x: (x ** 3).sum())(torch.tensor([1., 2.]))
    tensor(18.)
    """
    check_chunks("laplacian", chunk_size, memory_budget)
    if samples is not None and (not isinstance(samples, int) or samples <= 0):
        raise TransformError(f"laplacian: samples must be a positive int or None, got {samples!r}.")

    def compute(run: Callable[..., Any], selection: Selection) -> "list[torch.Tensor]":
        directions = samples and [_signs(samples, leaf) for leaf in selection.leaves]
        sums = _C.laplacian_leaves(run, selection.leaves, chunk_size, memory_budget, directions)
        return [each / samples for each in sums] if samples else sums

    return _second("laplacian", func, argnums, compute)


def hessian_diag(
    func: Callable[..., Any],
    argnums: Any = 0,
    *,
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
) -> Callable[..., Any]:
    """A function that computes the diagonal of the Hessian of `func`, without the rest of it.

    The result has the structure of `jacrev(func, argnums)`'s: each tensor has the output's shape
    followed by the input's.

    >>> import torch, torchlift
    >>> torchlift.hessian_diag(lambda x: (x ** 3).sum())(torch.tensor([1., 2.]))
    tensor([ 6., 12.])
    """
    check_chunks("hessian_diag", chunk_size, memory_budget)

    def diagonal(rows: torch.Tensor, selection: Selection) -> Any:
        parts = rows.movedim(0, -1).split([leaf.numel() for leaf in selection.leaves], -1)
        shapes = [rows.shape[1:] + leaf.shape for leaf in selection.leaves]
        return selection.tree([part.reshape(shape) for part, shape in zip(parts, shapes)])

    def compute(run: Callable[..., Any], selection: Selection) -> "list[Any]":
        rows = _C.second_leaves(run, selection.leaves, chunk_size, memory_budget)
        return [diagonal(each, selection) for each in rows]

    return _second("hessian_diag", func, argnums, compute)


def linearize(func: Callable[..., Any], *primals: Any) -> "tuple[Any, Callable[..., Any]]":
    """Runs `func(*primals)` once; returns its output, and the function that pushes tangents forward.

    jvp_fn(*tangents) is what `jvp(func, primals, tangents)` returns as tangent, without running func
    again. It is the transpose of func's vjp, so func needs derivatives in reverse mode.

    >>> import torch, torchlift
    >>> output, jvp_fn = torchlift.linearize(torch.sin, torch.tensor(0.))
    >>> jvp_fn(torch.tensor(3.)).item()
    3.0
    """
    call = _Call("linearize", func, primals, {})
    check_tangents(call, primals, primals)
    output, vjp_fn = vjp(func, *primals)
    outputs = _pytree.flatten(output)[0]
    zeros = _pytree.tree_map(torch.zeros_like, output)
    _, transposed = vjp(vjp_fn, zeros)

    def jvp_fn(*tangents: Any) -> Any:
        leaves, given = check_tangents(call, primals, tangents)
        # The graph of the pullback is nobody's business, unless something outside is differentiated.
        outside = _C.open_levels() > 0 or _C.forward_mode_open()
        outside = outside or any(t.requires_grad for t in [*leaves, *given, *outputs])
        return transposed(tangents, create_graph=None if outside else False)[0]

    return output, jvp_fn


# --- parts --------------------------------------------------------------------------------------


def _as_tuple(primals: Any) -> "tuple[Any, ...]":
    return primals if isinstance(primals, tuple) else (primals,)


def _gradients(
    call: _Call,
    func: "Callable[[list[torch.Tensor]], Any]",
    has_aux: bool,
    shape: "list[Any]",
) -> "Callable[[list[torch.Tensor]], list[Any]]":
    """[gradients, value, aux leaves] of func, which returns one number. shape gets aux's spec."""

    def loss(values: "list[torch.Tensor]") -> "tuple[torch.Tensor, list[Any]]":
        output = func(values)
        value, aux = call.split_aux(output) if has_aux else (output, None)
        call.check_loss(value)
        leaves, spec = _pytree.flatten(aux) if has_aux else ([], None)
        shape[:] = [spec]
        return value, leaves

    def run(values: "list[torch.Tensor]") -> "list[Any]":
        grads, value, aux = _C.grad_leaves(loss, values)
        return [*grads, value, *aux]

    return run


def _with_aux(value_and_aux: "list[Any]", product: Any, aux_spec: Any) -> "tuple[Any, ...]":
    value, *aux = value_and_aux
    return (value, product) if aux_spec is None else (value, product, aux_spec.unflatten(aux))


def _second(
    transform: str,
    func: Callable[..., Any],
    argnums: Any,
    compute: "Callable[[Callable[..., Any], Selection], list[Any]]",
) -> Callable[..., Any]:
    """compute(run, the arguments) gives a result for each tensor of func's output."""
    if not callable(func):
        raise TypeError(f"{transform}: the first argument must be a function, got {func!r}")
    wanted = _Argnums(argnums)

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = _Call(transform, func, args, kwargs, argnums)
        selection = select(call, wanted)

        def apply(values: "list[Any]") -> Any:
            new_args, new_kwargs = selection.arguments(values)
            return func(*new_args, **new_kwargs)

        shape: "list[Any]" = []
        run = output_runner(call, apply, False, shape)
        results = compute(run, selection)
        return shape[1].unflatten(results)

    return wrapped


def _signs(samples: int, like: torch.Tensor) -> torch.Tensor:
    heads = torch.rand((samples, *like.shape), device=like.device) < 0.5
    return torch.where(heads, 1.0, -1.0).to(like.dtype)
