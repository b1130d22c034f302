"""jacrev, jacfwd, jacobian and hessian."""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._chunks import check_chunks
from torchlift._errors import TransformError
from torchlift._forward import output_runner
from torchlift._grad import _Argnums, _Call
from torchlift._names import wraps

_REVERSE, _FORWARD, _AUTO, _HESSIAN = 0, 1, 2, 3
_REFUSE_COMPLEX, _HOLOMORPHIC, _REAL_VIEW = 0, 1, 2


def jacrev(
    func: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
    holomorphic: bool = False,
    real_view: bool = False,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    """A function that computes the Jacobian of `func` by reverse mode, a row for each output number.

    Args:
        func: returns a tensor or a pytree of tensors of a real floating dtype; with has_aux, a pair
            of that and anything else.
        argnums: what to differentiate, as in `grad`.
        has_aux: whether `func` returns (output, aux). The result is then (jacobian, aux).
        chunk_size: how many rows to compute at a time, to bound memory. All by default.
        memory_budget: instead, how many bytes a chunk of rows may take beside the result and what
            `func`'s own run keeps; measured on the first row. `memory_report` tells what it came to.
        holomorphic: `func` is holomorphic, and all that it is differentiated by and returns is
            complex: a derivative is one complex number.
        real_view: instead, complex tensors are differentiated, and differentiate, as their real
            views (`torch.view_as_real`): the Jacobian is real, with a dim of size 2 after the shape
            of each complex tensor. For any function.

    Returns:
        A function of the same arguments. The Jacobian has the structure of the output, with the
        structure of what argnums names in place of each tensor; each tensor in it has the output's
        shape followed by the input's.

    Raises:
        TransformError (a ValueError): for inputs or outputs that have no derivative; with
            holomorphic, for those that are not complex.
        UnsupportedError: for complex inputs or outputs, where neither of the two is given.

    >>> import torch, torchlift
    >>> torchlift.jacrev(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    >>> f = lambda x, y: {"sum": x + y}
    >>> torchlift.jacrev(f, argnums=(0, 1))(torch.tensor(1.), torch.tensor(2.))
    {'sum': (tensor(1.), tensor(1.))}
    >>> torchlift.jacrev(torch.square, holomorphic=True)(torch.tensor(1 + 2j))
    tensor(2.+4.j)
    >>> torchlift.jacrev(torch.square, real_view=True)(torch.tensor(1 + 2j))
    tensor([[ 2., -4.],
            [ 4.,  2.]])
    """
    del _preallocate_and_copy  # Chunks are always written into the result.
    numbers = _numbers("jacrev", holomorphic, real_view)
    return _make("jacrev", func, argnums, has_aux, (chunk_size, memory_budget), _REVERSE, numbers)


def jacfwd(
    func: Callable[..., Any],
    argnums: Any = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
    holomorphic: bool = False,
    real_view: bool = False,
) -> Callable[..., Any]:
    """A function that computes the Jacobian of `func` by forward mode, a column for each input number.

    `func` runs once, on its arguments as they are; only the tangents are a batch. So random operators
    need no `randomness`, which is there for torch.func's sake: all columns are of the same function.
    With chunk_size (columns at a time) or memory_budget `func` runs once for each chunk. Otherwise
    like `jacrev`.

    >>> import torch, torchlift
    >>> torchlift.jacfwd(lambda x: x ** 2)(torch.tensor([1., 2.]))
    tensor([[2., 0.],
            [0., 4.]])
    """
    if randomness not in ("error", "same", "different", "reproducible"):
        raise TransformError(
            f"jacfwd: randomness must be 'error', 'same', 'different' or 'reproducible', got "
            f"{randomness!r}."
        )
    numbers = _numbers("jacfwd", holomorphic, real_view)
    return _make("jacfwd", func, argnums, has_aux, (chunk_size, memory_budget), _FORWARD, numbers)


def jacobian(
    func: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
    holomorphic: bool = False,
    real_view: bool = False,
) -> Callable[..., Any]:
    """`jacfwd` if there are fewer input numbers than output numbers, else `jacrev`.

    To count the outputs, `func` runs once more.

    >>> import torch, torchlift
    >>> torchlift.jacobian(lambda x: x * torch.ones(3))(torch.tensor(2.))
    tensor([1., 1., 1.])
    """
    numbers = _numbers("jacobian", holomorphic, real_view)
    return _make("jacobian", func, argnums, has_aux, (chunk_size, memory_budget), _AUTO, numbers)


def hessian(
    func: Callable[..., Any],
    argnums: Any = 0,
    *,
    has_aux: bool = False,
    chunk_size: "int | None" = None,
    memory_budget: "int | None" = None,
    holomorphic: bool = False,
    real_view: bool = False,
) -> Callable[..., Any]:
    """A function that computes the Hessian of `func`: forward mode over reverse mode.

    By one or two input numbers it is Taylor mode, which runs `func` once (or a second time, if it calls
    what has no Taylor series); with chunk_size or memory_budget never.

    The result has the structure of the output, twice with the structure of what argnums names in
    place of each tensor. For a function of one tensor that returns one number it is a matrix.

    >>> import torch, torchlift
    >>> torchlift.hessian(lambda x: x[0] * x[1] ** 2)(torch.tensor([1., 3.]))
    tensor([[0., 6.],
            [6., 2.]])
    """
    numbers = _numbers("hessian", holomorphic, real_view)
    return _make("hessian", func, argnums, has_aux, (chunk_size, memory_budget), _HESSIAN, numbers)


def select(call: _Call, wanted: _Argnums) -> "Selection":
    """What argnums names among the arguments of a call."""
    positions = _Positions.of(call, wanted)
    return positions if positions is not None else Selection(call, wanted)


class Selection:
    """What argnums names among the arguments of a call: its leaves, and how to put others there."""

    leaves: "list[torch.Tensor]"

    def __init__(self, call: _Call, wanted: _Argnums) -> None:
        self._several = wanted.several
        selected = [call.select(entry) for entry in wanted.entries]
        paths, self._all, self._spec = _pytree.flatten_with_path((call.args, call.kwargs))
        self._parts = []  # For each entry: where its leaves are among the chosen, their structure.
        chosen: "list[int]" = []
        for path, value in selected:
            indices = [i for i, p in enumerate(paths) if p[: len(path)] == path]
            part_leaves, part_spec = _pytree.flatten(value)
            if len(part_leaves) != len(indices):
                call.fail(f"argnums: {path!r} leads into a value that cannot be replaced.")
            call.check_primals(part_leaves, lambda: [paths[i][1:] for i in indices])
            chosen += [i for i in indices if i not in chosen]
            self._parts.append(([chosen.index(i) for i in indices], part_spec))
        self._chosen = chosen
        self.leaves = [self._all[i] for i in chosen]

    def arguments(self, values: "list[Any]") -> "tuple[tuple[Any, ...], dict[str, Any]]":
        replaced = list(self._all)
        for i, value in zip(self._chosen, values):
            replaced[i] = value
        return self._spec.unflatten(replaced)

    def tree(self, values: "list[Any]") -> Any:
        """One value for each leaf, in the structure of what argnums names."""
        trees = tuple(spec.unflatten([values[i] for i in where]) for where, spec in self._parts)
        return trees if self._several else trees[0]


class _Positions(Selection):
    """The usual case, of whole positional arguments: no other argument need be looked at."""

    def __init__(self, call: _Call, places: "list[int]", several: bool) -> None:
        self._call, self._places, self._several = call, places, several
        self.leaves = []
        self._parts = []  # For each place: the end of its leaves among all, their structure.
        for place in places:
            value = call.args[place]
            if isinstance(value, torch.Tensor):
                self.leaves.append(value)
                self._parts.append((len(self.leaves), _pytree.LEAF))
            else:
                leaves, spec = _pytree.flatten(value)
                self.leaves += leaves
                self._parts.append((len(self.leaves), spec))

    @classmethod
    def of(cls, call: _Call, wanted: _Argnums) -> "_Positions | None":
        """None where argnums says something else, or the arguments have no derivative."""
        count = len(call.args)
        places = []
        for entry in wanted.entries:
            place = entry[0]
            if len(entry) != 1 or not isinstance(place, int) or not -count <= place < count:
                return None
            if place % count in places:
                return None
            places.append(place % count)
        found = cls(call, places, wanted.several)
        usable = found.leaves and all(_has_derivative(leaf) for leaf in found.leaves)
        return found if usable else None

    def arguments(self, values: "list[Any]") -> "tuple[tuple[Any, ...], dict[str, Any]]":
        replaced = list(self._call.args)
        for place, tree in zip(self._places, self._trees(values)):
            replaced[place] = tree
        return tuple(replaced), self._call.kwargs

    def tree(self, values: "list[Any]") -> Any:
        trees = self._trees(values)
        return tuple(trees) if self._several else trees[0]

    def _trees(self, values: "list[Any]") -> "list[Any]":
        trees, start = [], 0
        for end, spec in self._parts:
            trees.append(spec.unflatten(values[start:end]))
            start = end
        return trees


def _has_derivative(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _numbers(transform: str, holomorphic: bool, real_view: bool) -> int:
    if holomorphic and real_view:
        raise TransformError(
            f"{transform}: holomorphic and real_view were both given: a derivative is either one "
            f"complex number or those of real and imaginary parts. Give one of them."
        )
    return _HOLOMORPHIC if holomorphic else _REAL_VIEW if real_view else _REFUSE_COMPLEX


def _make(
    transform: str,
    func: Callable[..., Any],
    argnums: Any,
    has_aux: bool,
    chunks: "tuple[int | None, int | None]",
    mode: int,
    numbers: int,
) -> Callable[..., Any]:
    if not callable(func):
        raise TypeError(f"{transform}: the first argument must be a function, got {func!r}")
    check_chunks(transform, *chunks)
    wanted, has_aux = _Argnums(argnums), bool(has_aux)

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = _Call(transform, func, args, kwargs, argnums)
        selection = select(call, wanted)

        def apply(values: "list[Any]") -> Any:
            new_args, new_kwargs = selection.arguments(values)
            return func(*new_args, **new_kwargs)

        shape: "list[Any]" = []
        run = output_runner(call, apply, has_aux, shape)
        blocks, seen = _C.jacobian_leaves(mode, run, selection.leaves, *chunks, numbers)
        count, output_spec, aux_spec = shape
        trees = [selection.tree(block) for block in blocks]
        if mode == _HESSIAN:  # A block for each output and input: a tree of those for each output.
            width = len(selection.leaves)
            starts = range(0, len(trees), width)
            trees = [selection.tree(trees[start : start + width]) for start in starts]
        result = output_spec.unflatten(trees)
        return (result, aux_spec.unflatten(seen[count:])) if has_aux else result

    return wrapped
