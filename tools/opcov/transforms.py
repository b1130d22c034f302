"""What each transform checks on an operator: the library at work beside a reference."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from opcov.derivatives import Differentiable, as_leaves, inner, random_like
from opcov.samples import (
    BATCH,
    MAX_SOLO,
    OUTER_BATCH,
    PLAIN,
    VARIANTS,
    Case,
    Dims,
    Form,
    Function,
    Tensors,
    batches,
    batching_plans,
    clone,
    loop,
    make_batch,
    one_hot_dims,
)

# Ops whose result is uninitialised memory: only shapes and dtypes can be compared.
UNINITIALISED = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    "resize_", "resize_as_",
}  # fmt: skip

# Ops that read their argument's memory rather than its value: the loop has to hand them
# contiguous examples, since a slice of a batch has other memory around it.
READS_STORAGE = {"as_strided", "as_strided_copy", "as_strided_scatter"}


# Ops whose result's size is read from the largest of an argument's values, of which a batch without
# examples has none.
SIZED_BY_VALUES = {"bincount", "nn.functional.one_hot", "tensor_split"}


class NotApplicable(Exception):
    """The transform has nothing to check on this op; the message says why."""


@dataclasses.dataclass
class Check:
    label: str
    transformed: Function  # the library at work
    reference: Function
    arguments: list[Tensors]  # candidates; the first that the reference accepts is used
    shape_only: bool = False
    second_opinion: Function | None = None  # by finite differences


@dataclasses.dataclass
class Subject:
    """What a transform is asked to check: one op of one library on one case."""

    impl: Any
    op: Any
    case: Case
    random_op: bool  # the op draws random numbers on some sample
    random_case: bool  # ... on this one
    form: Form = PLAIN

    @property
    def shape_only(self) -> bool:
        """Whether values cannot be compared under vmap."""
        return self.random_case or self.op.name in UNINITIALISED

    def vmap(self, fn: Function, dims: Dims) -> Function:
        # Built at call time, so that whatever vmap(...) itself raises is this check's error.
        randomness = "different" if self.random_op else "error"
        return lambda *args: self.impl.vmap(fn, in_dims=dims, randomness=randomness)(*self.form.given(args, dims))

    def loop(self, fn: Function, dims: Dims, size: int | None = None) -> Function:
        contiguous = self.op.name in READS_STORAGE
        return self.form.loop(fn, dims, contiguous) if size is None else loop(fn, dims, size, contiguous)

    def sensible(self, plans: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """The batching plans that have a meaning for this op."""
        plans = list(plans)
        if self.op.name in READS_STORAGE:
            # How an example lies in memory is part of the input: only whole examples in a row.
            plans = [p for p in plans if "-1" not in p[0] and self.form.lay_out is PLAIN.lay_out]
        if self.op.name in SIZED_BY_VALUES and self.form.size == 0:
            plans = []
        return plans

    def written(self) -> list[int]:
        """The op's tensors that it writes to."""
        tensors = clone(self.case.variants[0])
        before = [t._version for t in tensors]
        with contextlib.suppress(Exception):
            self.case.bind(self.op.get_op())(*tensors)
        return [k for k, t in enumerate(tensors) if t._version != before[k]]

    @property
    def writes_first(self) -> bool:
        """Whether the op itself writes to its first argument, which then has to be batched."""
        return self.op.name.endswith("_") and not self.op.name.endswith("__")


TRANSFORMS: dict[str, Callable[[Subject], Iterator[Check]]] = {}
NEEDS_GRAD: set[str] = set()  # transforms that differentiate
NEEDS_GRADGRAD: set[str] = set()  # ... twice
TAKES_FORMS = {"vmap", "vmap_inplace", "vmapvjp", "vmapjvp"}  # ... that are tried on every Form


def transform(order: int) -> Callable:
    """Register a transform that differentiates ``order`` times."""

    def register(checks: Callable[[Subject], Iterator[Check]]) -> Callable:
        name = checks.__name__.removeprefix("checks_")
        TRANSFORMS[name] = checks
        if order >= 1:
            NEEDS_GRAD.add(name)
        if order >= 2:
            NEEDS_GRADGRAD.add(name)
        return checks

    return register


