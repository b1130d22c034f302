"""sparsity, coloring, sparse_jacobian and their kin for Hessians."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any, Callable

import torch

from torchlift import _C
from torchlift._chunks import check_chunks, check_size
from torchlift._errors import TransformError
from torchlift._forward import output_runner
from torchlift._grad import _Argnums, _Call
from torchlift._jacobian import Selection
from torchlift._names import wraps

_MODES = ("auto", "forward", "reverse", "both", "symmetric")
_LAYOUTS = ("csr", "coo", "values")
_state = threading.local()
_warned: "set[str]" = set()


def sparsity(
    func: Callable[..., Any], argnums: Any = 0, *, chunk_size: "int | None" = None
) -> Callable[..., torch.Tensor]:
    """A function that tells which elements of `func`'s Jacobian can be other than zero.

    The pattern is propagated through func's operators, not probed: it holds for every input of these
    shapes, so a `coloring` of it is right at all of them. What `func` closes over, and arguments that
    argnums does not name, are constants, whose zeros count. Whatever is detached or computed under
    no_grad depends on nothing. An operator that torchlift does not know the dependences of is taken
    for dense, with a warning: see `dense_operators`.

    Args:
        func: returns a tensor or a pytree of tensors of a real floating dtype.
        argnums: what to differentiate, as in `grad`.
        chunk_size: how many input numbers to propagate at a time; by default as many as bound the
            memory of a tensor to some 32 MB. `func` runs once a chunk.

    Returns:
        A function of the same arguments that returns a CSR tensor of bools: a row for each number that
        `func` returns, a column for each number of the inputs, both laid end to end, row by row.

    Raises:
        TransformError (a ValueError): for inputs or outputs that have no derivative.
        UnsupportedError: if `func` looks at values that depend on the inputs (`if x > 0:`).

    >>> import torch, torchlift
    >>> torchlift.sparsity(lambda x: x[1:] - x[:-1])(torch.zeros(3)).to_dense()
    tensor([[ True,  True, False],
            [False,  True,  True]])
    """
    return _pattern("sparsity", func, argnums, chunk_size, second=False)


def hessian_sparsity(
    func: Callable[..., Any], argnums: Any = 0, *, chunk_size: "int | None" = None
) -> Callable[..., torch.Tensor]:
    """Like `sparsity`, of the Hessian of `func`, which returns one number. It is symmetric.

    >>> import torch, torchlift
    >>> torchlift.hessian_sparsity(lambda x: (x[1:] * x[:-1]).sum())(torch.zeros(3)).to_dense()
    tensor([[False,  True, False],
            [ True, False,  True],
            [False,  True, False]])
    """
    return _pattern("hessian_sparsity", func, argnums, chunk_size, second=True)


def dense_operators() -> "list[str]":
    """The operators that were taken for dense in the last pattern computed on this thread.

    Where one is met, every number it returns is taken to depend on all that its arguments depend on:
    right, but a pattern may have more elements than it needs.

    >>> import torch, torchlift
    >>> pattern = torchlift.sparsity(torch.sin)(torch.zeros(3))
    >>> torchlift.dense_operators()
    []
    """
    return list(getattr(_state, "dense", []))


@dataclasses.dataclass(frozen=True, eq=False)
class Coloring:
    """Which products with a sparse matrix tell all of its nonzeros. Made by `coloring`.

    It can be pickled, and used for any number of Jacobians with this pattern.

    Attributes:
        mode: "forward" (products with columns), "reverse" (with rows), "both" or "symmetric".
        rows, columns: the shape of the matrix.
        crow_indices, col_indices: its pattern, as those of a CSR tensor.
        column_colors, row_colors: the colour of each column and row; -1 where no product needs it.
        forward, reverse: how many colours there are.

    >>> import torch, torchlift
    >>> found = torchlift.coloring(torch.tensor([[1, 1, 0], [0, 1, 1]]), "forward")
    >>> found.colors, found.column_colors.tolist(), found.col_indices.tolist()
    (2, [0, 1, 0], [0, 1, 1, 2])
    """

    mode: str
    rows: int
    columns: int
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    column_colors: torch.Tensor
    row_colors: torch.Tensor
    forward: int
    reverse: int
    _sources: torch.Tensor

    @property
    def colors(self) -> int:
        """How many products it takes."""
        return self.forward + self.reverse

    @property
    def nonzeros(self) -> int:
        """How many elements the pattern has."""
        return self.col_indices.numel()

    def pattern(self) -> torch.Tensor:
        """The pattern, a CSR tensor of bools."""
        ones = torch.ones(self.nonzeros, dtype=torch.bool)
        shape = (self.rows, self.columns)
        return torch.sparse_csr_tensor(self.crow_indices, self.col_indices, ones, shape)

    def __repr__(self) -> str:
        return (
            f"Coloring(mode={self.mode!r}, shape=[{self.rows}, {self.columns}], "
            f"nonzeros={self.nonzeros}, colors={self.colors})"
        )

    def _fields(self) -> "tuple[Any, ...]":
        values = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return (_MODES.index(self.mode), *values[1:])


def coloring(pattern: torch.Tensor, mode: str = "auto") -> Coloring:
    """Colours the columns or rows of a sparse matrix: those of one colour share a product with it.

    Args:
        pattern: what `sparsity(f)(x)` returns, or any matrix, sparse or not, that has a nonzero (or,
            if sparse, an element) wherever the Jacobian may.
        mode: "forward" for Jacobian-vector products (columns that share no row have one colour),
            "reverse" for vector-Jacobian products (rows that share no column), "both" for some rows
            and the columns of the rest or the other way around (an arrow matrix takes 3 products, and
            as many as it has rows in one direction), "symmetric" for a Hessian (a star colouring).
            "auto" takes the fewest products of the first three.

    Raises:
        TransformError (a ValueError): if the pattern is no matrix, or with "symmetric" not symmetric.

    >>> import torch, torchlift
    >>> torchlift.coloring(torch.eye(5), "forward")
    Coloring(mode='forward', shape=[5, 5], nonzeros=5, colors=1)
    """
    if not isinstance(pattern, torch.Tensor):
        raise TransformError(
            f"coloring: the pattern must be a tensor, got {type(pattern).__name__}. Pass what "
            f"sparsity(f)(x) returns."
        )
    if mode not in _MODES:
        raise TransformError(f"coloring: mode must be one of {', '.join(_MODES)}, got {mode!r}.")
    index, *fields = _C.color_pattern(pattern, _MODES.index(mode))
    return Coloring(_MODES[index], *fields)


def sparse_jacobian(
    func: Callable[..., Any],
    coloring: Coloring,
    argnums: Any = 0,
    *,
    layout: str = "csr",
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
) -> Callable[..., torch.Tensor]:
    """A function that computes the Jacobian of `func` by as many products as `coloring` has colours.

    Args:
        func, argnums: as in `sparsity`.
        coloring: of the pattern of this very function. A nonzero that the pattern lacks would be added
            to another one.
        layout: "csr" or "coo" for a sparse tensor; "values" for the nonzeros alone, a tensor
            [nonzeros] in the order of coloring.col_indices, which can be batched by an outer `vmap`.
        chunk_size: how many products to compute at a time. All by default.
        memory_budget: instead, how many bytes a chunk of them may take.

    Returns:
        A function of the same arguments. The result is laid out as the pattern, and can be
        differentiated.

    Raises:
        TransformError (a ValueError): if the colouring is of a matrix of another shape.

    >>> import torch, torchlift
    >>> f = lambda x: x[1:] * x[:-1]
    >>> x = torch.tensor([1., 2., 3.])
    >>> found_once = torchlift.coloring(torchlift.sparsity(f)(x))
    >>> torchlift.sparse_jacobian(f, found_once)(x).to_dense()
    tensor([[2., 1., 0.],
            [0., 3., 2.]])
    """
    chunks = (chunk_size, memory_budget)
    return _matrix("sparse_jacobian", func, coloring, argnums, layout, chunks, second=False)


def sparse_hessian(
    func: Callable[..., Any],
    coloring: Coloring,
    argnums: Any = 0,
    *,
    layout: str = "csr",
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
) -> Callable[..., torch.Tensor]:
    """Like `sparse_jacobian`, the Hessian of `func`, which returns one number: forward over reverse.

    The colouring is best of mode "symmetric", which needs the fewest products.

    >>> import torch, torchlift
    >>> f = lambda x: (x ** 3).sum()
    >>> x = torch.tensor([1., 2.])
    >>> found_once = torchlift.coloring(torchlift.hessian_sparsity(f)(x), "symmetric")
    >>> torchlift.sparse_hessian(f, found_once)(x).to_dense()
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    chunks = (chunk_size, memory_budget)
    return _matrix("sparse_hessian", func, coloring, argnums, layout, chunks, second=True)


