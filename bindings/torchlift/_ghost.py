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
that no more than one layer's g and a are needed at a time. Parameters without a formula are differentiated
as always.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchlift import _pytree
from torchlift._grad import grad

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


class _Recorder:
    """Forward hooks on layers that have a formula.

    Attributes:
        calls: how often each layer was called.
        outputs: the shapes of the outputs of those whose input is an argument by position.
        tracked: a tensor that makes the output of a layer tracked, where nothing else does; with it, the
            backward pass appends to `squares`.
    """

    def __init__(self, layers: "dict[str, nn.Module]", tracked: "Tensor | None" = None) -> None:
        self.layers = layers
        self.calls: "dict[str, int]" = {}
        self.outputs: "dict[str, torch.Size]" = {}
        self.tracked = tracked
        self.squares: "list[Tensor]" = []
        self.thread = threading.get_ident()

    def __enter__(self) -> "_Recorder":
        self.handles = [
            layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> "Tensor | None":
            if threading.get_ident() != self.thread:
                return None  # Somebody else's call of the module.
            self.calls[name] = self.calls.get(name, 0) + 1
            if args:
                self.outputs[name] = output.shape
            if self.tracked is None:
                return None
            if not output.requires_grad:
                output = output + self.tracked
            self._watch(layer, [args[0]], output)
            return output

        return hook

    def _watch(self, layer: nn.Module, inputs: "list[Tensor]", output: Tensor) -> None:
        formula = _formula(layer)
        assert formula is not None

        def square(g: Tensor) -> None:
            self.squares.append(formula(layer, inputs.pop(), g))  # a is free from here on

        output.register_hook(square)


_METADATA = frozenset({"__get__", "size", "dim", "numel", "is_floating_point", "is_complex", "stride"})


class _UseCounter(TorchFunctionMode):
    """Counts how often each of some tensors is an argument of a function of torch."""

    def __init__(self, tensors: "dict[str, Tensor]") -> None:
        super().__init__()
        self.names = {id(t): name for name, t in tensors.items()}
        self.uses: "dict[str, int]" = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _METADATA:
            self._look(args)
            if kwargs:
                self._look(kwargs.values())
        return func(*args, **kwargs)

    def _look(self, values: "Iterable[Any]") -> None:
        for value in values:
            if isinstance(value, (tuple, list)):
                self._look(value)
            elif (name := self.names.get(id(value))) is not None:
                self.uses[name] = self.uses.get(name, 0) + 1


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


def _chosen(
    module: nn.Module, f: Any, params: Any, rest: Any, batch: Any
) -> "dict[str, nn.Module]":
    """The layers that are called once for an example, with parameters that nobody else uses, and whose
    gradients are larger than what takes their place."""
    one = _pytree.tree_map(lambda t: t[0] if isinstance(t, Tensor) else t, batch)
    layers = _candidates(module)
    counter = _UseCounter(params)
    with _Recorder(layers) as recorder, torch.no_grad(), torch.random.fork_rng(devices=[]):
        with counter:
            f(params, rest, *one)

    def used_once(name: str) -> bool:
        own = [f"{name}.{p}" if name else p for p in ("weight", "bias")]
        return name in recorder.outputs and all(counter.uses.get(p, 0) <= 1 for p in own)

    return {
        name: layers[name]
        for name, n in recorder.calls.items()
        if n == 1 and used_once(name) and _is_worth_it(layers[name], recorder.outputs[name])
    }


def squared_norm_of_one(
    module: nn.Module, f: Any, params: Any, rest: Any, batch: Any
) -> "Callable[..., Tensor]":
    """square(params, rest, *example): the squared norm of f's gradient by params at one example."""
    layers = _chosen(module, f, params, rest, batch)
    covered = {f"{name}.{p}" if name else p for name, layer in layers.items() for p, _ in layer.named_parameters()}

    def square(params: Any, rest: Any, *example: Any) -> Tensor:
        materialised = {name: p for name, p in params.items() if name not in covered}
        constant = {name: p for name, p in params.items() if name in covered}
        squares: "list[Tensor]" = []

        def loss(tracked: Any) -> Tensor:
            with _Recorder(layers, tracked["outputs"]) as recorder:
                recorder.squares = squares
                return f(tracked["params"], {**rest, **constant}, *example)

        zero = torch.zeros((), device=next(iter(params.values())).device)
        grads = grad(loss)({"params": materialised, "outputs": zero})
        squares += [g.square().sum() for g in grads["params"].values()]
        return torch.stack(squares).sum()

    return square
