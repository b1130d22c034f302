"""vmap: what is mapped, the general path, and the words of its errors.

Calls made of tensors and plain containers never come here: see NOTE [the two paths of a transform]
in bindings/_C/vmap.h.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import torch

from torchlift import _C, _pytree
from torchlift._chunks import check_chunks, check_size
from torchlift._errors import TransformError
from torchlift._names import argument_label, describe, function_name, parameters_of, wraps

_RANDOMNESS = {"error": 0, "same": 1, "different": 2, "reproducible": 3}


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: "int | None" = None,
    axis_size: "int | None" = None,
    memory_budget: "int | None" = None,
) -> Callable[..., Any]:
    """Maps `func` over a dimension of its arguments, in one go.

    `vmap(func)(xs)` equals `torch.stack([func(x) for x in xs])`, but each operator of `func` runs
    once, on the whole batch.

    Args:
        func: any function of tensors and pytrees of tensors (dicts, lists, tuples, dataclasses
            registered with optree or torch...), which returns tensors or pytrees of tensors.
        in_dims: which dim of each argument to map over. An int for all tensors of all arguments
            (values that are no tensors are passed as they are); None for those every call shares; a
            tuple with an entry for each positional argument, where an entry may itself be a
            structure like the argument's, or an int or None for all of it. A dict names parameters
            of `func` instead, positional or keyword: `{"x": 0, "w": None}`; those it leaves out are
            mapped over dim 0. (For a function of one parameter that is not named in it, such a dict
            would have no parameter to name: that is an error; write `({...},)` for the structure of
            an argument.) Negative dims count from the end. Without a dict all examples share the
            keyword arguments, as in torch.func.
        out_dims: where the mapped dim goes in each output: an int, None (for an output that is the
            same for all examples), or a structure of these like the output's.
        randomness: "error" (random operators raise), "same" (the same numbers for every example),
            "different", or "reproducible": different numbers that depend on the generator's seed, the
            call and the example alone, so that any chunk_size, and a loop with `random_rows`, give
            the same ones bit for bit.
        chunk_size: run at most this many examples at a time, to bound memory. The results are the
            same numbers, but for random ones with randomness="different".
        axis_size: the number of examples, needed only if nothing is mapped.
        memory_budget: or the number of bytes that a chunk may take at its peak, beside the result. The
            size of the chunks is chosen by what the first ones take; `memory_report()` tells it. An
            example that takes more is an error.

    Returns:
        A function of the same arguments. It can be nested, used as a decorator, and called from
        several threads.

    Raises:
        TransformError (a ValueError): before `func` runs, if in_dims do not fit the arguments;
            after, if out_dims do not fit what it returned.

    >>> import torch, torchlift
    >>> x, y = torch.arange(6.).reshape(3, 2), torch.ones(3, 2)
    >>> torchlift.vmap(torch.dot)(x, y)
    tensor([1., 5., 9.])
    >>> torchlift.vmap(lambda x, w: {"y": x * w}, in_dims={"x": 1, "w": None})(x, torch.ones(3))["y"].shape
    torch.Size([2, 3])
    >>> torchlift.vmap(torchlift.vmap(torch.mul), in_dims=(0, None))(x, torch.ones(2)).shape
    torch.Size([3, 2])
    """
    random = _check_options(func, in_dims, randomness, chunk_size, axis_size, memory_budget)
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    # Most calls need no _Vmap, and are made of a vmap that is itself made for the one call.
    options = (func, in_dims, out_dims, random, chunk_size, axis_size, memory_budget)
    if memory_budget is not None or isinstance(in_dims, dict):

        @wraps(func)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return _Vmap(*options).general(args, kwargs)

        return wrapped

    def finish(output: Any) -> Any:
        return _Vmap(*options).finish(output)

    call = _C.vmap_call

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            result = call(func, in_dims, out_dims, random, axis_size, finish, args, chunk_size)
            if result is not NotImplemented:
                return result
        return _Vmap(*options).general(args, kwargs)

    return wrapped


def _check_options(
    func: Callable[..., Any],
    in_dims: Any,
    randomness: str,
    chunk_size: "int | None",
    axis_size: "int | None",
    memory_budget: "int | None",
) -> int:
    """What the extension calls the randomness."""
    if not callable(func):
        raise TypeError(f"vmap: the first argument must be a function, got {func!r}")
    random = _RANDOMNESS.get(randomness)
    if random is None:
        raise TransformError(
            f"vmap: randomness must be 'error', 'same', 'different' or 'reproducible', got "
            f"{randomness!r}."
        )
    if axis_size is not None:
        check_size("vmap", "axis_size", axis_size, smallest=0)
    if chunk_size is not None or memory_budget is not None:
        check_chunks("vmap", chunk_size, memory_budget)
    if isinstance(in_dims, torch.Tensor):
        raise TransformError(
            f"vmap({function_name(func)}): in_dims must be ints, None or structures of them, got a "
            f"tensor."
        )
    return random


def _as_it_is(leaves: "list[Any]") -> "list[Any]":
    return leaves


class _Leaf:
    """A leaf of the arguments: where it is, and the dim it is mapped over."""

    __slots__ = ("argument", "path", "value", "dim")

    def __init__(self, argument: "int | str", path: "tuple[Any, ...]", value: Any, dim: Any) -> None:
        self.argument, self.path, self.value, self.dim = argument, path, value, dim


class _Vmap:
    """One vmap: its options and everything but the fast path."""

    def __init__(
        self,
        func: Callable[..., Any],
        in_dims: Any,
        out_dims: Any,
        random: int,
        chunk_size: "int | None",
        axis_size: "int | None",
        memory_budget: "int | None",
    ) -> None:
        self.func, self.in_dims, self.out_dims, self.random = func, in_dims, out_dims, random
        self.chunk_size, self.axis_size, self.memory_budget = chunk_size, axis_size, memory_budget
        # The structure of an output that out_dims fit, and the dim of each leaf.
        self.placed: "tuple[Any, list[Any]] | None" = None

    # --- inputs ---------------------------------------------------------------------------------

    def general(self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> Any:
        (arg_dims, kwarg_dims) = self.split_in_dims(args, kwargs)
        leaves: "list[_Leaf]" = []
        specs = []
        for argument, value, dims in [
            *((i, value, dims) for i, (value, dims) in enumerate(zip(args, arg_dims))),
            *((name, value, kwarg_dims[name]) for name, value in kwargs.items()),
        ]:
            found = self.flat_argument(args, kwargs, argument, value, dims)
            is_leaf = type(value) is torch.Tensor
            specs.append((len(found), _pytree.LEAF if is_leaf else _pytree.flatten(value)[1]))
            leaves += found
        size = self.batch_size(args, kwargs, leaves)

        def call(values: "list[Any]") -> "tuple[Any, ...]":
            rebuilt, at = [], 0
            for count, spec in specs:
                rebuilt.append(spec.unflatten(values[at : at + count]))
                at += count
            positional = len(args)
            named = dict(zip(kwargs, rebuilt[positional:]))
            return self.finish(self.func(*rebuilt[:positional], **named))

        values, dims = [leaf.value for leaf in leaves], [leaf.dim for leaf in leaves]
        if size > (size if self.chunk_size is None else self.chunk_size) or (
            self.memory_budget is not None and size > 0
        ):
            return self.in_chunks(call, size, values, dims)
        return _C.vmap_leaves(call, size, self.random, values, dims)

    def split_in_dims(
        self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]"
    ) -> "tuple[Sequence[Any], dict[str, Any]]":
        """in_dims for each positional and each keyword argument."""
        in_dims = self.in_dims
        if isinstance(in_dims, dict):
            return self.named_in_dims(args, kwargs)
        kwarg_dims = dict.fromkeys(kwargs)
        if in_dims is None:
            return [None] * len(args), kwarg_dims
        if isinstance(in_dims, int) and not isinstance(in_dims, bool):
            return [_Implicit(in_dims)] * len(args), kwarg_dims
        if not isinstance(in_dims, tuple):
            self.fail(
                args,
                kwargs,
                f"in_dims must be an int, None, a tuple with an entry for each positional "
                f"argument, or a dict of parameter names, got {type(in_dims).__name__}.",
            )
        if len(in_dims) != len(args):
            self.fail(
                args,
                kwargs,
                f"in_dims has {len(in_dims)} entries, but there are {len(args)} positional "
                f"arguments. Give an entry for each: an int, None, or a structure like the argument's.",
            )
        return list(in_dims), kwarg_dims

    def named_in_dims(
        self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]"
    ) -> "tuple[Sequence[Any], dict[str, Any]]":
        positions, names, any_name = parameters_of(self.func)
        unknown = [n for n in self.in_dims if n not in names and n not in kwargs]
        if unknown and not (any_name and unknown[0] in kwargs):
            known = ", ".join(repr(n) for n in names) or "none that can be named"
            self.fail(
                args,
                kwargs,
                f"in_dims names {unknown[0]!r}, which is no parameter of {function_name(self.func)} "
                f"(it has {known}). A dict given as in_dims names parameters; for the structure of "
                f"a dict argument write in_dims=({{...}},).",
            )
        default = _Implicit(0)
        by_position = [positions[i] if i < len(positions) else None for i in range(len(args))]
        return (
            [self.in_dims.get(name, default) for name in by_position],
            {name: self.in_dims.get(name, default) for name in kwargs},
        )

    def flat_argument(
        self,
        args: "tuple[Any, ...]",
        kwargs: "dict[str, Any]",
        argument: "int | str",
        value: Any,
        dims: Any,
    ) -> "list[_Leaf]":
        implicit = isinstance(dims, _Implicit)
        try:
            entries = _pytree.broadcast_prefix(dims.dim if implicit else dims, value)
        except _pytree.PrefixError as error:
            where = self.label(argument, error.path)
            self.fail(
                args,
                kwargs,
                f"{where} is {describe(error.tree)}, but in_dims has {error.prefix!r} for it. An "
                f"entry of in_dims is an int, None, or a structure like the argument's.",
            )
        leaves = []
        for path, dim, leaf, level in entries:
            if dim is not None and not isinstance(leaf, torch.Tensor):
                if level and not implicit:
                    self.fail(
                        args,
                        kwargs,
                        f"{self.label(argument, path)} is {describe(leaf)}, which has no dim {dim} "
                        f"to map over: in_dims must have None for it, or pass a tensor.",
                    )
                dim = None
            if dim is not None:
                dim = self.check_dim(args, kwargs, argument, path, leaf, dim, implicit)
            leaves.append(_Leaf(argument, path, leaf, dim))
        return leaves

    def check_dim(
        self,
        args: "tuple[Any, ...]",
        kwargs: "dict[str, Any]",
        argument: "int | str",
        path: "tuple[Any, ...]",
        leaf: torch.Tensor,
        dim: int,
        implicit: bool,
    ) -> int:
        if leaf.is_nested or leaf.is_quantized:
            self.refuse(args, kwargs, self.label(argument, path), leaf)
        rank = leaf.dim()
        if -rank <= dim < rank and not isinstance(dim, bool):
            return dim % rank
        where = self.label(argument, path)
        if rank == 0:
            name = argument if isinstance(argument, str) else None
            fix = (
                f"Name it in a dict to share it by all examples: in_dims={{{name!r}: None}}."
                if name is not None and implicit
                else "Give in_dims=None for it to share it by all examples."
            )
            self.fail(
                args, kwargs, f"{where} has shape [] with 0 dims, so it has none to map over. {fix}"
            )
        self.fail(
            args,
            kwargs,
            f"{where} has shape {list(leaf.shape)} with {rank} dim{'s' if rank > 1 else ''}, so "
            f"in_dims must lie in [{-rank}, {rank - 1}], got {dim!r}. Give a dim it has, or None "
            f"to share it by all examples.",
        )
        raise AssertionError

    def refuse(
        self,
        args: "tuple[Any, ...]",
        kwargs: "dict[str, Any]",
        where: str,
        leaf: torch.Tensor,
    ) -> None:
        """See NOTE [nested and quantized tensors] in core/lifted_tensor.cc."""
        if leaf.is_nested:
            self.fail(
                args,
                kwargs,
                f"{where} is a nested tensor, over which vmap cannot map: its examples differ in "
                f"shape. Pass its to_padded_tensor(0.0), with their lengths or a mask, or loop over "
                f"its unbind().",
            )
        self.fail(
            args,
            kwargs,
            f"{where} is a quantized tensor ({leaf.dtype}), over which vmap cannot map: operators on "
            f"quantized tensors have no batching rules. Pass its dequantize(), or give "
            f"in_dims=None for it if all examples share it.",
        )

    def batch_size(
        self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]", leaves: "list[_Leaf]"
    ) -> int:
        sizes: "dict[int, list[_Leaf]]" = {}
        for leaf in leaves:
            if leaf.dim is not None:
                sizes.setdefault(leaf.value.shape[leaf.dim], []).append(leaf)
        if not sizes:
            if self.axis_size is not None:
                return self.axis_size
            self.fail(args, kwargs, self.nothing_mapped(args, kwargs, leaves))
        if len(sizes) > 1:
            seen = "; ".join(
                f"{self.label(leaf.argument, leaf.path)} has shape {list(leaf.value.shape)}, that "
                f"is size {size} along dim {leaf.dim}"
                for size, members in sizes.items()
                for leaf in members[:2]
            )
            self.fail(
                args,
                kwargs,
                f"the mapped dims must have one size, got {' and '.join(map(str, sizes))}: {seen}. "
                f"Make them agree, or give None in in_dims for what all examples share.",
            )
        (size,) = sizes
        if self.axis_size is not None and self.axis_size != size:
            leaf = sizes[size][0]
            self.fail(
                args,
                kwargs,
                f"axis_size={self.axis_size}, but {self.label(leaf.argument, leaf.path)} has shape "
                f"{list(leaf.value.shape)}, that is size {size} along dim {leaf.dim}. Leave "
                f"axis_size out, or give the size the arguments have.",
            )
        return size

    def nothing_mapped(
        self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]", leaves: "list[_Leaf]"
    ) -> str:
        if not any(isinstance(leaf.value, torch.Tensor) for leaf in leaves):
            return (
                "there is no tensor among the arguments to map over. Pass one, or say how often "
                "the function is to run: axis_size=n."
            )
        keyword = next((leaf.argument for leaf in leaves if isinstance(leaf.argument, str)), None)
        if keyword is not None and not isinstance(self.in_dims, dict):
            return (
                f"there is nothing to map over: all examples share keyword arguments unless in_dims "
                f"names them. Map over {keyword!r} with in_dims={{{keyword!r}: 0}}, or pass it by "
                f"position."
            )
        return (
            "in_dims is None for every tensor, so there is nothing to map over. Give an int for "
            "one of them, or say how often the function is to run: axis_size=n."
        )

    # --- chunks ---------------------------------------------------------------------------------

    def in_chunks(
        self, call: Callable[..., Any], size: int, values: "list[Any]", dims: "list[Any]"
    ) -> Any:
        # Where the function is on several devices, the first mapped tensor's memory counts.
        like = next((v for v, dim in zip(values, dims) if dim is not None), None)
        chunks = _C.Chunks(size, self.random, self.chunk_size, self.memory_budget, like)
        places: "list[Any]" = []
        unflatten: Any = None

        def flat(lifted: "list[Any]") -> "tuple[Any, ...]":
            """As `call`, but the result is kept flat."""
            nonlocal places, unflatten
            leaves, places, own, fail = call(lifted)
            unflatten = unflatten or own
            return leaves, places, _as_it_is, fail

        try:
            while chunks.next():
                start, count = chunks.start(), chunks.length()
                chunk = [
                    value if dim is None else value.narrow(dim, start, count)
                    for value, dim in zip(values, dims)
                ]
                result = _C.vmap_leaves(flat, count, self.random, chunk, dims, chunks)
                chunks.end(result, places)
                del result, chunk
            return unflatten(chunks.join())
        finally:
            chunks.close()

    # --- outputs --------------------------------------------------------------------------------

    def finish(self, output: Any) -> "tuple[list[Any], list[Any], Callable[..., Any], Any]":
        """(leaves, out_dims, unflatten, fail): what the extension needs of an output."""
        if output is None:
            self.fail_output("the function returned None. It must return tensors: did it forget its "
                             "return statement?")
        if type(output) is torch.Tensor and not output.is_nested:
            if self.out_dims is None or type(self.out_dims) is int:
                return [output], [self.out_dims], _pytree.LEAF.unflatten, self.misfit_of(output)
        leaves, spec = _pytree.flatten(output)
        # Chunks have outputs of one structure: only the leaves of the second are new.
        if self.placed is not None and spec == self.placed[0]:
            if all(isinstance(leaf, torch.Tensor) and not leaf.is_nested for leaf in leaves):
                return leaves, self.placed[1], spec.unflatten, self.misfit_of(output)
        entries = self.place(output)
        for path, _, leaf, _ in entries:
            if not isinstance(leaf, torch.Tensor):
                self.fail_output(
                    f"the output{_pytree.format_path(path)} is {describe(leaf)}. The function must "
                    f"return tensors; make it one with torch.as_tensor, or leave it out."
                )
            if leaf.is_nested:
                self.fail_output(
                    f"the output{_pytree.format_path(path)} is a nested tensor, which has no dim "
                    f"for the examples. Return its to_padded_tensor(0.0)."
                )
        dims = [dim for _, dim, _, _ in entries]
        self.placed = spec, dims
        return leaves, dims, spec.unflatten, self.misfit_of(output)

    def place(self, output: Any) -> "list[tuple[tuple[Any, ...], Any, Any, bool]]":
        """For every leaf of the output: (its path, its out_dim, it, whether they are level)."""
        out_dims = self.out_dims
        if isinstance(output, torch.Tensor) and isinstance(out_dims, (tuple, list)):
            if len(out_dims) == 1:
                out_dims = out_dims[0]
        try:
            return _pytree.broadcast_prefix(out_dims, output)
        except _pytree.PrefixError as error:
            self.fail_output(
                f"the output{_pytree.format_path(error.path)} is {describe(error.tree)}, but "
                f"out_dims has {error.prefix!r} for it. out_dims is an int, None, or a structure "
                f"of these like the output's."
            )
            raise AssertionError from error

    def misfit_of(self, output: Any) -> "Callable[[int, bool], None]":
        """What raises the error that an out_dim does not suit its leaf."""

        def fail(index: int, batched: bool) -> None:
            path, dim, leaf, _ = self.place(output)[index]
            where = f"the output{_pytree.format_path(path)}"
            if batched:
                self.fail_output(
                    f"{where} differs between examples, so out_dims cannot be None for it (shape "
                    f"of one example: {list(leaf.shape)}). Give the dim that the examples go to."
                )
            rank = leaf.dim() + 1
            self.fail_output(
                f"{where} has shape {list(leaf.shape)} for one example, so {rank} dim"
                f"{'s' if rank > 1 else ''} with the mapped one: out_dims must lie in "
                f"[{-rank}, {rank - 1}], got {dim}."
            )

        return fail

    # --- errors ---------------------------------------------------------------------------------

    def label(self, argument: "int | str", path: "tuple[Any, ...]") -> str:
        return argument_label(self.func, argument, path)

    def echo(self) -> str:
        options = [function_name(self.func)]
        if self.in_dims != 0:
            options.append(f"in_dims={self.in_dims!r}")
        return f"vmap({', '.join(options)})"

    def fail(self, args: "tuple[Any, ...]", kwargs: "Mapping[str, Any]", message: str) -> None:
        positions, _, _ = parameters_of(self.func)
        names = [positions[i] if i < len(positions) else f"args[{i}]" for i in range(len(args))]
        names += [f"{name}=..." for name in kwargs]
        raise TransformError(f"{self.echo()}({', '.join(names)}): {message}")

    def fail_output(self, message: str) -> None:
        out = "" if self.out_dims == 0 else f", out_dims={self.out_dims!r}"
        raise TransformError(f"{self.echo()[:-1]}{out}): {message}")


class _Implicit:
    """An int in in_dims that was not meant for one argument alone."""

    __slots__ = ("dim",)

    def __init__(self, dim: int) -> None:
        self.dim = dim