# --- parts --------------------------------------------------------------------------------------


class _Run:
    """A call of the function: its selected leaves, and what the extension calls."""

    def __init__(
        self,
        transform: str,
        func: Callable[..., Any],
        wanted: _Argnums,
        argnums: Any,
        args: "tuple[Any, ...]",
        kwargs: "dict[str, Any]",
    ) -> None:
        call = _Call(transform, func, args, kwargs, argnums)
        selection = Selection(call, wanted)

        def apply(values: "list[Any]") -> Any:
            new_args, new_kwargs = selection.arguments(values)
            return func(*new_args, **new_kwargs)

        self.leaves = selection.leaves
        self.call = output_runner(call, apply, False, [])


def _pattern(
    transform: str, func: Callable[..., Any], argnums: Any, chunk_size: "int | None", second: bool
) -> Callable[..., torch.Tensor]:
    if not callable(func):
        raise TypeError(f"{transform}: the first argument must be a function, got {func!r}")
    check_size(transform, "chunk_size", chunk_size)
    wanted = _Argnums(argnums)

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        run = _Run(transform, func, wanted, argnums, args, kwargs)
        pattern, dense = _C.pattern_leaves(second, run.call, run.leaves, chunk_size)
        _state.dense = dense
        _warn_of(dense)
        return pattern

    return wrapped


