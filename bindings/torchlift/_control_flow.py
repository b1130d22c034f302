"""cond, while_loop, fori_loop and scan: branches and loops on values, under any transforms.

The work is done in C++ (batching/control_flow.h), on lists of tensors. Here trees are taken apart,
numbers become tensors, and what the functions return is checked.
"""

from __future__ import annotations

from typing import Any, Callable, NoReturn

import torch
from torch import Tensor

from torchlift import _C, _pytree
from torchlift._errors import TransformError
from torchlift._names import describe, function_name

_NUMBERS = (bool, int, float, complex)


def cond(
    pred: "Tensor | bool",
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    *operands: Any,
) -> Any:
    """`true_fn(*operands)` where `pred` is true, `false_fn(*operands)` where it is not.

    Without vmap this is an if. Under vmap `pred` may differ from example to example: then each
    function runs once, on the examples that take it, and on no others; so a formula that is infinite
    or undefined for the others leaves no NaN in a gradient, as it does with torch.where.

    Args:
        pred: a bool, or a bool tensor without dims.
        true_fn, false_fn: pure functions, which may close over anything. They return the same
            structure, with the same shapes and dtypes; numbers in it become tensors.
        operands: pytrees, of tensors or not.

    Raises:
        TransformError: pred is something else, or the functions return different things.

    >>> import torch, torchlift
    >>> root = lambda x: torchlift.cond(x > 0, torch.sqrt, torch.zeros_like, x)
    >>> torchlift.vmap(torchlift.grad(root))(torch.tensor([4.0, 0.0, -1.0]))
    tensor([0.2500, 0.0000, 0.0000])
    """
    if isinstance(pred, bool):
        return _Tree((true_fn if pred else false_fn)(*operands)).tree()
    _check_is_tensor("cond", "pred", pred)
    leaves, spec = _pytree.flatten(operands)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    numbers_as: "dict[int, _Weak]" = {}
    first: "list[_Tree]" = []

    def run(func: Callable[..., Any]) -> "Callable[[list[Tensor]], list[Tensor]]":
        def call(tensors: "list[Tensor]") -> "list[Tensor]":
            given = list(leaves)
            for i, tensor in zip(where, tensors):
                given[i] = tensor
            result = _Tree(func(*spec.unflatten(given)))
            if first:
                first[0].check_alike("cond", _cond_words(true_fn, false_fn), result, weak=True)
            else:
                result.convert(numbers_as)
                first.append(result)
            return result.tensors

        return call

    while True:
        try:
            found = _C.cond_leaves(
                pred, run(true_fn), run(false_fn), [leaves[i] for i in where]
            )
            return first[0].with_tensors(found)
        except _Weak as weak:
            numbers_as[weak.index] = weak
            first.clear()


def while_loop(
    cond_fn: Callable[[Any], "Tensor | bool"], body_fn: Callable[[Any], Any], init: Any
) -> Any:
    """`carry = body_fn(carry)`, from `init`, while `cond_fn(carry)`.

    Without vmap this is a while. Under vmap the examples may need different numbers of steps: those
    that have finished are set aside, and the others go on by themselves, so that no work is done for
    the finished ones. Differentiable in reverse and forward mode.

    Args:
        cond_fn: returns a bool, or a bool tensor without dims.
        body_fn: takes and returns the carry, with the same structure, shapes and dtypes. Both are
            pure functions, which may close over anything.
        init: a pytree of tensors; numbers in it become tensors.

    Raises:
        TransformError: body_fn returns another structure, shape or dtype, or cond_fn no bool.

    >>> import torch, torchlift
    >>> def collatz(n):
    ...     step = lambda n: torchlift.cond(n % 2 == 0, lambda n: n // 2, lambda n: 3 * n + 1, n)
    ...     n, steps = torchlift.while_loop(lambda c: c[0] != 1, lambda c: (step(c[0]), c[1] + 1), (n, 0))
    ...     return steps
    >>> torchlift.vmap(collatz)(torch.tensor([1, 2, 3, 27]))
    tensor([  0,   1,   7, 111])
    """
    return _loop("while_loop", cond_fn, body_fn, init, body_fn)


