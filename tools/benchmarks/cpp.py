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


def pairs(binaries, repetitions):
    """{name: (median nanoseconds of a call without the transform, and with it)} of every benchmark."""
    found = {}
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
            for run in json.load(file)["benchmarks"]:
                if run["run_type"] == "iteration":
                    found.setdefault(run["run_name"].removesuffix("/manual_time"), []).append(run)
    return {
        name: tuple(statistics.median(run[which] for run in runs) for which in ("plain", "ours"))
        for name, runs in found.items()
    }


def rows(bin_dir, repetitions, python_rows):
    """The table's rows, with torch.func's values from the rows of the same name in Python."""
    ns = pairs([bin_dir / name for name in BINARIES], repetitions)
    peer = {row.what: row.torch_func for row in python_rows}

    def row(what, unit, value, target, **options):
        return Row(f"C++: {what}", unit, peer.get(what), value, target, **options)

    def overhead(what, name, target):
        plain, ours = ns[name]
        return row(what, "us an operator", (ours - plain) / STEPS / 1e3, target, relative=True)

    def times(what, name, target):
        plain, ours = ns[name]
        return row(what, "times plain autograd", ours / plain, target)

    def fixed(what, name, target):
        plain, ours = ns[name]
        return row(what, "us a call", (ours - plain) / 1e3, target)

    for op, name in (("mul", "Mul"), ("sin", "Sin")):
        yield overhead(f"vmap overhead, {op} chain on 8x5", f"BM_Vmap{name}", 0.2)
        yield overhead(f"vmap(vmap) overhead, {op} chain on 4x8x5", f"BM_VmapVmap{name}", 0.25)
        yield times(f"vmap(grad), {op} chain on 8x5", f"BM_VmapGrad{name}", 1.2)
        yield times(f"grad, {op} chain on 8x5", f"BM_Grad{name}", 1.03)
    yield fixed("fixed cost of a vmap call (of sin)", "BM_VmapCall", 8)
    yield fixed("fixed cost of a grad call over plain autograd", "BM_GradCall", 8)
