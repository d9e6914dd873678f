"""Brief tables: the same answers to five digits, and nothing that a file may not say."""

from __future__ import annotations

from typing import Any

import pytest

from allocators.problem.brief_table import from_brief, to_brief
from fxquant.errors import ArtefactError
from tests.allocators.tables import random_table

pytestmark = pytest.mark.quick


def test_a_brief_table_answers_like_the_table() -> None:
    table = random_table(0, 7)
    brief = from_brief(to_brief(table))
    lowest, highest = table.lowest(), table.highest()
    for assignment in (lowest, highest):
        assert brief.usage(assignment) == table.usage(assignment)
        assert brief.objective(assignment) == pytest.approx(table.objective(assignment), rel=1e-4)
    assert (brief.allowed == table.allowed).all()
    assert to_brief(brief) == to_brief(table)


@pytest.mark.parametrize(
    "change",
    [
        {"macs": None}, {"layers": 3}, {"layers": []}, {"bits": ["a"]}, {"cost": [[1]]}, {"extra": 1},
        {"bits": [2, 300]}, {"elements": [[2**60], [2**60]]}, {"cost": [[[1e200] * 3], [[1e200] * 3]]},
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(change: dict[str, Any]) -> None:
    values = to_brief(random_table(1, 7))
    with pytest.raises(ArtefactError, match="not a cost table"):
        from_brief({**values, **change})


@pytest.mark.parametrize("values", [None, [], {}, "table", 3])
def test_other_values_are_refused(values: Any) -> None:
    with pytest.raises(ArtefactError, match="not a cost table"):
        from_brief(values)
