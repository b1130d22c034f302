"""Decompositions: functions that take the place of operators in a trace."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Iterator, Mapping

import torch

from torchlift._errors import UnsupportedError

Table = Mapping[Any, Callable[..., Any]]
_state = threading.local()
# A table is applied to what its own functions give, until nothing of it is left.
_ROUNDS = 16


def current() -> Table:
    """The table of the innermost `pythonkey_decompose`."""
    table: Table = getattr(_state, "table", {})
    return table


@contextlib.contextmanager
def pythonkey_decompose(decomposition_table: "Table | None") -> Iterator[Table]:
    """Applies decompositions to all that is traced by make_fx or aot_function; a `with` block.

    Args:
        decomposition_table: for operators (`torch.ops.aten.silu.default`), functions that take their
            place, as `torch._decomp.get_decompositions` gives them.

    >>> import torch, torchlift
    >>> table = {torch.ops.aten.silu.default: lambda x: x * torch.sigmoid(x)}
    >>> with torchlift.compile.pythonkey_decompose(table):
    ...     module = torchlift.make_fx(torch.nn.functional.silu)(torch.zeros(3))
    >>> [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    ['aten.sigmoid.default', 'aten.mul.Tensor']
    """
    before = current()
    _state.table = dict(decomposition_table or {})
    try:
        yield _state.table
    finally:
        _state.table = before


class _Decompose(torch.fx.Interpreter):
    def __init__(self, module: "torch.fx.GraphModule", table: Table) -> None:
        super().__init__(module)
        self.table = table

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self.table.get(target, target), args, kwargs)


def apply(
    module: "torch.fx.GraphModule",
    table: Table,
    retrace: "Callable[[Callable[..., Any]], torch.fx.GraphModule]",
) -> "torch.fx.GraphModule":
    """The module without the operators in the table; retrace(f) traces f(*inputs of the module)."""
    for _ in range(_ROUNDS):
        left = [node for node in module.graph.nodes if node.target in table]
        if not left:
            return module
        module = retrace(_Decompose(module, table).run)
    raise UnsupportedError(
        f"[make_fx] the decomposition of {left[0].target} gives that operator again, after "
        f"{_ROUNDS} rounds. Take it out of the table."
    )
