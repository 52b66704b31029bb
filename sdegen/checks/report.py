"""What a check found: one row for each comparison, and the table of a report.

A residual is in standard errors of a mean over samples (unit "SE"), or a number without
noise (unit ""): relative to the size of the terms, or a probability.
"""

import dataclasses
import math
import textwrap

from ..runs.recorder import table
from ..typing import ScalarLike

_WIDTH = 100
_HEAD = ("", "check", "what is compared", "   found", " allowed")
_NAME, _WHAT = 14, 58  # with the other columns that makes less than the width


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: its part of the check, what was found and what is allowed.

    `passed` is None where it was skipped, and the remark says why.
    """

    part: str
    name: str
    what: str
    residual: float | None = None
    limit: float | None = None
    unit: str = ""
    passed: bool | None = None
    remark: str = ""


def measured(
    part: str,
    name: str,
    what: str,
    residual: ScalarLike,
    limit: ScalarLike,
    unit: str = "",
    remark: str = "",
) -> Row:
    """A row that passes if residual <= limit, which a NaN does not."""
    residual, limit = float(residual), float(limit)
    return Row(part, name, what, residual, limit, unit, residual <= limit, remark)


def worst(
    part: str, name: str, what: str, errors: dict[str, ScalarLike], limit: ScalarLike
) -> Row:
    """A row for the largest error, in standard errors; a failure says which it is."""
    size = {label: float(error) for label, error in errors.items()}
    label = max(size, key=lambda label: (math.isnan(size[label]), size[label]))
    remark = "" if size[label] <= limit else f"worst: {label}"
    return measured(part, name, what, size[label], limit, "SE", remark)


def skipped(part: str, name: str, what: str, why: str) -> Row:
    """A row that could not be measured, and why."""
    return Row(part, name, what, remark=why)


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a check of one process; `str` is the table, `ok` the verdict.

    `advice` are hints to a repair. `precision` is the dtype of the numbers in the
    process, which sets the limits.
    """

    process: str
    precision: str
    rows: tuple[Row, ...]
    advice: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no row failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.passed is False)

    def __str__(self):
        cells = [dict(zip(_HEAD, _cells(row), strict=True)) for row in self.rows]
        head, rule, *lines = table(cells or [dict.fromkeys(_HEAD, "")]).split("\n")
        shown = [head, rule]
        for row, line in zip(self.rows, lines, strict=False):
            shown += [line, *_wrap(row.remark, " " * 8)]
        left_out = sum(row.passed is None for row in self.rows)
        count, total = len(self.failed), len(self.rows) - left_out
        verdict = f"all {total} checks passed"
        if count:
            verdict = f"{count} of {total} checks FAILED"
        note = f" ({left_out} skipped)" if left_out else ""
        title = f"{self.process} ({self.precision})"
        advice = [line for hint in self.advice for line in _wrap(hint, "  ")]
        verdict = f"{self.process}: {verdict}{note}."
        return "\n".join([title, "", *shown, "", verdict, *advice])


def number(value: float | None, unit: str = "") -> str:
    """`value` as a table shows it: two digits, and its unit."""
    if value is None:
        return "-"
    if unit == "SE":
        return f"{value:.1f} SE" if value < 1e3 else f"{value:.0e} SE"
    return f"{value:.1e}" if value else "0"


def _cells(row):
    verdict = {True: "ok", False: "FAIL", None: "skip"}[row.passed]
    numbers = (f"{number(v, row.unit):>8}" for v in (row.residual, row.limit))
    return verdict, row.name[:_NAME], row.what[:_WHAT], *numbers


def _wrap(text, indent):
    options = {"initial_indent": indent, "subsequent_indent": indent + "  "}
    wrap = textwrap.TextWrapper(_WIDTH, replace_whitespace=False, **options)
    return [part for line in text.split("\n") for part in wrap.wrap(line)]
