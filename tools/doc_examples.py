"""Runs the fenced ```python and ```cpp blocks of README.md and docs/*.md, each as a program of its own.

A block runs as it stands. A C++ block without a main() gets an empty one: what it declares must
compile, link and initialise. An HTML comment on the line before a fence changes that:
  <!-- not run -->     the block is left out
  <!-- continued -->   the block is appended to the one before it (of the same language)
  <!-- in main -->     the block is the body of main(); its #include lines go above
C++ blocks are built against the SDK in out/sdk (tools/build_sdk), Python blocks against the wheel in .venv.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import bazel
import sdk

MARKS = ("not run", "continued", "in main")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)")


@dataclasses.dataclass
class Block:
    where: str
    language: str
    text: str


def _mark(line):
    found = re.fullmatch(r"<!-- (.*) -->", line.strip())
    return found.group(1) if found and found.group(1) in MARKS else None


def _in_main(text):
    lines = text.splitlines()
    includes = [line for line in lines if line.startswith("#include")]
    body = [line for line in lines if not line.startswith("#include")]
    return "\n".join([*includes, "int main() {", *body, "return 0;", "}"]) + "\n"


def extract(text, name="text"):
    """The runnable blocks of a page, in order."""
    blocks = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        fence = FENCE.match(lines[i])
        if not fence:
            i += 1
            continue
        indent = len(fence["indent"])
        start = i
        i += 1
        body = []
        while i < len(lines) and lines[i].strip() != "```":
            body.append(lines[i][indent:])
            i += 1
        i += 1
        mark = _mark(lines[start - 1]) if start else None
        if fence["language"] not in ("python", "cpp") or mark == "not run":
            continue
        source = "\n".join(body) + "\n"
        if mark == "in main":
            source = _in_main(source)
        if mark == "continued":
            if not blocks or blocks[-1].language != fence["language"]:
                raise ValueError(f"{name}:{start + 1}: nothing of this language to continue")
            blocks[-1].text += source
        else:
            blocks.append(Block(f"{name}:{start + 1}", fence["language"], source))
    return blocks


def pages():
    return [p for p in [bazel.ROOT / "README.md", *sorted(bazel.ROOT.glob("docs/**/*.md"))] if p.exists()]


def run_python(block, folder):
    return subprocess.run([sys.executable, "-c", block.text], cwd=folder, capture_output=True, text=True)


def run_cpp(block, folder):
    source = block.text
    if not re.search(r"\bmain\s*\(", source):
        source += "\nint main() {}\n"
    (folder / "block.cc").write_text(source)
    torch, include, lib = sdk.libtorch(), sdk.STAGE / "include", sdk.STAGE / "lib"
    built = subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-o", "block", "block.cc"]
        + [f"-I{include}", f"-I{include}/torchlift"]
        + ["-isystem", f"{torch}/include", "-isystem", f"{torch}/include/torch/csrc/api/include"]
        + [f"-L{lib}", f"-L{torch}/lib", f"-Wl,-rpath,{lib}:{torch}/lib", "-Wl,--no-as-needed"]
        + ["-ltorchlift", "-ltorch_cpu", "-lc10", "-lpthread"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return built if built.returncode else subprocess.run(["./block"], cwd=folder, capture_output=True, text=True)


def run_all():
    """(where, error or None) of every block."""
    results = []
    for page in pages():
        for block in extract(page.read_text(), str(page.relative_to(bazel.ROOT))):
            with tempfile.TemporaryDirectory() as folder:
                run = run_python if block.language == "python" else run_cpp
                done = run(block, pathlib.Path(folder))
            error = None if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]
            print(f"  {block.where} ({block.language}): {'failed' if error else 'ok'}", flush=True)
            results.append((block.where, error))
    return results


if __name__ == "__main__":
    failures = [r for r in run_all() if r[1]]
    for where, error in failures:
        print(f"{where}\n{error}")
    sys.exit(1 if failures else 0)