def fori_loop(
    lower: "int | Tensor", upper: "int | Tensor", body_fn: Callable[[Any, Any], Any], init: Any
) -> Any:
    """`carry = body_fn(i, carry)`, from `init`, for i = lower ... upper - 1.

    Args:
        lower, upper: ints, and i is an int; or integer tensors without dims, and so is i. Under vmap
            they may differ from example to example, as in while_loop.
        body_fn: returns the carry, with the same structure, shapes and dtypes.
        init: a pytree of tensors; numbers in it become tensors.

    >>> import torch, torchlift
    >>> power = lambda x, n: torchlift.fori_loop(0, n, lambda i, y: y * x, torch.ones_like(x))
    >>> torchlift.vmap(torchlift.grad(power))(torch.tensor([3.0, 3.0]), torch.tensor([2, 4]))
    tensor([  6., 108.])
    """
    if isinstance(lower, int) and isinstance(upper, int):
        return _with_weak_numbers(init, lambda carry: _plain_for(lower, upper, body_fn, carry))
    lower, upper = _bound("lower", lower), _bound("upper", upper)

    def body(state: Any) -> Any:
        i, carry = state
        return i + 1, body_fn(i, carry)

    return _loop("fori_loop", lambda state: state[0] < upper, body, (lower, init), body_fn)[1]


def scan(
    f: Callable[[Any, Any], "tuple[Any, Any]"],
    init: Any,
    xs: Any,
    length: "int | None" = None,
    reverse: bool = False,
) -> "tuple[Any, Any]":
    """`carry, y = f(carry, x)` for each slice x of xs along dim 0; returns (carry, stacked ys).

    Args:
        f: returns a tuple of the carry, with the same structure, shapes and dtypes, and a pytree.
        init: a pytree of tensors; numbers in it become tensors.
        xs: a pytree of tensors with the same size along dim 0; None for none, with a length.
        length: the number of steps; needed only if xs is None.
        reverse: from the last slice to the first. The ys are in the order of xs all the same.

    Raises:
        TransformError: sizes that differ, or an f that returns something else.

    With no steps, f is called once on zeros to learn what ys look like.

    >>> import torch, torchlift
    >>> def step(total, x):
    ...     return total + x, total * x
    >>> torchlift.scan(step, torch.tensor(0), torch.arange(4))
    (tensor(6), tensor([0, 0, 2, 9]))
    """
    leaves, spec = _pytree.flatten(xs) if xs is not None else ([], _pytree.flatten(())[1])
    steps = _scan_length(xs, leaves, length)
    if xs is None:
        spec = _pytree.flatten(None)[1]

    def run(carry: Any) -> Any:
        tree = _Tree(carry)
        if steps == 0:
            with torch.no_grad():
                zeros = [None] if xs is None else [x.new_zeros(x.shape[1:]) for x in leaves]
                y = _Tree(_pair(f, f(tree.tree(), spec.unflatten(zeros)))[1])
                empty = [t.detach()[None][:0] for t in y.tensors]
            return tree.tree(), y.with_tensors(empty)
        count = len(tree.tensors)
        first: "list[_Tree]" = []

        def step(tensors: "list[Tensor]") -> "list[Tensor]":
            x = [None] if xs is None else tensors[count:]
            following, y = map(_Tree, _pair(f, f(tree.with_tensors(tensors), spec.unflatten(x))))
            tree.check_alike("scan", _carry_words(f, "as carry"), following, weak=True)
            if first:
                first[0].check_alike("scan", _scan_words(f), y)
            else:
                first.append(y)
            return following.tensors + y.tensors

        last, ys = _C.scan_leaves(step, tree.tensors, leaves, steps, reverse)
        return tree.with_tensors(last), first[0].with_tensors(ys)

    return _with_weak_numbers(init, run)


# --- trees ------------------------------------------------------------------------------------


