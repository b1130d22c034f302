"""custom_jvp, custom_vjp and stop_gradient.

NOTE [custom rules]
Both are autograd Functions, so that libtorch applies them in the domain of the arguments, and
_autograd_function.py across domains. The rule that is not given is the transpose of the one that is:
a jvp is linear in the tangents, and its vjp by them is the vjp of the function; and the reverse.
Rules are differentiated in their turn, for higher derivatives.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
from torch.autograd.function import Function

from torchlift import _C, _pytree
from torchlift._errors import TransformError
from torchlift._grad import _structure, vjp
from torchlift._names import describe, function_name


def stop_gradient(tree: Any) -> Any:
    """The tensors of a tree as constants: no transform around differentiates them, in either mode.

    >>> import torch, torchlift
    >>> torchlift.grad(lambda x: x * torchlift.stop_gradient(x))(torch.tensor(3.))
    tensor(3.)
    """
    return _pytree.tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, tree
    )


class _Custom:
    """A function with a derivative of its own. See custom_jvp and custom_vjp."""

    _kind = ""
    _function: Any = None

    def __init__(self, func: Callable[..., Any]) -> None:
        if not callable(func):
            raise TypeError(f"{self._kind}: the argument must be a function, got {func!r}")
        functools.update_wrapper(self, func)
        self._func = func
        self._rules: "tuple[Callable[..., Any], ...] | None" = None

    def __call__(self, *args: Any) -> Any:
        if self._rules is None:
            raise TransformError(
                f"{self._kind}: {function_name(self._func)} has no rule yet. Give it one with "
                f"{function_name(self._func)}.{self._kind.replace('custom_', 'def')}(...)."
            )
        leaves, spec = _pytree.flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            return self._func(*args)
        call = _Use(self._kind, self._func, self._rules, leaves, spec)
        outputs = self._function.apply(call, *tensors)
        return call.output_spec.unflatten(outputs)

    def __repr__(self) -> str:
        return f"<{self._kind} {function_name(self._func)}>"


class Use:
    """One call of a function with rules of its own: what is constant in it."""

    def __init__(self, name: str, leaves: "list[Any]", spec: Any) -> None:
        self._name, self._spec = name, spec
        self.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        # It lives as long as the graph does, and must not hold the tensors besides.
        self._leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.output_spec: Any = None

    def arguments(self, tensors: Any) -> Any:
        return self._filled(self._leaves, tensors)

    def flags(self, batched: "list[bool]") -> Any:
        """A bool for each leaf of the arguments, of which these are the tensors'."""
        return self._filled([False] * len(self._leaves), batched)

    def _filled(self, leaves: "list[Any]", values: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(self.positions, values):
            filled[i] = value
        return self._spec.unflatten(filled)

    def flat(self, output: Any, what: str, like: str = "the output") -> "list[torch.Tensor]":
        """The tensors of an output (or a tangent of it), in the structure that outputs have."""
        leaves, spec = _pytree.flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                self.fail(f"{what} holds {describe(leaf)}, but must be a tree of tensors.")
        if self.output_spec is None:
            self.output_spec = spec
        elif spec != self.output_spec:
            self.fail(
                f"{what} has structure {_structure(spec)}, but {like} has structure "
                f"{_structure(self.output_spec)}."
            )
        return leaves

    def fail(self, message: str) -> None:
        raise TransformError(f"{self._name}: {message}")


class _Use(Use):
    def __init__(
        self,
        kind: str,
        func: Callable[..., Any],
        rules: "tuple[Callable[..., Any], ...]",
        leaves: "list[Any]",
        spec: Any,
    ) -> None:
        super().__init__(f"{kind}({function_name(func)})", leaves, spec)
        self.func, self.rules = func, rules

    def gradients(self, grads: Any, tensors: Any) -> "list[torch.Tensor]":
        """bwd's result as a list, with zeros for None."""
        if not isinstance(grads, tuple):
            grads = (grads,)
        given = list(grads)
        arguments = self.arguments(tensors)
        if len(given) != len(arguments):
            self.fail(
                f"bwd returned {len(given)} gradients, but the function has {len(arguments)} "
                f"arguments. Return a tuple with one for each; None means zero."
            )
        flat: "list[torch.Tensor]" = []
        for number, (argument, grad) in enumerate(zip(arguments, given)):
            leaves, spec = _pytree.flatten(argument)
            grad_leaves = [None] * len(leaves) if grad is None else _pytree.flatten(grad)[0]
            if len(grad_leaves) != len(leaves):
                self.fail(
                    f"bwd's gradient of argument {number} has {len(grad_leaves)} leaves, but the "
                    f"argument has structure {_structure(spec)}."
                )
            for leaf, part in zip(leaves, grad_leaves):
                if not isinstance(leaf, torch.Tensor):
                    continue
                if part is not None and part.shape != leaf.shape:
                    self.fail(
                        f"bwd's gradient of argument {number} has shape {list(part.shape)}, but "
                        f"the argument has shape {list(leaf.shape)}."
                    )
                flat.append(torch.zeros_like(leaf) if part is None else part)
        return flat


def _fresh(outputs: "list[torch.Tensor]", inputs: Any) -> "tuple[torch.Tensor, ...]":
    """Outputs that share no memory with the inputs, as a Function wants them."""
    return tuple(out.clone() if any(out is t for t in inputs) or out._is_view() else out
                 for out in outputs)


def _or_zeros(tangents: Any, primals: Any) -> "list[torch.Tensor]":
    return [torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents)]