def _warn_of(operators: "list[str]") -> None:
    new = [name for name in operators if name not in _warned]
    _warned.update(new)
    if new:
        warnings.warn(
            f"torchlift does not know the dependences of {', '.join(new)}, and takes what they return "
            f"to depend on all that their arguments depend on. The pattern is right, but may have more "
            f"elements than it needs. torchlift.dense_operators() tells which were met.",
            stacklevel=3,
        )


def _matrix(
    transform: str,
    func: Callable[..., Any],
    coloring: Coloring,
    argnums: Any,
    layout: str,
    chunks: "tuple[int | None, int | None]",
    second: bool,
) -> Callable[..., torch.Tensor]:
    if not callable(func):
        raise TypeError(f"{transform}: the first argument must be a function, got {func!r}")
    if not isinstance(coloring, Coloring):
        raise TransformError(
            f"{transform}: coloring must be a torchlift.Coloring, got {type(coloring).__name__}. "
            f"Make one by torchlift.coloring(pattern)."
        )
    if layout not in _LAYOUTS:
        raise TransformError(
            f"{transform}: layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}."
        )
    check_chunks(transform, *chunks)
    wanted, fields, index = _Argnums(argnums), coloring._fields(), _LAYOUTS.index(layout)

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        run = _Run(transform, func, wanted, argnums, args, kwargs)
        return _C.sparse_leaves(second, run.call, run.leaves, fields, index, *chunks)

    return wrapped
