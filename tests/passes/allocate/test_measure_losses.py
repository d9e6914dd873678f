"""MeasureLosses: what it notes is the divergence of one operand alone."""

from __future__ import annotations

import pytest

from fxquant.errors import CalibrationError
from passes.allocate.measure_losses import REALISED, MeasureLosses
from tests.report.small_pages import measured_compiled


def test_every_operand_with_bits_has_a_loss() -> None:
    compiled = measured_compiled()
    found = next(entry.notes[REALISED] for entry in compiled.journal.entries if REALISED in entry.notes)
    assert set(found) == {row.layer for row in compiled.layers}
    for row in compiled.layers:
        assert [loss is None for loss in found[row.layer]] == [operand.bits is None for operand in row.operands]
        assert all(loss is None or loss >= 0 for loss in found[row.layer])
    assert sum(loss for losses in found.values() for loss in losses if loss) > 0


@pytest.mark.quick
def test_a_number_of_images_that_is_none_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at least one image"):
        MeasureLosses(images=0)
