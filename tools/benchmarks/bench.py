"""Prints what torchlift's transforms cost beside torch.func's and plain PyTorch, and whether targets are met.

Everything is measured in one run, on one thread, in turns; figures are medians. docs/benchmarks.md tells how.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

import chains
import compile_time
import cpp
import loading
import machine
import operators
import table
import timing

HERE = pathlib.Path(__file__).resolve().parent
PEERBENCH_TARGETS = {"per_sample_grad_mlp": 0.65, "per_sample_grad_cnn": 0.9, "per_sample_grad_transformer": 0.75}
SECTIONS = ("python", "operators", "loading", "peerbench", "cpp", "compile")


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="tools/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, no figures to quote")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--only", default=",".join(SECTIONS), help="some of " + ",".join(SECTIONS))
    parser.add_argument("--each", action="store_true", help="a row for each of the sixty operators")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="the core to stay on")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time: for a busy machine")
    parser.add_argument("--bin-dir", type=pathlib.Path, help="Bazel's folder of the C++ benchmarks")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if "cpp" in options.only and options.bin_dir is None:
        parser.error("the section cpp needs --bin-dir (tools/bench gives it)")
    return options


def peerbench_rows(options):
    """Cases of peerbench, each peer in a process of its own, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder) / "results.json"
        command = [sys.executable, HERE / "peerbench" / "run.py", "--impl", "torchlift,torch.func"]
        command += ["--cases", f"^({'|'.join(PEERBENCH_TARGETS)})$", "--json", results, f"--cpu={options.cpu}"]
        command += [f"--rounds={2 if options.quick else 9}"]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        cases = json.loads(results.read_text())["cases"]
    clock = "cpu_ms" if options.cpu_time else "median_ms"
    for case, target in PEERBENCH_TARGETS.items():
        ours, theirs = cases[case]["torchlift"], cases[case]["torch.func"]
        note = ours.get("error") or ours.get("skipped") or ours.get("mismatch") or ""
        value = None if note else ours[clock]
        yield table.Row(case, "ms", theirs[clock], value, target, relative=True, note=note)


def say(text):
    print(f"[bench] {text}", file=sys.stderr, flush=True)


def measure(section, options, earlier):
    """The rows of a section; `earlier` has those of the sections before it."""
    rounds = 30 if options.quick else 300
    if section == "python":
        return chains.rows(rounds)
    if section == "operators":
        return operators.rows(10 if options.quick else 60, options.each)
    if section == "loading":
        return loading.rows(2 if options.quick else 9)
    if section == "peerbench":
        return peerbench_rows(options)
    if section == "cpp":
        return cpp.rows(options.bin_dir, 3 if options.quick else 15, earlier)
    return compile_time.rows(options.quick)


WHAT = {
    "python": "Python: chains of operators and single calls",
    "operators": "Python: sixty operators under vmap",
    "loading": "Python: the import",
    "peerbench": "Python: per-sample gradients of three models",
    "cpp": "C++: the same chains by Google Benchmark",
    "compile": "compile time of headers and files of rules",
}


def main():
    options = parse_arguments()
    all_cores = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    if options.cpu_time:
        timing.CLOCK = time.process_time
    facts = machine.describe()
    print(machine.line(facts) + ("; processor time" if options.cpu_time else ""), flush=True)
    rows = []
    for section in [name for name in SECTIONS if name in options.only]:
        say(f"measuring {WHAT[section]}")
        os.sched_setaffinity(0, all_cores if section == "compile" else {options.cpu})
        found = list(measure(section, options, rows))
        print("\n" + "\n".join(table.text(found)), flush=True)
        rows += found
    judged = [row for row in rows if row.target is not None]
    print(f"\n{sum(row.met is True for row in judged)} of {len(judged)} targets met")
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
