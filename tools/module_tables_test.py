"""No class of torch::nn may be missing in the tables of nn_functional's tests."""

import pathlib
import re

import torch

ROOT = pathlib.Path(__file__).parents[1]
HEADERS = pathlib.Path(torch.__file__).parent / "include/torch/csrc/api/include/torch/nn/modules"

# Why there is no row.
OTHER = {
    "ModuleDict": "has no forward",
    "ModuleList": "has no forward",
    "ParameterDict": "has no forward",
    "ParameterList": "has no forward",
    "Sequential": "in functional_call_test.cc, ensemble_test.cc and others",
    "CrossMapLRN2d": "an autograd Function that resizes; in Python it works",
    "AdaptiveLogSoftmaxWithLoss": "sorts its targets into clusters of sizes that depend on them",
}


def names_in(file):
    return set(re.findall(r'(?:row|make_case)(?:<\d>)?\(\s*"(\w+)', (ROOT / file).read_text()))


def test_every_class_has_a_row():
    classes = set()
    for header in HEADERS.rglob("*.h"):
        classes.update(re.findall(r"^TORCH_MODULE\((\w+)\);", header.read_text(), re.MULTILINE))
    assert len(classes) > 100
    covered = names_in("nn_functional/modules_test.cc") | names_in("nn_functional/stateless_modules_test.cc")
    assert classes - covered - set(OTHER) == set()
    assert not covered & set(OTHER)
