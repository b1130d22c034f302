"""Gradients of single examples: per_sample_grad, per_sample_grad_norms, clipping, DP-SGD.

Everywhere here an example is a batch of one: the module sees inputs[i:i+1] and the loss sees its output and
targets[i:i+1], so modules and losses written for batches work as they are.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from torchlift import _ghost, _pytree
from torchlift._errors import TransformError
from torchlift._functional import functional_call
from torchlift._grad import grad
from torchlift._make_functional import extract_state
from torchlift._vmap import vmap

Loss = Callable[..., Tensor]


def trainable(module: nn.Module) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """(the parameters that require grad, all other state), detached."""
    params, buffers = extract_state(module)
    chosen = {name for name, p in module.named_parameters() if p.requires_grad}
    rest = {name: t for name, t in params.items() if name not in chosen}
    return {name: params[name] for name in params if name in chosen}, {**rest, **buffers}


def check_trainable(transform: str, module: nn.Module, params: "Mapping[str, Tensor]") -> None:
    if not params:
        raise TransformError(
            f"{transform}: no parameter of {type(module).__name__} requires grad, so there is nothing to "
            f"differentiate. Call requires_grad_() on those that are trained."
        )


def as_batch_of_one(example: Any) -> Any:
    return _pytree.tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, example)


def scalar_loss(transform: str, value: Any) -> Tensor:
    """The loss of one example, of shape []; a loss with reduction="none" gives [1]."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TransformError(
            f"{transform}: the loss of one example must be a single number, got {got}."
        )
    return value.reshape(())


def loss_of_one(
    transform: str, module: nn.Module, loss: Loss
) -> "Callable[..., Tensor]":
    """f(params, rest, input, *targets): the loss of one example."""

    def f(params: Any, rest: Any, example: Any, *targets: Any) -> Tensor:
        inputs = as_batch_of_one(example)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        if module.training and rest:  # BatchNorm writes statistics.
            output, _ = functional_call(module, (params, rest), args, mutate_buffers="return")
        else:
            output = functional_call(module, (params, rest), args)
        return scalar_loss(transform, loss(output, *as_batch_of_one(targets)))

    return f


def batch_size_of(transform: str, batch: Any) -> int:
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in _tensors(batch)}
    if len(sizes) != 1 or None in sizes:
        raise TransformError(
            f"{transform}: the inputs and targets must have one size along dim 0, the examples; got "
            f"shapes {[list(leaf.shape) for leaf in _tensors(batch)]}."
        )
    return int(sizes.pop())  # type: ignore[arg-type]


def _tensors(batch: Any) -> "list[Tensor]":
    return [leaf for leaf in _pytree.flatten(batch)[0] if isinstance(leaf, Tensor)]


