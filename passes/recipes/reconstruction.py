"""Systems in the papers' tables that learn roundings and scales block by block: BRECQ, QDrop, FIMA-Q.

    brecq("W4A4")                                   the paper's 20,000 steps for each block: hours on a CPU
    qdrop("W4A4", steps=200)                        fewer, with rates that rise as steps fall
    fima_q("W4A4", steps=200)

Calibrate with 1,024 images, as the papers do. What each differs in from its paper: docs/reference/papers.md.
"""

from __future__ import annotations

from typing import Any, Unpack

from allocators.uniform import Uniform
from passes.allocate.allocate_bits import AllocateBits
from passes.correct.reconstruct import Reconstruct
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.recipes.assembly import Options, checked_recipe, norm_inputs, with_options
from passes.search.calibrate import Calibrate
from passes.search.insert_observers import InsertObservers
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers

PAPERS_STEPS = 20_000
_MOST = 20.0  # times the papers' rates: what 100 steps learn by


@checked_recipe
def brecq(budget: Any, *, steps: int = PAPERS_STEPS, **options: Unpack[Options]) -> Pipeline:
    """BRECQ: rounding and activation scales learned block by block, errors weighted by the Fisher information.

    Li et al., ICLR 2021.

    Args:
        budget: anything `Budget.parse` takes.
        steps: gradient steps of each block; the paper's rates are those of 20,000.
    """
    return _reconstructed(budget, options, _learning(steps, drop=0.0, loss="fisher", rank=1))


@checked_recipe
def qdrop(budget: Any, *, steps: int = PAPERS_STEPS, **options: Unpack[Options]) -> Pipeline:
    """QDrop: the same with plain squared errors, while half of all activations stay float at random.

    Wei et al., ICLR 2022.

    Args:
        budget: anything `Budget.parse` takes.
        steps: see `brecq`.
    """
    return _reconstructed(budget, options, _learning(steps, drop=0.5, loss="mse"))


@checked_recipe
def fima_q(budget: Any, *, steps: int = PAPERS_STEPS, **options: Unpack[Options]) -> Pipeline:
    """FIMA-Q: QDrop with errors weighted by a diagonal plus rank-5 Fisher matrix.

    Wu et al., CVPR 2025.

    Args:
        budget: anything `Budget.parse` takes.
        steps: see `brecq`.
    """
    return _reconstructed(budget, options, _learning(steps, drop=0.5, loss="fisher", rank=5))


def _learning(steps: int, **settings: Any) -> Reconstruct:
    """AdaRound's and LSQ's rates in these papers, from float weights; fewer steps learn faster, up to a limit."""
    faster = min(PAPERS_STEPS / max(steps, 1), _MOST)
    return Reconstruct(
        steps=steps,
        images=32,
        rounding_rate=1e-3 * faster,
        scale_rate=4e-5 * faster,
        bias_rate=0.0,
        closed_form=None,
        checks=min(20, steps),
        **settings,
    )


def _reconstructed(budget: Any, options: Options, learning: Reconstruct) -> Pipeline:
    """Asymmetric uniform quantizers of least squared error everywhere, then the learning."""
    return with_options(
        options,
        [
            AssignRoles(),
            PlanOperands(
                post_gelu="asymmetric",
                post_softmax="asymmetric",
                other="asymmetric",
                weight="asymmetric",
                **norm_inputs(options, "asymmetric", "asymmetric"),
            ),
            InsertObservers(),
            Calibrate(gradient=False),
            SearchScales(criterion="mse"),
            AllocateBits(budget, Uniform()),
            learning,
            SubstituteQuantizers(),
        ],
    )
