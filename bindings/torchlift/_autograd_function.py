"""torch.autograd.Function inside vmap.

NOTE [functions across domains]
Function.apply records one node in the autograd domain of its arguments, and runs forward with
GradMode off. With plain tensors, that is all. Under vmap, an argument is a lifted tensor: what
autograd sees of it is the domain inside vmap, while its value may be tracked by a domain outside,
as in grad(vmap(f)). forward runs unseen by that one too, so its gradient would be lost.

So when an argument's value is tracked outside, `apply` is done in two steps. First as always, with
forward hidden from the outer domains. Then the value of each output is passed through _Outer, a
Function of the next outer domain, whose forward hands the value on, and whose backward enters a
vmap of the same size and there asks for the vjp of the user's Function: the user's own backward
answers, in every domain; and so does the user's own jvp, to a tangent from outside. _Outer.apply is
itself routed this way when there is yet another domain outside.

With a tangent outside, and no batch dim (a jvp inside a jvp), it is simpler. The outputs' values are
those of `apply` on the arguments' values, which the outer domain differentiates by the user's own
rules; forward runs besides, seen by the outer domains, for what it saves.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from typing import Any

import torch
from torch.autograd.function import Function

from torchlift import _C
from torchlift._errors import UnsupportedError

_RANDOMNESS = ("error", "same", "different", "reproducible")
# A classmethod, written in C in newer releases of torch.
_torch_apply = inspect.getattr_static(Function, "apply")
_UNBATCHED, _CONSTANT, _NARROWS, _PLAIN = 2, 3, 4, 5  # See function_route.
_unbatched_classes: "weakref.WeakKeyDictionary[type, type]" = weakref.WeakKeyDictionary()
_routed_classes: "weakref.WeakKeyDictionary[type, type]" = weakref.WeakKeyDictionary()
_state = threading.local()


def install() -> None:
    """Makes Function.apply look for lifted tensors. Calls without any are unchanged."""
    if hasattr(Function.apply, "__torchlift__"):
        return

    bind = _torch_apply.__get__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        outer_grad = _route(args)
        if outer_grad is None:
            return bind(None, cls)(*args, **kwargs)
        if outer_grad == _NARROWS:
            return apply(cls, *_C.function_lift(args), **kwargs)
        if outer_grad == _CONSTANT:
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            return bind(None, cls)(*args, **kwargs)
        if outer_grad == _PLAIN:
            return _C.function_outside(lambda: bind(None, cls)(*args, **kwargs), ())
        if outer_grad == _UNBATCHED:
            return bind(None, _routed_unbatched(cls))(*_C.function_lift(args), **kwargs)
        return _apply_routed(cls, args, kwargs, outer_grad)

    apply.__doc__ = Function.apply.__doc__
    apply.__torchlift__ = True  # type: ignore[attr-defined]
    Function.apply = classmethod(apply)  # type: ignore[assignment]


_route = _C.function_route


def _apply_routed(
    cls: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]", outer_grad: bool
) -> Any:
    modes = _state.__dict__.setdefault("modes", [])
    modes.append(outer_grad)
    try:
        return _torch_apply.__get__(None, _routed(cls))(*_C.function_lift(args), **kwargs)
    finally:
        modes.pop()


def _routed(cls: Any) -> Any:
    """The user's class with a forward that connects its outputs to the outer domains."""
    found = _routed_classes.get(cls)
    if found is None:
        with_ctx = cls.setup_context is Function.setup_context

        @functools.wraps(cls.forward)
        def forward(*args: Any) -> Any:
            inputs = args[1:] if with_ctx else args
            return _forward(cls, args, inputs)

        found = type(cls.__name__, (cls,), {"forward": staticmethod(forward)})
        _routed_classes[cls] = found
    return found


def _routed_unbatched(cls: Any) -> Any:
    """The user's class with a forward whose outputs have the values of an apply further outside."""
    found = _unbatched_classes.get(cls)
    if found is None:
        with_ctx = cls.setup_context is Function.setup_context

        @functools.wraps(cls.forward)
        def forward(*args: Any) -> Any:
            inputs = args[1:] if with_ctx else args
            output = _C.function_forward_seen(cls.forward, args)
            outputs = output if isinstance(output, tuple) else (output,)
            outputs = tuple(_own_tensor(out, list(inputs)) for out in outputs)
            values = [
                _C.lower_lifted(t)[0] if isinstance(t, torch.Tensor) else t for t in inputs
            ]
            with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                connected = _C.function_outside(lambda: cls.apply(*values), inputs)
            connected = connected if isinstance(connected, tuple) else (connected,)
            for out, value in zip(outputs, connected):
                if isinstance(out, torch.Tensor) and _C.is_lifted(out):
                    _C.replace_value(out, value)
            return outputs if isinstance(output, tuple) else outputs[0]

        found = type(cls.__name__, (cls,), {"forward": staticmethod(forward)})
        _unbatched_classes[cls] = found
    return found


