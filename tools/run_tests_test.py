"""The counting behind `N passed, N failed`: a failure is never lost."""

import json

from run_tests import Counts, parse, test_results as results_of


def junit(tmp_path, body):
    path = tmp_path / "test.xml"
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    return path


def test_counts_of_junit(tmp_path):
    counts = Counts()
    failed = counts.add_junit(
        junit(
            tmp_path,
            '<testcase classname="A" name="ok" status="run"/>'
            '<testcase classname="A" name="off" status="notrun"/>'
            '<testcase classname="A" name="bad"><failure message="x"/></testcase>'
            '<testcase classname="A" name="crash"><error/></testcase>'
            '<testcase classname="A" name="gpu"><skipped message="no device"/></testcase>',
        )
    )
    assert (counts.passed, failed) == (1, 2)
    assert counts.failures == ["A.bad", "A.crash"]
    assert counts.skips == ["A.gpu: no device"]


def test_results_of_build_events():
    events = [
        {
            "id": {"testResult": {"label": "//a:t"}},
            "testResult": {
                "status": "TIMEOUT",
                "testActionOutput": [{"name": "test.xml", "uri": "file:///x%20y/test.xml"}],
            },
        },
        {"id": {"targetCompleted": {"label": "//a:broken"}}, "completed": {}},
        {"id": {"targetCompleted": {"label": "//a:lib"}}, "completed": {"success": True}},
        # What Bazel says of a test whose build was fine but which was not run.
        {"id": {"targetCompleted": {"label": "//a:aborted"}}, "aborted": {"reason": "INCOMPLETE"}},
    ]
    assert sorted(results_of(map(json.dumps, events))) == [
        ("//a:aborted", "FAILED_TO_BUILD", None),
        ("//a:broken", "FAILED_TO_BUILD", None),
        ("//a:t", "TIMEOUT", "/x y/test.xml"),
    ]


def test_steps():
    assert parse(["//core/..."]).steps == ["cpp"]
    assert parse(["--fast"]).steps == ["format", "cpp"]
    assert "sdk" not in parse(["--skip", "sdk"]).steps
    assert parse(["--only", "sanitizers", "//core:level_test"]).steps == ["sanitizers"]