def values_and_function(subject: Subject) -> tuple[list[list[torch.Tensor]], Function]:
    """The op's tensors per variant; an op without any gets a dummy argument to map over."""
    fn = subject.case.bind(subject.op.get_op())
    if subject.case.slots:
        return subject.case.variants, fn
    return [[torch.tensor(float(v))] for v in range(VARIANTS)], lambda _dummy: fn()


@transform(order=0)
def checks_vmap(s: Subject) -> Iterator[Check]:
    values, fn = values_and_function(s)
    written = s.written() if s.form.shares_memory else []
    for label, dims in s.sensible(batching_plans(len(values[0]))):
        if s.writes_first and dims[0] is None:
            continue
        if any(dims[k] is not None for k in written):
            continue  # a write to one example would be a write to all
        yield Check(label, s.vmap(fn, dims), s.loop(fn, dims), s.form.batches(values, dims), s.shape_only)


@transform(order=0)
def checks_vmap_inplace(s: Subject) -> Iterator[Check]:
    inplace = s.op.get_inplace()
    if inplace is None:
        raise NotApplicable("no in-place variant")
    if not s.case.slots or s.case.slots[0] != 0:
        raise NotApplicable("the in-place argument is not a tensor")
    if s.case.sample.broadcasts_input:
        raise NotApplicable("the sample broadcasts the in-place argument")
    call = s.case.bind(inplace)
    values = s.case.variants

    def on_a_copy(x: torch.Tensor, *rest: torch.Tensor) -> Tensors:
        x = x.clone()
        return call(x, *rest) + (x,)

    def and_the_argument(fn: Function) -> Function:
        return lambda x, *rest: tuple(fn(x, *rest)) + (x,)

    reshapes = changes_layout(call, values[0])
    for label, dims in s.sensible(batching_plans(len(values[0]))):
        if dims[0] is None:
            continue  # per-example writes into one shared tensor have no meaning
        examples = s.form.batches(values, dims)
        yield Check(f"copy:{label}", s.vmap(on_a_copy, dims), s.loop(on_a_copy, dims), examples, s.shape_only)
        if reshapes or s.form is not PLAIN:
            continue  # a view of the batch changes shape; what that does to the batch is undefined
        yield Check(
            f"argument:{label}",
            and_the_argument(s.vmap(call, dims)),
            and_the_argument(s.loop(call, dims)),
            examples,
            s.shape_only,
        )


def changes_layout(inplace: Function, tensors: Sequence[torch.Tensor]) -> bool:
    x, *rest = clone(tensors)
    before = x.shape, x.stride()
    with contextlib.suppress(Exception):
        inplace(x, *rest)
    return (x.shape, x.stride()) != before


@transform(order=0)
def checks_vmapvmap(s: Subject) -> Iterator[Check]:
    values, fn = values_and_function(s)
    count = len(values[0])
    plans = [
        ("all@0,all@0", ((0,) * count, (0,) * count)),
        ("all@-1,all@0", ((-1,) * count, (0,) * count)),
    ]
    if count > 1 and not s.writes_first:
        first, rest = {0}, set(range(1, count))
        plans += [
            ("arg0@0,rest@0", (one_hot_dims(count, first), one_hot_dims(count, rest))),
            ("rest@0,arg0@-1", (one_hot_dims(count, rest), one_hot_dims(count, first, -1))),
        ]
    for label, (outer, within) in s.sensible(plans):
        arguments = []
        for examples in (values, [values[0]] * VARIANTS):
            rows = [make_batch(examples[o * BATCH : (o + 1) * BATCH], within) for o in range(OUTER_BATCH)]
            arguments.append(make_batch(rows, outer))
        yield Check(
            label,
            s.vmap(s.vmap(fn, within), outer),
            s.loop(s.loop(fn, within), outer, OUTER_BATCH),
            arguments,
            s.shape_only,
        )


def pullback(impl: Any, d: Differentiable) -> Function:
    """(primals, others, cotangents) -> the vjp, by the library."""

    def apply(*args: torch.Tensor) -> Tensors:
        primals, others, cots = d.split(args)
        _, pull = impl.vjp(lambda *p: d.fn(*p, *others), *primals)
        return tuple(pull(cots))

    return apply


