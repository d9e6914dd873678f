"""Orders of rows and what undoes them."""

from __future__ import annotations

import pytest
import torch

from fxquant.runtime.integer.row_order import ReorderRows

pytestmark = pytest.mark.quick


def test_an_order_is_undone_by_its_inverse_only() -> None:
    rows = torch.randperm(12)
    order, back = ReorderRows(rows, (3, 4)), ReorderRows(rows.argsort(), (12,))
    x = torch.randn(2, 12, 5)
    assert torch.equal(back(order(x)), x)
    assert order.undone_by(back)
    assert not order.undone_by(ReorderRows(rows, (12,)))
    assert not order.undone_by(ReorderRows(torch.arange(6), (6,)))
