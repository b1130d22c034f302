"""Runs the checks of one (operator, transform), and tells what became of them in a row."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import torch

from opcov.derivatives import Mismatch, Undecided, confirms, has_nan, is_double
from opcov.samples import (
    FORMS,
    PLAIN,
    SEED,
    Form,
    Function,
    Tensors,
    build_cases,
    clone,
    is_random,
    seed_everything,
)
from opcov.transforms import (
    NEEDS_GRAD,
    NEEDS_GRADGRAD,
    TAKES_FORMS,
    TRANSFORMS,
    Check,
    NotApplicable,
    Subject,
)

MAX_FAILURES_KEPT = 4  # failing checks described in a row

# Tried in turn until the op supports one on CPU.
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.int64, torch.int32, torch.bool)

# Those of --extended.
MORE_DTYPES = (torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool)

HALF = (torch.float16, torch.bfloat16)
MANY_NUMBERS = 500
ROUNDINGS = 4  # of the arguments, on which the reference shows how precise it is

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}

FALLBACK = re.compile(r"performance drop because we have not yet implemented the batching rule for (\S+)\.")


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    if dtype in HALF:
        return 2e-2, 2e-2
    if dtype in (torch.float32, torch.complex64):
        return 1e-4, 1e-4
    if dtype in (torch.float64, torch.complex128):
        return 1e-6, 1e-7
    return 0.0, 0.0


def compare(actual: Tensors, expected: Tensors, shape_only: bool = False) -> None:
    if len(actual) != len(expected):
        raise Mismatch(f"{len(actual)} outputs, expected {len(expected)}")
    for k, (a, e) in enumerate(zip(actual, expected)):
        if a.shape != e.shape:
            raise Mismatch(f"output {k}: shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        if a.dtype != e.dtype:
            raise Mismatch(f"output {k}: dtype {a.dtype}, expected {e.dtype}")
        if shape_only:
            continue
        rtol, atol = tolerance(e.dtype)
        try:
            torch.testing.assert_close(
                a.detach().resolve_conj().resolve_neg(), e.detach().resolve_conj().resolve_neg(),
                rtol=rtol, atol=atol, equal_nan=True, check_stride=False,
            )  # fmt: skip
        except AssertionError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise Mismatch(f"output {k}: " + "; ".join(lines)) from None


def widened(tensors: Tensors) -> Tensors:
    return tuple(t.double() if t.dtype in HALF else t for t in tensors)


def as_precise(check: Check, arguments: Tensors, actual: Tensors, expected: Tensors) -> bool:
    """Whether a result in half precision is about as near to the one in float64 as the reference comes,
    on these arguments or on others that differ from them by a rounding.
    """
    if not any(e.dtype in HALF for e in expected):
        return False
    if [(a.shape, a.dtype) for a in actual] != [(e.shape, e.dtype) for e in expected]:
        return False
    # A large result shows by itself how errors scatter; and its reference may take a while.
    large = sum(e.numel() for e in expected) > MANY_NUMBERS
    truths = [truth for truth in (check.reference, check.second_opinion) if truth is not None]
    for truth in reversed(truths) if large else truths:
        try:
            exact = seeded(truth, widened(arguments))
            errors = distances(expected, exact)
            for draw in range(1 if large else ROUNDINGS):
                if draw:
                    moved = rounded_elsewhere(arguments, draw)
                    found = distances(seeded(check.reference, moved), seeded(truth, widened(moved)))
                    errors = [max(pair) for pair in zip(errors, found, strict=True)]
                if all(nearly_as_near(*each) for each in zip(widened(actual), exact, errors, strict=True)):
                    return True
        except Exception:
            continue
    return False


def seeded(fn: Function, arguments: Tensors) -> Tensors:
    seed_everything()
    return tuple(fn(*clone(arguments)))


def distances(results: Tensors, exact: Tensors) -> list[float]:
    """The largest error in each of the results."""
    return [largest_finite((r - x).abs()) for r, x in zip(widened(results), exact, strict=True)]


def rounded_elsewhere(tensors: Tensors, seed: int) -> Tensors:
    """The tensors, each number in half precision moved to a neighbour, up or down."""
    generator = torch.Generator().manual_seed(SEED + seed)

    def moved(t: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
        return (t.double() * (1 + torch.finfo(t.dtype).eps * signs)).to(t.dtype)

    return tuple(moved(t) if t.dtype in HALF else t for t in tensors)


def largest_finite(t: torch.Tensor) -> float:
    return float(t.nan_to_num(nan=0.0, posinf=0.0).max()) if t.numel() else 0.0


def nearly_as_near(actual: torch.Tensor, exact: torch.Tensor, error: float) -> bool:
    """Whether ``actual`` is within four times ``error`` of ``exact``, and some roundings.

    Where ``exact`` is NaN, the derivative is undefined.
    """
    finite, infinite = exact.isfinite(), exact.isinf()
    if not (actual == exact)[infinite].all():
        return False
    allowed = 4 * error + tolerance(torch.bfloat16)[1] * largest_finite(exact.abs())
    return bool(((actual - exact)[finite].abs() <= allowed).all())  # false for NaN


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:400] if text else ""


@dataclasses.dataclass
class Tally:
    """What became of the checks of one (op, transform)."""

    ok: int = 0
    wrong: int = 0
    error: int = 0
    noref: int = 0
    failures: list[dict] = dataclasses.field(default_factory=list)
    noref_reason: str = ""
    fallback_ops: set[str] = dataclasses.field(default_factory=set)
    shape_only: bool = False
    copies: int = 0  # checks on a batch of copies of one example
    second_opinion: int = 0  # checks that finite differences decided for the library

    def drop(self, reason: str) -> None:
        self.noref += 1
        self.noref_reason = self.noref_reason or reason

    def fail(self, kind: str, sample: int, label: str, error: BaseException) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        failure = {
            "kind": kind,
            "sample": sample,
            "check": label,
            "error_type": type(error).__name__,
            "message": first_line(error),
        }
        # Keep one of each message, wrong values before errors.
        if all((f["kind"], f["message"]) != (kind, failure["message"]) for f in self.failures):
            self.failures.append(failure)
            self.failures.sort(key=lambda f: f["kind"] != "wrong")
            del self.failures[MAX_FAILURES_KEPT:]


class LoopWatch:
    """Notes the operators for which the library loops over the examples while the watch is on.

    By the library's own report if it has one: that misses nothing, while a warning may come once only.
    Else by torch's warning.
    """

    def __init__(self, impl: Any, found: set[str]) -> None:
        self.found = found
        self.reports = hasattr(impl, "fallback_report") and hasattr(impl, "reset_fallback_report")
        self.impl = impl
        self.warnings = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        if self.reports:
            self.impl.reset_fallback_report()
        self.caught = self.warnings.__enter__()
        warnings.simplefilter("always")

    def __exit__(self, *exc: Any) -> None:
        self.warnings.__exit__(*exc)
        if self.reports:
            self.found |= {record.op for record in self.impl.fallback_report()}
        for warning in self.caught:
            if match := FALLBACK.search(str(warning.message)):
                self.found.add(match.group(1))


def run_check(impl: Any, check: Check, sample: int, tally: Tally) -> None:
    for position, arguments in enumerate(check.arguments):
        try:
            seed_everything()
            expected = check.reference(*clone(arguments))
            if not expected:
                raise NotApplicable("no tensor output")
            break
        except Undecided as error:
            tally.fail("wrong", sample, check.label, error)
            return
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        tally.drop(reason)
        return

    tally.shape_only |= check.shape_only
    tally.copies += position > 0
    with LoopWatch(impl, tally.fallback_ops):
        try:
            seed_everything()
            actual = tuple(check.transformed(*clone(arguments)))
            try:
                compare(actual, expected, check.shape_only)
            except Mismatch:
                if confirmed(check, arguments, actual) or as_precise(check, arguments, actual, expected):
                    tally.second_opinion += 1
                elif check.second_opinion and all(map(is_double, actual)) and has_nan(expected):
                    tally.drop("the derivative is undefined: the reference is NaN")
                    return
                else:
                    raise
            tally.ok += 1
        except Mismatch as error:
            tally.fail("wrong", sample, check.label, error)
        except Exception as error:
            tally.fail("error", sample, check.label, error)


def confirmed(check: Check, arguments: Tensors, actual: Tensors) -> bool:
    """Whether finite differences take the library's side against the reference."""
    if check.second_opinion is None or not all(map(is_double, actual)):
        return False
    try:
        return confirms(check.second_opinion(*clone(arguments)), actual)
    except Exception:
        return False


