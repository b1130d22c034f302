"""What the figures were measured on."""

import os
import platform
import re
import time

import torch


def cpu_name():
    try:
        text = open("/proc/cpuinfo").read()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found.group(1).strip() if found else platform.machine()


def describe():
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "vector_extension": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def line(facts):
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['vector_extension']}; {facts['system']}; "
        f"Python {facts['python']}, torch {facts['torch']}; {facts['threads']} thread; load {facts['load'][0]}"
    )
