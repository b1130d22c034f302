"""torch.autograd.grad and Tensor.backward on lifted tensors.

torch refuses them for tensors of its own vmap, and takes ours for such. Ours have an autograd of
their own, so the engine can run as it is. With create_graph=True what it does to the values is
recorded by the domains outside of the vmap too, without it by none, as in a loop over the examples.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.autograd.graph

from torchlift import _C


def install() -> None:
    """Makes torch's calls of the engine look for lifted tensors. Others are unchanged."""
    run_torch = torch.autograd.graph._engine_run_backward
    if hasattr(run_torch, "__torchlift__"):
        return
    run_ours = _C.run_backward

    @functools.wraps(run_torch)
    def _engine_run_backward(
        t_outputs: Any,
        grads: Any,
        keep_graph: bool,
        create_graph: bool,
        inputs: Any,
        allow_unreachable: bool,
        accumulate_grad: bool,
    ) -> Any:
        result = run_ours(
            tuple(t_outputs),
            tuple(grads),
            bool(keep_graph),
            bool(create_graph),
            tuple(inputs),
            bool(allow_unreachable),
            bool(accumulate_grad),
        )
        if result is not NotImplemented:
            return result
        return run_torch(
            t_outputs,
            grads,
            keep_graph,
            create_graph,
            inputs,
            allow_unreachable=allow_unreachable,
            accumulate_grad=accumulate_grad,
        )

    _engine_run_backward.__torchlift__ = True  # type: ignore[attr-defined]
    torch.autograd.graph._engine_run_backward = _engine_run_backward
    torch.autograd._engine_run_backward = _engine_run_backward  # type: ignore[attr-defined]
