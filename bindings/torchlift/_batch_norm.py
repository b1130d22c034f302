"""BatchNorm under transforms.

In training mode BatchNorm writes running statistics. Under vmap each example has statistics of its own,
which do not fit into buffers that all share. Ways out: functional_call(..., mutate_buffers="return"),
which returns them; running without them (replace_all_batch_norm_modules_); another norm
(patch_batch_norm_with); eval mode.
"""

from __future__ import annotations

from typing import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchlift._errors import TransformError


def replace_all_batch_norm_modules_(root: nn.Module) -> nn.Module:
    """Makes every BatchNorm in root use the statistics of its batch only, in place. Returns root.

    >>> import torch, torchlift
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    >>> torchlift.replace_all_batch_norm_modules_(model)[0].running_mean is None
    True
    """
    for module in root.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
            module.track_running_stats = False
    return root


def patch_batch_norm_with(
    root: nn.Module, make: "Callable[[_BatchNorm], nn.Module]"
) -> nn.Module:
    """Puts make(norm) in the place of every BatchNorm in root, in place. Returns root, or make(root) if
    root is a BatchNorm itself.

    A module that root holds in several places is replaced by one module.

    >>> import torch, torchlift
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> make = lambda bn: torch.nn.GroupNorm(4, bn.num_features)
    >>> type(torchlift.patch_batch_norm_with(model, make)[1]).__name__
    'GroupNorm'
    """
    made: "dict[int, nn.Module]" = {}

    def replacement(norm: _BatchNorm) -> nn.Module:
        if id(norm) not in made:
            new = make(norm)
            if not isinstance(new, nn.Module):
                raise TransformError(
                    f"patch_batch_norm_with: make must return a module, got {type(new).__name__}."
                )
            made[id(norm)] = new.train(norm.training)
        return made[id(norm)]

    if isinstance(root, _BatchNorm):
        return replacement(root)
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if isinstance(child, _BatchNorm):
                module._modules[name] = replacement(child)
    return root
