"""OutputGram: by groups the sum over tokens, and off the diagonal as much of it as images agree on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.quantizers.statistics.output_gram import GROUP, OutputGram, gram_of


def matrices(images: int, noise: float, outputs: int = 24) -> list[Tensor]:
    """Of each image the same matrix and noise of its own, (1, outputs, outputs)."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(outputs, outputs, generator=generator)
    spread = (torch.randn(outputs, outputs, generator=generator) for _ in range(images))
    return [(root @ root.T + noise * (each + each.T))[None] for each in spread]


def gathered(found: list[Tensor]) -> OutputGram:
    gram = OutputGram()
    for each in found:
        gram.add(each)
    return gram


@pytest.mark.parametrize(("outputs", "size"), [(7, 7), (GROUP, GROUP), (GROUP + 2, 129), (576, 192), (257, 1)])
def test_groups_are_the_largest_that_divide_the_outputs(outputs: int, size: int) -> None:
    gradient = torch.randn(5, outputs, generator=torch.Generator().manual_seed(0))
    found = gram_of(gradient)
    assert found.shape == (outputs // size, size, size)
    whole = gradient.T @ gradient
    for group, matrix in enumerate(found):
        inside = slice(group * size, (group + 1) * size)
        torch.testing.assert_close(matrix, whole[inside, inside])


def test_what_all_images_say_stays() -> None:
    found = matrices(5, noise=0.0)
    torch.testing.assert_close(gathered(found).matrix(), found[0])


def test_one_image_says_nothing_off_the_diagonal() -> None:
    (only,) = matrices(1, noise=0.0)
    torch.testing.assert_close(gathered([only]).matrix(), torch.diag_embed(only.diagonal(dim1=1, dim2=2)))


def test_the_mean_is_drawn_to_its_diagonal_by_its_share_of_noise() -> None:
    """The share is known here: off the diagonal, entries of the noise have a variance of 2 noise^2 / images."""
    images, noise, outputs = 32, 30.0, 24
    found = matrices(images, noise, outputs)
    mean, shrunk = torch.stack(found).mean(0), gathered(found).matrix()
    torch.testing.assert_close(shrunk.diagonal(dim1=1, dim2=2), mean.diagonal(dim1=1, dim2=2))
    off = ~torch.eye(outputs, dtype=torch.bool)[None]
    kept = float(shrunk[off].norm() / mean[off].norm())
    power = float(mean[off].square().sum())
    assert kept == pytest.approx(1 - outputs * (outputs - 1) * 2 * noise**2 / images / power, abs=0.05)
    exact = matrices(1, 0.0)[0]
    assert (shrunk - exact)[off].norm() < (mean - exact)[off].norm()


def test_parts_merge_into_the_whole() -> None:
    found = matrices(6, noise=1.0)
    first, second = gathered(found[:2]), gathered(found[2:])
    first.merge(second.state())
    again = OutputGram()
    again.restore(first.state())
    torch.testing.assert_close(again.matrix(), gathered(found).matrix())


def test_an_image_added_is_an_image_merged_bit_for_bit() -> None:
    """So that one process may add what several ranks merge."""
    added, merged = OutputGram(), OutputGram()
    for each in matrices(6, noise=1.0):
        added.add(each)
        merged.merge(gathered([each]).state())
    assert torch.equal(added.matrix(), merged.matrix())


def test_a_layer_without_gradients_has_a_matrix_of_zeros() -> None:
    assert not gathered([torch.zeros(1, 3, 3)] * 2).matrix().any()
