"""Tables and lists from rows."""

from __future__ import annotations

import collections
import gzip
import json
import re
from collections.abc import Callable, Iterable

from opcov.transforms import TRANSFORMS

STATUSES = ("pass", "wrong", "error", "timeout", "crash", "skip")

# Causes of failure that recur, by what the message says; the first that matches names the
# class.  Messages that match none are grouped by themselves, with the numbers taken out.
ERROR_CLASSES = [
    ("forward AD not implemented for an operator", r"Trying to use forward AD with"),
    ("reverse AD not implemented for an operator", r"derivative for .* is not implemented|not differentiable with"),
    ("no batching rule, and no fallback can be made", r"could not generate a fallback"),
    ("no batching rule, and the fallback rejects views and out=", r"fallback path doesn't work on out= or view ops"),
    ("refused by vmap: operator not supported", r"do not yet support|isn't supported yet|requires special handling"),
    (
        "output shape depends on the data",
        r"dynamic shape|differently shaped|`output_size` argument|explicit positive num_c",
    ),
    ("value needed on the host (.item(), control flow)", r"calling \.item\(\)|data-dependent control flow"),
    ("in-place write to a tensor that is not batched", r"aten::\w+_\(self, |updated in place, were not batched"),
    ("memory_format checked against the batched rank", r"channels_last(_3d)? format"),
    ("autograd.Function without setup_context", r"must override the setup_context"),
    ("wrapped tensor has no storage", r"data pointer of Tensor that doesn't have storage"),
    ("forward gradient of another size", r"set a forward gradient that has a different size"),
    ("sparse output", r"Sparse(CPU|CUDA)' backend"),
    ("internal assert", r"INTERNAL ASSERT FAILED"),
    ("randomness mode", r"randomness"),
    (
        "shape error inside a batching rule",
        r"invalid for input of size|must match the size|equal size|out of range|stride",
    ),
]


def classify(failure: dict) -> str:
    message = failure["message"]
    if failure["kind"] == "wrong":
        for name, pattern in (("wrong: shape", "shape"), ("wrong: dtype", "dtype"), ("wrong: count", "outputs, exp")):
            if pattern in message:
                return name
        return "wrong: value"
    for name, pattern in ERROR_CLASSES:
        if re.search(pattern, message):
            return name
    return f"{failure['error_type']}: " + re.sub(r"-?\d+(\.\d+)?", "N", message)[:90]


def op_label(row: dict) -> str:
    return row["op"] + (f".{row['variant']}" if row["variant"] else "")


def variations(rows: list[dict]) -> list[str]:
    """Of extended rows: the dtypes and forms of a batch."""
    return list(dict.fromkeys(r["variation"] for r in rows if "variation" in r))


def table(rows: list[dict]) -> list[str]:
    columns = ("ops", "pass", "fallback", "wrong", "error", "partial", "timeout", "crash", "skip", "pass%")
    lines = [f"{'transform':<15}" + "".join(f"{c:>10}" for c in columns)]

    def line(label: str, rows: list[dict]) -> str:
        count = collections.Counter(r["status"] for r in rows)
        tested = len(rows) - count["skip"]
        fallback = sum(r["status"] == "pass" and bool(r.get("fallback")) for r in rows)
        partial = sum(r["status"] in ("wrong", "error") and r["checks"]["ok"] > 0 for r in rows)
        share = f"{100 * count['pass'] / tested:.1f}" if tested else "-"
        cells = (tested, count["pass"], fallback, count["wrong"], count["error"], partial)
        cells += (count["timeout"], count["crash"], count["skip"], share)
        return f"{label:<15}" + "".join(f"{c:>10}" for c in cells)

    names = [n for n in TRANSFORMS if any(r["transform"] == n for r in rows)]
    lines += [line(name, [r for r in rows if r["transform"] == name]) for name in names]
    lines += [line(name, [r for r in rows if r.get("variation") == name]) for name in variations(rows)]
    lines.append(line("total", rows))
    lines.append(
        "ops: rows with something to check.  fallback: of the passes, those that took the slow vmap loop.\n"
        "partial: of wrong and error, those where some other check of the row passed."
    )
    return lines


