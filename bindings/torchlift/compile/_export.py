"""To and from what torch itself saves: torch.export programs (.pt2) and TorchScript."""

from __future__ import annotations

import os
from typing import Any, Callable

import torch
from torch.utils import _pytree as torch_pytree

from torchlift._errors import TransformError
from torchlift._fx import make_fx
from torchlift._names import describe, wraps
from torchlift._shapes import tensors_for


def export(f: Callable[..., Any]) -> "Callable[..., torch.export.ExportedProgram]":
    """Traces a function, transforms and all, into a torch.export.ExportedProgram.

    It holds plain operators only: `torch.export.save` writes it to a .pt2 file, which programs
    without torchlift can load.

    Args:
        f: a function of pytrees of tensors; tensors that it captures become constants.

    Returns:
        A function of the same arguments (not keywords) that gives the program. They may be no more than
        shapes, as in `torchlift.trace`.

    >>> import torch, torchlift
    >>> f = torchlift.vmap(torchlift.grad(lambda x: x.sin().sum()))
    >>> program = torchlift.compile.export(f)(torch.zeros(2, 3))
    >>> program.module()(torch.zeros(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    @wraps(f)
    def exported(*args: Any) -> "torch.export.ExportedProgram":
        with torch.no_grad():
            return torch.export.export(_Plain(make_fx(f)(*args)), _examples(args))

    return exported


def _examples(args: "tuple[Any, ...]") -> "tuple[Any, ...]":
    """What torch.export takes: fake tensors, where the arguments are shapes alone."""
    from torch._subclasses import FakeTensorMode

    leaves, spec = torch_pytree.tree_flatten(args)
    leaves, devices = tensors_for(leaves)
    if devices is None:
        return args
    rest = iter(devices)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [
            torch.empty_like(leaf, device=next(rest)) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
    return torch_pytree.tree_unflatten(fake, spec)


class _Plain(torch.nn.Module):
    """A module with forward(*args), whatever code fx made."""

    def __init__(self, module: "torch.fx.GraphModule") -> None:
        super().__init__()
        self.traced = module

    def forward(self, *args: Any) -> Any:
        return self.traced(*args)


def from_exported(program: "torch.export.ExportedProgram | str | os.PathLike[str]") -> Any:
    """The module of an exported program, or of a .pt2 file, ready to be transformed.

    The result can be called inside of vmap, grad and all other transforms, with arguments of the
    shapes that it was exported for, and `torchlift.functional_call` gives it other parameters.

    >>> import torch, torchlift
    >>> program = torch.export.export(torch.nn.Linear(3, 1), (torch.ones(3),))
    >>> f = torchlift.compile.from_exported(program)
    >>> torchlift.vmap(torchlift.grad(lambda x: f(x).sum()))(torch.ones(5, 3)).shape
    torch.Size([5, 3])
    """
    if isinstance(program, (str, os.PathLike)):
        program = torch.export.load(program)
    if not isinstance(program, torch.export.ExportedProgram):
        raise TransformError(
            f"[from_exported] got {describe(program)} in place of a torch.export.ExportedProgram, "
            f"or the path of a .pt2 file."
        )
    return program.module()


def from_torchscript(module: "torch.jit.ScriptModule | str | os.PathLike[str]") -> Any:
    """A TorchScript module, or file, as a module that can be transformed.

    Its operators run one by one, without TorchScript's optimizations, which know nothing of
    transforms.

    >>> import torch, torchlift
    >>> script = torch.jit.script(torch.nn.Linear(3, 1))
    >>> f = torchlift.compile.from_torchscript(script)
    >>> torchlift.vmap(torchlift.grad(lambda x: f(x).sum()))(torch.ones(5, 3)).shape
    torch.Size([5, 3])
    """
    if isinstance(module, (str, os.PathLike)):
        module = torch.jit.load(module)
    if not isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TransformError(
            f"[from_torchscript] got {describe(module)} in place of a torch.jit.ScriptModule, or "
            f"the path of a file."
        )
    return _Script(module)


class _Script(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.script = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.jit.optimized_execution(False):
            return self.script(*args, **kwargs)
