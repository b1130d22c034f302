"""Sources include ATen/ops/NAME.h for every at::NAME they call: another torch version need not bring it along."""

import pathlib
import re

import torch

ROOT = pathlib.Path(__file__).parents[1]
OPERATORS = pathlib.Path(torch.__file__).parent / "include/ATen/ops"
FOLDERS = ("core", "batching", "autodiff", "nn_functional", "compile", "bindings", "examples")
GENERATED = ("_ops", "_native", "_dispatch")
# Headers that have all operators, for sources that are compiled against one version.
ALL = ("<torch/torch.h>", "<torch/nn.h>", "<ATen/ATen.h>", "<torch/extension.h>")

# Comments, and strings with escapes.
NO_CODE = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"')
CALLED = re.compile(r"\bat::(\w+)\(|[(,&]\s*&?at::(\w+)\s*[,)]")


def operators():
    """Names of ATen/ops/NAME.h that a source can call; from_blob and tensor are declared elsewhere, too."""
    return {p.stem for p in OPERATORS.glob("*.h") if not p.stem.endswith(GENERATED)} - {"from_blob", "tensor"}


def missing(text, known):
    if any(f"#include {header}" in text for header in ALL):
        return set()
    included = set(re.findall(r"#include <ATen/ops/(\w+)\.h>", text))
    code = NO_CODE.sub("", re.sub(r"^#include.*$", "", text, flags=re.MULTILINE))
    called = {name for groups in CALLED.findall(code) for name in groups if name}
    return ({name.removesuffix("_symint") for name in called} & known) - included


def sources():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".cc", ".h")]


def test_what_is_called_is_included():
    known = operators()
    found = {str(p.relative_to(ROOT)): names for p in sources() if (names := missing(p.read_text(), known))}
    assert found == {}


def test_a_missing_include_is_found():
    known = {"stack", "zeros_like", "cos"}
    text = '#include <ATen/ops/stack.h>\nauto y = at::stack({f(&at::cos), g(x, "at::zeros_like(x)")});  // at::zeros_like(x)\n'
    assert missing(text, known) == {"cos"}
    assert missing(text.replace('"', ""), known) == {"cos", "zeros_like"}
    assert missing("#include <torch/torch.h>\n" + text, known) == set()