def _differentiable(tensors: Any) -> "list[int]":
    return [i for i, t in enumerate(tensors) if t.is_floating_point() or t.is_complex()]


class _JvpFunction(Function):
    @staticmethod
    def forward(ctx: Any, call: _Use, *tensors: torch.Tensor) -> Any:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        return _fresh(call.flat(call.func(*call.arguments(tensors)), "the output"), tensors)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        primals = ctx.saved_tensors
        return _push(ctx.call, primals, _or_zeros(tangents, primals))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        primals = ctx.saved_tensors
        chosen = _differentiable(primals)

        def push(*tangents: torch.Tensor) -> "tuple[torch.Tensor, ...]":
            full = [torch.zeros_like(p) for p in primals]
            for i, tangent in zip(chosen, tangents):
                full[i] = tangent
            return _push(ctx.call, primals, full)

        outputs, pull = vjp(push, *(torch.zeros_like(primals[i]) for i in chosen))
        grads: "list[Any]" = [None] * len(primals)
        for i, grad in zip(chosen, pull(tuple(_or_zeros(cotangents, outputs)))):
            grads[i] = grad
        return (None, *grads)


def _push(call: _Use, primals: Any, tangents: "list[Any]") -> "tuple[torch.Tensor, ...]":
    result = call.rules[0](call.arguments(primals), call.arguments(tangents))
    if not isinstance(result, tuple) or len(result) != 2:
        call.fail(f"the jvp rule must return (output, tangent), but it returned {describe(result)}.")
    return tuple(call.flat(result[1], "the tangent that the jvp rule returned"))


class _VjpFunction(Function):
    @staticmethod
    def forward(ctx: Any, call: _Use, *tensors: torch.Tensor) -> Any:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        output, ctx.residuals = _run_fwd(call, tensors)
        return _fresh(call.flat(output, "the output of fwd"), tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        tensors, residuals = ctx.saved_tensors, ctx.residuals
        if torch.is_grad_enabled() or _C.forward_mode_open():
            # The residuals as functions of the arguments, for another derivative.
            _, residuals = _run_fwd(ctx.call, tensors)
        return (None, *_pull(ctx.call, residuals, tensors, cotangents))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        tensors = ctx.saved_tensors
        chosen = _differentiable(tensors)
        output, residuals = _run_fwd(ctx.call, tensors)

        def pull(*cotangents: torch.Tensor) -> "tuple[torch.Tensor, ...]":
            grads = _pull(ctx.call, residuals, tensors, cotangents)
            return tuple(grads[i] for i in chosen)

        zeros = [torch.zeros_like(out) for out in ctx.call.flat(output, "the output of fwd")]
        _, push = vjp(pull, *zeros)
        full = _or_zeros(tangents, tensors)
        return push(tuple(full[i] for i in chosen))


def _run_fwd(call: _Use, tensors: Any) -> "tuple[Any, Any]":
    result = call.rules[0](*call.arguments(tensors))
    if not isinstance(result, tuple) or len(result) != 2:
        call.fail(f"fwd must return (output, residuals), but it returned {describe(result)}.")
    return result


def _pull(call: _Use, residuals: Any, tensors: Any, cotangents: Any) -> "list[torch.Tensor]":
    return call.gradients(
        call.rules[1](residuals, call.output_spec.unflatten(cotangents)), tensors
    )


class custom_jvp(_Custom):
    """A function with a derivative of its own, given by a rule for forward mode.

    `f.defjvp(rule)`: rule(primals, tangents), two tuples like f's arguments, returns (output,
    tangent), with the tangent linear in the tangents. Reverse mode uses its transpose, and higher
    derivatives differentiate the rule. Arguments and outputs are pytrees of tensors; other leaves of
    the arguments are constants, and None among the tangents.

    >>> import torch, torchlift
    >>> @torchlift.custom_jvp
    ... def square(x):
    ...     return x * x
    >>> @square.defjvp
    ... def square_jvp(primals, tangents):
    ...     (x,), (t,) = primals, tangents
    ...     return square(x), 2 * x * t
    >>> torchlift.grad(square)(torch.tensor(3.))
    tensor(6.)
    """

    _kind = "custom_jvp"
    _function = _JvpFunction

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the rule, and returns it: usable as a decorator."""
        self._rules = (rule,)
        return rule


class custom_vjp(_Custom):
    """A function with a derivative of its own, given by rules for reverse mode.

    `f.defvjp(fwd, bwd)`: fwd(*args) returns (output, residuals), any tree; bwd(residuals, cotangent)
    returns a tuple with the gradient for each argument (None for zero), linear in the cotangent.
    Forward mode uses the transpose of bwd, and higher derivatives differentiate fwd and bwd.

    >>> import torch, torchlift
    >>> @torchlift.custom_vjp
    ... def clipped(x):
    ...     return x.sum()
    >>> clipped.defvjp(lambda x: (x.sum(), x), lambda x, g: (g * torch.ones_like(x).clamp(max=0.5),))
    >>> torchlift.grad(clipped)(torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    _kind = "custom_vjp"
    _function = _VjpFunction

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Sets the rules."""
        self._rules = (fwd, bwd)