class _Tree:
    """A tree with its tensors apart; numbers are tensors from here on, other leaves constants."""

    __slots__ = ("leaves", "spec", "weak", "positions")

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = _pytree.flatten(tree)
        # The leaves that were numbers: their dtype may still change.
        self.weak = [isinstance(leaf, _NUMBERS) for leaf in leaves]
        self.leaves = [
            torch.tensor(leaf) if number else leaf for leaf, number in zip(leaves, self.weak)
        ]
        self.positions = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> "list[Tensor]":
        return [self.leaves[i] for i in self.positions]

    def tree(self) -> Any:
        return self.spec.unflatten(self.leaves)

    def with_tensors(self, tensors: "list[Tensor]") -> Any:
        leaves = list(self.leaves)
        for i, tensor in zip(self.positions, tensors):
            leaves[i] = tensor
        return self.spec.unflatten(leaves)

    def convert(self, numbers_as: "dict[int, _Weak]") -> None:
        """Gives leaves that were numbers another dtype and device."""
        for i, weak in numbers_as.items():
            self.leaves[i] = self.leaves[i].to(dtype=weak.dtype, device=weak.device)
            self.weak[i] = False

    def check_alike(
        self, transform: str, words: "Callable[[], tuple[str, str]]", got: "_Tree", weak: bool = False
    ) -> None:
        """words() are two phrases: who returned it, and what it should have been like.

        What was a number in got becomes like its counterpart; if the counterpart was one and weak is
        true, _Weak asks for the opposite.
        """
        if got.spec != self.spec:
            who, like = words()
            raise TransformError(
                f"[{transform}] {who} returned {_structure(got)}, but {like} {_structure(self)}. Both "
                f"must have the same structure."
            )
        for i, (mine, other) in enumerate(zip(self.leaves, got.leaves)):
            if isinstance(mine, Tensor) and isinstance(other, Tensor):
                if (
                    mine.shape == other.shape
                    and mine.dtype == other.dtype
                    and mine.device == other.device
                ):
                    continue
                if got.weak[i] and _takes(other, mine):
                    got.leaves[i] = other.to(dtype=mine.dtype, device=mine.device)
                    continue
                if weak and self.weak[i] and _takes(mine, other):
                    raise _Weak(i, other)
                self.fail(transform, words, got, i, _tensor(other), _tensor(mine))
            elif isinstance(mine, Tensor) or isinstance(other, Tensor) or not _same(mine, other):
                self.fail(transform, words, got, i, describe(other), describe(mine))

    def fail(
        self,
        transform: str,
        words: "Callable[[], tuple[str, str]]",
        got: "_Tree",
        index: int,
        is_now: str,
        was: str,
    ) -> NoReturn:
        who, like = words()
        path = _pytree.format_path(_pytree.flatten_with_path(got.tree())[0][index])
        at = f" at {path}" if path else ""
        raise TransformError(
            f"[{transform}] {who} returned{at} {is_now}, but {like} {was} there. Shapes, dtypes and "
            f"devices must be the same (expand or convert one of them with .expand(), .to()), and "
            f"only tensors can change."
        )


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _tensor(t: Tensor) -> str:
    device = "" if t.device.type == "cpu" else f" on {t.device}"
    return f"a tensor of shape {list(t.shape)} and dtype {t.dtype}{device}"


def _structure(tree: _Tree) -> str:
    text = str(tree.spec)
    text = text.removeprefix("PyTreeSpec(").removesuffix(")") if "NoneIsLeaf" not in text else text
    return f"the structure {text}"


class _Weak(Exception):
    """Leaf `index` of the carry was a number, and should have been a tensor like `like`."""

    def __init__(self, index: int, like: Tensor) -> None:
        super().__init__(index)
        self.index, self.dtype, self.device = index, like.dtype, like.device


def _takes(number: Tensor, other: Tensor) -> bool:
    """Whether a number could as well have been a tensor like `other`."""
    floating = number.dtype.is_floating_point and other.dtype.is_floating_point
    promoted = torch.promote_types(number.dtype, other.dtype) == other.dtype
    return number.shape == other.shape and (promoted or floating)


def _with_weak_numbers(init: Any, run: Callable[[Any], Any]) -> Any:
    """run(init); numbers in init take the dtype that the function gives them.

    As in `0.0 + x`: the number adapts, not x. The functions are pure, so the loop begins anew.
    """
    leaves, spec = _pytree.flatten(init)
    for _ in range(len(leaves) + 1):
        try:
            return run(spec.unflatten(leaves))
        except _Weak as weak:
            leaves[weak.index] = torch.tensor(
                leaves[weak.index], dtype=weak.dtype, device=weak.device
            )
    raise AssertionError("unreachable: every number is replaced once at most")


# --- loops ------------------------------------------------------------------------------------


