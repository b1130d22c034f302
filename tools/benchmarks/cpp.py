"""The C++ API, by Google Benchmark: //batching:vmap_benchmark and //autodiff:grad_benchmark.

libtorch has no C++ transforms of its own, so torch.func's figures from Python stand beside these.
"""

import json
import statistics
import subprocess
import tempfile

from table import Row

STEPS = 50
BINARIES = ["batching/vmap_benchmark", "autodiff/grad_benchmark"]


def medians(binaries, repetitions, clock):
    """{name: median nanoseconds of one iteration} of every benchmark."""
    times = {}
    for binary in binaries:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            command = [
                str(binary),
                f"--benchmark_out={file.name}",
                "--benchmark_out_format=json",
                f"--benchmark_repetitions={repetitions}",
                "--benchmark_min_time=0.05",
                "--benchmark_enable_random_interleaving=true",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found = json.load(file)["benchmarks"]
        for run in found:
            if run["run_type"] == "iteration":
                times.setdefault(run["run_name"], []).append(run[clock])
    return {name: statistics.median(values) for name, values in times.items()}


def rows(bin_dir, repetitions, cpu_time, python_rows):
    """The table's rows, with torch.func's values from the rows of the same name in Python."""
    clock = "cpu_time" if cpu_time else "real_time"
    ns = medians([bin_dir / name for name in BINARIES], repetitions, clock)
    peer = {row.what: row.torch_func for row in python_rows}

    def overhead(what, plain, ours, target):
        value = (ns[ours] - ns[plain]) / STEPS / 1e3
        return Row(f"C++: {what}", "us an operator", peer.get(what), value, target, relative=True)

    def times(what, plain, ours, target):
        return Row(f"C++: {what}", "times plain autograd", peer.get(what), ns[ours] / ns[plain], target)

    def fixed(what, plain, ours, target):
        return Row(f"C++: {what}", "us a call", peer.get(what), (ns[ours] - ns[plain]) / 1e3, target)

    for op, name in (("mul", "Mul"), ("sin", "Sin")):
        plain = f"BM_Plain{name}"
        yield overhead(f"vmap overhead, {op} chain on 8x5", plain, f"BM_Vmap{name}", 0.2)
        yield overhead(f"vmap(vmap) overhead, {op} chain on 4x8x5", f"{plain}Nested", f"BM_VmapVmap{name}", 0.25)
        autograd = f"BM_Autograd{name}"
        yield times(f"vmap(grad), {op} chain on 8x5", autograd, f"BM_VmapGrad{name}", 1.2)
        yield times(f"grad, {op} chain on 8x5", autograd, f"BM_Grad{name}", 1.03)
    yield fixed("fixed cost of a vmap call (of sin)", "BM_PlainCall", "BM_VmapCall", 8)
    yield fixed("fixed cost of a grad call over plain autograd", "BM_AutogradCall", "BM_GradCall", 8)