def run_transform(
    impl: Any, op: Any, name: str, dtype: torch.dtype, max_samples: int, form: Form = PLAIN
) -> dict:
    """The row for one (op, transform) at one dtype."""
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}

    def skip(reason: str) -> dict:
        return row | {"status": "skip", "reason": reason}

    differentiates = name in NEEDS_GRAD
    if differentiates and (not op.supports_autograd or dtype not in op.supported_backward_dtypes("cpu")):
        return skip("not differentiable")
    if name in NEEDS_GRADGRAD and not op.supports_gradgrad:
        return skip("no double backward in PyTorch (OpInfo.supports_gradgrad)")
    if name == "vmap_inplace" and op.get_inplace() is None:
        return skip("no in-place variant")

    try:
        cases = build_cases(op, dtype, differentiates, max_samples)
    except Exception as error:
        return skip(f"sample_inputs failed: {type(error).__name__}: {first_line(error)}")
    if not cases:
        return skip("no sample with a differentiable tensor" if differentiates else "no strided sample")

    tally = Tally()
    reasons = []
    random_cases = [is_random(op, case) for case in cases]
    for case, random_case in zip(cases, random_cases):
        try:
            for check in TRANSFORMS[name](Subject(impl, op, case, any(random_cases), random_case, form)):
                run_check(impl, check, case.index, tally)
        except NotApplicable as why:
            reasons.append(str(why))
        except Exception as error:
            # Only the untransformed op runs outside of run_check.
            reasons.append(f"the op itself failed: {type(error).__name__}: {first_line(error)}")

    row["checks"] = {"ok": tally.ok, "wrong": tally.wrong, "error": tally.error, "noref": tally.noref}
    if tally.ok + tally.wrong + tally.error == 0:
        return skip(reasons[0] if reasons else f"no reference: {tally.noref_reason}")
    row["status"] = "wrong" if tally.wrong else "error" if tally.error else "pass"
    row["fallback"] = bool(tally.fallback_ops)
    if tally.fallback_ops:
        row["fallback_ops"] = sorted(tally.fallback_ops)
    if tally.shape_only:
        row["shape_only"] = True
    for extra in ("copies", "second_opinion"):
        if getattr(tally, extra):
            row[extra] = getattr(tally, extra)
    if tally.noref:
        row["noref_reason"] = tally.noref_reason
    if tally.failures:
        row["error_type"] = tally.failures[0]["error_type"]
        row["message"] = tally.failures[0]["message"]
        row["failures"] = tally.failures
    return row


