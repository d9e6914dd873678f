"""Codebooks: levels as good as theory says, codes as the definition says, files that cannot lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import ArtefactError
from fxquant.quantizers.codebook import CodebookQuantizer
from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.lloyd_max import companded, lloyd_max
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.search import search_activation
from tests.quantizers.plain_versions import squared_error, statistics_of, to_bf16

BOOKS = st.integers(1, 5).flatmap(
    lambda bits: st.tuples(
        st.just(bits), st.integers(0, 255), st.sets(st.integers(0, 255), min_size=1, max_size=2**bits).map(sorted)
    )
)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_values_get_the_levels_of_max(bits: int, error: float) -> None:
    """Max (1960), Table I: mean squared error of the best levels for a normal distribution of variance 1."""
    x = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0))
    (candidate,) = search_activation(statistics_of(x), FAMILIES["codebook"], [bits], len(x), weighted=False)
    assert squared_error(x, candidate.quantizer(x)) / x.numel() == pytest.approx(error, rel=0.03)
    uniform = search_activation(statistics_of(x), FAMILIES["symmetric"], [bits], len(x), weighted=False)[0]
    assert candidate.noise < 0.95 * uniform.noise


@pytest.mark.parametrize("kind", ["normal", "gelu", "tailed"])
def test_few_levels_are_close_to_the_best_of_all(kind: str) -> None:
    """Against every way of cutting sorted values in three (at every tenth), each part with its mean for a level."""
    x = torch.randn(1, 1500, generator=torch.Generator().manual_seed(1))
    x = to_bf16({"normal": x, "gelu": torch.nn.functional.gelu(2 * x), "tailed": x**3}[kind])
    values = np.sort(x[0].double().numpy())
    prefix = np.stack([np.concatenate([[0.0], np.cumsum(values**k)]) for k in range(3)])

    def error(ends: tuple[int, ...]) -> float:
        n, first, second = np.diff(prefix[:, [0, *ends, len(values)]], axis=1)
        return float((second - first**2 / n).sum())

    best = min(error(ends) for ends in itertools.combinations(range(10, len(values), 10), 2))
    found = lloyd_max(statistics_of(x).moments, companded(statistics_of(x).moments, 3))
    reached = squared_error(x[0], torch.tensor(found)[(x[0][:, None] - torch.tensor(found)).abs().argmin(1)])
    assert reached <= 1.02 * best


def test_weights_decide_where_levels_lie() -> None:
    x = torch.linspace(0, 1, 2000).reshape(2, -1)
    heavy = (x > 0.8).float() + 1e-4
    plain, weighted = (
        search_activation(statistics_of(x, w), FAMILIES["codebook"], [2], 2, weighted=True)[0].quantizer
        for w in (torch.ones_like(x), heavy)
    )
    assert isinstance(plain, CodebookQuantizer)
    assert isinstance(weighted, CodebookQuantizer)
    assert (plain.levels() > 0.8).sum() == 1
    assert (weighted.levels() > 0.8).sum() == 3


@given(BOOKS, st.floats(1e-3, 1e3), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_every_value_gets_the_code_nearest_to_its_byte(
    book: tuple[int, int, list[int]], scale: float, seed: int
) -> None:
    bits, zero, codes = book
    quantizer = CodebookQuantizer(bits, scale, zero, codes)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * scale * 100
    fine = ((x * (1 / quantizer.scale)).round() + zero).clamp(0, 255)
    distance = (fine[:, None] - torch.tensor(codes).float()).abs()
    expected = distance.argmin(1)  # the first of equal ones: the lower
    found = quantizer.quantize(x)
    assert torch.equal(found.long(), expected)
    assert int(found.max()) < 2**bits
    values = (torch.tensor(codes).float()[expected] - zero) * quantizer.scale
    assert torch.equal(quantizer(x), values)
    assert torch.equal(quantizer.dequantize(found), values)


def test_a_codebook_is_built_again_from_its_settings() -> None:
    quantizer = CodebookQuantizer(3, 0.25, 7, [0, 5, 7, 8, 200])
    again = Quantizer.from_settings(quantizer.settings())
    again.load_state_dict(quantizer.state_dict())
    x = torch.linspace(-5, 60, 999)
    assert torch.equal(again(x), quantizer(x))


@pytest.mark.parametrize(
    "changed",
    [
        {"codes": []},
        {"codes": [3, 3]},
        {"codes": [4, 3]},
        {"codes": [0, 256]},
        {"codes": [-1, 2]},
        {"codes": list(range(9))},
        {"codes": [0.5, 2]},
        {"codes": "01"},
        {"zero": 256},
        {"zero": -1},
        {"bits": 0},
    ],
)
def test_settings_that_are_no_codebook_are_refused(changed: dict[str, object]) -> None:
    good = {"kind": "codebook", "bits": 3, "zero": 7, "codes": [0, 5, 7]}
    Quantizer.from_settings(good)
    with pytest.raises(ArtefactError, match="codebook"):
        Quantizer.from_settings({**good, **changed})
