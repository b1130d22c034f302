"""The command line of opcov; see the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db

import opcov
from opcov.isolation import run_isolated
from opcov.page import page
from opcov.report import comparison, load_rows, report
from opcov.running import Job, jobs_of
from opcov.samples import consume_random_state_normally
from opcov.transforms import NEEDS_GRAD, TRANSFORMS

# What a transform asks of the library under test.
NEEDS = {
    "vmap": {"vmap"}, "vmap_inplace": {"vmap"}, "vmapvmap": {"vmap"}, "grad": {"vjp", "grad"},
    "jvp": {"jvp"}, "vmapvjp": {"vmap", "vjp"}, "vmapjvp": {"vmap", "jvp"}, "vjpvjp": {"vjp"},
    "jvpvjp": {"jvp", "vjp"}, "jvpjvp": {"jvp"}, "vjpvmap": {"vjp", "vmap"},
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="opcov", description=opcov.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impl", default="torchlift", help="module under test (default: torchlift)")
    parser.add_argument("--transforms", help="comma-separated (default: all that the library has)")
    parser.add_argument("--ops", default="", help="regular expression on op names, e.g. '^nn.functional'")
    parser.add_argument(
        "--again", metavar="FILE", help="take the rows of FILE that passed plainly, and run the others again"
    )
    parser.add_argument("--max-samples", type=int, default=4, help="samples per op (default: 4)")
    parser.add_argument("--max-samples-grad", type=int, help="the same for transforms that differentiate")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per (op, transform) (default: 60)")
    parser.add_argument(
        "--extended", action="store_true", help="instead: other dtypes, and other sizes and memory layouts of a batch"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="torchlift's results come from traced and optimized graphs"
    )
    parser.add_argument("--out", help="write one JSON line per (op, transform) here")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the ops (default: 1)")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th op, starting at the i-th")
    parser.add_argument("--report", nargs="+", metavar="JSONL", help="report on earlier results instead of running")
    parser.add_argument("--against", nargs="+", metavar="JSONL", help="with --report: what differs in these results")
    parser.add_argument("--page", metavar="MD", help="write them as a page of the documentation, too")
    parser.add_argument("--top", type=int, default=40, help="error classes listed")
    parser.add_argument("--verbose", action="store_true", help="let the children print")
    args = parser.parse_args(argv)
    if args.compiled:
        args.impl = "opcov.compiled_impl"
    if args.transforms is not None:
        args.transforms = [name for name in args.transforms.split(",") if name]
        if unknown := set(args.transforms) - set(TRANSFORMS):
            parser.error(f"unknown transforms: {', '.join(sorted(unknown))}; known: {', '.join(TRANSFORMS)}")
    try:
        index, count = args.shard = tuple(map(int, args.shard.split("/")))
        if not 0 <= index < count:
            raise ValueError
    except ValueError:
        parser.error("--shard takes i/n with 0 <= i < n")
    return args


def selected_transforms(args: argparse.Namespace, impl: object) -> list[str]:
    """Those asked for; else those for which the library has what they need. Says what is left out."""
    if args.transforms is not None:
        return args.transforms
    missing = {name: sorted(n for n in NEEDS[name] if not hasattr(impl, n)) for name in TRANSFORMS}
    for name, needs in missing.items():
        if needs and args.shard[0] == 0:
            print(f"{name}: left out, {args.impl} has no {', no '.join(needs)}", file=sys.stderr)
    return [name for name, needs in missing.items() if not needs]


def row_key(row: dict) -> tuple[str, ...]:
    return row["op"], row["variant"], row["transform"], row.get("variation", "")


def passed_plainly(path: str) -> dict[tuple[str, ...], dict]:
    """The rows of a file about which there is nothing to ask: not by a second opinion."""
    rows = load_rows([path])
    return {row_key(r): r for r in rows if r["status"] in ("pass", "skip") and not r.get("second_opinion")}


def run(args: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        # The first jvp imports this, which takes a third of a second: once here, not in each child.
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    consume_random_state_normally()
    impl = importlib.import_module(args.impl)
    transforms = selected_transforms(args, impl)
    index, count = args.shard
    ops = [op for op in op_db if re.search(args.ops, op.full_name)][index::count]

    def samples(name: str) -> int:
        return args.max_samples_grad or args.max_samples if name in NEEDS_GRAD else args.max_samples

    def head(op: Any, job: Job) -> dict:
        row = {"impl": args.impl, "op": op.name, "variant": op.variant_test_name, "transform": job.transform}
        return row | {"variation": job.variation} if job.variation else row

    stored = passed_plainly(args.again) if args.again else {}
    rows: list[dict] = []
    start = time.monotonic()
    with open(args.out, "w") if args.out else contextlib.nullcontext() as out:
        for number, op in enumerate(ops, 1):
            jobs = jobs_of(op, transforms, args.extended)
            known = {job: stored[key] for job in jobs if (key := row_key(head(op, job))) in stored}
            todo = [job for job in jobs if job not in known]
            for job, result in run_isolated(impl, op, todo, samples, args.timeout, args.verbose):
                known[job] = head(op, job) | result
            for job in jobs:
                row = known[job]
                rows.append(row)
                if out:
                    out.write(json.dumps(row) + "\n")
                    out.flush()
            if number % 25 == 0 or number == len(ops):
                print(f"{number}/{len(ops)} ops, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def run_shards(args: argparse.Namespace, argv: Sequence[str]) -> list[dict]:
    """The same by several processes, each with every n-th op (of the shard, if it is one)."""
    index, count = args.shard
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jsonl" for i in range(args.jobs)]
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "opcov", *argv, "--jobs=1"),
                    *(f"--shard={index + count * i}/{count * args.jobs}", f"--out={path}"),
                ],
                stdout=subprocess.DEVNULL,
            )
            for i, path in enumerate(paths)
        ]
        if any([process.wait() for process in processes]):
            sys.exit("opcov: a process failed")
        order = {op.full_name: number for number, op in enumerate(op_db)}
        rows = load_rows(paths)
        rows.sort(key=lambda row: order[".".join(filter(None, [row["op"], row["variant"]]))])
    if args.out:
        with open(args.out, "w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.report:
        rows = load_rows(args.report)
        print(comparison(rows, load_rows(args.against)) if args.against else report(rows, top=args.top))
    else:
        start = time.monotonic()
        rows = run_shards(args, argv) if args.jobs > 1 else run(args)
        print(report(rows, time.monotonic() - start, args.top))
    if args.page:
        with open(args.page, "w") as out:
            out.write(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
