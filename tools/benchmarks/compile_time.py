"""How long public headers and rule files take to compile: seconds of the compiler's processor time, for each alone."""

import concurrent.futures
import os
import pathlib
import subprocess
import tempfile

import torch

from table import Row

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LAYERS = ("core", "batching", "autodiff", "nn_functional", "compile")
HEADER_LIMIT, RULES_LIMIT = 6, 30


def flags():
    include = pathlib.Path(torch.__file__).parent / "include"
    system = [include, include / "torch/csrc/api/include"]
    return ["-std=c++20", "-O2", "-DNDEBUG", f"-I{ROOT}", *(f"-isystem{path}" for path in system)]


def seconds_to_compile(source):
    compiler = subprocess.Popen([os.environ.get("CXX", "g++"), *flags(), "-c", str(source), "-o", os.devnull])
    _, status, usage = os.wait4(compiler.pid, 0)
    if status:
        raise RuntimeError(f"{source} does not compile")
    return usage.ru_utime + usage.ru_stime


def public_headers():
    """Headers that users may include: those at the top of a layer. The SDK has them all."""
    return [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.h"))]


def header_seconds(header):
    with tempfile.NamedTemporaryFile("w", suffix=".cc") as source:
        source.write(f'#include "{header.relative_to(ROOT)}"\n')
        source.flush()
        return seconds_to_compile(source.name)


def rule_files():
    return sorted(p for p in (ROOT / "batching" / "rules").glob("*.cc") if not p.stem.endswith(("_test", "_benchmark")))


def rows(quick):
    """The slowest of each kind. Quick: only two headers and the largest rule file."""
    headers, sources = public_headers(), rule_files()
    if quick:
        headers = [h for h in headers if h.name in ("vmap.h", "grad.h")]
        sources = sorted(sources, key=lambda path: path.stat().st_size)[-1:]
    for kind, seconds_of, paths, limit in (
        ("public header", header_seconds, headers, HEADER_LIMIT),
        ("rule file", seconds_to_compile, sources, RULES_LIMIT),
    ):
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            seconds = dict(zip(paths, pool.map(seconds_of, paths)))
        slowest = max(seconds, key=seconds.get)
        what = f"compiling a {kind}: {slowest.relative_to(ROOT)}, the slowest of {len(paths)}"
        yield Row(what, "s", None, seconds[slowest], limit)
