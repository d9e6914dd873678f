"""A model that the tests of sessions share."""

from __future__ import annotations

import pytest

import fxquant
from fxquant.session.compiled import Compiled
from tests.models import images, vit


@pytest.fixture(scope="session")
def small() -> Compiled:
    """A small Vision Transformer in mean 4 and 5 bits; not to be changed."""
    return fxquant.compile(vit(), "W4A5", calibration=images())