def chunk_size_for(
    memory_budget: "int | None", per_example: int, size: int
) -> "int | None":
    """How many examples fit into a budget of bytes; None for all of them."""
    if memory_budget is None:
        return None
    if memory_budget <= 0:
        raise TransformError(f"memory_budget must be above 0 bytes, got {memory_budget}.")
    fitting = max(1, int(memory_budget) // max(1, per_example))
    return None if fitting >= size else fitting


def saved_bytes(run: "Callable[[], Any]") -> int:
    """What autograd saves for backward while run() runs, in bytes, each storage once."""
    seen: "dict[int, int]" = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def bytes_per_example(
    f: "Callable[..., Tensor]", params: Any, rest: Any, batch: Any, with_grads: bool
) -> int:
    """An estimate: what autograd saves for one example, twice (values and their gradients), and the
    gradients."""
    one = _pytree.tree_map(lambda t: t[0] if isinstance(t, Tensor) else t, batch)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    own = sum(p.numel() * p.element_size() for p in params.values())

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        total = saved_bytes(lambda: f(leaves, rest, *one))
    activations = max(0, total - own)
    return 2 * activations + (own if with_grads else 0)


def per_sample_grad(
    module: nn.Module,
    loss: Loss,
    *,
    randomness: str = "different",
    memory_budget: "int | None" = None,
    chunk_size: "int | None" = None,
) -> "Callable[..., dict[str, Tensor]]":
    """A function of (inputs, *targets) that returns the gradient of each example's loss.

    Args:
        module: any nn.Module. Its parameters that require grad are differentiated.
        loss: loss(output, *targets), for a batch of one example, a single number. inputs may be a tuple,
            for a module with several.
        memory_budget: bytes that the work may take beside the result; the batch is cut accordingly.
        chunk_size: or how many examples to do at a time.

    The result is a dict from names of parameters to tensors [examples, *shape].

    >>> import torch, torchlift
    >>> model = torch.nn.Linear(3, 1)
    >>> grads = torchlift.per_sample_grad(model, torch.nn.functional.mse_loss)(torch.ones(5, 3), torch.ones(5, 1))
    >>> grads["weight"].shape
    torch.Size([5, 1, 3])
    """
    f = loss_of_one("per_sample_grad", module, loss)

    def grads_of(inputs: Any, *targets: Any) -> "dict[str, Tensor]":
        params, rest = trainable(module)
        check_trainable("per_sample_grad", module, params)
        batch = (inputs, *targets)
        size = batch_size_of("per_sample_grad", batch)
        chunk = chunk_size
        if memory_budget is not None:
            each = bytes_per_example(f, params, rest, batch, with_grads=True) if size else 1
            chunk = chunk_size_for(memory_budget, each, size)
        run = vmap(
            grad(f),
            in_dims=(None, None, *[0] * len(batch)),
            randomness=randomness,
            chunk_size=chunk,
        )
        return run(params, rest, *batch)

    return grads_of


def per_sample_grad_norms(
    module: nn.Module,
    loss: Loss,
    *,
    randomness: str = "different",
    memory_budget: "int | None" = None,
    chunk_size: "int | None" = None,
) -> "Callable[..., Tensor]":
    """A function of (inputs, *targets) that returns the norm of each example's gradient, [examples].

    For Linear, Conv, Embedding and norm layers the norm comes from the layer's input and the gradient of its
    output, without making the gradient of its weight ("ghost norms": Goodfellow 2015, arXiv:1510.01799; for
    sequences Li et al. 2021, arXiv:2110.05679). Parameters of other modules, tied ones, and layers that
    are called more than once, have their gradients made, one chunk of examples at a time.

    Arguments as in per_sample_grad.

    >>> import torch, torchlift
    >>> model = torch.nn.Linear(3, 1)
    >>> norms = torchlift.per_sample_grad_norms(model, torch.nn.functional.mse_loss)
    >>> norms(torch.ones(5, 3), torch.ones(5, 1)).shape
    torch.Size([5])
    """
    f = loss_of_one("per_sample_grad_norms", module, loss)

    def norms_of(inputs: Any, *targets: Any) -> Tensor:
        params, rest = trainable(module)
        check_trainable("per_sample_grad_norms", module, params)
        batch = (inputs, *targets)
        size = batch_size_of("per_sample_grad_norms", batch)
        if size == 0:
            return next(iter(params.values())).new_zeros(0)
        chunk = chunk_size
        if memory_budget is not None:
            each = bytes_per_example(f, params, rest, batch, with_grads=False)
            chunk = chunk_size_for(memory_budget, each, size)
        square = _ghost.squared_norm_of_one(module, f)
        run = vmap(
            square,
            in_dims=(None, None, *[0] * len(batch)),
            randomness=randomness,
            chunk_size=chunk,
        )
        return run(params, rest, *batch).sqrt()

    return norms_of


def grad_norms(grads: "Mapping[str, Tensor]") -> Tensor:
    """The norm over all parameters of each example's gradient, from materialised gradients."""
    squares = [g.unsqueeze(-1).flatten(1).square().sum(1) for g in grads.values()]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm); 1 for a gradient of zero."""
    return (max_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)


def clip_and_sum(
    grads: "Mapping[str, Tensor]", max_norm: float, norms: "Tensor | None" = None
) -> "dict[str, Tensor]":
    """The sum over the examples of gradients that are scaled down to norm max_norm where they exceed it.

    grads: a dict of tensors [examples, *shape], as of per_sample_grad. norms: theirs, if known.

    >>> import torch, torchlift
    >>> torchlift.clip_and_sum({"w": torch.tensor([[3., 4.], [0.3, 0.4]])}, max_norm=1.0)["w"]
    tensor([0.9000, 1.2000])
    """
    if not max_norm > 0:
        raise TransformError(f"clip_and_sum: max_norm must be above 0, got {max_norm}.")
    factors = clip_factors(grad_norms(grads) if norms is None else norms, max_norm)
    return {name: torch.einsum("b,b...->...", factors.to(g.dtype), g) for name, g in grads.items()}


def dp_gradients(
    module: nn.Module,
    loss: Loss,
    *,
    max_norm: float,
    noise_multiplier: float,
    expected_batch_size: "float | None" = None,
    generator: "torch.Generator | None" = None,
    ghost: bool = True,
    memory_budget: "int | None" = None,
) -> "Callable[..., dict[str, Tensor]]":
    """A function of (inputs, *targets) that returns the gradients of a step of DP-SGD.

    Each example's gradient is clipped to max_norm; to their sum comes Gaussian noise of standard deviation
    noise_multiplier * max_norm; the whole is divided by the batch size, or by expected_batch_size (with
    Poisson sampling, as the privacy accounting wants it). Algorithm 1 of Abadi et al. 2016,
    arXiv:1607.00133. Accounting for the privacy spent is the caller's.

    With ghost=True the norms come from per_sample_grad_norms, and a second backward pass of the weighted
    losses gives the sum, so no gradient of one example is ever made; the module must then draw no random
    numbers, since the passes would differ: use ghost=False for modules with Dropout.

    >>> import torch, torchlift
    >>> model = torch.nn.Linear(3, 1)
    >>> step = torchlift.dp_gradients(
    ...     model, torch.nn.functional.mse_loss, max_norm=1.0, noise_multiplier=0.0)
    >>> step(torch.ones(5, 3), torch.ones(5, 1))["weight"].norm() <= 1.0
    tensor(True)
    """
    if not max_norm > 0 or noise_multiplier < 0:
        raise TransformError(
            f"dp_gradients: max_norm must be above 0 and noise_multiplier at least 0, got {max_norm} and "
            f"{noise_multiplier}."
        )
    f = loss_of_one("dp_gradients", module, loss)
    norms_of = per_sample_grad_norms(module, loss, randomness="error", memory_budget=memory_budget)
    materialised = per_sample_grad(module, loss, memory_budget=memory_budget)

    def summed(batch: "tuple[Any, ...]") -> "dict[str, Tensor]":
        if not ghost:
            return clip_and_sum(materialised(*batch), max_norm)
        factors = clip_factors(norms_of(*batch), max_norm)
        params, rest = trainable(module)
        losses = vmap(f, in_dims=(None, None, *[0] * len(batch)))
        return grad(lambda p: (losses(p, rest, *batch) * factors).sum())(params)

    def gradients(inputs: Any, *targets: Any) -> "dict[str, Tensor]":
        batch = (inputs, *targets)
        size = batch_size_of("dp_gradients", batch)
        params, _ = trainable(module)
        total = summed(batch) if size else {k: torch.zeros_like(p) for k, p in params.items()}
        scale = noise_multiplier * max_norm
        divisor = max(size, 1) if expected_batch_size is None else expected_batch_size
        return {name: (g + scale * _noise(g, generator)) / divisor for name, g in total.items()}

    return gradients


def _noise(like: Tensor, generator: "torch.Generator | None") -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def dp_sgd_step(
    module: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    inputs: Any,
    *targets: Any,
    **options: Any,
) -> None:
    """One step of DP-SGD: dp_gradients(module, loss, **options), put into the parameters' grad, and
    optimizer.step().

    >>> import torch, torchlift
    >>> model = torch.nn.Linear(3, 1)
    >>> torchlift.dp_sgd_step(
    ...     model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1),
    ...     torch.ones(5, 3), torch.ones(5, 1), max_norm=1.0, noise_multiplier=1.0)
    """
    grads = dp_gradients(module, loss, **options)(inputs, *targets)
    for name, param in module.named_parameters():
        if name in grads:
            param.grad = grads[name]
    optimizer.step()
