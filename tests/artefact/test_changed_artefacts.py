"""Artefacts with anything changed in them load, or raise an ArtefactError and nothing else."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.artefact import artefact
from fxquant.errors import ArtefactError

# Anything at all

fuzzing = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@fuzzing
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4), st.booleans())
def test_flipped_bytes_never_raise_anything_else(small_bytes, tmp_path, flips, in_header):
    content = bytearray(small_bytes)
    length = int.from_bytes(content[:8], "little") + 8 if in_header else len(content)
    for place, change in flips:
        content[place % length] ^= change
    (tmp_path / "a").write_bytes(bytes(content))
    for read in (artefact.load, artefact.inspect_card, artefact.size_breakdown):
        try:
            read(tmp_path / "a")
        except ArtefactError:
            continue


JUNK = [
    None, True, False, 0, -1, 1, 7, 2**40, 2**70, -(2**63), 1e308, 0.5, "", "x", "weight", "call_module", "float16",
    "torch.relu", "__class__", "a.b.c", [], [[]], [1, 2], {}, {"node": 0}, {"tuple": [1]}, {"dict": [[[], 1]]},
    {"slice": [1]}, {"float": "inf"}, {"dtype": []}, {"device": 3}, {"format": {}}, {"ellipsis": 1}, {"class": "ReLU"},
]  # fmt: skip


def places(document, path=()):
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(graph, dice):
    """Replace, delete, duplicate or swap something somewhere."""
    found = list(places(graph))[1:]
    *parents, last = dice.choice(found)
    owner = graph
    for key in parents:
        owner = owner[key]
    action = dice.randrange(4)
    if action == 0:
        del owner[last]
    elif action == 1 and isinstance(owner, list):
        owner.insert(dice.randrange(len(owner) + 1), owner[last])
    elif action == 2:
        other = graph
        for key in dice.choice(found):
            other = other[key]
        owner[last] = json.loads(json.dumps(other))
    else:
        owner[last] = json.loads(json.dumps(dice.choice(JUNK)))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's, about the forward of a graph that makes no sense
@fuzzing
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_changed_graphs_load_or_raise_artefact_errors(edited, seed, count):
    def change(graph, tensors, texts):
        dice = random.Random(seed)
        for _ in range(count):
            mutate(graph, dice)

    path = edited(change)
    for read in (artefact.load, artefact.size_breakdown):
        try:
            read(path)
        except ArtefactError:
            continue
