"""The package itself: import, versions, printing, docstrings, the self-check."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import torchlift
from torchlift import _C, _load, grad, vmap

FOLDER = pathlib.Path(torchlift.__file__).parent


def run_python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120)


MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(FOLDER)], "torchlift.")
    if info.name not in ("torchlift._C", "torchlift.__main__")
)


@pytest.mark.parametrize("name", ["torchlift", *MODULES])
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_every_public_name_is_documented_with_an_example():
    for name in torchlift.__all__:
        value = getattr(torchlift, name)
        if name == "__version__":
            continue
        assert inspect.getdoc(value), name
        if name not in ("FallbackRecord", "reset_fallback_report"):
            assert ">>>" in inspect.getdoc(value), name
    for name in torchlift.compile.__all__:
        if name != "default_decompositions":
            assert ">>>" in inspect.getdoc(getattr(torchlift.compile, name)), name


def test_every_function_has_type_hints():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            untyped = [a.arg for a in args if a.annotation is None and a.arg not in ("self", "cls")]
            assert not untyped and node.returns is not None, f"{path.name}: {node.name}"
    assert (FOLDER / "py.typed").exists()


def test_stub_matches_the_extension():
    stub = ast.parse((FOLDER / "_C.pyi").read_text())
    told = {n.name for n in stub.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert told == {name for name in dir(_C) if not name.startswith("__")}


class TestImport:
    def test_loads_nothing_heavy(self):
        code = (
            "import torch, sys; before = set(sys.modules); import torchlift; "
            "print(sorted(set(sys.modules) - before))"
        )
        loaded = ast.literal_eval(run_python("-c", code).stdout)
        assert all(name.startswith("torchlift") for name in loaded), loaded

    def test_another_torch_is_told_before_the_extension_is_loaded(self):
        code = (
            "import torch, sys; torch.__version__ = '2.9.1'\n"
            "try: import torchlift\n"
            "except ImportError as e: print('torchlift._C' in sys.modules, e)"
        )
        built = _C.build_info()["built_for_torch"]
        told = run_python("-c", code).stdout
        assert told.startswith(f"False This torchlift was built for torch {built}, but torch 2.9.1 is")
        assert told.count("\n") == 1

    @pytest.mark.parametrize(
        "built,running,fits",
        (
            ("2.15.0", "2.15.0+cu130", True),
            ("2.15.0", "2.15.1", True),
            ("2.15.0", "2.1.0", False),
            ("2.15.0", "3.15.0", False),
        ),
    )
    def test_releases_that_fit(self, built, running, fits):
        if fits:
            _load.check_torch(built, running)
        else:
            with pytest.raises(ImportError, match=f"built for torch {built}"):
                _load.check_torch(built, running)

    def test_missing_extension(self, tmp_path):
        with pytest.raises(ImportError, match="torchlift is not built"):
            _load.extension_path(str(tmp_path))


class TestMain:
    def test_versions_and_checks(self):
        done = run_python("-m", "torchlift")
        assert done.returncode == 0, done.stdout + done.stderr
        for text in (torchlift.__version__, torch.__version__, "Python", "g++", "DeferredInit"):
            assert text in done.stdout
        assert done.stdout.count("pass  ") == 4 and "FAIL" not in done.stdout

    def test_a_failure_is_told(self):
        code = (
            "import torchlift, torch; from torchlift import _check\n"
            "torchlift.grad = lambda f: lambda x, w: x\n"
            "raise SystemExit(_check.main())"
        )
        done = run_python("-c", code)
        assert done.returncode == 1 and "FAIL  grad against autograd" in done.stdout


class TestPrinting:
    def test_repr_shows_value_level_and_dim(self):
        texts = []
        x = torch.arange(4.0).reshape(2, 2)
        vmap(lambda v: texts.append(repr(v)) or v, in_dims=1)(x)
        assert texts == [f"LiftedTensor(vmap level 1, size 2, batch dim 1, value={x!r})"]

    def test_nested(self):
        texts = []
        vmap(vmap(lambda v: texts.append(str(v)) or v))(torch.zeros(2, 3))
        assert "LiftedTensor(vmap level 2, size 3, batch dim 0, value=LiftedTensor(vmap level 1, size 2" in texts[0]

    def test_autograd_state(self):
        texts = []
        vmap(grad(lambda v: texts.extend([repr(v), repr(v.sin())]) or v.sum()))(torch.zeros(2, 3))
        assert "requires_grad=True" in texts[0] and "grad_fn=<SinBackward0>" in texts[1]

    def test_formatting_in_f_strings(self):
        texts = []
        vmap(lambda v: texts.append(f"{v}") or v)(torch.zeros(2, 3))
        assert "LiftedTensor" in texts[0]

    def test_other_tensors_print_as_ever(self):
        assert repr(torch.ones(2)) == "tensor([1., 1.])"
        assert repr(torch.nn.Parameter(torch.ones(1))).startswith("Parameter containing")

    def test_dump_tensor(self):
        dumped = []
        w = torch.ones(3, requires_grad=True)

        def f(v):
            dumped.append(torchlift.dump_tensor(v * w))
            return v

        vmap(vmap(f))(torch.zeros(2, 4, 3))
        lines = dumped[0].splitlines()
        assert [line.strip().split(":")[0] for line in lines] == [
            "vmap level 2 (size 4)",
            "vmap level 1 (size 2)",
            "plain tensor",
        ]
        assert "grad_fn MulBackward0" in lines[2] and "no autograd" in lines[0]
        with pytest.raises(TypeError, match="expected a tensor, got int"):
            torchlift.dump_tensor(3)
