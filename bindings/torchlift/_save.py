"""Functions in files: save traces one, load gives it back, in Python or in C++."""

from __future__ import annotations

import os
from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError, UnsupportedError
from torchlift._names import describe, function_name, parameters_of
from torchlift._native import check_backend, compiled_package
from torchlift._shapes import ShapeDtype, tensors_for
from torchlift._signature import same_leaf
from torchlift._trace import trace_call

_CONSTANTS = (bool, int, float, complex, str)


class Loaded:
    """A function from a file: call it with arguments of the structure it was saved with.

    Attributes:
        name: of the function.
        graph: its graph.
        signature: its arguments and results, as text.
        backend: what runs it: "eager" (the graph), or "inductor" (machine code of the file).

    >>> import os, tempfile, torch, torchlift
    >>> path = os.path.join(tempfile.mkdtemp(), "sum.tlc")
    >>> torchlift.save(lambda x, y: {"sum": x + y}, path, torch.ones(2), torch.ones(2))
    >>> torchlift.load(path).signature
    '(x: Tensor, y: Tensor) -> {sum: Tensor}'
    """

    def __init__(self, artifact: "_C.Artifact", program: "_C.LoadedProgram") -> None:
        self.name: str = artifact.name
        self.graph: "_C.Graph" = artifact.graph
        self.signature: str = artifact.signature
        self.backend: str = program.backend
        self._program = program
        self._inputs = artifact.inputs
        self._outputs = artifact.outputs

    def __call__(self, *args: Any, seed: "int | None" = None, **kwargs: Any) -> Any:
        """Runs it.

        Args:
            args, kwargs: arguments in their order, or by name.
            seed: of the random operators.

        Raises:
            TransformError (a ValueError): for arguments that do not fit the signature.
        """
        given = list(args)
        names = [name for _, name, _ in self._inputs[2]]
        for name in names[len(given) :]:
            if name in kwargs:
                given.append(kwargs.pop(name))
        if kwargs or len(given) != len(names):
            raise TransformError(
                f"[load] {self.name} takes {self.signature}; got {len(args)} positional arguments"
                + (f" and {', '.join(kwargs)}" if kwargs else "")
                + "."
            )
        tensors: "list[torch.Tensor]" = []
        for value, structure in zip(given, self._inputs[2]):
            self._collect(value, structure, structure[1], tensors)
        rest = iter(self._program.run(tensors, seed))
        return _build(self._outputs, rest)

    def _collect(
        self, value: Any, structure: "tuple[str, str, Any]", path: str, tensors: "list[torch.Tensor]"
    ) -> None:
        kind, _, content = structure
        if kind == "tensor" and isinstance(value, torch.Tensor):
            tensors.append(value)
        elif kind == "none" and value is None:
            return
        elif kind == "constant" and same_leaf(value, content):
            return
        elif kind in ("tuple", "list") and isinstance(value, (tuple, list)):
            self._children(list(value), content, [f"{path}[{i}]" for i in range(len(content))], tensors)
        elif kind == "dict" and isinstance(value, dict):
            names = [name for _, name, _ in content]
            if sorted(value) != sorted(names):
                raise TransformError(
                    f"[load] {path} must have the keys {names}, got {list(value)}."
                )
            self._children(
                [value[name] for name in names], content, [f"{path}[{n!r}]" for n in names], tensors
            )
        else:
            wanted = repr(content) if kind == "constant" else f"a {kind}"
            raise TransformError(
                f"[load] {path} must be {wanted}, got {describe(value)}; {self.name} takes "
                f"{self.signature}."
            )

    def _children(
        self,
        values: "list[Any]",
        content: "list[Any]",
        paths: "list[str]",
        tensors: "list[torch.Tensor]",
    ) -> None:
        if len(values) != len(content):
            raise TransformError(
                f"[load] {paths[0] if paths else 'an argument'} and its like: expected "
                f"{len(content)} elements, got {len(values)}."
            )
        for value, structure, path in zip(values, content, paths):
            self._collect(value, structure, path, tensors)

    def __repr__(self) -> str:
        return f"<torchlift.Loaded {self.name}: {self.signature}>"


