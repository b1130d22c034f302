"""The benchmark's own arithmetic, and that it runs."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    yield
    for name in ("table", "timing", "cpp", "compile_time", "operators"):
        sys.modules.pop(name, None)


def test_targets_are_shares_or_values():
    from table import Row

    assert Row("a", "us", 2.0, 0.4, 0.2, relative=True).met
    assert not Row("a", "us", 2.0, 0.5, 0.2, relative=True).met
    assert Row("a", "us", 100.0, 8.0, 8).met
    assert not Row("a", "us", 100.0, 8.1, 8).met
    assert Row("a", "us", 100.0, None, 8, note="no such thing").met is None


def test_a_missing_value_is_told_and_not_met():
    from table import Row, text

    lines = text([Row("a", "ms", 2.0, None, 0.5, relative=True, note="torchlift has no jvp")])
    assert lines[1].endswith("torchlift has no jvp") and "met" not in lines[1]


def test_medians_follow_the_work():
    import timing

    found = timing.interleave({"short": lambda: time.sleep(1e-3), "long": lambda: time.sleep(3e-3)}, rounds=5)
    assert found["short"] >= 1e-3 and found["long"] >= 3e-3 and found["long"] > found["short"]


def test_headers_and_rule_files_are_found():
    import compile_time

    names = [path.name for path in compile_time.public_headers()]
    assert "vmap.h" in names and "grad.h" in names
    assert "testing.h" not in names and "paired_benchmark.h" not in names and "compositions.h" not in names
    modules = [path.name for path in compile_time.public_headers() if compile_time.module_headers(path)]
    assert modules == ["ensemble.h"]
    assert compile_time.rule_files() and not any(p.stem.endswith("_test") for p in compile_time.rule_files())


def test_the_python_part_runs(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, HERE / "bench.py", "--quick", "--only=python", "--json", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["torch"] and len(found["rows"]) == 11
    assert all(row["torchlift"] is not None for row in found["rows"])


def test_sixty_operators_agree_with_what_is_written_by_hand():
    """Each is compared before it is timed."""
    import operators

    assert len(operators.OPERATORS) == 60
    (row,) = operators.rows(rounds=1)
    assert row.relative and row.torchlift > 0


def test_peerbench_skips_what_a_peer_lacks(tmp_path):
    """A peer with vmap and grad only: the case of a jvp is skipped by name, the others run and agree."""
    (tmp_path / "small_peer.py").write_text("from torch.func import functional_call, grad, vmap\n")
    command = [sys.executable, HERE / "peerbench" / "run.py", "--impl=small_peer", "--rounds=1", "--budget=0.01"]
    command += ["--cases=^(hvp|per_sample_grad_mlp)$", f"--json={tmp_path / 'all.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "small_peer skipped: small_peer has no jvp" in done.stdout
    cases = json.loads((tmp_path / "all.json").read_text())["cases"]
    assert cases["per_sample_grad_mlp"]["small_peer"]["agrees"]
