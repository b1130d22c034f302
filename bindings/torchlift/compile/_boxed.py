"""Boxed functions: they take a list of inputs, which they may empty, so that memory is freed early."""

from __future__ import annotations

from typing import Any, Callable

from torchlift._names import wraps


def make_boxed_func(f: Callable[..., Any]) -> "Callable[[list[Any]], Any]":
    """f(*args) as a function of the list of args.

    >>> from torchlift.compile import make_boxed_func
    >>> make_boxed_func(lambda a, b: a - b)([5, 3])
    2
    """

    def boxed(args: "list[Any]") -> Any:
        return f(*args)

    boxed._boxed_call = boxed._torchlift_boxed = True  # type: ignore[attr-defined]
    return boxed


def make_boxed_compiler(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler whose results are boxed.

    >>> import torch
    >>> from torchlift.compile import aot_function, make_boxed_compiler
    >>> @make_boxed_compiler
    ... def shout(fx_module, inputs):
    ...     print("compiling", len(inputs), "inputs")
    ...     return fx_module
    >>> aot_function(torch.sin, shout)(torch.zeros(2))
    compiling 1 inputs
    tensor([0., 0.])
    """

    @wraps(compiler)
    def boxed(fx_g: Any, inps: Any) -> Any:
        return make_boxed_func(compiler(fx_g, inps))

    return boxed


def call(compiled: Callable[..., Any], args: "list[Any]", ours_only: bool = False) -> "list[Any]":
    """What a compiler gave, called by its own convention; always a list.

    ours_only: only what `make_boxed_func` made is boxed. (torch's compile_fx gives functions that say
        so of themselves, and are not.)
    """
    boxed = getattr(compiled, "_torchlift_boxed" if ours_only else "_boxed_call", False)
    outputs = compiled(args) if boxed else compiled(*args)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
