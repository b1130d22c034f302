"""The dependencies of MODULE.bazel that no registry has. WORKSPACE: see repositories.bzl."""

load("//third_party/cuda:cuda.bzl", "cuda_repository")
load("//third_party/pybind11:pybind11.bzl", "pybind11_repository")
load("//third_party/torch:torch.bzl", "torch_repository")

def _found_on_this_machine_impl(_ctx):
    cuda_repository(name = "cuda")
    pybind11_repository(name = "pybind11")
    torch_repository(name = "torch")

found_on_this_machine = module_extension(implementation = _found_on_this_machine_impl)
