"""Machine code of a traced graph: a package of torch's AOTInductor, which an artifact holds.

NOTE [packages of machine code]
The package is what torch._inductor.aoti_compile_and_package makes, without what only its compiler
needs: C++ sources, command lines and symbols, which tell of the machine that they were made on.
What it computes of the graph, and what is done around it: compile/artifact/native_plan.h.

NOTE [threads of machine code]
Inductor's loops are for a number of threads that is known when they are compiled: reductions have an
array with a place for each. Left to itself, Inductor sometimes lets OpenMP choose the number when the
code runs, which may be a larger one, and the array is overrun. Its option cpp.dynamic_threads avoids
that, and makes every loop a parallel one, however small it is. So the number is fixed. It is one where
loops check indices: a check that fails throws, and that ends the process in a parallel loop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from torchlift import _C
from torchlift._errors import TransformError, UnsupportedError

BACKENDS = ("eager", "inductor")


def check_backend(backend: str) -> None:
    """Raises TransformError for one that files do not have."""
    if backend not in BACKENDS:
        raise TransformError(
            f"[save] there is no backend {backend!r} for files. Use 'eager' (the graph, which the "
            f"replay runs) or 'inductor' (machine code as well)."
        )


@contextlib.contextmanager
def compiler_errors(transform: str, others: str) -> "Iterator[None]":
    """What Inductor throws where there is no C++ compiler becomes an error that says so."""
    try:
        yield
    except Exception as error:
        if not _lacks_compiler(error):
            raise
        raise UnsupportedError(
            f"[{transform}] the backend 'inductor' could not compile: {error}\nIt needs a C++ compiler "
            f"(g++, or the one that CXX names). {others}"
        ) from error


def _lacks_compiler(error: Exception) -> bool:
    return "c++ compiler" in str(error).lower()


def compiled_package(graph: "_C.Graph") -> torch.Tensor:
    """The bytes of a package for the graph: what Graph.natively_computed says."""
    from torchlift._fx import graph_module

    computed = graph.natively_computed()
    names = [value.name for value in computed.inputs()]
    module = graph_module(computed, names, to_compile=True)
    with tempfile.TemporaryDirectory(prefix="torchlift-") as folder:
        path = os.path.join(folder, "package.pt2")
        with compiler_errors("save", "The backend 'eager' does not."):
            _compile(module, computed, path)
        data = _stripped(path, folder)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _compile(module: "torch.fx.GraphModule", graph: "_C.Graph", path: str) -> None:
    dims = _example_sizes([least for _, _, least in graph.symbols()])
    inputs = tuple(
        torch.empty_strided(sizes, strides, dtype=dtype, device=device).zero_()
        for sizes, strides, dtype, device in graph.input_types(dims)
    )
    shapes = _dynamic_shapes(graph) if dims else None
    try:
        with torch.no_grad(), torch._C._DisableAutocast():
            program = torch.export.export(module, inputs, dynamic_shapes=shapes)
            _package(program, path, torch.get_num_threads())
            if _checks_in_parallel(path):
                _package(program, path, 1)
    except Exception as error:
        if _lacks_compiler(error):
            raise
        raise UnsupportedError(
            f"[save] the backend 'inductor' could not compile the graph: {error}\nThe backend "
            f"'eager' saves it without machine code."
        ) from error


def _package(program: "torch.export.ExportedProgram", path: str, threads: int) -> None:
    # Random operators draw from the default generators, as those of the replay do.
    options = {"fallback_random": True, "cpp.threads": threads}
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def _checks_in_parallel(path: str) -> bool:
    """See NOTE [threads of machine code]."""
    with zipfile.ZipFile(path) as package:
        names = [name for name in package.namelist() if name.endswith(".cpp")]
        sources = [package.read(name).decode() for name in names]
    return any("#pragma omp parallel" in text and "TORCH_CHECK(" in text for text in sources)


def _example_sizes(least: "list[int]") -> "list[int]":
    """Each another one: the exporter asks whether sizes are equal."""
    sizes: "list[int]" = []
    for smallest in least:
        sizes.append(max([smallest, 2, *sizes]) + 11)
    return sizes


def _dynamic_shapes(graph: "_C.Graph") -> "tuple[dict[int, Any], ...]":
    """For torch.export: the dims of each input whose sizes depend on dynamic dims."""
    dims = [
        torch.export.Dim(f"dim{i}", min=max(least, 2))
        for i, (_, _, least) in enumerate(graph.symbols())
    ]
    return tuple(
        {place: dims[_symbol(size)] for place, size in enumerate(sizes) if not isinstance(size, int)}
        for sizes in graph.input_sizes()
    )


def _symbol(size: "_C.GraphSize") -> int:
    """Of a dim of an argument, which is a dynamic one itself."""
    [(powers, _)] = size.terms
    return powers.index(1)


_COMPILER_FILES = (".cpp", ".h", ".o", ".cubin.s", "_compile_flags.json", "_linker_flags.json")


def _stripped(path: str, folder: str) -> bytes:
    """The package without what only its compiler needs."""
    slim = os.path.join(folder, "slim.pt2")
    with zipfile.ZipFile(path) as package, zipfile.ZipFile(slim, "w") as result:
        for entry in package.infolist():
            if entry.filename.endswith(_COMPILER_FILES):
                continue
            data = package.read(entry)
            if entry.filename.endswith(".so"):
                data = _without_symbols(data, os.path.join(folder, "library.so"))
                data = linked_to_cpu_alone(data)
            # The date of each entry is the earliest one that there is.
            copy = zipfile.ZipInfo(entry.filename)
            result.writestr(copy, data, zipfile.ZIP_DEFLATED)
    with open(slim, "rb") as file:
        return file.read()


def _without_symbols(library: bytes, path: str) -> bytes:
    strip = shutil.which("strip")
    if strip is None:
        return library
    with open(path, "wb") as file:
        file.write(library)
    if subprocess.run([strip, "--strip-unneeded", path], capture_output=True).returncode != 0:
        return library
    with open(path, "rb") as file:
        return file.read()


# Of an ELF file of 64 bits, little endian.
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def linked_to_cpu_alone(library: bytes) -> bytes:
    """The library with libtorch_cpu.so in the place of libtorch.so, which Inductor links as well.

    All that it calls is in libtorch_cpu.so, which each program with libtorch has loaded. libtorch.so
    would bring CUDA along, and is not found by programs that have a RUNPATH.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        return library
    (headers,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    segments = [struct.unpack_from("<IIQQQQ", library, headers + i * size) for i in range(count)]
    entries: "list[tuple[int, int, int]]" = []  # (place in the file, tag, value)
    for kind, _, offset, _, _, length in segments:
        if kind == _PT_DYNAMIC:
            places = range(offset, offset + length, 16)
            entries = [(place, *struct.unpack_from("<qQ", library, place)) for place in places]
    tables = [value for _, tag, value in entries if tag == _DT_STRTAB]
    names = [
        offset + table - address
        for table in tables
        for kind, _, offset, address, _, length in segments
        if kind == _PT_LOAD and address <= table < address + length
    ]
    if not names:
        return library
    needed = {}
    for place, tag, value in entries:
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            begin = names[0] + value
            needed[library[begin : library.index(b"\0", begin)]] = (place, value)
    if b"libtorch.so" not in needed or b"libtorch_cpu.so" not in needed:
        return library
    result = bytearray(library)
    struct.pack_into("<qQ", result, needed[b"libtorch.so"][0], _DT_NEEDED, needed[b"libtorch_cpu.so"][1])
    return bytes(result)
