"""grad, value_and_grad, grad_and_value and vjp.

NOTE [argnums]
An entry of argnums says which part of the arguments is differentiated:

  1            the second positional argument
  "w"          the argument of that name, positional or keyword
  (0, "w")     a path, recognised by the string in it: args[0]["w"], or args[0].w for a namedtuple
               or dataclass; ("params", "w") is params["w"] of the argument named params
  ((0, 1),)    a path of ints alone has to stand in a tuple or list of paths

A tuple of ints, or a list, or a tuple of tuples, asks for several: the gradient is a tuple. One
entry gives one gradient, with the structure of what it names.
"""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError
from torchlift._names import argument_label, describe, function_name, parameters_of, wraps

_GRADS, _VALUE_AND_GRADS, _GRADS_AND_VALUE = 0, 1, 2


def grad(
    func: Callable[..., Any], argnums: Any = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that computes the gradient of `func`, which returns a scalar tensor.

    Args:
        func: returns a tensor without dims; with has_aux, a pair of that and anything else.
        argnums: what to differentiate: a position, a parameter's name, a path to a part of an
            argument such as `(0, "w")`, or a tuple or list of several. A tuple of ints means
            several positions.
        has_aux: whether `func` returns (loss, aux). The result is then (gradients, aux).

    Returns:
        A function of the same arguments. The gradient has the structure of what argnums names;
        several give a tuple.

    Raises:
        TransformError (a ValueError): if argnums name no tensors of a floating or complex dtype, or
            `func` does not return a scalar.

    >>> import torch, torchlift
    >>> torchlift.grad(lambda x: (x ** 2).sum())(torch.tensor([1., 2.]))
    tensor([2., 4.])
    >>> params = {"w": torch.tensor(3.), "b": torch.tensor(1.)}
    >>> loss = lambda params, x: params["w"] * x + params["b"]
    >>> torchlift.grad(loss)(params, torch.tensor(2.))
    {'w': tensor(2.), 'b': tensor(1.)}
    >>> torchlift.grad(loss, argnums=(0, "w"))(params, torch.tensor(2.))
    tensor(2.)
    >>> torchlift.vmap(torchlift.grad(loss), in_dims=(None, 0))(params, torch.ones(3))["b"]
    tensor([1., 1., 1.])
    """
    return _make("grad", func, argnums, has_aux, _GRADS)


def value_and_grad(
    func: Callable[..., Any], argnums: Any = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Like `grad`; returns (value, gradients), or ((value, aux), gradients) with has_aux.

    >>> import torch, torchlift
    >>> torchlift.value_and_grad(torch.sin)(torch.tensor(0.))
    (tensor(0.), tensor(1.))
    """
    return _make("value_and_grad", func, argnums, has_aux, _VALUE_AND_GRADS)


def grad_and_value(
    func: Callable[..., Any], argnums: Any = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Like `grad`; returns (gradients, value), or (gradients, (value, aux)), as torch.func does.

    >>> import torch, torchlift
    >>> torchlift.grad_and_value(torch.sin)(torch.tensor(0.))
    (tensor(1.), tensor(0.))
    """
    return _make("grad_and_value", func, argnums, has_aux, _GRADS_AND_VALUE)


def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False) -> "tuple[Any, ...]":
    """Runs `func(*primals)` and returns its output with the function that pulls cotangents back.

    Args:
        func: a function of tensors or pytrees of tensors, which returns the like. With has_aux, it
            returns a pair (output, aux).
        primals: its arguments; all of their leaves are tensors of a floating or complex dtype.

    Returns:
        (output, vjp_fn), or (output, vjp_fn, aux). vjp_fn takes cotangents with the structure,
        shapes and dtypes of output, and returns a tuple with the gradient for each primal. It can
        be called many times, and later.

    Raises:
        TransformError (a ValueError): for primals or outputs that are no such tensors; from vjp_fn,
            for cotangents of another structure, shape or dtype.

    >>> import torch, torchlift
    >>> output, vjp_fn = torchlift.vjp(torch.mul, torch.tensor(2.), torch.tensor(3.))
    >>> vjp_fn(torch.tensor(1.))
    (tensor(3.), tensor(2.))
    """
    call = _Call("vjp", func, primals, {})
    if not primals:
        call.fail("there are no primals. Pass the arguments to differentiate: vjp(f, x).")
    leaves, spec = _pytree.flatten(primals)
    call.check_primals(leaves, lambda: _pytree.flatten_with_path(primals)[0])
    shape: "list[Any]" = []

    def run(values: "list[torch.Tensor]") -> "list[Any]":
        output = func(*spec.unflatten(values))
        aux = None
        if has_aux:
            output, aux = call.split_aux(output)
        output_leaves, output_spec = _pytree.flatten(output)
        call.check_outputs(output, output_leaves)
        aux_leaves, aux_spec = _pytree.flatten(aux)
        shape.extend([len(output_leaves), output_spec, aux_spec])
        return output_leaves + aux_leaves

    seen, pullback = _C.vjp_leaves(run, leaves)
    count, output_spec, aux_spec = shape
    output = output_spec.unflatten(seen[:count])
    tensors = [leaf for leaf in seen[count:] if isinstance(leaf, torch.Tensor)]
    vjp_fn = _Vjp(call, pullback, spec, seen[:count], output_spec, len(tensors))
    if has_aux:
        return output, vjp_fn, aux_spec.unflatten(seen[count:])
    return output, vjp_fn


class _Vjp:
    """What vjp returns: cotangents in, a tuple with the gradient for each primal out."""

    def __init__(
        self,
        call: "_Call",
        pullback: Any,
        primals_spec: Any,
        outputs: "list[torch.Tensor]",
        output_spec: Any,
        aux: int,
    ) -> None:
        self._call, self._pullback, self._primals_spec = call, pullback, primals_spec
        self._wanted = [(output.shape, output.dtype) for output in outputs]
        self._output_spec, self._aux = output_spec, aux

    def __call__(
        self, cotangents: Any, retain_graph: bool = True, create_graph: "bool | None" = None
    ) -> "tuple[Any, ...]":
        leaves, spec = _pytree.flatten(cotangents)
        self._check(cotangents, leaves, spec)
        padded = leaves + [None] * self._aux
        enabled = torch.is_grad_enabled() if create_graph is None else create_graph
        with torch.set_grad_enabled(enabled):
            grads = self._pullback.pull(padded, not retain_graph)
        return self._primals_spec.unflatten(grads)

    def __repr__(self) -> str:
        return f"<vjp of {function_name(self._call.func)}>"

    def _check(self, cotangents: Any, leaves: "list[Any]", spec: Any) -> None:
        if spec != self._output_spec:
            self._call.fail_cotangents(
                f"the cotangents have structure {_structure(spec)}, but the output has structure "
                f"{_structure(self._output_spec)}. Give one cotangent for each output, in the same "
                f"structure."
            )
        for index, (leaf, (shape, dtype)) in enumerate(zip(leaves, self._wanted)):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.shape == shape
                and leaf.dtype == dtype
            ):
                continue
            where = "the cotangent" + _pytree.format_path(
                _pytree.flatten_with_path(cotangents)[0][index]
            )
            wanted = f"shape {list(shape)} and dtype {dtype}"
            if not isinstance(leaf, torch.Tensor):
                self._call.fail_cotangents(
                    f"{where} is {describe(leaf)}, but must be a tensor of {wanted}, like the output."
                )
            fix = (
                f"Convert it with .to({dtype})."
                if leaf.shape == shape
                else "Give it the output's shape; torch.ones_like(output) sums the outputs."
            )
            self._call.fail_cotangents(
                f"{where} has shape {list(leaf.shape)} and dtype {leaf.dtype}, but the output has "
                f"{wanted}. {fix}"
            )


def _structure(spec: Any) -> str:
    text = str(spec).removeprefix("PyTreeSpec(")
    for suffix in (")", ", namespace='torchlift'", ", NoneIsLeaf"):
        text = text.removesuffix(suffix)
    return text


def _make(
    transform: str, func: Callable[..., Any], argnums: Any, has_aux: bool, order: int
) -> Callable[..., Any]:
    if not callable(func):
        raise TypeError(f"{transform}: the first argument must be a function, got {func!r}")
    fast, has_aux = _C.grad_call, bool(has_aux)
    wanted = _Argnums(argnums)
    plain = wanted.plain()

    def help_fast(kind: str, value: Any) -> Any:
        if kind == "loss":
            call = _Call(transform, func, (), {})
            call.check_loss(call.split_aux(value)[0] if has_aux else value)
        leaves, spec = _pytree.flatten(value)
        return leaves, spec.unflatten

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if plain is not None:
            result = fast(func, plain, has_aux, order, help_fast, args, kwargs or None)
            if result is not NotImplemented:
                return result
        return _general(_Call(transform, func, args, kwargs, argnums), wanted, has_aux, order)

    return wrapped


def _general(call: "_Call", wanted: "_Argnums", has_aux: bool, order: int) -> Any:
    selected = [call.select(entry) for entry in wanted.entries]
    paths, leaves, spec = _pytree.flatten_with_path((call.args, call.kwargs))
    parts = []  # For each entry: the leaves it stands for, and their structure.
    for path, value in selected:
        indices = [i for i, p in enumerate(paths) if p[: len(path)] == path]
        part_leaves, part_spec = _pytree.flatten(value)
        if len(part_leaves) != len(indices):
            call.fail(f"argnums: {path!r} leads into a value that cannot be replaced.")
        call.check_primals(part_leaves, lambda: [paths[i][1:] for i in indices])
        parts.append((indices, part_spec))
    chosen = sorted({i for indices, _ in parts for i in indices})
    shape: "list[Any]" = []

    def run(values: "list[torch.Tensor]") -> "tuple[torch.Tensor, list[Any]]":
        replaced = list(leaves)
        for i, value in zip(chosen, values):
            replaced[i] = value
        args, kwargs = spec.unflatten(replaced)
        output = call.func(*args, **kwargs)
        loss, aux = call.split_aux(output) if has_aux else (output, None)
        call.check_loss(loss)
        aux_leaves, aux_spec = _pytree.flatten(aux)
        shape.append(aux_spec)
        return loss, aux_leaves

    grads, value, aux_leaves = _C.grad_leaves(run, [leaves[i] for i in chosen])
    by_index = dict(zip(chosen, grads))
    trees = tuple(part.unflatten([by_index[i] for i in indices]) for indices, part in parts)
    result = trees if wanted.several else trees[0]
    aux = shape[0].unflatten(aux_leaves)
    if order == _GRADS:
        return (result, aux) if has_aux else result
    if has_aux:
        value = (value, aux)
    return (value, result) if order == _VALUE_AND_GRADS else (result, value)


class _Argnums:
    """See NOTE [argnums]."""

    def __init__(self, argnums: Any) -> None:
        self.argnums = argnums
        self.several = isinstance(argnums, list) or (
            isinstance(argnums, tuple) and not any(isinstance(key, str) for key in argnums)
        )
        entries = list(argnums) if self.several else [argnums]
        self.entries = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
        for entry in self.entries:
            if not entry or isinstance(entry[0], bool) or not isinstance(entry[0], (int, str)):
                raise TransformError(
                    f"argnums must be a position, a parameter's name, a path that starts with one, "
                    f"or a tuple or list of several, got {argnums!r}."
                )
        if not self.entries:
            raise TransformError("argnums is empty: name at least one argument to differentiate.")

    def plain(self) -> Any:
        """argnums as the extension takes them, or None."""
        if all(len(entry) == 1 and isinstance(entry[0], int) for entry in self.entries):
            numbers = tuple(entry[0] for entry in self.entries)
            return numbers if self.several else numbers[0]
        return None


class _Call:
    """One call of a transformed function: finds its parts, and words its errors."""

    def __init__(
        self,
        transform: str,
        func: Callable[..., Any],
        args: "tuple[Any, ...]",
        kwargs: "dict[str, Any]",
        argnums: Any = 0,
    ) -> None:
        self.transform, self.func, self.argnums = transform, func, argnums
        self.args, self.kwargs = args, kwargs

    def select(self, entry: "tuple[Any, ...]") -> "tuple[tuple[Any, ...], Any]":
        """(path in the flattened (args, kwargs), the value there) for an entry of argnums."""
        path, value = self.select_argument(entry[0])
        for step, key in enumerate(entry[1:], 1):
            node = _pytree.flatten_one_level(value)
            where = f"argnums={self.argnums!r}: {_pytree.format_path(entry[:step])}"
            if node is None:
                self.fail(f"{where} is {describe(value)}, which has no part {key!r}.")
            children, entries = node
            fields = getattr(type(value), "_fields", None)
            if isinstance(key, str) and fields is not None and key in fields:
                key = list(fields).index(key)
            elif isinstance(key, int) and key < 0 and isinstance(value, (list, tuple)):
                key += len(value)
            if key not in entries:
                attribute = getattr(value, key, self) if isinstance(key, str) else self
                matches = [e for e, child in zip(entries, children) if child is attribute]
                if not matches:
                    self.fail(f"{where} is {describe(value)}, which has no part {key!r}.")
                key = matches[0]
            path, value = (*path, key), children[entries.index(key)]
        return path, value

    def select_argument(self, key: "int | str") -> "tuple[tuple[Any, ...], Any]":
        count = len(self.args)
        if isinstance(key, int):
            if not -count <= key < count:
                self.fail(
                    f"argnums={self.argnums!r} asks for argument {key}, but there are {count} "
                    f"positional arguments. Name a keyword argument by its name: argnums='w'."
                )
            return (0, key % count), self.args[key]
        if key in self.kwargs:
            return (1, key), self.kwargs[key]
        positions, _, _ = parameters_of(self.func)
        if key in positions[:count]:
            return (0, positions.index(key)), self.args[positions.index(key)]
        self.fail(
            f"argnums={self.argnums!r} names {key!r}, which is not among the arguments of this "
            f"call. Pass it, or name another."
        )
        raise AssertionError

    # --- checks ---------------------------------------------------------------------------------

    def check_primals(self, leaves: "list[Any]", paths: Callable[[], "list[Any]"]) -> None:
        if not leaves:
            self.fail("the argument to differentiate holds no tensor. Choose another with argnums.")
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                continue
            argument, *path = paths()[index]
            where = argument_label(self.func, argument, tuple(path))
            if isinstance(leaf, torch.Tensor):
                self.fail(
                    f"{where} has dtype {leaf.dtype} and shape {list(leaf.shape)}, but only "
                    f"tensors of a floating or complex dtype have a gradient. Convert it with "
                    f".float(), or differentiate other arguments."
                )
            self.fail(
                f"{where} is {describe(leaf)}, but only tensors have a gradient. Pass "
                f"torch.as_tensor(...) of it, or differentiate other arguments."
            )

    def check_loss(self, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor):
            self.fail_output(f"the function returned {describe(loss)}, but it must return a tensor "
                             f"without dims{self.aux_hint(loss)}.")
        if loss.dim() != 0:
            self.fail_output(
                f"the function returned a tensor of shape {list(loss.shape)}, but it must return "
                f"one without dims: the gradient of a single number. Reduce it with .sum() or "
                f".mean(), or use vjp for outputs with dims."
            )
        if not loss.is_floating_point():
            self.fail_output(
                f"the function returned a tensor of dtype {loss.dtype}, but it must be real and "
                f"floating to have a gradient."
            )

    @staticmethod
    def aux_hint(loss: Any) -> str:
        if isinstance(loss, tuple) and len(loss) == 2:
            return ". If the second of the pair is auxiliary, pass has_aux=True"
        return ""

    def split_aux(self, output: Any) -> "tuple[Any, Any]":
        if isinstance(output, tuple) and len(output) == 2:
            return output[0], output[1]
        self.fail_output(
            f"with has_aux=True the function must return a pair (output, aux), but it returned "
            f"{describe(output)}."
        )
        raise AssertionError

    def check_outputs(self, output: Any, leaves: "list[Any]") -> None:
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                path = _pytree.flatten_with_path(output)[0][index]
                self.fail_output(
                    f"the output{_pytree.format_path(path)} is {describe(leaf)}, but the function "
                    f"must return tensors. Return other things with has_aux=True."
                )

    def echo(self) -> str:
        options = "" if self.argnums == 0 else f", argnums={self.argnums!r}"
        return f"{self.transform}({function_name(self.func)}{options})"

    def fail(self, message: str) -> None:
        positions, _, _ = parameters_of(self.func)
        names = [positions[i] if i < len(positions) else f"args[{i}]" for i in range(len(self.args))]
        names += [f"{name}=..." for name in self.kwargs]
        if self.transform in ("vjp", "linearize"):
            echo = f"{self.transform}({', '.join([function_name(self.func), *names])})"
        elif self.transform in ("jvp", "jet", "hvp", "vhp", "ggn_vp"):
            echo = f"{self.transform}({function_name(self.func)}, ({', '.join(names)},), ...)"
        else:
            echo = f"{self.echo()}({', '.join(names)})"
        raise TransformError(f"{echo}: {message}")

    def fail_output(self, message: str) -> None:
        raise TransformError(f"{self.echo()}: {message}")

    def fail_cotangents(self, message: str) -> None:
        raise TransformError(f"vjp_fn of {function_name(self.func)}: {message}")