def pushforward(impl: Any, d: Differentiable) -> Function:
    """(primals, others, tangents) -> the jvp, by the library."""

    def apply(*args: torch.Tensor) -> Tensors:
        primals, others, tangents = d.split(args)
        return tuple(impl.jvp(lambda *p: d.fn(*p, *others), primals, tangents)[1])

    return apply


@transform(order=1)
def checks_grad(s: Subject) -> Iterator[Check]:
    d = differentiable(s)
    args = d.primals[0] + d.others[0]
    cots = d.cotangents()

    def grad_of_loss(*args: torch.Tensor) -> Tensors:
        primals, others, cots = d.split(args)

        def loss(*p: torch.Tensor) -> torch.Tensor:
            terms = [inner(c, o) for c, o in zip(cots, d.fn(*p, *others), strict=True)]
            return functools.reduce(torch.add, terms)

        return tuple(s.impl.grad(loss, argnums=tuple(range(d.n)))(*primals))

    yield Check("vjp", pullback(s.impl, d), d.ref_vjp, [args + cots], second_opinion=d.fd_vjp)
    if len({o.dtype for o in d.outs}) == 1 or all(o.is_floating_point() for o in d.outs):
        yield Check("grad", grad_of_loss, d.ref_vjp, [args + cots], second_opinion=d.fd_vjp)


@transform(order=1)
def checks_jvp(s: Subject) -> Iterator[Check]:
    d = differentiable(s)
    args = d.primals[0] + d.others[0] + d.tangents()
    yield Check("jvp", pushforward(s.impl, d), d.ref_jvp, [args], second_opinion=d.fd_jvp)


def derivative_plans(d: Differentiable, extra: int, name: str) -> list[tuple[str, Dims]]:
    """What to batch of (primals, others, extra), extra being the cotangents or tangents."""
    count = d.n + d.m + extra
    plans: list[tuple[str, Dims]] = [
        ("all@0", (0,) * count),
        ("all@-1", (-1,) * count),
        (f"{name}@0", one_hot_dims(count, range(d.n + d.m, count))),
    ]
    if count > extra + 1:
        plans += [(f"primal{k}@0", one_hot_dims(count, {k})) for k in sorted({0, d.n - 1})]
    return plans


@transform(order=1)
def checks_vmapvjp(s: Subject) -> Iterator[Check]:
    d = differentiable(s)
    values = [d.primals[b] + d.others[b] + d.cotangents(b) for b in range(BATCH)]
    for label, dims in s.sensible(derivative_plans(d, len(d.outs), "cotangents")):
        yield Check(
            label,
            s.vmap(pullback(s.impl, d), dims),
            s.loop(d.ref_vjp, dims),
            s.form.batches(values, dims),
            s.shape_only,
            second_opinion=s.loop(d.fd_vjp, dims),
        )


@transform(order=1)
def checks_vmapjvp(s: Subject) -> Iterator[Check]:
    d = differentiable(s)
    values = [d.primals[b] + d.others[b] + d.tangents(b) for b in range(BATCH)]
    for label, dims in s.sensible(derivative_plans(d, d.n, "tangents")):
        yield Check(
            label,
            s.vmap(pushforward(s.impl, d), dims),
            s.loop(d.ref_jvp, dims),
            s.form.batches(values, dims),
            s.shape_only,
            second_opinion=s.loop(d.fd_jvp, dims),
        )


@transform(order=2)
def checks_vjpvjp(s: Subject) -> Iterator[Check]:
    d = differentiable(s)
    others = d.others[0]

    def twice(*args: torch.Tensor) -> Tensors:
        primals, others, rest = d.split(args)
        cots, second = rest[: len(d.outs)], rest[len(d.outs) :]
        first = pullback(s.impl, d)
        _, pull = s.impl.vjp(lambda *pc: first(*pc[: d.n], *others, *pc[d.n :]), *primals, *cots)
        return tuple(pull(second))

    args = d.primals[0] + others + d.cotangents() + random_like(d.primals[0], 5)
    yield Check("vjpvjp", twice, d.ref_vjpvjp, [args])


