"""What the examples' tests share."""

import importlib.util
import pathlib

import pytest
import torch


@pytest.fixture(scope="module")
def example(request):
    """The example beside the test, as a module: pinn.py for pinn_test.py."""
    path = pathlib.Path(request.path)
    path = path.with_name(path.name.replace("_test.py", ".py"))
    spec = importlib.util.spec_from_file_location(f"{path.stem}_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    yield module
    torch.set_num_threads(threads)
