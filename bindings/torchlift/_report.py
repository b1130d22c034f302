"""The loop fallback: what it did, and how to forbid it. What a memory budget did."""

from __future__ import annotations

from typing import Any, NamedTuple

from torchlift import _C


class FallbackRecord(NamedTuple):
    """One operator that has no batching rule."""

    op: str
    """Its name, such as "aten::ctc_loss.IntList"."""
    count: int
    """How often the loop was taken."""
    examples: int
    """How often the operator itself ran."""
    seconds: float
    """Wall time in the loop."""
    bytes: int
    """Size of the results."""


def fallback_report() -> "list[FallbackRecord]":
    """What vmap looped over since the start, or since reset_fallback_report(); slowest first.

    >>> import torch, torchlift
    >>> torchlift.reset_fallback_report()
    >>> _ = torchlift.vmap(torch.sin)(torch.ones(3))
    >>> torchlift.fallback_report()
    []
    """
    return [FallbackRecord(*record) for record in _C.fallback_report()]


def reset_fallback_report() -> None:
    """Forgets what fallback_report() would tell."""
    _C.reset_fallback_report()


class strict:
    """`with strict():` an operator without a batching rule raises UnsupportedError on this thread.

    >>> import torch, torchlift
    >>> with torchlift.strict():
    ...     _ = torchlift.vmap(torch.sin)(torch.ones(3))
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = bool(enabled)
        self._open: "list[Any]" = []

    def __enter__(self) -> "strict":
        scope = _C.Strict(self._enabled)
        scope.__enter__()
        self._open.append(scope)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().__exit__(*error)


def has_rule(op: str) -> bool:
    """Whether an operator ("aten::sin", "aten::mul.Tensor") has a batching rule of its own.

    Operators that libtorch makes of others ("aten::linear") need none.

    >>> import torchlift
    >>> torchlift.has_rule("aten::sin"), torchlift.has_rule("aten::no_such_operator")
    (True, False)
    """
    name, _, overload = op.partition(".")
    return _C.has_rule(name, overload)


class MemoryReport(NamedTuple):
    """What a call with memory_budget did."""

    examples: int
    """How many there were."""
    chunks: int
    """How many chunks they ran in."""
    chunk_size: int
    """Examples in the largest chunk."""
    budget: int
    """Bytes, as given."""
    peak_bytes: int
    """The most that a chunk took beside the result, measured."""
    result_bytes: int
    """The result, and what autograd keeps for it."""


def memory_report() -> "MemoryReport | None":
    """What the last vmap with memory_budget on this thread did; None if there was none.

    Counted is what torch's allocators hand out on the thread, not the scratch memory of libraries like
    MKL.

    >>> import torch, torchlift
    >>> f = torchlift.vmap(lambda x: torch.outer(x, x).sum(), memory_budget=100_000)
    >>> _ = f(torch.ones(50, 64))
    >>> report = torchlift.memory_report()
    >>> report.examples, report.chunk_size < 8, report.peak_bytes <= 100_000
    (50, True, True)
    """
    report = _C.memory_report()
    return None if report is None else MemoryReport(*report)


def _set_vmap_fallback_warning_enabled(enabled: bool) -> bool:
    """Whether the first loop over an operator warns (functorch's name). Returns the previous setting."""
    return _C.set_fallback_warning_enabled(enabled)
