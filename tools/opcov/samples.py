"""Sample inputs of an operator, and batches and loops over them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.testing._internal import common_methods_invocations as cmi
from torch.utils._pytree import tree_flatten, tree_unflatten

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Tensors]  # tensors in, tuple of tensors out
Dims = tuple["int | None", ...]  # one entry per tensor argument; None: not batched

BATCH = 3  # examples in a batch
OUTER_BATCH = 2  # examples in the outer batch of a nested vmap
VARIANTS = BATCH * OUTER_BATCH  # seeds under which each sample is generated
MAX_SCANNED = 150  # samples looked at per op
MAX_NUMEL = 3000  # "small": total elements of a sample's tensors
MAX_SOLO = 4  # tensor arguments that are batched one at a time
SEED = 1234


def seed_everything(seed: int = SEED) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def consume_random_state_normally() -> None:
    """Undo the OpInfos' own re-seeding, which would hide that an op is random."""
    cmi.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def flatten_outputs(out: Any) -> Tensors:
    """The tensors of an op's result; python numbers count as 0-d tensors."""
    leaves, _ = tree_flatten(out)
    return tuple(
        torch.tensor(leaf) if isinstance(leaf, (bool, int, float, complex)) else leaf
        for leaf in leaves
        if isinstance(leaf, (torch.Tensor, bool, int, float, complex))
    )


@dataclasses.dataclass
class Case:
    """One sample input of an op: its structure, and VARIANTS sets of values for its tensors."""

    index: int
    leaves: list[Any]  # the flattened (input, args, kwargs)
    spec: Any
    slots: list[int]  # where in ``leaves`` the tensors are
    variants: list[list[torch.Tensor]]
    requires_grad: list[bool]  # per tensor
    sample: Any

    def bind(self, op: Callable) -> Function:
        """``op`` as a function of this sample's tensors alone."""

        def bound(*tensors: torch.Tensor) -> Tensors:
            leaves = list(self.leaves)
            for slot, tensor in zip(self.slots, tensors):
                leaves[slot] = tensor
            input, args, kwargs = tree_unflatten(leaves, self.spec)
            return flatten_outputs(op(input, *args, **kwargs))

        return bound


def sample_list(op: Any, dtype: torch.dtype, requires_grad: bool, seed: int) -> list[Any]:
    seed_everything(seed)
    samples = op.sample_inputs("cpu", dtype, requires_grad=requires_grad, set_seed=False)
    return list(itertools.islice(samples, MAX_SCANNED))


def choose(sizes: Sequence[int | None], count: int) -> list[int]:
    """Indices of up to ``count`` samples, spread over the list: small and non-empty first."""
    usable = [i for i, size in enumerate(sizes) if size is not None]
    small = [i for i in usable if 0 < sizes[i] <= MAX_NUMEL]
    if len(small) < count:
        rest = sorted((i for i in usable if i not in set(small)), key=lambda i: sizes[i])
        small = sorted(small + rest[: count - len(small)])
    if len(small) <= count:
        return small
    return [small[round(k * (len(small) - 1) / max(count - 1, 1))] for k in range(count)]


def build_cases(op: Any, dtype: torch.dtype, requires_grad: bool, count: int) -> list[Case]:
    by_seed = [sample_list(op, dtype, requires_grad, SEED + v) for v in range(VARIANTS)]
    flat = [[tree_flatten((s.input, s.args, s.kwargs)) for s in samples] for samples in by_seed]

    def size(leaves: list[Any]) -> int | None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(map(is_plain, tensors)) or (requires_grad and not any(t.requires_grad for t in tensors)):
            return None
        # An op without tensor arguments still has something to check: size 1.
        return sum(t.numel() for t in tensors) if tensors else 1

    cases = []
    for index in choose([size(leaves) for leaves, _ in flat[0]], count):
        leaves, spec = flat[0][index]
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        first = [leaves[i].detach() for i in slots]
        others = [samples[index][0] if index < len(samples) else [] for samples in flat[1:]]
        cases.append(
            Case(
                index=index,
                leaves=leaves,
                spec=spec,
                slots=slots,
                variants=[first] + [same_shaped(first, slots, leaves) or first for leaves in others],
                requires_grad=[leaves[i].requires_grad for i in slots],
                sample=by_seed[0][index],
            )
        )
    return cases


def same_shaped(like: list[torch.Tensor], slots: list[int], leaves: list[Any]) -> list[torch.Tensor] | None:
    """The tensors in ``slots``, if they are like those of another seed in all but value."""
    if slots and slots[-1] >= len(leaves):
        return None
    found = [leaves[i] for i in slots]
    alike = all(
        isinstance(t, torch.Tensor) and is_plain(t) and t.shape == f.shape and t.dtype == f.dtype
        for t, f in zip(found, like)
    )
    return [t.detach() for t in found] if alike else None


