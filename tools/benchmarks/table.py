"""The rows of the table that bench.py prints, and how they read."""

import dataclasses


@dataclasses.dataclass
class Row:
    """One figure of torchlift and its peer. Smaller is better."""

    what: str
    unit: str  # of the two values: "us an operator", "times plain autograd", "us a call", "ms"
    torch_func: float | None
    torchlift: float | None
    target: float | None = None
    relative: bool = False  # whether the target is a share of torch.func's value, and not a value
    note: str = ""  # why there is no value

    @property
    def reached(self):
        """What the target is compared with."""
        if self.torchlift is None or (self.relative and not self.torch_func):
            return None
        return self.torchlift / self.torch_func if self.relative else self.torchlift

    @property
    def met(self):
        return None if self.target is None or self.reached is None else self.reached <= self.target

    def as_dict(self):
        return dataclasses.asdict(self) | {"reached": self.reached, "met": self.met}


def number(value):
    if value is None:
        return "-"
    digits = 3 if abs(value) < 2 else 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}"


def cells(row):
    target = "" if row.target is None else f"<= {row.target:g}" + (" of torch.func" if row.relative else "")
    reached = number(row.reached) if row.relative else ""
    verdict = {True: "met", False: "NOT MET", None: row.note}[row.met]
    return [f"{row.what}, {row.unit}", number(row.torch_func), number(row.torchlift), reached, target, verdict]


HEAD = ["what", "torch.func", "torchlift", "share", "target", ""]


def text(rows):
    """Lines of a table in columns."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    align = [str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust]
    return ["  ".join(a(cell, w) for a, cell, w in zip(align, line, widths)).rstrip() for line in lines]