@dataclasses.dataclass(frozen=True)
class Job:
    """What makes one row of an op."""

    transform: str
    dtype: torch.dtype | None = None  # None: the first that the op supports
    form: Form = PLAIN

    @property
    def variation(self) -> str:
        """What differs from the ordinary row, in words; empty for that one."""
        return str(self.dtype).removeprefix("torch.") if self.dtype is not None else self.form.name


def first_dtype(op: Any) -> torch.dtype | None:
    supported = op.supported_dtypes("cpu")
    return next((d for d in DTYPES if d in supported), None)


def jobs_of(op: Any, transforms: list[str], extended: bool) -> list[Job]:
    """A row for each transform; or, extended, the other dtypes and the forms of a batch."""
    if not extended:
        return [Job(name) for name in transforms]
    supported = op.supported_dtypes("cpu")
    dtypes = [d for d in MORE_DTYPES if d in supported and d != first_dtype(op)]
    jobs = [Job(name, dtype=dtype) for name in transforms for dtype in dtypes]
    return jobs + [Job(name, form=form) for name in transforms if name in TAKES_FORMS for form in FORMS]


def run_job(impl: Any, op: Any, job: Job, max_samples: int) -> dict:
    """The row for a job: at its dtype, or at the op's first one and in doubt at a wider one."""
    dtype = job.dtype or first_dtype(op)
    if dtype is None:
        return {"status": "skip", "reason": "no supported dtype on CPU"}
    row = run_transform(impl, op, job.transform, dtype, max_samples, job.form)
    if row["status"] == "wrong" and WIDER.get(dtype) in op.supported_dtypes("cpu"):
        wide = run_transform(impl, op, job.transform, WIDER[dtype], max_samples, job.form)
        if wide["status"] != "skip":
            row = wide | {"retried": True}
    return row