def _forward(cls: Any, args: "tuple[Any, ...]", inputs: "tuple[Any, ...]") -> Any:
    outer_grad = _state.modes[-1]
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    versions = [t._version for t in tensors]
    random = _save_random(tensors)
    output = _C.function_forward(cls.forward, args)
    if versions != [t._version for t in tensors]:
        raise UnsupportedError(
            f"[torchlift] {cls.__name__}.forward writes into its arguments, which a gradient "
            f"outside of vmap tracks. Return new tensors instead, or take the gradient inside: vmap(grad(f))."
        )
    outputs = output if isinstance(output, tuple) else (output,)
    outputs = tuple(_own_tensor(out, tensors) for out in outputs)
    _connect(cls, inputs, outputs, outer_grad, random)
    return outputs if isinstance(output, tuple) else outputs[0]


def _own_tensor(output: Any, inputs: "list[torch.Tensor]") -> Any:
    """Never the very tensor that was passed in: its value is about to be replaced."""
    same = any(output is t for t in inputs)
    return _C.function_forward(torch.Tensor.detach, (output,)) if same else output


class _Call:
    """What _Outer must know of a call of the user's Function."""

    def __init__(self, cls: Any, inputs: "tuple[Any, ...]", random: Any) -> None:
        self.cls, self.inputs, self.random = cls, list(inputs), random
        self.positions = [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)]
        self.bdims: "list[int | None]" = []
        for i in self.positions:
            _, bdim, self.size, self.randomness = _C.lower_lifted(inputs[i])
            self.bdims.append(bdim)
            self.inputs[i] = None
        self.out_positions: "list[int]" = []
        self.out_bdims: "list[int | None]" = []

    def run(self, tensors: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
        """The outputs that have a derivative, for other input tensors."""
        inputs = list(self.inputs)
        for i, tensor in zip(self.positions, tensors):
            inputs[i] = tensor
        with _Rewound(self.random):
            output = self.cls.apply(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        return tuple(outputs[i] for i in self.out_positions)


def _connect(
    cls: Any,
    inputs: "tuple[Any, ...]",
    outputs: "tuple[Any, ...]",
    outer_grad: bool,
    random: Any,
) -> None:
    call = _Call(cls, inputs, random)
    values = []
    for i, out in enumerate(outputs):
        if not isinstance(out, torch.Tensor) or not _has_derivative(out):
            continue
        lowered = _C.lower_lifted(out)
        if lowered is None:
            continue  # A plain tensor depends on no argument of this call.
        call.out_positions.append(i)
        call.out_bdims.append(lowered[1])
        values.append(lowered[0])
    if not values:
        return
    arguments = [_C.lower_lifted(inputs[i])[0] for i in call.positions]
    with torch.set_grad_enabled(outer_grad), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        connected = _Outer.apply(call, len(values), *values, *arguments)
    for i, value in zip(call.out_positions, connected):
        _C.replace_value(outputs[i], value)


class _Outer(Function):
    """Hands on the values of outputs; see NOTE [functions across domains]."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: torch.Tensor) -> Any:
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(*tensors[count:])
        ctx.save_for_forward(*tensors[count:])
        return tuple(value.detach() for value in tensors[:count])

    @staticmethod
    def jvp(ctx: Any, _call: Any, _count: Any, *tangents: Any) -> Any:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            return _push(ctx.call, without_tangents(ctx.saved_tensors), tangents[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        grads = _pull(ctx.call, ctx.saved_tensors, cotangents, ctx.needs_input_grad[2 + ctx.count :])
        return (None, None, *[None] * ctx.count, *grads)


def _pull(
    call: _Call,
    values: "tuple[torch.Tensor, ...]",
    cotangents: "tuple[torch.Tensor, ...]",
    wanted: "tuple[bool, ...]",
) -> "list[torch.Tensor | None]":
    """The gradients of the values: the user's backward, mapped over the examples."""
    from torchlift._grad import vjp
    from torchlift._vmap import vmap

    chosen = [i for i, wants in enumerate(wanted) if wants]
    spread = [_per_example(c, b, call.size) for c, b in zip(cotangents, call.out_bdims)]
    out_bdims = tuple(0 if bdim is None else bdim for bdim in call.out_bdims)

    def one(tensors: "tuple[torch.Tensor, ...]", grads: "tuple[torch.Tensor, ...]") -> Any:
        def of_chosen(*primals: torch.Tensor) -> "tuple[torch.Tensor, ...]":
            replaced = list(tensors)
            for i, primal in zip(chosen, primals):
                replaced[i] = primal
            return call.run(tuple(replaced))

        return vjp(of_chosen, *(tensors[i] for i in chosen))[1](grads)

    mapped = vmap(
        one,
        in_dims=(tuple(call.bdims), out_bdims),
        randomness=_RANDOMNESS[call.randomness],
        axis_size=call.size,
    )
    found = mapped(tuple(values), tuple(spread))
    result: "list[torch.Tensor | None]" = [None] * len(values)
    for i, grad in zip(chosen, found):
        bdim = call.bdims[i]
        result[i] = grad.sum(0) if bdim is None else grad.movedim(0, bdim)
    return result


def _push(
    call: _Call, values: "tuple[torch.Tensor, ...]", tangents: "tuple[Any, ...]"
) -> "tuple[torch.Tensor, ...]":
    """The tangents of the outputs' values: the user's jvp, mapped over the examples."""
    from torchlift._forward import jvp
    from torchlift._vmap import vmap

    chosen = [i for i, t in enumerate(tangents) if t is not None and _has_derivative(values[i])]

    def one(tensors: "tuple[torch.Tensor, ...]", pushed: "tuple[torch.Tensor, ...]") -> Any:
        def of_chosen(*primals: torch.Tensor) -> "tuple[torch.Tensor, ...]":
            replaced = list(tensors)
            for i, primal in zip(chosen, primals):
                replaced[i] = primal
            return call.run(tuple(replaced))

        return jvp(of_chosen, tuple(tensors[i] for i in chosen), pushed)[1]

    mapped = vmap(
        one,
        in_dims=(tuple(call.bdims), tuple(call.bdims[i] for i in chosen)),
        randomness=_RANDOMNESS[call.randomness],
        axis_size=call.size,
    )

    def push(*pushed: torch.Tensor) -> "tuple[torch.Tensor, ...]":
        found = mapped(tuple(values), pushed)
        return tuple(
            # What all examples share has one tangent.
            t.sum(0) / max(call.size, 1) if bdim is None else t.movedim(0, bdim)
            for t, bdim in zip(found, call.out_bdims)
        )

    return for_each_direction(push, tuple(tangents[i] for i in chosen))


def without_tangents(tensors: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    """For the jvp of a Function: a jvp in there is another one, and must not meet its tangents."""
    return tuple(torch._VF._unpack_dual(t, level=0)[0] for t in tensors)  # type: ignore[attr-defined]


def for_each_direction(
    push: Any, tangents: "tuple[torch.Tensor, ...]"
) -> "tuple[torch.Tensor, ...]":
    """push(*tangents). In jacfwd they are those of several directions, and push is mapped over them:
    it may decide by their values."""
    from torchlift._vmap import vmap

    if not any(_C.is_tangent_batch(t) for t in tangents):
        return push(*tangents)
    lowered = [_C.lower_lifted(t) if _C.is_tangent_batch(t) else (t, None) for t in tangents]
    dims = tuple(found[1] for found in lowered)
    if all(dim is None for dim in dims):
        return push(*(found[0] for found in lowered))  # the same for all
    pushed = vmap(push, in_dims=dims)(*(found[0] for found in lowered))
    batch = next(t for t in tangents if _C.is_tangent_batch(t))
    return tuple(_C.lift_like(batch, t) for t in pushed)


def _has_derivative(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _per_example(cotangent: torch.Tensor, bdim: "int | None", size: int) -> torch.Tensor:
    """The cotangent of an output that all examples share belongs to one of them, not to each."""
    if bdim is not None:
        return cotangent
    rest = cotangent.new_zeros((max(size - 1, 0), *cotangent.shape))
    return torch.cat([cotangent.unsqueeze(0), rest])[:size]


# --- random numbers: backward runs forward again, which must draw the same ---------------------


def _save_random(tensors: "list[torch.Tensor]") -> Any:
    lifted = [_C.lower_lifted(t) for t in tensors]
    if not any(found is not None and found[3] != 0 for found in lifted):
        return None  # Random operators are errors here.
    devices = sorted({t.get_device() for t in tensors if t.is_cuda})
    return torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in devices]


class _Rewound:
    def __init__(self, random: Any) -> None:
        self.random = random

    def __enter__(self) -> None:
        if self.random is None:
            return
        devices = [device for device, _ in self.random[1]]
        self.fork = torch.random.fork_rng(devices=devices)
        self.fork.__enter__()
        torch.set_rng_state(self.random[0])
        for device, state in self.random[1]:
            torch.cuda.set_rng_state(state, device)

    def __exit__(self, *error: Any) -> None:
        if self.random is not None:
            self.fork.__exit__(*error)
