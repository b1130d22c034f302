"""Each operator in a forked child, so that a crash or a hang costs one row."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from opcov.running import Job, run_job


def child(
    write: Callable[[dict], None], impl: Any, op: Any, jobs: dict[int, Job], samples: Callable[[str], int]
) -> None:
    warnings.simplefilter("ignore")
    with contextlib.suppress(AttributeError):
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)
    for number, job in jobs.items():
        write({"begin": number})
        start = time.monotonic()
        try:
            row = run_job(impl, op, job, samples(job.transform))
        except Exception:
            row = {"status": "skip", "reason": "harness: " + traceback.format_exc()[-1500:]}
        row["seconds"] = round(time.monotonic() - start, 3)
        write({"row": row, "job": number})


def run_isolated(
    impl: Any, op: Any, jobs: list[Job], samples: Callable[[str], int], timeout: float, verbose: bool
) -> Iterator[tuple[Job, dict]]:
    """Yield (job, row) for each of ``jobs``, forking anew after a crash or a timeout."""
    pending = dict(enumerate(jobs))
    while pending:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            if not verbose:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            try:
                child(lambda m: _write_line(write_end, m), impl, op, pending, samples)
            finally:
                os._exit(0)
        os.close(write_end)

        current, began, timed_out = next(iter(pending)), time.monotonic(), False
        for message in _read_lines(read_end, lambda: began + timeout - time.monotonic()):
            if message is None:
                timed_out = True
                os.kill(pid, signal.SIGKILL)
                break
            began = time.monotonic()
            if "begin" in message:
                current = message["begin"]
            else:
                yield pending.pop(message["job"]), message["row"]
        os.close(read_end)
        _, status = os.waitpid(pid, 0)

        if timed_out:
            yield pending.pop(current), {"status": "timeout", "seconds": timeout}
        elif pending:
            sig = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            what = signal.Signals(sig).name if sig else f"exit code {os.waitstatus_to_exitcode(status)}"
            yield pending.pop(current), {"status": "crash", "error_type": what, "message": f"the process died: {what}"}


def _write_line(fd: int, message: dict) -> None:
    data = (json.dumps(message) + "\n").encode()
    while data:
        data = data[os.write(fd, data) :]


def _read_lines(fd: int, time_left: Callable[[], float]) -> Iterator[dict | None]:
    """Messages from ``fd`` until it closes; None when the time is up."""
    buffer = b""
    while True:
        ready, _, _ = select.select([fd], [], [], max(time_left(), 0.0))
        if not ready:
            yield None
            return
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            yield json.loads(line)