@transform(order=2)
def checks_jvpvjp(s: Subject) -> Iterator[Check]:
    d = differentiable(s)

    def forward_over_reverse(*args: torch.Tensor) -> Tensors:
        primals, others, rest = d.split(args)
        k = len(d.outs)
        cots, tangents = rest[:k], rest[k:]
        first = pullback(s.impl, d)
        return tuple(s.impl.jvp(lambda *pc: first(*pc[: d.n], *others, *pc[d.n :]), primals + cots, tangents)[1])

    args = d.primals[0] + d.others[0] + d.cotangents() + d.tangents() + d.cotangents(1)
    yield Check("jvpvjp", forward_over_reverse, d.ref_jvpvjp, [args], second_opinion=d.fd_jvpvjp)


@transform(order=2)
def checks_jvpjvp(s: Subject) -> Iterator[Check]:
    d = differentiable(s)

    def nested(*args: torch.Tensor) -> Tensors:
        primals, others, tangents = d.split(args)
        t1, t2 = tangents[: d.n], tangents[d.n :]
        first = pushforward(s.impl, d)
        return d.project(tuple(s.impl.jvp(lambda *p: first(*p, *others, *t1), primals, t2)[1]))

    args = d.primals[0] + d.others[0] + d.tangents(0) + d.tangents(1)
    yield Check("jvpjvp", nested, d.ref_jvpjvp, [args], second_opinion=d.fd_jvpjvp)


@transform(order=1)
def checks_vjpvmap(s: Subject) -> Iterator[Check]:
    d = differentiable(s)
    values = [d.primals[b] + d.others[b] for b in range(BATCH)]
    count = d.n + d.m
    plans: list[tuple[str, Dims]] = [("all@0", (0,) * count), ("all@-1", (-1,) * count)]
    if d.m:
        plans.append(("primals@0", one_hot_dims(count, range(d.n))))
    if d.n > 1:
        plans.append(("primal0@0", one_hot_dims(count, {0})))
    cots = tuple(torch.stack(c) for c in zip(*(d.cotangents(b) for b in range(BATCH))))

    for label, dims in s.sensible(plans):
        # The batched function is itself a function to differentiate.
        def through(fn: Function) -> Differentiable:
            return dataclasses.replace(d, fn=fn)

        yield Check(
            label,
            pullback(s.impl, through(s.vmap(d.fn, dims))),
            through(s.loop(d.fn, dims)).ref_vjp,
            [batch + cots for batch in batches(values, dims)],
            s.shape_only,
            second_opinion=through(s.loop(d.fn, dims)).fd_vjp,
        )


# --- differentiable functions ---------------------------------------------------------------------


def differentiable(s: Subject) -> Differentiable:
    op, case = s.op, s.case
    wrapper = op.gradcheck_wrapper
    post = case.sample.output_process_fn_grad

    def apply(*args: Any, **kwargs: Any) -> Any:
        # The wrapper projects onto the op's domain (symmetric matrices, say); the
        # postprocessing picks outputs that are differentiable where the op's are not unique.
        out = op.get_op()(*args, **kwargs) if reseeds(wrapper) else wrapper(op.get_op(), *args, **kwargs)
        return post(out)

    bound = case.bind(apply)
    wrt = [k for k, needed in enumerate(case.requires_grad) if needed]
    rest = [k for k, needed in enumerate(case.requires_grad) if not needed]
    order = wrt + rest

    def all_outputs(*args: torch.Tensor) -> Tensors:
        tensors: list[Any] = [None] * len(order)
        for k, arg in zip(order, args):
            tensors[k] = arg
        return bound(*tensors)

    first = case.variants[0]
    outs = all_outputs(*as_leaves(first[k] for k in wrt), *(first[k] for k in rest))
    keep = [i for i, o in enumerate(outs) if o.requires_grad]
    if not keep:
        raise NotApplicable("no differentiable output")
    return Differentiable(
        case=case,
        fn=lambda *args: tuple(all_outputs(*args)[i] for i in keep),
        primals=[tuple(v[k] for k in wrt) for v in case.variants],
        others=[tuple(v[k] for k in rest) for v in case.variants],
        outs=tuple(outs[i].detach() for i in keep),
        random=s.random_case,
    )


def reseeds(wrapper: Callable) -> bool:
    return getattr(wrapper, "__name__", "") == "wrapper_set_seed"
