"""How long public headers and rule files take to compile: seconds of the compiler's processor time, for each alone."""

import concurrent.futures
import os
import pathlib
import re
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


def test_headers(layer):
    """Names of the headers that are there for tests and benchmarks only."""
    libraries = re.findall(r"tl_cc_library\(\n(.*?)\n\)", (ROOT / layer / "BUILD.bazel").read_text(), re.DOTALL)
    return {name for text in libraries if "testonly = True" in text for name in re.findall(r'"(\w+\.h)"', text)}


def public_headers():
    """Headers that users may include: torchlift.h and those at the top of a layer."""
    headers = [ROOT / "torchlift.h"]
    for layer in LAYERS:
        hidden = test_headers(layer)
        headers += [path for path in sorted((ROOT / layer).glob("*.h")) if path.name not in hidden]
    return headers


def include_seconds(names):
    """Of a source that includes these files and has nothing else."""
    with tempfile.NamedTemporaryFile("w", suffix=".cc") as source:
        source.writelines(f'#include "{name}"\n' for name in names)
        source.flush()
        return seconds_to_compile(source.name)


def header_seconds(header):
    return include_seconds([header.relative_to(ROOT)])


def module_headers(header):
    """The headers of libtorch's modules that a header includes, since it defines a module: ["torch/nn/module.h"]."""
    return re.findall(r"#include <(torch/nn/[\w/]+\.h)>", header.read_text())


def seconds_above_modules(header):
    """Of a header that defines a module: what it costs above libtorch's headers for that."""
    return header_seconds(header) - include_seconds(module_headers(header))


def rule_files():
    return sorted(p for p in (ROOT / "batching" / "rules").glob("*.cc") if not p.stem.endswith(("_test", "_benchmark")))


def largest_rule_files(count):
    """Those that name the most operators: what their compile time grows with."""
    return sorted(rule_files(), key=lambda path: path.read_text().count("ops::"))[-count:]


def slowest(paths, seconds_of):
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        seconds = dict(zip(paths, pool.map(seconds_of, paths)))
    path = max(seconds, key=seconds.get)
    return path.relative_to(ROOT), seconds[path]


def rows(quick):
    headers = public_headers()
    if quick:
        headers = [h for h in headers if h.name in ("vmap.h", "grad.h")]
    plain = [h for h in headers if not module_headers(h)]
    path, seconds = slowest(plain, header_seconds)
    yield Row(f"compiling a public header: {path}, the slowest of {len(plain)}", "s", None, seconds, HEADER_LIMIT)
    for header in headers:
        if names := module_headers(header):
            what = f"compiling {header.relative_to(ROOT)}, above {' and '.join(names)}"
            yield Row(what, "s", None, seconds_above_modules(header), HEADER_LIMIT)

    sources = largest_rule_files(1 if quick else 6)
    path, seconds = slowest(sources, seconds_to_compile)
    what = f"compiling a rule file: {path}, the slowest of the {len(sources)} largest of {len(rule_files())}"
    yield Row(what, "s", None, seconds, RULES_LIMIT)
