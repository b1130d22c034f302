"""Functions of torch that look at values only to check them.

NOTE [checks of values]
`if torch.any(var < 0): raise ValueError(...)` in torch's Python asks one question of all examples: is
there one that is not allowed? Under vmap that has an answer, though bool() of a batched tensor has
none. So in the functions listed here the name that asks (torch.any, x.all) is another one, which
asks all examples; nothing else of them changes: they stay the same objects, with their source and
signature, and what somebody imported before torchlift is served, too. In a trace the answer is that of the
run that is traced: the graph does not ask again.

AdaptiveLogSoftmaxWithLoss does not only check: it sorts its targets into clusters, of sizes that
depend on them. With batched targets it computes the log-probabilities of all clusters and chooses.
Geometric.log_prob of a number works on a vector of one number.
"""

from __future__ import annotations

import functools
import types
from typing import Any, Callable

import torch
from torch import nn
from torch.distributions import constraints, continuous_bernoulli, distribution, geometric

from torchlift import _C


def _agree_on(answers: torch.Tensor, expected: bool) -> "torch.Tensor | bool":
    """Whether the answers of all examples are the expected one; plain answers stay tensors."""
    if not _C.is_lifted(answers):
        return answers
    traced = _C.traced_values_are(answers, expected)
    if traced is not None:
        return traced is expected
    same = torch.full_like(answers, expected)
    try:
        return torch.equal(answers, same) is expected
    except RuntimeError as error:  # it becomes an UnsupportedError on its way out of vmap
        if "the examples differ" not in str(error):
            raise
        return not expected


def any_example(x: torch.Tensor) -> "torch.Tensor | bool":
    """torch.any, of all examples."""
    return _agree_on(torch.any(x), False)


def all_examples(x: torch.Tensor) -> "torch.Tensor | bool":
    """torch.all, of all examples."""
    return _agree_on(torch.all(x), True)


def _all_method(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """x.all(); along a dim it is an ordinary reduction."""
    return torch.all(x, *args, **kwargs) if args or kwargs else all_examples(x)


def _module_like_torch(**others: Callable[..., Any]) -> types.ModuleType:
    """torch, but for some functions."""
    module = types.ModuleType("torch")
    module.__getattr__ = functools.partial(getattr, torch)  # type: ignore[method-assign]
    vars(module).update(others)
    return module


def _rename(function: types.FunctionType, name: str, other: str) -> None:
    """Makes a function use another global, or method, where it uses `name`."""
    code = function.__code__
    if name in code.co_names:  # else another torch, which asks in another way
        names = tuple(other if n == name else n for n in code.co_names)
        function.__code__ = code.replace(co_names=names)


def _ask_all_examples() -> None:
    checking = _module_like_torch(any=any_example, all=all_examples, _is_all_true=all_examples)
    for function in (
        nn.functional.gaussian_nll_loss,
        getattr(distribution, "_all_true_or_runtime_assert", None),
    ):
        if isinstance(function, types.FunctionType):
            function.__globals__["_torchlift_checking_torch"] = checking
            _rename(function, "torch", "_torchlift_checking_torch")
    torch.Tensor._torchlift_all = _all_method  # type: ignore[attr-defined]
    for method in (
        constraints._PositiveDefinite.check,
        constraints._PositiveSemidefinite.check,
        constraints._Symmetric.check,
        continuous_bernoulli.ContinuousBernoulli.__init__,
        geometric.Geometric.__init__,
    ):
        _rename(method, "all", "_torchlift_all")


def _patch_adaptive_log_softmax() -> None:
    cls = nn.AdaptiveLogSoftmaxWithLoss
    forward, predict = cls.forward, cls.predict

    @functools.wraps(forward)
    def batched_forward(self: Any, input_: torch.Tensor, target_: torch.Tensor) -> Any:
        fits = target_.dim() <= 1 and input_.dim() == target_.dim() + 1
        if not _C.is_lifted(target_) or not fits or input_.shape[:-1] != target_.shape:
            return forward(self, input_, target_)  # which complains of shapes, if they do not fit
        if not all_examples((target_ >= 0) & (target_ < self.n_classes)):
            raise RuntimeError(
                f"Target values should be in [0, {self.n_classes - 1}], but others were found."
            )
        log_prob = self.log_prob(input_.reshape(-1, input_.shape[-1]))
        output = log_prob.gather(1, target_.reshape(-1, 1)).reshape(target_.shape)
        return nn.modules.adaptive._ASMoutput(output, (-output).mean())

    @functools.wraps(predict)
    def batched_predict(self: Any, input: torch.Tensor) -> torch.Tensor:
        head = self.head.weight
        if not (_C.is_lifted(input) or _C.is_lifted(head)):
            return predict(self, input)
        return self.log_prob(input).argmax(dim=1)

    cls.forward, cls.predict = batched_forward, batched_predict  # type: ignore[method-assign]


def _patch_geometric() -> None:
    """Geometric.log_prob indexes by a mask, which for a number asks for its value."""
    log_prob = geometric.Geometric.log_prob

    @functools.wraps(log_prob)
    def batched_log_prob(self: Any, value: torch.Tensor) -> torch.Tensor:
        numbers = self.batch_shape == () and isinstance(value, torch.Tensor) and value.dim() == 0
        if not numbers or not (_C.is_lifted(self.probs) or _C.is_lifted(value)):
            return log_prob(self, value)
        return log_prob(self.expand((1,)), value.reshape(1)).squeeze(0)

    geometric.Geometric.log_prob = batched_log_prob  # type: ignore[method-assign]


def install() -> None:
    """Done once, when torchlift is imported."""
    _ask_all_examples()
    _patch_adaptive_log_softmax()
    _patch_geometric()


install()
