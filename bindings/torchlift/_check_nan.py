"""check_nan: the operator that made the first NaN.

The work is done in C++ (autodiff/check_nan.h), which calls back for the line of code.
"""

from __future__ import annotations

from typing import Any, Callable

from torchlift import _C
from torchlift._names import NOT_USERS, wraps


class NanError(FloatingPointError):
    """An operator made a NaN: see `check_nan`.

    >>> import torch, torchlift
    >>> try:
    ...     torchlift.check_nan(torch.sqrt)(torch.tensor(-1.0))
    ... except torchlift.NanError as error:
    ...     print(str(error).splitlines()[0])
    [check_nan] aten::sqrt returned NaN, and no argument of it has any.
    """


NanError.__module__ = "torchlift"


def check_nan(func: Callable[..., Any], *, inf: bool = False) -> Callable[..., Any]:
    """func, which raises NanError if an operator makes a NaN. For debugging.

    The error names the operator, the example of each vmap around, the element, the transforms, the
    line of code, and in a backward pass the node. It looks at all that happens while func runs, so
    `check_nan(grad(f))` sees the derivative, `grad(check_nan(f))` only f itself; it may stand
    outside, inside and between transforms.

    No finding is a NaN that was there before: in an argument, in a constant
    (`torch.full((), float("nan"))`), or in memory that is not initialized (`torch.empty`). Each
    example of a vmap is looked at by itself. func runs to its end, or to its own error, before the
    error is raised. What other threads that func starts do is not seen.

    Args:
        func: any function, transformed or not.
        inf: infinities too.

    >>> import torch, torchlift
    >>> def loss(x):
    ...     return (x - 1).log().sum()
    >>> safe = torchlift.check_nan(torchlift.vmap(torchlift.grad(loss)))
    >>> safe(torch.tensor([2.0, 3.0]))
    tensor([1.0000, 0.5000])
    >>> try:
    ...     safe(torch.tensor([2.0, 3.0, 0.0]))
    ... except torchlift.NanError as error:
    ...     print("row 2 of vmap level 1 (size 3)" in str(error))
    True
    """

    @wraps(func)
    def checked(*args: Any, **kwargs: Any) -> Any:
        watch = _C.NanWatch(inf, NOT_USERS)
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            found = watch.close()
            if found is None or isinstance(error, NanError) or not isinstance(error, Exception):
                raise
            raise NanError(f"[check_nan] {found}\n  then the function raised: {error!r}") from error
        found = watch.close()
        if found is not None:
            raise NanError(f"[check_nan] {found}")
        return result

    return checked
