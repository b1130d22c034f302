"""How the scripts of this folder call Bazel, and what they read from its answers."""

import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Progress lines suit a log that a person follows or a machine keeps.
PLAIN = ["--color=no", "--curses=no", "--show_progress_rate_limit=15"]


def command(*args):
    """A Bazel command line; TORCHLIFT_BAZEL_STARTUP adds startup options such as --output_base."""
    startup = shlex.split(os.environ.get("TORCHLIFT_BAZEL_STARTUP", ""))
    return ["bazel", *startup, *args]


def run(*args, **kwargs):
    """Runs Bazel in the checkout, its output going where ours goes. Raises if it fails."""
    subprocess.run(command(*args), cwd=ROOT, check=True, **kwargs)


def ask(*args):
    """Standard output of a quiet Bazel command, as lines."""
    done = subprocess.run(command(*args), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def query(expression, *args):
    """The lines that `bazel query` answers."""
    return ask("query", "--noshow_progress", "--color=no", *args, expression)


def bin_dir(*args):
    """The folder of the outputs of a build with the options `args`."""
    return pathlib.Path(ask("info", "--noshow_progress", "--color=no", *args, "bazel-bin")[-1])
