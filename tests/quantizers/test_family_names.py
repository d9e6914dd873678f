"""Families by name: collected from the modules of the package, each name once."""

from __future__ import annotations

import pytest

from fxquant.artefact.module_json import quantizer_from_json, quantizer_to_json
from fxquant.errors import ArtefactError, PatternError
from fxquant.quantizers import uniform
from fxquant.quantizers.families import BYTE_FAMILIES, FAMILIES, UNIFORM_FAMILIES, register
from fxquant.quantizers.family import Family
from fxquant.quantizers.level_table import LevelTableQuantizer

pytestmark = pytest.mark.quick


def test_families_are_those_that_modules_end_in() -> None:
    for family in uniform.FAMILIES:
        assert FAMILIES[family.name] is family
    assert UNIFORM_FAMILIES.keys() <= BYTE_FAMILIES.keys() <= FAMILIES.keys()


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(PatternError, match="called 'symmetric' already"):
        register(Family("symmetric", uniform.symmetric))
    assert FAMILIES["symmetric"] is uniform.FAMILIES[0]


def test_a_kind_without_rules_is_in_no_file() -> None:
    with pytest.raises(ArtefactError, match="no quantizer of kind 'level-table' in files; there are adalog, "):
        quantizer_to_json(LevelTableQuantizer(4, 1.0), "fc")
    with pytest.raises(ArtefactError, match="quantizer 'fc': there is no quantizer of kind 'level-table'"):
        quantizer_from_json({"kind": "level-table", "bits": 4}, "fc", {})