def is_random(op: Any, case: Case) -> bool:
    """Whether the op draws random numbers on this sample. Some ops do for some values only, as rrelu does."""
    seed_everything()
    before = torch.get_rng_state()
    for tensors in case.variants:
        with contextlib.suppress(Exception):
            case.bind(op.get_op())(*clone(tensors))
    return not torch.equal(before, torch.get_rng_state())


# --- batches and loops ------------------------------------------------------------------------------


def clone(tensors: Iterable[torch.Tensor]) -> Tensors:
    return tuple(t.clone() for t in tensors)


def make_batch(examples: Sequence[Sequence[torch.Tensor]], dims: Dims) -> Tensors:
    """Stack each batched argument of ``examples``; take the others from the first example."""
    return tuple(
        examples[0][k] if dim is None else torch.stack([e[k] for e in examples], dim) for k, dim in enumerate(dims)
    )


def batches(examples: Sequence[Sequence[torch.Tensor]], dims: Dims) -> list[Tensors]:
    """The batch of distinct examples, and the batch of copies to fall back on."""
    return [make_batch(examples, dims), make_batch([examples[0]] * len(examples), dims)]


def loop(fn: Function, dims: Dims, size: int, contiguous: bool = False) -> Function:
    """The reference for vmap(fn, in_dims=dims)."""

    def looped(*args: torch.Tensor) -> Tensors:
        results = []
        for b in range(size):
            example = [a if d is None else a.select(d, b) for a, d in zip(args, dims)]
            if contiguous:
                example = [t.clone(memory_format=torch.contiguous_format) for t in example]
            results.append(fn(*example))
        return tuple(torch.stack(outs) for outs in zip(*results, strict=True))

    return looped


@dataclasses.dataclass(frozen=True)
class Form:
    """How a batch is handed to the library: how many examples, and how they lie in memory."""

    name: str
    size: int = BATCH
    shares_memory: bool = False  # every example is the first one, and there is memory for one alone
    lay_out: Callable[[torch.Tensor, int], torch.Tensor] = lambda tensor, dim: tensor

    def batches(self, examples: Sequence[Sequence[torch.Tensor]], dims: Dims) -> list[Tensors]:
        """What a check takes for its arguments. A batch without examples is made of one, by `given`."""
        candidates = batches(examples[: max(self.size, 1)], dims)
        return candidates[1:] if self.shares_memory else candidates

    def given(self, args: Sequence[torch.Tensor], dims: Dims) -> Tensors:
        """The same arguments, as the library gets them."""
        if self.size == 0:
            args = [a if d is None else a.narrow(d, 0, 0) for a, d in zip(args, dims)]
        return tuple(a if d is None else self.lay_out(a, d) for a, d in zip(args, dims))

    def loop(self, fn: Function, dims: Dims, contiguous: bool = False) -> Function:
        """The reference for vmap(fn, in_dims=dims).

        Where an example is refused for how it lies in memory (a view of it cannot be had), there is none.
        The numbers are those of contiguous examples: kernels that are called past the functions that
        make their arguments contiguous give others (flash attention does).
        """
        looped = loop(fn, dims, max(self.size, 1), contiguous)

        def checked(*args: torch.Tensor) -> Tensors:
            if self.lay_out is not PLAIN.lay_out:
                looped(*(a if d is None else self.lay_out(a, d) for a, d in zip(clone(args), dims)))
                seed_everything()
            return looped(*args)

        return checked if self.size else lambda *args: tuple(out[:0] for out in looped(*args))


def every_other(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The values in a memory where they are two apart in every dim, the last dim outermost."""
    room = tensor.new_zeros([2 * n for n in reversed(tensor.shape)]).permute(*reversed(range(tensor.dim())))
    return room[(slice(None, None, 2),) * tensor.dim()].copy_(tensor)


def shared_memory(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A batch of copies, in the memory of one."""
    return tensor.narrow(dim, 0, 1).expand_as(tensor)


PLAIN = Form("")
FORMS = [
    Form("non-contiguous", lay_out=every_other),
    Form("expanded", shares_memory=True, lay_out=shared_memory),
    Form("batch of 1", size=1),
    Form("batch of 0", size=0),
]


def batching_plans(count: int) -> list[tuple[str, Dims]]:
    """All arguments batched, then each of them alone; along the first and the last dim."""
    plans: list[tuple[str, Dims]] = [("all@0", (0,) * count), ("all@-1", (-1,) * count)]
    if count > 1:
        for k in range(min(count, MAX_SOLO)):
            for dim in (0, -1):
                plans.append((f"arg{k}@{dim}", one_hot_dims(count, {k}, dim)))
    return plans


def one_hot_dims(count: int, batched: Iterable[int], dim: int = 0) -> Dims:
    batched = set(batched)
    return tuple(dim if k in batched else None for k in range(count))
