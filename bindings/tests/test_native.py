"""Files with machine code: save(..., backend="inductor"), in Python and by torchlift-run.

A compilation takes ten seconds and more: four functions for the whole module.
"""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import zipfile

import numpy
import pytest
import torch

import torchlift
from torchlift._native import linked_to_cpu_alone

PROGRAM = pathlib.Path(torchlift.__file__).with_name("torchlift-run")


def run(*words):
    done = subprocess.run([PROGRAM, *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# --- the Jacobian of a model -----------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def jacobian(net):
    def f(batch, scale, flag=None):
        rows = torchlift.vmap(torchlift.jacrev(net))(batch["x"] * scale)
        return {"rows": rows, "parts": [(rows.sum(0),), flag], "scale": scale}

    return f


@pytest.fixture(scope="module")
def jacobian_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "jacobian.tlc"
    torchlift.save(jacobian(model()), path, {"x": torch.randn(5, 4)}, 2, backend="inductor")
    return path


def check_jacobian(got, batch):
    expected = jacobian(model())(batch, 2)
    assert got.keys() == expected.keys()
    assert got["scale"] == 2 and type(got["parts"]) is list and type(got["parts"][0]) is tuple
    assert got["parts"][1] is None
    torch.testing.assert_close(got["rows"], expected["rows"].detach())
    torch.testing.assert_close(got["parts"][0][0], expected["parts"][0][0].detach())


def test_machine_code_gives_what_the_function_gives(jacobian_file):
    f = torchlift.load(jacobian_file, allow_native_code=True)
    assert f.backend == "inductor"
    assert f.signature.startswith("(batch: {x: Tensor}, scale: 2) -> {")
    batch = {"x": torch.randn(5, 4)}
    check_jacobian(f(batch, 2), batch)


def test_it_is_not_loaded_by_surprise(jacobian_file):
    with pytest.raises(torchlift.TransformError, match="it holds machine code, made by inductor") as info:
        torchlift.load(jacobian_file)
    assert "If you trust who made the file, load it with allow_native_code" in str(info.value)
    f = torchlift.load(jacobian_file, backend="eager")
    assert f.backend == "eager"
    batch = {"x": torch.randn(5, 4)}
    check_jacobian(f(batch, 2), batch)
    with pytest.raises(torchlift.TransformError, match="no backend 'ts' to load it with"):
        torchlift.load(jacobian_file, backend="ts")


def test_inputs_are_checked_and_may_have_other_strides(jacobian_file):
    f = torchlift.load(jacobian_file, allow_native_code=True)
    batch = {"x": torch.randn(4, 5).t()}
    check_jacobian(f(batch, 2), batch)
    batch = {"x": torch.randn(5, 8)[:, ::2]}
    check_jacobian(f(batch, 2), batch)
    with pytest.raises(torchlift.TransformError, match=r"input 0 \(batch_x\) is Float\[6, 4\] on cpu; the"):
        f({"x": torch.randn(6, 4)}, 2)
    with pytest.raises(torchlift.TransformError, match=r"is Double\[5, 4\] on cpu; the program was traced"):
        f({"x": torch.randn(5, 4).double()}, 2)
    with pytest.raises(torchlift.TransformError, match="scale must be 2"):
        f({"x": torch.randn(5, 4)}, 3)


def test_transforms_and_autograd_use_the_graph(jacobian_file, tmp_path):
    f = torchlift.load(jacobian_file, allow_native_code=True)

    def total(g):
        return lambda x: g({"x": x}, 2)["rows"].square().sum()

    x = torch.randn(5, 4)
    expected = torchlift.grad(total(jacobian(model())))(x).detach()
    torch.testing.assert_close(torchlift.grad(total(f))(x), expected)
    tracked = x.clone().requires_grad_()
    total(f)(tracked).backward()
    torch.testing.assert_close(tracked.grad, expected)
    xs = torch.randn(3, 5, 4)
    batched = torchlift.vmap(total(f))(xs)
    torch.testing.assert_close(batched, torch.stack([total(f)(each) for each in xs]))
    torchlift.save(torchlift.grad(total(f)), tmp_path / "grad.tlc", x)
    torch.testing.assert_close(torchlift.load(tmp_path / "grad.tlc")(x), expected)


def test_the_runner_runs_it(jacobian_file, tmp_path):
    x = numpy.random.default_rng(0).standard_normal((5, 4), dtype=numpy.float32)
    numpy.save(tmp_path / "x.npy", x)
    inputs = ["--inputs", tmp_path / "x.npy"]
    code, _, errors = run("run", jacobian_file, *inputs)
    assert code == 1 and "it holds machine code, made by inductor, and loading it runs it" in errors
    results = tmp_path / "out"
    code, _, errors = run("run", jacobian_file, *inputs, "--allow-native-code", "--output", results)
    assert code == 0, errors
    expected = jacobian(model())({"x": torch.from_numpy(x)}, 2)["rows"].detach().numpy()
    assert sorted(file.name for file in results.iterdir()) == ["parts[0][0].npy", "rows.npy"]
    numpy.testing.assert_allclose(numpy.load(results / "rows.npy"), expected, rtol=1e-4, atol=1e-6)
    total = numpy.load(results / "parts[0][0].npy")
    numpy.testing.assert_allclose(total, expected.sum(0), rtol=1e-4, atol=1e-6)
    code, out, errors = run("run", jacobian_file, *inputs, "--backend", "eager")
    assert code == 0 and "rows: f32[5, 2, 4]" in out
    code, out, errors = run("bench", jacobian_file, "--repeat", 3, "--allow-native-code")
    assert code == 0 and "3 runs" in out, errors


def test_looking_at_it_runs_nothing(jacobian_file):
    code, out, _ = run("inspect", jacobian_file)
    assert code == 0 and "machine code: by inductor (" in out and "def graph(" in out
    assert f"torch {torch.__version__.split('+')[0]}, " in out
    code, out, _ = run("validate", jacobian_file)
    assert code == 0 and "machine code that was not looked into" in out
    assert torchlift.load(jacobian_file, backend="eager").graph.nodes()


def test_no_python_runs_it(jacobian_file):
    # For seconds, and to its end: torch unpacks the library into a folder, which it removes then.
    command = [PROGRAM, "bench", jacobian_file, "--allow-native-code", "--repeat", "200000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    text = ""
    while ".wrapper.so" not in text and process.poll() is None:
        text = maps.read_text()
        time.sleep(0.05)
    assert process.wait() == 0
    assert ".wrapper.so" in text and "libtorch_cpu" in text
    for other in ("libpython", "libtorch_python", "libtorch_cuda"):
        assert other not in text


def test_damaged_files(jacobian_file, tmp_path):
    data = jacobian_file.read_bytes()
    for place in (len(data) // 2, len(data) - 100):
        damaged = bytearray(data)
        damaged[place] ^= 1
        (tmp_path / "damaged.tlc").write_bytes(damaged)
        with pytest.raises(torchlift.TransformError, match="damaged.tlc: the .* damaged"):
            torchlift.load(tmp_path / "damaged.tlc", allow_native_code=True)
    (tmp_path / "cut.tlc").write_bytes(data[: len(data) // 2])
    with pytest.raises(torchlift.TransformError, match="cut.tlc: .* it is cut"):
        torchlift.load(tmp_path / "cut.tlc", allow_native_code=True)


def test_the_package_is_one_of_torch(jacobian_file, tmp_path):
    """Other readers of safetensors can take it out."""
    data = jacobian_file.read_bytes()
    graph_size = int.from_bytes(data[24:32], "little")
    weights = data[(64 + graph_size + 63) // 64 * 64 :]
    header_size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + header_size])
    begin, end = header["native/package.pt2"]["data_offsets"]
    path = tmp_path / "package.pt2"
    path.write_bytes(weights[8 + header_size :][begin:end])
    names = zipfile.ZipFile(path).namelist()
    assert any(name.endswith(".so") for name in names)
    assert not any(name.endswith((".cpp", "flags.json")) for name in names)
    loaded = torch._inductor.aoti_load_package(str(path))
    # The weights are inputs of the code, and not in it.
    assert loaded.get_constant_fqns() == []


# --- writes, views, random numbers, branches and loops ---------------------------------------------

TABLE = torch.arange(6.0).reshape(2, 3)


def everything(state, x):
    state["count"].add_(1)
    state["mean"].mul_(0.5).add_(x.mean(0) * 0.5)
    doubled = x * 2
    branch = torchlift.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), x)
    return {
        "random": torch.nn.functional.dropout(torch.rand_like(x) + 1, 0.5, True),
        "branch": branch,
        "root": torchlift.while_loop(
            lambda v: ((v * v - 2).abs() > 1e-3).any(), lambda v: 0.5 * (v + 2 / v), x.abs() + 1
        ),
        "running": torchlift.scan(lambda c, row: (c + row, c * row), torch.zeros(3), x),
        "mean": state["mean"],
        "first": doubled[0],
        "doubled": doubled,
        "table": TABLE.t(),
        "next": state["count"] + 1,
        "half": x.half() @ x.half().t(),
        "transposed": branch.t(),
    }


def new_state():
    return {"count": torch.tensor(4), "mean": torch.ones(3)}


@pytest.fixture(scope="module")
def everything_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "everything.tlc"
    example = new_state(), torch.randn(4, 3)
    torchlift.save(everything, path, *example, backend="inductor")
    assert example[0]["count"] == 4  # what is tried out is not the caller's
    return path


@pytest.mark.parametrize("sign", [1, -1])
def test_it_does_what_the_replay_does(everything_file, sign):
    f = torchlift.load(everything_file, allow_native_code=True)
    graph = torchlift.load(everything_file, backend="eager")
    x = torch.randn(4, 3).abs() * sign
    state, expected_state = new_state(), new_state()
    found, expected = f(state, x, seed=3), graph(expected_state, x, seed=3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, expected_state)
    assert state["count"] == 5
    assert found["mean"].data_ptr() == state["mean"].data_ptr()
    assert found["first"].data_ptr() == found["doubled"].data_ptr()
    assert found["transposed"].data_ptr() == found["branch"].data_ptr()
    for run in (f, graph):  # what the file holds is copied in each run
        run(new_state(), x)["table"].add_(1)
        torch.testing.assert_close(run(new_state(), x)["table"], expected["table"])


def test_random_numbers(everything_file):
    f = torchlift.load(everything_file, allow_native_code=True)
    x = torch.randn(4, 3)
    draw = lambda **seed: f(new_state(), x, **seed)["random"]
    before = torch.get_rng_state()
    assert torch.equal(draw(seed=1), draw(seed=1)) and not torch.equal(draw(seed=1), draw(seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw(), draw())
    assert not torch.equal(torch.get_rng_state(), before)


def test_written_inputs_that_share_memory(everything_file):
    """Machine code cannot see such a write: the graph runs."""
    f = torchlift.load(everything_file, allow_native_code=True)
    graph = torchlift.load(everything_file, backend="eager")

    def call(g):
        x = torch.arange(12.0).reshape(4, 3) + 1
        return g({"count": torch.tensor(0), "mean": x[1]}, x, seed=0), x

    torch.testing.assert_close(call(f), call(graph))


def test_written_inputs_must_have_their_strides(everything_file):
    f = torchlift.load(everything_file, allow_native_code=True)
    with pytest.raises(torchlift.TransformError, match="and writes into its inputs. Trace it anew"):
        f({"count": torch.tensor(0), "mean": torch.ones(6)[::2]}, torch.ones(4, 3))


def test_what_an_operator_refuses_is_its_own_error(tmp_path):
    """Though the loop that checks the indices would be a parallel one."""
    count = 200_000

    def rows(x, places):
        return x[places].sin()

    path = tmp_path / "f.tlc"
    places = torch.zeros(count, dtype=torch.long)
    torchlift.save(rows, path, torch.randn(5), places, backend="inductor")
    f = torchlift.load(path, allow_native_code=True)
    x = torch.randn(5)
    places = torch.randint(0, 5, (count,))
    torch.testing.assert_close(f(x, places), rows(x, places))
    places[-1] = 7
    with pytest.raises(IndexError, match="index 7 is out of bounds for dimension 0 with size 5"):
        f(x, places)


def test_threads_take_turns(everything_file):
    from concurrent.futures import ThreadPoolExecutor

    f = torchlift.load(everything_file, allow_native_code=True)
    xs = torch.randn(20, 4, 3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: f(new_state(), x)["branch"], xs))
    for x, each in zip(xs, found):
        torch.testing.assert_close(each, everything(new_state(), x)["branch"])


# --- dynamic dims ----------------------------------------------------------------------------------


def of_sizes(x, y):
    """Sizes as ints, lists of ints, products and fractions, and as numbers."""
    n, m = x.shape[0], y.shape[1]
    return {
        "product": torchlift.vmap(lambda row: row @ y)(x),
        "flat": x.reshape(-1)[: 2 * n],
        "scaled": torch.add(x, x, alpha=n),
        "triangle": torch.arange(n * (n + 1) // 2),
        "filled": torch.full((n * m,), n / 2),
        "mean": x.mean(0),
    }


def test_dynamic_dims(tmp_path):
    path = tmp_path / "f.tlc"
    dynamic = {"x": {0: "n"}, "y": {1: "m"}}
    example = torch.randn(4, 3), torch.randn(3, 5)
    torchlift.save(of_sizes, path, *example, backend="inductor", dynamic=dynamic)
    f = torchlift.load(path, allow_native_code=True)
    for n, m in ((2, 2), (3, 7), (7, 3), (6, 6), (1, 4), (0, 2)):  # the last two run the graph
        x, y = torch.randn(n, 3), torch.randn(3, m)
        torch.testing.assert_close(f(x, y), of_sizes(x, y), equal_nan=True)
    with pytest.raises(torchlift.TransformError, match=r"input 0 \(x\) is .*\[2, 4\] on cpu; the program"):
        f(torch.randn(2, 4), torch.randn(3, 2))
    code, out, errors = run("bench", path, "--allow-native-code", "--repeat", 3, "--dim", "n=50")
    assert code == 0 and "3 runs" in out, errors


# --- errors ----------------------------------------------------------------------------------------


def test_saved_by_shapes_alone(tmp_path):
    path, f = tmp_path / "f.tlc", torchlift.vmap(torchlift.grad(lambda x: x.sin().sum()))
    torchlift.save(f, path, torchlift.ShapeDtype((4, 3), torch.float32), backend="inductor")
    x = torch.randn(4, 3)
    torch.testing.assert_close(torchlift.load(path, allow_native_code=True)(x), x.cos())


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "f.tlc"
    with pytest.raises(torchlift.TransformError, match=r"\[save\] there is no backend 'ts' for files. Use"):
        torchlift.save(torch.sin, path, torch.ones(3), backend="ts")
    with pytest.raises(torchlift.UnsupportedError, match="is on meta, and machine code is made for the CPU"):
        torchlift.save(lambda x: x.sin().to("meta"), path, torch.ones(3), backend="inductor")
    assert not path.exists()


def test_without_a_compiler(tmp_path):
    code = f"""
        import torch, torchlift
        try:
            torchlift.save(torch.sin, {str(tmp_path / "f.tlc")!r}, torch.ones(3), backend="inductor")
        except torchlift.UnsupportedError as error:
            print(error)
    """
    env = dict(
        os.environ, CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert "[save] the backend 'inductor' could not compile: " in done.stdout, done.stderr
    assert "It needs a C++ compiler (g++, or the one that CXX names). The backend 'eager' does not." in done.stdout


def test_a_graph_that_is_not_compiled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no lowering for it")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(torchlift.UnsupportedError, match="could not compile the graph: no lowering") as info:
        torchlift.save(torch.sin, tmp_path / "f.tlc", torch.ones(3), backend="inductor")
    assert "The backend 'eager' saves it without machine code." in str(info.value)


def test_what_is_no_library_is_left_as_it_is():
    for data in (b"", b"no library", b"\x7fELF\x01\x01" + bytes(100)):
        assert linked_to_cpu_alone(data) == data