def save(
    func: Callable[..., Any],
    path: "str | os.PathLike[str]",
    *args: Any,
    dynamic: "dict[Any, Any] | None" = None,
    backend: str = "eager",
    **kwargs: Any,
) -> None:
    """Traces `func` and saves it: `torchlift.load` and the C++ library run it without its code.

    Args:
        func: a function of tensors, in tuples, lists and dicts with strings as keys, with any
            transforms: `save(vmap(grad(loss)), "grads.tlc", params, xs, ys)`.
        path: of the file, by custom with the suffix .tlc.
        args, kwargs: example arguments; the file is for tensors of their shapes and dtypes. They may
            be no more than shapes (a `ShapeDtype`, or tensors on the meta device).
        dynamic: dims of any size, as in `torchlift.trace`.
        backend: "eager": the file holds the graph, which the replay runs. "inductor": it also holds
            machine code that torch's Inductor makes of the graph now, for this version of torch,
            torchlift and this kind of CPU; `load` asks for `allow_native_code=True` then.

    Tensors that `func` captures (weights) are saved with it. Those that it writes into (running
    statistics) are saved as they are now, and each loaded program updates its own.

    Raises:
        UnsupportedError (a RuntimeError): for what cannot be traced, and structures that a file
            does not hold (dataclasses and other registered nodes). With "inductor": without a C++
            compiler, on another device than the CPU, and for operators and dynamic dims that torch's
            exporter and Inductor cannot compile.

    >>> import os, tempfile, torch, torchlift
    >>> path = os.path.join(tempfile.mkdtemp(), "grad.tlc")
    >>> torchlift.save(torchlift.grad(lambda x: (x ** 2).sum()), path, torch.ones(3))
    >>> torchlift.load(path)(torch.arange(3.))
    tensor([0., 2., 4.])
    """
    positional = parameters_of(func)[0]
    names = [positional[i] if i < len(positional) else f"arg{i}" for i in range(len(args))]
    inputs = [_structure(value, name) for name, value in zip(names, args)]
    inputs += [_structure(kwargs[name], name) for name in sorted(kwargs)]
    check_backend(backend)
    # Keyword arguments come in the order of their names, as leaves of a dict do.
    kwargs = dict(sorted(kwargs.items()))
    traced = trace_call("save", func, args, kwargs, dynamic)
    placeholder = object()
    result = _pytree.tree_map(lambda leaf: leaf, traced.rebuild([placeholder] * len(traced.graph.outputs())))
    outputs = _structure(result, "", placeholder)
    package = None
    if backend == "inductor":
        examples = _examples(args, kwargs)
        package = compiled_package(traced.graph)
    artifact = _C.make_artifact(
        traced.graph, ("tuple", "", inputs), outputs, function_name(func), package
    )
    if package is not None:
        _try_out(artifact, examples)
    _C.save_artifact(artifact, os.fspath(path))


def _examples(args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> "list[torch.Tensor]":
    """The tensors among the arguments, zeros where only their shapes are known."""
    leaves, devices = tensors_for(_pytree.flatten((args, kwargs))[0])
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if devices is None:
        return [tensor.clone() for tensor in tensors]
    return [torch.zeros_like(t, device=device) for t, device in zip(tensors, devices)]


def _try_out(artifact: "_C.Artifact", examples: "list[torch.Tensor]") -> None:
    """Runs machine code that was just made, so that one that does not fit the graph is not saved."""
    with torch.no_grad():
        program = _C.LoadedProgram(artifact, True, "", artifact.name)
        program.try_out([example.clone() for example in examples])


def load(
    path: "str | os.PathLike[str]",
    *,
    allow_native_code: bool = False,
    backend: "str | None" = None,
) -> Loaded:
    """The function that `save`, in Python or C++, wrote into a file.

    What the function writes into tensors that it captured is written into those of the program: each
    load gives new ones, with what they held when it was saved. Loading runs nothing (but machine code that you allow), and a damaged or hostile file is an error. What comes can be called,
    transformed (`vmap(grad(load(path)))`) and saved again.

    Args:
        path: of the file.
        allow_native_code: whether machine code in the file (`save(..., backend="inductor")`) may be
            loaded, which runs code of the file: only for files of people whom you trust. Without
            it, such a file is an error.
        backend: "eager": the graph of the file runs, though it holds machine code.

    Raises:
        TransformError (a ValueError): for a file that is no artifact, or damaged; for machine code
            that is not allowed, or was made for another machine, torch or torchlift.
        UnsupportedError (a RuntimeError): if it calls an operator that this torch does not have.

    >>> import os, tempfile, torch, torchlift
    >>> path = os.path.join(tempfile.mkdtemp(), "sin.tlc")
    >>> torchlift.save(lambda x: x.sin().sum(), path, torch.ones(3))
    >>> torchlift.vmap(torchlift.grad(torchlift.load(path)))(torch.zeros(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    artifact = _C.load_artifact(os.fspath(path))
    return Loaded(
        artifact, _C.LoadedProgram(artifact, allow_native_code, backend or "", os.fspath(path))
    )


def _structure(value: Any, name: str, tensor: Any = None) -> "tuple[str, str, Any]":
    """(kind, name, content) of a pytree; `tensor` stands for tensors."""
    if isinstance(value, (torch.Tensor, ShapeDtype)) or (tensor is not None and value is tensor):
        return ("tensor", name, None)
    if value is None:
        return ("none", name, None)
    if type(value) in _CONSTANTS:
        return ("constant", name, value)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        # In the order in which pytrees have them.
        return ("dict", name, [_structure(value[key], key, tensor) for key in sorted(value)])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        children = [_structure(v, f, tensor) for v, f in zip(value, value._fields)]
        return ("tuple", name, children)
    if type(value) in (tuple, list):
        return (
            "tuple" if type(value) is tuple else "list",
            name,
            [_structure(v, "", tensor) for v in value],
        )
    raise UnsupportedError(
        f"[save] {name or 'the result'} holds {describe(value)}, which a "
        f"file does not keep. Use tuples, lists, dicts with strings as keys, tensors and numbers."
    )


def _build(structure: "tuple[str, str, Any]", tensors: Any) -> Any:
    kind, _, content = structure
    if kind == "tensor":
        return next(tensors)
    if kind in ("none", "constant"):
        return content
    children = [_build(child, tensors) for child in content]
    if kind == "dict":
        return {child[1]: value for child, value in zip(content, children)}
    return tuple(children) if kind == "tuple" else children
