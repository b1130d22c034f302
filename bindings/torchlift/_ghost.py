"""Norms of gradients without the gradients.

NOTE [ghost norms]
The gradient of a Linear layer's weight is a sum of outer products g_t a_t^T, of the gradient g of its output
and its input a, over positions t. Its squared norm is sum_{t,s} (g_t.g_s)(a_t.a_s), which needs no matrix of
the weight's size. Convolutions are the same over unfolded patches; for embeddings a_t.a_s is whether two
indices agree.

Where the two matrices of positions by positions would be larger than the gradient, as in a convolution with few
channels, and for the weights of norm layers, the gradient is made: autograd does that best.

The work is done for one example and mapped over by vmap, so that nobody needs to know which dim of a layer's
input is the batch. A hook on the layer's output sees g in the backward pass and computes the norm there, so
that no more than one layer's g and a are needed at a time.

Which layers these are, the graph of the forward pass tells: those that were called once, and through whose
output every path from their parameters to the loss goes. (That the graph takes a weight once is not enough: its
transpose or its cast may be taken again, as by the formula of a second derivative, or under autocast.) The
backward pass is then asked for the gradients of all other parameters alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Callable

import torch
from torch import Tensor, nn

from torchlift import _C
from torchlift._errors import UnsupportedError

Formula = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _products(a: Tensor, g: Tensor) -> Tensor:
    """|sum_t g_t a_t^T|^2 for a: [..., T, I] and g: [..., T, O], summed over the dims in front."""
    if a.shape[-2] == 1:
        return (a.square().sum(-1) * g.square().sum(-1)).sum()
    return ((a @ a.mT) * (g @ g.mT)).sum()


def _linear(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    total = g.new_zeros(())
    if layer.weight.requires_grad:
        total = total + _products(a, g)
    if layer.bias is not None and layer.bias.requires_grad:
        total = total + g.sum(0).square().sum()
    return total


def _patches(layer: Any, a: Tensor) -> Tensor:
    """What each output position of a convolution sees: [batch, channels * kernel, positions]."""
    spatial = len(layer.kernel_size)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        a = nn.functional.pad(a, layer._reversed_padding_repeated_twice, mode=_pad_mode(layer))
    elif any(layer.padding):
        a = nn.functional.pad(a, [p for p in reversed(layer.padding) for _ in range(2)])
    for dim in range(spatial):
        extent = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        a = a.unfold(2 + dim, extent, layer.stride[dim])[..., :: layer.dilation[dim]]
    # [batch, channels, *positions, *kernel] -> [batch, channels, *kernel, *positions]
    order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
    a = a.permute(order)
    return a.flatten(2 + spatial).flatten(1, 1 + spatial)


def _pad_mode(layer: Any) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode


def _conv(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    spatial = len(layer.kernel_size)
    if a.dim() == spatial + 1:  # no batch
        a, g = a.unsqueeze(0), g.unsqueeze(0)
    total = g.new_zeros(())
    if layer.weight.requires_grad:
        seen, groups = _patches(layer, a), layer.groups
        # [groups, batch * positions, features]
        seen = seen.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        out = g.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        total = total + _products(seen, out)
    if layer.bias is not None and layer.bias.requires_grad:
        total = total + g.flatten(2).sum((0, 2)).square().sum()
    return total


def _embedding(layer: Any, ids: Tensor, g: Tensor) -> Tensor:
    ids, g = ids.reshape(-1), g.reshape(-1, g.shape[-1])
    if layer.padding_idx is not None:
        g = torch.where((ids == layer.padding_idx).unsqueeze(-1), 0, g)
    same = (ids.unsqueeze(0) == ids.unsqueeze(1)).to(g.dtype)
    return (same * (g @ g.mT)).sum()


_FORMULAS: "dict[type, Formula]" = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Embedding: _embedding,
}


def _formula(layer: nn.Module) -> "Formula | None":
    if isinstance(layer, nn.Embedding) and (
        layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
    ):
        return None
    # Exactly these classes: a subclass may do something else in forward. (Attention reads the weight of
    # its NonDynamicallyQuantizableLinear without calling it.)
    return _FORMULAS.get(type(layer))


def _is_worth_it(layer: nn.Module, output: torch.Size) -> bool:
    """Whether two matrices of positions by positions are less than the gradient of the weight (Z. Bu et al.,
    "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential Privacy", 2022)."""
    weight: Any = layer.weight
    features = weight.shape[-1 if isinstance(layer, nn.Embedding) else 0]
    positions = output.numel() // features
    return 2 * getattr(layer, "groups", 1) * positions**2 <= weight.numel()


class _Call:
    """A call of a layer that has a formula, in the graph of the forward pass."""

    def __init__(self, name: str, layer: nn.Module, a: Tensor, node: _C.GraphNode) -> None:
        self.name, self.layer = name, layer
        self.inputs = [(a, _version(a))]
        # The node holds the hook, which holds this: let go of it when it has been looked at.
        self.node: "_C.GraphNode | None" = node
        # Not before the backward pass: a gradient that f itself takes calls the hook, too.
        self.norm_is_wanted = False

    def take_input(self) -> Tensor:
        ((a, version),) = self.inputs
        self.inputs.clear()  # a is free from here on
        if _version(a) != version:
            raise UnsupportedError(
                f"[per_sample_grad_norms] the input of the layer '{self.name}', of shape {list(a.shape)}, was modified "
                "by an in-place operation after the layer ran, and the gradient of the layer's weight needs it. Use the "
                "out-of-place operation, or give the layer a clone()."
            )
        return a

    def forget(self) -> None:
        self.norm_is_wanted = False
        self.inputs.clear()
        self.node = None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


class _Recorder:
    """Forward hooks on layers that have a formula, whose calls in the backward pass append to `squares`.

    tracked: a number that is differentiated. The outputs of the layers claim to depend on it, so that the
    backward pass comes by them, whatever else is asked of it.
    """

    def __init__(self, layers: "dict[str, nn.Module]", tracked: Tensor) -> None:
        self.layers, self.tracked = layers, tracked
        self.calls: "dict[str, list[_Call | None]]" = {}  # None: its gradient is to be made
        self.squares: "list[Tensor]" = []
        self.thread = threading.get_ident()

    def __enter__(self) -> "_Recorder":
        self.handles = [
            layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        if error is not None:
            for calls in self.calls.values():
                self.forget(calls)

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> "Tensor | None":
            if threading.get_ident() != self.thread:
                return None  # Somebody else's call of the module.
            calls = self.calls.setdefault(name, [])
            if not args or not self._is_recorded(output) or not _is_worth_it(layer, output.shape):
                calls.append(None)
                return None
            behind = _C.behind_node(output, self.tracked)
            if behind is None:
                calls.append(None)
                return None
            call = _Call(name, layer, args[0], _C.GraphNode(behind))
            calls.append(call)
            behind.register_hook(lambda g: self._add(call, g))
            return behind

        return hook

    def _is_recorded(self, output: Tensor) -> bool:
        """For all examples: not in an inner vmap, nor in a branch that some of them take."""
        return output.requires_grad and _C.level_of(output) == _C.level_of(self.tracked)

    def _add(self, call: _Call, g: Tensor) -> None:
        if call.norm_is_wanted:
            formula = _formula(call.layer)
            assert formula is not None
            self.squares.append(formula(call.layer, call.take_input(), g))

    def single_calls(self) -> "dict[str, _Call]":
        """Of the layers that were called once. Those of others are forgotten."""
        single = {}
        for name, calls in self.calls.items():
            if len(calls) == 1 and calls[0] is not None:
                single[name] = calls[0]
            else:
                self.forget(calls)
        return single

    @staticmethod
    def forget(calls: "Iterable[_Call | None]") -> None:
        for call in calls:
            if call is not None:
                call.forget()


def _tied(module: nn.Module) -> "set[int]":
    seen: "set[int]" = set()
    twice: "set[int]" = set()
    for _, param in module.named_parameters(remove_duplicate=False):
        (twice if id(param) in seen else seen).add(id(param))
    return twice


def _candidates(module: nn.Module) -> "dict[str, nn.Module]":
    tied = _tied(module)
    return {
        name: layer
        for name, layer in module.named_modules()
        if _formula(layer) is not None
        and "weight" in layer._parameters
        and layer._parameters.keys() <= {"weight", "bias"}
        and any(p.requires_grad for p in layer.parameters(recurse=False))
        and not any(id(p) in tied for p in layer.parameters(recurse=False))
    }


def _parameters_of(name: str, layer: nn.Module) -> "list[str]":
    return [f"{name}.{p}" if name else p for p, _ in layer.named_parameters()]


def _plan(
    loss: Tensor, params: "dict[str, Tensor]", recorder: _Recorder
) -> "tuple[set[str], set[str]]":
    """{the parameters whose gradients the recorder's hooks take the norms of, those whose gradients are to be made}."""
    single = recorder.single_calls()
    nodes = [call.node for call in single.values() if call.node is not None]
    passes = dict(zip(params, _C.sole_paths(loss, list(params.values()), nodes)))
    made = {name for name, number in passes.items() if number is not None}
    covered: "set[str]" = set()
    for number, (name, call) in enumerate(single.items()):
        call.node = None
        own = [p for p in _parameters_of(name, call.layer) if passes.get(p) is not None]
        if own and all(passes[p] == number for p in own):
            call.norm_is_wanted = True
            covered.update(own)
        else:
            call.forget()
    return covered, made - covered


def squared_norm_of_one(module: nn.Module, f: Any) -> "Callable[..., Tensor]":
    """square(params, rest, *example): the squared norm of f's gradient by params at one example."""
    layers = _candidates(module)

    def square(params: Any, rest: Any, *example: Any) -> Tensor:
        names = list(params)
        like = next(iter(params.values()))
        recorders: "list[_Recorder]" = []
        plans: "list[tuple[set[str], set[str]]]" = []

        def run(values: "list[Tensor]") -> "list[Tensor]":
            *given, tracked = values
            named = dict(zip(names, given))
            with _Recorder(layers, tracked) as recorder:
                recorders.append(recorder)
                loss = f(named, rest, *example)
            plans.append(_plan(loss, named, recorder))
            return [loss]

        zero = torch.zeros((), device=like.device)
        (loss,), pullback = _C.vjp_leaves(run, [*params.values(), zero])
        (recorder,), ((_, made),) = recorders, plans
        numbers = [i for i, name in enumerate(names) if name in made]
        grads = pullback.pull([torch.ones_like(loss)], True, [*numbers, len(names)])
        squares = recorder.squares + [g.square().sum() for g in grads[:-1]]
        return torch.stack(squares).sum() if squares else like.new_zeros(())

    return square