def _loop(
    transform: str,
    cond_fn: Callable[[Any], Any],
    body_fn: Callable[[Any], Any],
    init: Any,
    named: Callable[..., Any],
) -> Any:
    def run(start: Any) -> Any:
        first = _Tree(start)
        words = _carry_words(named)

        def test(tensors: "list[Tensor]") -> Tensor:
            found = cond_fn(first.with_tensors(tensors))
            if isinstance(found, bool):
                return torch.tensor(found)
            _check_is_tensor(transform, f"what {function_name(cond_fn)} returned", found)
            return found

        def body(tensors: "list[Tensor]") -> "list[Tensor]":
            result = _Tree(body_fn(first.with_tensors(tensors)))
            first.check_alike(transform, words, result, weak=True)
            return result.tensors

        return first.with_tensors(_C.while_leaves(transform, test, body, first.tensors))

    return _with_weak_numbers(init, run)


def _plain_for(lower: int, upper: int, body_fn: Callable[[Any, Any], Any], init: Any) -> Any:
    tree = _Tree(init)
    words = _carry_words(body_fn)
    for i in range(lower, upper):
        following = _Tree(body_fn(i, tree.tree()))
        tree.check_alike("fori_loop", words, following, weak=True)
        tree = following
    return tree.tree()


def _bound(name: str, bound: Any) -> Tensor:
    if isinstance(bound, int) and not isinstance(bound, bool):
        return torch.tensor(bound)
    integer = isinstance(bound, Tensor) and not (
        bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool
    )
    if integer and bound.dim() == 0:
        return bound
    got = _tensor(bound) if isinstance(bound, Tensor) else describe(bound)
    raise TransformError(
        f"[fori_loop] {name} must be an int or an integer tensor without dims, got {got}."
    )


def _scan_length(xs: Any, leaves: "list[Any]", length: "int | None") -> int:
    if length is not None and (not isinstance(length, int) or length < 0):
        raise TransformError(f"[scan] length must be an int of at least 0, got {length!r}.")
    names = ["xs" + _pytree.format_path(p) for p in _pytree.flatten_with_path(xs)[0]]
    for name, leaf in zip(names, leaves):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            got = "a tensor without dims" if isinstance(leaf, Tensor) else describe(leaf)
            raise TransformError(
                f"[scan] {name} is {got}, but scan goes along dim 0 of every tensor in xs. Let the "
                f"function close over what all steps share."
            )
    sizes = {leaf.shape[0] for leaf in leaves} | ({length} if length is not None else set())
    if not sizes:
        raise TransformError("[scan] xs has no tensors: give length, the number of steps.")
    if len(sizes) > 1:
        report = [f"  {n}: size {x.shape[0]} (shape {list(x.shape)})" for n, x in zip(names, leaves)]
        if length is not None:
            report.append(f"  length: {length}")
        raise TransformError(
            "[scan] the tensors in xs must all have the same size along dim 0, which is the number "
            "of steps (and length, if given), but got:\n" + "\n".join(report)
        )
    return sizes.pop()


# --- words ------------------------------------------------------------------------------------


def _check_is_tensor(transform: str, what: str, pred: Any) -> None:
    if not isinstance(pred, Tensor):
        raise TransformError(
            f"[{transform}] {what} must be a bool or a bool tensor without dims, got {describe(pred)}."
        )


def _pair(f: Callable[..., Any], result: Any) -> "tuple[Any, Any]":
    if not isinstance(result, tuple) or len(result) != 2:
        raise TransformError(
            f"[scan] {function_name(f)} must return a tuple (carry, y), got {describe(result)}."
        )
    return result


def _carry_words(
    func: Callable[..., Any], role: str = ""
) -> "Callable[[], tuple[str, str]]":
    name = function_name(func)
    return lambda: (f"{name}{', ' + role + ',' if role else ''}", "the carry it got has")


def _scan_words(f: Callable[..., Any]) -> "Callable[[], tuple[str, str]]":
    return lambda: (f"{function_name(f)}, as y,", "in the first step it returned")


def _cond_words(
    true_fn: Callable[..., Any], false_fn: Callable[..., Any]
) -> "Callable[[], tuple[str, str]]":
    return lambda: (
        f"false_fn ({function_name(false_fn)})",
        f"true_fn ({function_name(true_fn)}) returned",
    )
