"""How errors call functions, arguments and values."""

from __future__ import annotations

import functools
import inspect
import os
import types
from typing import Any, Callable

import torch

from torchlift import _pytree

# What the names of files begin with whose lines are not the user's.
NOT_USERS = [os.path.dirname(path) + os.sep for path in (__file__, torch.__file__)] + ["<frozen "]


def wraps(func: Callable[..., Any]) -> Callable[[Any], Any]:
    """functools.wraps, without copying the attributes of objects that happen to be callable."""
    if isinstance(func, types.FunctionType):
        return functools.partial(_named_after, func)
    return functools.wraps(func, updated=())


def _named_after(func: types.FunctionType, wrapper: Any) -> Any:
    """What functools.wraps does, for a function; attribute by attribute takes half of the time."""
    wrapper.__module__ = func.__module__
    wrapper.__name__ = func.__name__
    wrapper.__qualname__ = func.__qualname__
    wrapper.__doc__ = func.__doc__
    wrapper.__annotations__ = func.__annotations__
    if func.__dict__:
        wrapper.__dict__.update(func.__dict__)
    wrapper.__wrapped__ = func
    return wrapper


def function_name(func: Callable[..., Any]) -> str:
    """A short name for messages: `loss`, `<lambda>`, `Linear`."""
    name = getattr(func, "__name__", None)
    if name is None and hasattr(func, "func"):  # functools.partial
        return f"partial({function_name(func.func)})"
    return name if isinstance(name, str) else type(func).__name__


def parameters_of(func: Callable[..., Any]) -> "tuple[list[str], list[str], bool]":
    """(names of positional parameters, all names, whether any other name is taken as a keyword)."""
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return [], [], True
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return positional, named, open_ended


def argument_label(
    func: Callable[..., Any], argument: "int | str", path: "tuple[Any, ...]" = ()
) -> str:
    """`argument 1 (y)`, `argument 0 (params['w'])` or `argument 'scale'`."""
    inner = _pytree.format_path(path)
    if isinstance(argument, str):
        return f"argument {argument!r}" + (f" ({argument}{inner})" if inner else "")
    positions, _, _ = parameters_of(func)
    name = positions[argument] if argument < len(positions) else f"args[{argument}]"
    return f"argument {argument} ({name}{inner})"


def describe(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {list(value)[:8]!r}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return f"{text if len(text) < 40 else 'a value'} (of type {type(value).__name__})"
