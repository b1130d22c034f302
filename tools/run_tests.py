"""The steps of tools/test. Each adds to two counts; the last line printed is `N passed, N failed`."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.parse
import xml.etree.ElementTree as ElementTree

import bazel


class Counts:
    """What passed, failed and was skipped, with the names and reasons of the latter two."""

    def __init__(self):
        self.passed = 0
        self.failures = []
        self.skips = []

    def check(self, name, ok):
        if ok:
            self.passed += 1
        else:
            self.failures.append(name)

    def add_junit(self, path, prefix=""):
        """Adds the cases of a JUnit file (GoogleTest, pytest and Bazel write it); the number failed."""
        failed = 0
        for case in ElementTree.parse(path).iter("testcase"):
            name = prefix + ".".join(filter(None, [case.get("classname"), case.get("name")]))
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failures.append(name)
                failed += 1
            elif skipped is not None:
                self.skips.append(f"{name}: {(skipped.get('message') or 'no reason given').strip()}")
            elif case.get("status") != "notrun":
                self.passed += 1
        return failed


def say(text):
    print(f"== {text}", flush=True)


def succeeds(*command, **kwargs):
    return subprocess.run([str(c) for c in command], cwd=bazel.ROOT, **kwargs).returncode == 0


# --- C++ ------------------------------------------------------------------------------------------


def test_results(events):
    """(label, status, path of test.xml or None) of each test in a build event file."""
    latest = {}
    for line in events:
        event = json.loads(line)
        label = event.get("id", {}).get("testResult", {}).get("label")
        if label:
            result = event["testResult"]
            uris = {o["name"]: o.get("uri", "") for o in result.get("testActionOutput", [])}
            xml = urllib.parse.unquote(urllib.parse.urlparse(uris.get("test.xml", "")).path)
            latest[label] = (label, result["status"], xml or None)
        completed = event.get("id", {}).get("targetCompleted", {}).get("label")
        if completed and not event.get("completed", {}).get("success"):
            latest.setdefault(completed, (completed, "FAILED_TO_BUILD", None))
    return list(latest.values())


def bazel_test(counts, patterns, options=(), prefix=""):
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "events.json"
        ok = succeeds(
            *bazel.command("test", *bazel.PLAIN, "--keep_going", f"--build_event_json_file={log}"),
            *options,
            "--",
            *patterns,
        )
        results = test_results(log.read_text().splitlines()) if log.exists() else []
    explained = False
    for label, status, xml in results:
        failed = counts.add_junit(xml, f"{prefix}{label} ") if xml and os.path.exists(xml) else 0
        if status != "PASSED" and not failed:
            counts.failures.append(f"{prefix}{label} ({status})")
        explained = explained or status != "PASSED"
    if not ok and not explained:
        counts.failures.append(f"{prefix}bazel test {' '.join(patterns)}")


def step_build(counts, _):
    """Everything compiles and links, with warnings as errors; benchmarks too."""
    benchmarks = bazel.query('attr("tags", "benchmark", //...)')
    counts.check(
        "build //...",
        succeeds(*bazel.command("build", *bazel.PLAIN, "--keep_going", "--", "//...", *benchmarks)),
    )


def step_cpp(counts, patterns):
    """The C++ tests."""
    bazel_test(counts, patterns or ["//..."])


# What reads files that somebody may have made to do harm is among them. (libtorch's own reader of TorchScript leaks
# where a file is bad, so its test is not.)
SANITIZED = [
    "//core/...",
    "//compile/artifact/...",
    "//compile/import:hostile_test",
    "//compile/import:records_test",
    "//compile/import:size_language_test",
]


def step_sanitizers(counts, patterns):
    """The tests of core/ and of files under each sanitizer. A test tagged no_asan (and so on) is left out."""
    for name in ["asan", "ubsan", "tsan"]:
        say(f"sanitizers: {name}")
        options = [f"--config={name}", f"--test_tag_filters=-no_{name}", "--build_tests_only"]
        bazel_test(counts, patterns or SANITIZED, options, f"{name} ")
    step_pytest(counts, ["tools/sanitizers"])


# --- Python ---------------------------------------------------------------------------------------


def step_pytest(counts, paths):
    with tempfile.TemporaryDirectory() as folder:
        xml = os.path.join(folder, "pytest.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", *paths]
        ok = succeeds(*command, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "2"})
        failed = counts.add_junit(xml) if os.path.exists(xml) else 0
    if not ok and not failed:
        counts.failures.append(f"pytest {' '.join(paths)}")


def step_wheel(counts, _):
    """The wheel is built and installed into .venv."""
    counts.check("build and install the wheel", succeeds("tools/build_wheel", "--install"))


def step_python(counts, _):
    """The Python tests, against the installed wheel."""
    paths = [name for name in ["bindings", "tools", "examples"] if (bazel.ROOT / name).exists()]
    step_pytest(counts, [*paths, "--ignore=tools/sdk_test", "--ignore=tools/sanitizers"])


# --- the rest -------------------------------------------------------------------------------------


def step_sdk(counts, _):
    """The SDK is built, and a CMake project and an external Bazel workspace use it."""
    built = succeeds("tools/build_sdk")
    counts.check("build the SDK", built)
    if built:
        step_pytest(counts, ["tools/sdk_test"])


def step_docs(counts, _):
    """The examples of README.md and docs/ run (after the steps wheel and sdk)."""
    import doc_examples

    for where, error in doc_examples.run_all():
        counts.check(where, error is None)
        if error:
            print(error)


def step_format(counts, _):
    """clang-format finds nothing to change (tools/format changes it)."""
    counts.check("clang-format", succeeds("tools/format", "--check"))


STEPS = {
    "format": step_format,
    "build": step_build,
    "cpp": step_cpp,
    "wheel": step_wheel,
    "python": step_python,
    "sdk": step_sdk,
    "docs": step_docs,
    "sanitizers": step_sanitizers,
}
FAST = ["format", "cpp"]


def parse(arguments):
    parser = argparse.ArgumentParser(prog="tools/test", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="Bazel patterns: the C++ tests below them only")
    parser.add_argument("--fast", action="store_true", help="only " + " and ".join(FAST))
    parser.add_argument("--only", metavar="STEPS", help="these steps only, separated by commas")
    parser.add_argument("--skip", metavar="STEPS", default="", help="without these steps")
    parser.add_argument("--list", action="store_true", help="name the steps and stop")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else FAST if options.fast else list(STEPS)
    if options.patterns and not options.only:
        names = ["cpp"]
    unknown = [n for n in names + options.skip.split(",") if n and n not in STEPS]
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)} (there are: {', '.join(STEPS)})")
    options.steps = [n for n in names if n not in options.skip.split(",")]
    return options


def main():
    options = parse(sys.argv[1:])
    if options.list:
        for name, step in STEPS.items():
            print(f"{name:12} {step.__doc__}")
        return 0
    counts = Counts()
    for name in options.steps:
        say(f"{name}: {STEPS[name].__doc__}")
        start = time.monotonic()
        try:
            STEPS[name](counts, options.patterns)
        except Exception as error:  # A broken step is a failure, and the others still run.
            counts.failures.append(f"{name}: {error!r}")
        say(f"{name}: {time.monotonic() - start:.0f} s")
    if os.environ.get("CI"):
        succeeds(*bazel.command("shutdown"))
    for skip in counts.skips:
        print(f"skipped: {skip}")
    for failure in counts.failures:
        print(f"failed: {failure}")
    print(f"{counts.passed} passed, {len(counts.failures)} failed", flush=True)
    return 1 if counts.failures else 0


if __name__ == "__main__":
    sys.exit(main())
