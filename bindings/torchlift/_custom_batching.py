"""custom_batching: a function with a rule of its own for vmap.

The work is done in C++ (autodiff/custom_batching.h), on lists of tensors.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._custom import Use
from torchlift._errors import TransformError
from torchlift._grad import _structure
from torchlift._names import describe, function_name

_EARLIER = "that of an earlier run"


class custom_batching:
    """A function with a rule of its own for what vmap makes of it.

    For what is faster on a whole batch than operator by operator, or cannot be mapped at all (code
    that leaves torch, such as numpy).

    `f.defbatching(rule)`: rule(size, batched, *args) gets the number of examples, and for each
    argument a tree like it, of bools that say which tensors have the batch dim; these have it in
    front, others are the same for all examples. It returns (output, batched): the output, and True
    if all of its tensors have the batch dim in front, False if none has, or a tree of bools like it.
    Arguments and outputs are pytrees; the output's leaves are tensors.

    The rule is applied at the innermost vmap around that maps an argument. What it computes is
    differentiated, and mapped by vmaps further outside, as any code is; gradients inside of that
    vmap, vmap(grad(f)), are those of the rule as well (which then gets the batch dim in all that is
    differentiated). With no argument mapped, the function itself runs.

    A rule must give each example what the function would have given it. Random operators in a rule
    belong to the levels around the vmap.

    >>> import torch, torchlift
    >>> @torchlift.custom_batching
    ... def norm(x):
    ...     return x.norm()
    >>> @norm.defbatching
    ... def norm_batching(size, batched, x):
    ...     return x.norm(dim=1), True
    >>> torchlift.vmap(norm)(torch.tensor([[3., 4.], [6., 8.]]))
    tensor([ 5., 10.])
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        if not callable(func):
            raise TypeError(f"custom_batching: the argument must be a function, got {func!r}")
        functools.update_wrapper(self, func)
        self._func = func
        self._rule: "Callable[..., Any] | None" = None

    def defbatching(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the rule, and returns it: usable as a decorator."""
        self._rule = rule
        return rule

    def __call__(self, *args: Any) -> Any:
        if self._rule is None:
            name = function_name(self._func)
            raise TransformError(
                f"[custom_batching] {name} has no rule yet. Give it one with {name}.defbatching(...)."
            )
        leaves, spec = _pytree.flatten(args)
        call = _Use(self._func, self._rule, leaves, spec)
        tensors = [leaves[i] for i in call.positions]
        if not tensors:
            return self._func(*args)
        outputs = _C.custom_batching_leaves(call.value, call.batch, tensors)
        return call.output_spec.unflatten(outputs)

    def __repr__(self) -> str:
        return f"<custom_batching {function_name(self._func)}>"


class _Use(Use):
    def __init__(
        self,
        func: Callable[..., Any],
        rule: Callable[..., Any],
        leaves: "list[Any]",
        spec: Any,
    ) -> None:
        super().__init__(f"[custom_batching] {function_name(func)}", leaves, spec)
        self._func, self._rule = func, rule

    def value(self, tensors: "list[torch.Tensor]") -> "list[torch.Tensor]":
        return self.flat(self._func(*self.arguments(tensors)), "the output", _EARLIER)

    def batch(
        self, size: int, tensors: "list[torch.Tensor]", batched: "list[bool]"
    ) -> "tuple[list[torch.Tensor], list[bool]]":
        result = self._rule(size, self.flags(batched), *self.arguments(tensors))
        if not isinstance(result, tuple) or len(result) != 2:
            self.fail(f"the rule must return (output, batched), but it returned {describe(result)}.")
        outputs = self.flat(result[0], "the output of the rule", _EARLIER)
        return outputs, self._output_flags(result[1], len(outputs))

    def _output_flags(self, batched: Any, count: int) -> "list[bool]":
        if isinstance(batched, bool):
            return [batched] * count
        leaves, spec = _pytree.flatten(batched)
        if spec != self.output_spec or not all(isinstance(leaf, bool) for leaf in leaves):
            self.fail(
                f"the second result of the rule must be a bool, or a tree of bools of the structure "
                f"{_structure(self.output_spec)} of the output; it is {batched!r}."
            )
        return leaves
