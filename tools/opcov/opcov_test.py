"""The measure is measured: a right implementation passes, two planted faults do not."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from opcov.refusals import REFUSALS
from opcov.report import op_label

TOOLS = pathlib.Path(__file__).resolve().parent.parent
STORED = TOOLS / "opcov" / "torch_func.jsonl.gz"
OPERATORS = "^(sin|mul|sum)$"


def opcov(*arguments, mutant=""):
    path = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OPCOV_MUTANT": mutant}
    command = [sys.executable, "-m", "opcov", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def statuses(folder, transforms, mutant=""):
    """{(transform, operator): status} of the loop implementation."""
    out = folder / "rows.jsonl"
    opcov("--impl", "opcov.loop_impl", "--transforms", transforms, "--ops", OPERATORS, "--out", out, mutant=mutant)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 * len(transforms.split(","))
    return {(row["transform"], row["op"]): row["status"] for row in rows}


def test_a_right_implementation_passes(tmp_path):
    assert set(statuses(tmp_path, "vmap,grad,vmapvjp").values()) == {"pass"}


@pytest.mark.parametrize("mutant, transforms", [("first", "vmap,vmapvmap"), ("scale", "grad,vmapvjp")])
def test_a_planted_fault_is_seen(tmp_path, mutant, transforms):
    assert set(statuses(tmp_path, transforms, mutant).values()) == {"wrong"}


def test_rows_that_failed_are_run_again(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    arguments = ["--impl", "opcov.loop_impl", "--transforms", "vmap", "--ops", "^(sin|mul)$"]
    opcov(*arguments, "--out", first, mutant="first")
    lines = first.read_text().splitlines()
    passed = json.loads(lines[0]) | {"status": "pass", "seconds": -1}  # as nothing that runs has
    first.write_text("\n".join([json.dumps(passed), *lines[1:]]))
    opcov(*arguments, "--again", first, "--out", second)
    rows = [json.loads(line) for line in second.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["pass", "pass"]
    assert [row["seconds"] == -1 for row in rows] == [True, False]


def test_extended_rows(tmp_path):
    """Other dtypes and forms of a batch, each of which shows a planted fault; and a page of them."""
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    arguments = ["--impl", "opcov.loop_impl", "--transforms", "vmap", "--ops", "^mul$", "--extended", "--out", out]
    opcov(*arguments, "--page", page, mutant="first")
    rows = {row["variation"]: row["status"] for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["float64", "bfloat16", "complex64", "int64", "bool"] + [
        "non-contiguous", "expanded", "batch of 1", "batch of 0",
    ]  # fmt: skip
    unseen = {"expanded": "pass", "batch of 1": "pass", "batch of 0": "error"}  # a loop of none fails
    assert rows == dict.fromkeys(rows, "wrong") | unseen
    text = page.read_text()
    assert text.startswith("# Operator coverage, other inputs\n")
    assert "| bfloat16 | 1 | 0 | 0 | 1 | 0 | 0 | 0.0 % |" in text
    assert "| `mul` | vmap (int64) | wrong |" in text


def test_the_page_of_stored_rows(tmp_path):
    page = tmp_path / "page.md"
    opcov("--report", STORED, "--page", page)
    text = page.read_text()
    assert "| all | 5920 | 5645 | 284 | 33 | 242 | 0 | 95.4 % |" in text
    assert "\n| `sin` | pass | pass | pass | pass | pass | pass | pass | pass | pass | pass | pass |\n" in text


def test_refusals_are_what_is_refused(tmp_path):
    """An operator of the list that passes has no place in it; and it fails by an error, no more than listed."""
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    operators = "^(" + "|".join(map(re.escape, REFUSALS)) + ")$"
    opcov("--impl", "torchlift", "--ops", operators, "--timeout", 300, "--jobs", 2, "--out", out, "--page", page)
    failed: dict[str, set[str]] = {}
    for row in map(json.loads, out.read_text().splitlines()):
        if row["status"] in ("pass", "skip"):
            continue
        assert row["status"] == "error", row
        failed.setdefault(op_label(row), set()).add(row["transform"])
    assert failed == {op: set(entry.transforms) for op, entry in REFUSALS.items()}
    operators = {entry.spelling_of or op for op, entry in REFUSALS.items()}
    assert operators <= set(REFUSALS) and len(operators) < 10
    assert sum(not REFUSALS[op].data_dependent for op in operators) == 1
    assert "Every other row passes." in page.read_text()


def test_loops_of_torchlift_are_counted():
    """An operator without a batching rule passes, but not in silence."""
    import torch
    import torchlift
    from opcov.running import LoopWatch

    torch.library.define("opcov_test::twice", "(Tensor x) -> Tensor")
    torch.library.impl("opcov_test::twice", "CPU", lambda x: 2 * x)
    found = set()
    for _ in range(2):  # a warning comes once only, the report every time
        found.clear()
        with LoopWatch(torchlift, found):
            torchlift.vmap(torch.sin)(torch.ones(3))
        assert not found
        with LoopWatch(torchlift, found):
            torchlift.vmap(torch.ops.opcov_test.twice)(torch.ones(3))
        assert found == {"opcov_test::twice"}


def test_transforms_that_the_library_lacks_are_left_out_aloud(tmp_path):
    (tmp_path / "only_vmap.py").write_text("from opcov.loop_impl import vmap\n")
    out = tmp_path / "rows.jsonl"
    environment = os.environ | {"PYTHONPATH": f"{TOOLS}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "opcov", "--impl", "only_vmap", "--ops", "^sin$", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "vmapvjp: left out, only_vmap has no vjp" in done.stderr
    found = [json.loads(line)["transform"] for line in out.read_text().splitlines()]
    assert found == ["vmap", "vmap_inplace", "vmapvmap"]


def test_the_stored_result_of_torch_func_can_be_read():
    table = opcov("--report", STORED).stdout
    assert "pass=5645 wrong=33 error=242" in table
