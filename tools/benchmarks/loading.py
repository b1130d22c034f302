"""What `import torchlift` costs a program that has imported torch."""

import statistics
import subprocess
import sys

import timing
from table import Row

LIMIT = 50  # ms
PROGRAM = "import time, torch; clock = time.{clock}; t = clock(); import torchlift; print(clock() - t)"


def milliseconds():
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(clock=timing.CLOCK.__name__)], check=True, capture_output=True, text=True)
    return float(done.stdout) * 1e3


def rows(times):
    loads = [milliseconds() for _ in range(times + 1)][1:]  # the first fills the page cache
    yield Row("import torchlift, after torch", "ms", None, statistics.median(loads), LIMIT)
