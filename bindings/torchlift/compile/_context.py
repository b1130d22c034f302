"""Which graph is being compiled, for compilers that ask."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Iterator

MODEL_NAME = "model"
_ids = itertools.count()
_state = threading.local()


def next_aot_id() -> int:
    return next(_ids)


def get_aot_compilation_context() -> "tuple[list[str], str, int]":
    """(names of the graph that is being compiled, the model's name, how many were before it).

    >>> from torchlift.compile import get_aot_compilation_context
    >>> get_aot_compilation_context()[1]
    'model'
    """
    return list(getattr(_state, "names", [])), MODEL_NAME, getattr(_state, "count", 0)


def get_aot_graph_name() -> str:
    """A name for the graph that is being compiled: "model__3_forward_7".

    >>> import torch
    >>> from torchlift.compile import aot_function, get_aot_graph_name
    >>> def compiler(fx_module, inputs):
    ...     print(get_aot_graph_name().split("_")[-2])
    ...     return fx_module
    >>> aot_function(torch.sin, compiler)(torch.zeros(2, requires_grad=True)).detach()
    forward
    backward
    tensor([0., 0.])
    """
    names, model, count = get_aot_compilation_context()
    return f"{model}__{'_'.join(names)}_{count}"


get_graph_being_compiled = get_aot_graph_name


@contextlib.contextmanager
def compiling(aot_id: int, kind: str) -> "Iterator[None]":
    before = getattr(_state, "names", [])
    _state.names = [f"{aot_id}_{kind}"]
    try:
        yield
    finally:
        _state.names = before
        _state.count = getattr(_state, "count", 0) + 1
