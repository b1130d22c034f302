"""Looks at the extension before it is loaded.

A shared library that was compiled for another libtorch fails to load with a page of mangled names,
or loads and crashes later. The extension carries the version it was built for as plain text, so the
check needs none of it to run.
"""

from __future__ import annotations

import importlib.machinery
import mmap
import os

_MARK = b"torchlift extension built for torch="


def extension_path(folder: str) -> str:
    """The file of the extension in `folder`; ImportError if there is none."""
    for suffix in (".so", *importlib.machinery.EXTENSION_SUFFIXES):
        path = os.path.join(folder, "_C" + suffix)
        if os.path.exists(path):
            return path
    raise ImportError(
        f"torchlift is not built: {folder} holds no extension _C.so. Install the wheel "
        "(tools/build_wheel makes it)."
    )


def built_for_torch(path: str) -> str:
    """The torch release the extension at `path` was compiled for, such as '2.15.0'."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_MARK)
        if start < 0:
            raise ImportError(f"{path} is not torchlift's extension.")
        start += len(_MARK)
        return data[start : data.find(b";", start)].decode()


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def check_torch(built_for: str, running: str) -> None:
    """Raises ImportError unless `running` is of the release the extension was built for."""
    if _release(built_for) != _release(running):
        raise ImportError(
            f"This torchlift was built for torch {built_for}, but torch {running} is installed: "
            f"install torch {'.'.join(_release(built_for))}, or the torchlift made for "
            f"torch {'.'.join(_release(running))}."
        )
