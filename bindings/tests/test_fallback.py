"""Operators without a batching rule: right, recorded, warned of once, and refused in strict mode."""

import warnings

import pytest
import torch

import torchlift
from torchlift import UnsupportedError, vmap

X = torch.randn(4, 9)

# No rule can ever come to exist for operators of this file's own.
LIBRARY = torch.library.Library("torchlift_test", "DEF")
for name in ("thrice", "warned"):
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, lambda x: 3 * x, "CPU")

LIBRARY.define("shorten(Tensor(a!) x) -> ()")


@torch.library.impl(LIBRARY, "shorten", "CPU")
def _shorten(x):
    x.resize_(2)


looped = torch.ops.torchlift_test.thrice


def test_right_and_recorded(fallback_is_silent):
    torchlift.reset_fallback_report()
    torch.testing.assert_close(vmap(looped)(X), torch.stack([looped(x) for x in X]))
    (record,) = torchlift.fallback_report()
    assert record.op.startswith("torchlift_test::thrice")
    assert record.count == 1 and record.examples == 4 and record.seconds > 0
    assert record.bytes == 4 * 9 * 4
    torchlift.reset_fallback_report()
    assert torchlift.fallback_report() == []


def test_warning_can_be_switched_off():
    previous = torchlift._set_vmap_fallback_warning_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vmap(looped)(X)
        assert torchlift._set_vmap_fallback_warning_enabled(True) is False
    finally:
        torchlift._set_vmap_fallback_warning_enabled(previous)


def test_warns_in_functorchs_words():
    with pytest.warns(UserWarning, match="There is a performance drop because we have not yet impl"):
        vmap(torch.ops.torchlift_test.warned)(X)
    with warnings.catch_warnings():  # once an operator
        warnings.simplefilter("error")
        vmap(torch.ops.torchlift_test.warned)(X)


def test_strict(fallback_is_silent):
    with torchlift.strict():
        vmap(torch.sin)(X)
        with pytest.raises(UnsupportedError, match="thrice"):
            vmap(looped)(X)
        with torchlift.strict(False):
            vmap(looped)(X)
    vmap(looped)(X)
    assert torchlift._C.open_levels() == 0


def test_a_target_keeps_its_shape(fallback_is_silent):
    message = r"shorten writes a result of shape \[2\] into a tensor of shape \[9\].*target of the result's shape"
    with pytest.raises(UnsupportedError, match=message):
        vmap(lambda x: torch.ops.torchlift_test.shorten(x.clone()))(X)
    assert torchlift._C.open_levels() == 0
