"""Every test starts from a fixed seed, and leaves no level open and no global state changed."""

import zlib

import pytest
import torch

import torchlift
from torchlift import _C


@pytest.fixture(autouse=True)
def clean_state(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    assert _C.open_levels() == 0
    assert torch.is_grad_enabled()
    assert not _C.is_strict()


@pytest.fixture
def fallback_is_silent():
    previous = torchlift._set_vmap_fallback_warning_enabled(False)
    yield
    torchlift._set_vmap_fallback_warning_enabled(previous)
