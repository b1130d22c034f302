"""The command torchlift-run: a program without Python, which the wheel brings along."""

import os
import pathlib
import sys


def main() -> None:
    """Becomes the program, with the same arguments."""
    program = pathlib.Path(__file__).with_name("torchlift-run")
    os.execv(program, [str(program), *sys.argv[1:]])
