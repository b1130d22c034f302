"""Operators that torchlift refuses under vmap, each with the reason.

The one list: pages of results show it, opcov_test.py runs the operators and checks that they fail
where it says, and nowhere else. An entry excuses errors alone, never a wrong number, a crash or a
time-out. docs/limits.md says for users what to write instead.
"""

from __future__ import annotations

import dataclasses

VALUE = "gives one Python number or bool, which cannot differ between the examples"
SHAPE = "the shape of its result depends on the values, so the examples would not stack"
STATISTICS = "training would write each example's statistics into running statistics that all share"

FORWARD = ("vmap", "vmapvmap")
DIFFERENTIATED = (*FORWARD, "vmapvjp", "vmapjvp", "vjpvmap")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why, and under which transforms."""

    reason: str
    transforms: tuple[str, ...]
    data_dependent: bool = True  # by nature: no library could return anything
    spelling_of: str | None = None  # another operator of the list, which does the same


def batch_norm(*more: str) -> Refusal:
    """The one reason, in an operator that batch_norm calls, or that calls batch_norm."""
    return Refusal(STATISTICS, (*DIFFERENTIATED, *more), False, "nn.functional.batch_norm")


REFUSALS: dict[str, Refusal] = {
    "allclose": Refusal(VALUE, FORWARD),
    "equal": Refusal(VALUE, FORWARD),
    "item": Refusal(VALUE, FORWARD),
    "nonzero": Refusal(SHAPE, FORWARD),
    "argwhere": Refusal(SHAPE, FORWARD, spelling_of="nonzero"),
    "unique": Refusal(SHAPE, FORWARD),
    "unique_consecutive": Refusal(SHAPE, FORWARD),
    "masked_select": Refusal(SHAPE, DIFFERENTIATED),
    "repeat_interleave": Refusal(SHAPE, DIFFERENTIATED),
    "nn.functional.batch_norm": Refusal(STATISTICS, DIFFERENTIATED, data_dependent=False),
    "nn.functional.instance_norm": batch_norm(),
    "native_batch_norm": batch_norm(),
    "_native_batch_norm_legit": batch_norm("jvpjvp"),
    "_batch_norm_with_update": batch_norm("jvpjvp"),
}


def refusal(row: dict) -> Refusal | None:
    """The entry that excuses a row of torchlift."""
    found = REFUSALS.get(".".join(filter(None, [row["op"], row["variant"]])))
    if found is None or row["impl"] != "torchlift" or row["status"] != "error":
        return None
    return found if row["transform"] in found.transforms else None
