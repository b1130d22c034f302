"""What `python -m torchlift` tells: versions, and whether the transforms agree with plain loops."""

from __future__ import annotations

import platform
from typing import Callable, Iterator

import torch

import torchlift
from torchlift import _C


def versions() -> "list[tuple[str, str]]":
    info = _C.build_info()
    return [
        ("torchlift", info["version"]),
        ("built for torch", info["built_for_torch"]),
        ("running torch", torch.__version__),
        ("Python", platform.python_version()),
        ("compiler", info["compiler"]),
        ("dispatch keys", ", ".join(info["keys"])),
        ("batching rules", str(len(_C.rule_names()))),
    ]


def _f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(x @ w).sin() * x[0]).sum()


def _plain_grad(f: Callable[..., torch.Tensor], x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x, w), x)[0]


def checks() -> "Iterator[tuple[str, Callable[[], float]]]":
    """Name, and a function that returns the largest difference from the plain computation."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max())

    yield "vmap against a loop", lambda: difference(
        torchlift.vmap(_f, in_dims=(0, None))(xs, w), torch.stack([_f(x, w) for x in xs])
    )
    yield "grad against autograd", lambda: difference(
        torchlift.grad(_f)(xs[0], w), _plain_grad(_f, xs[0], w)
    )
    yield "vjp against autograd", lambda: difference(
        torchlift.vjp(lambda x: _f(x, w), xs[0])[1](torch.tensor(2.0, dtype=torch.float64))[0],
        2 * _plain_grad(_f, xs[0], w),
    )
    yield "vmap(grad) against a loop", lambda: difference(
        torchlift.vmap(torchlift.grad(_f), in_dims=(0, None))(xs, w),
        torch.stack([_plain_grad(_f, x, w) for x in xs]),
    )


def main() -> int:
    """Prints it all; 0 if every check passed."""
    for name, value in versions():
        print(f"{name:16} {value}")
    failed = 0
    for name, check in checks():
        try:
            worst = check()
            passed = worst < 1e-10
            note = f"max difference {worst:.1e}"
        except Exception as error:  # noqa: BLE001: whatever went wrong is the result
            passed, note = False, f"{type(error).__name__}: {error}"
        failed += not passed
        print(f"{'pass' if passed else 'FAIL'}  {name}: {note}")
    return 1 if failed else 0