def class_lines(rows: list[dict], top: int) -> list[str]:
    """Each row counts once, under the class of its first failure."""
    groups: dict[str, list[dict]] = collections.defaultdict(list)
    for row in rows:
        if row.get("failures"):
            groups[classify(row["failures"][0])].append(row)
        elif row["status"] in ("timeout", "crash"):
            groups[row["status"]].append(row)
    lines = []
    for name, members in sorted(groups.items(), key=lambda item: -len(item[1]))[:top]:
        ops = list(dict.fromkeys(op_label(r) for r in members))
        by = collections.Counter(r["transform"] for r in members)
        lines.append(f"{len(members):5d} rows {len(ops):4d} ops  {name}")
        lines.append(f"{'':17s}by transform: " + ", ".join(f"{t} {n}" for t, n in by.most_common()))
        lines.append(f"{'':17s}e.g. " + ", ".join(ops[:8]))
    return lines


def wrapped(names: Iterable[str], width: int = 110) -> list[str]:
    lines, line = [], " "
    for name in names:
        if len(line) + len(name) + 2 > width:
            lines.append(line)
            line = " "
        line += f" {name},"
    return [text for text in [*lines, line.rstrip(",")] if text.strip()]


def report(rows: list[dict], seconds: float | None = None, top: int = 40) -> str:
    lines = table(rows)
    lines += ["", "Failures by class", *class_lines(rows, top)]
    for name in ("vmap", "vmap_inplace"):
        mine = [r for r in rows if r["transform"] == name]
        if not mine:
            continue
        slow = sorted({op_label(r) for r in mine if r.get("fallback")})
        bad = sorted(
            {
                op_label(r) + f" [{r['status']}]" * (r["status"] != "error")
                for r in mine
                if r["status"] not in ("pass", "skip")
            }
        )
        lines += ["", f"{name}: {len(slow)} ops take the slow fallback", *wrapped(slow)]
        lines += ["", f"{name}: {len(bad)} ops fail", *wrapped(bad)]
    count = collections.Counter(r["status"] for r in rows)
    fallback = sum(bool(r.get("fallback")) for r in rows)
    spent = seconds if seconds is not None else sum(r.get("seconds", 0) for r in rows)
    lines += [
        "",
        f"summary: impl={rows[0]['impl'] if rows else '-'} ops={len({op_label(r) for r in rows})} rows={len(rows)} "
        + " ".join(f"{s}={count[s]}" for s in STATUSES)
        + f" fallback={fallback} seconds={spent:.0f}",
    ]
    return "\n".join(lines)


def side_by_side(base: list[dict], other: list[dict]) -> list[str]:
    """Counts of two result files on the rows that both have: ops to check, passed, by a loop, wrong."""
    columns = ("ops", "pass", "loop", "wrong")
    names = (base[0]["impl"], other[0]["impl"]) if base else ("", "")
    lines = [f"{'transform':<13}" + "".join(f"{f'{n} {c}':>18}" for n in names for c in columns)]

    def counts(rows: list[dict]) -> tuple[int, ...]:
        status = collections.Counter(r["status"] for r in rows)
        loops = sum(r["status"] == "pass" and bool(r.get("fallback")) for r in rows)
        return len(rows) - status["skip"], status["pass"], loops, status["wrong"]

    def line(label: str, keep: Callable[[dict], bool]) -> str:
        cells = [*counts([r for r in base if keep(r)]), *counts([r for r in other if keep(r)])]
        return f"{label:<13}" + "".join(f"{c:>18}" for c in cells)

    for name in TRANSFORMS:
        if any(r["transform"] == name for r in base):
            lines.append(line(name, lambda r, name=name: r["transform"] == name))
    return [*lines, line("total", lambda r: True), ""]


def comparison(base: list[dict], other: list[dict]) -> str:
    """What two result files disagree on, by transform."""
    key = lambda r: (r["transform"], op_label(r), r.get("variation", ""))  # noqa: E731
    left, right = {key(r): r for r in base}, {key(r): r for r in other}
    lines = side_by_side([left[k] for k in left if k in right], [right[k] for k in left if k in right])
    for name in TRANSFORMS:
        shared = [k for k in left if k in right and k[0] == name]
        gained = [k[1] for k in shared if left[k]["status"] != "pass" and right[k]["status"] == "pass"]
        lost = [k[1] for k in shared if left[k]["status"] == "pass" and right[k]["status"] not in ("pass", "skip")]
        if shared:
            lines.append(
                f"{name}: {len(shared)} shared rows, {len(gained)} only the second passes, {len(lost)} only the first"
            )
            if gained:
                lines += ["  only the second:", *wrapped(gained)]
            if lost:
                lines += ["  only the first:", *wrapped(lost)]
    return "\n".join(lines)


def load_rows(paths: Iterable[str]) -> list[dict]:
    rows = []
    for path in paths:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
            rows += [json.loads(line) for line in lines if line.strip()]
    return rows
