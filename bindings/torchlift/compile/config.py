"""Options of torchlift.compile, read whenever something is compiled.

>>> import torchlift
>>> with torchlift.compile.config.patch(recompute_views=False):
...     torchlift.compile.config.recompute_views
False
>>> torchlift.compile.config.recompute_views
True
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

# What min_cut_rematerialization_partition may compute a second time.
# Views are never saved: a view that is kept keeps all memory of its base, which is saved instead.
recompute_views: bool = True
# Sums, softmax, normalizations: they read more than they write.
ban_recompute_reductions: bool = False
# Products of matrices, convolutions, attention, and what else is no pointwise operator.
aggressive_recomputation: bool = False
# Parameters and buffers (static_lifetime_input_indices) are alive anyway: keeping them costs nothing.
treat_parameters_as_free_to_save: bool = True
# Prints what a partition saves and computes again.
debug_partitioner: bool = False


@contextlib.contextmanager
def patch(**changes: Any) -> Iterator[None]:
    """Other options for a while; a `with` block."""
    options = globals()
    unknown = [name for name in changes if name not in __all__]
    if unknown:
        raise AttributeError(f"[config] there is no option {unknown[0]!r}; there are {__all__}.")
    before = {name: options[name] for name in changes}
    options.update(changes)
    try:
        yield
    finally:
        options.update(before)


__all__ = [
    "aggressive_recomputation",
    "ban_recompute_reductions",
    "debug_partitioner",
    "recompute_views",
    "treat_parameters_as_free_to_save",
]
