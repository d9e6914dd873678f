"""What can be said to recipes and to the one call, each option written down once: name, type, and what it means.

    Unpack[SharedOptions]               the options of a call, as type checkers and editors see them
    words(SharedOptions, "backend")     what the command line's help says
    described(SharedOptions)            a list for docstrings

Types are texts that name their modules in full, so that the command line reads the words without importing torch;
`fxquant.checks.hints` resolves them when a call is checked.
"""

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    import collections.abc

    import allocators.allocator
    import allocators.problem.overrides
    import passes.allocate.measure_latency
    import passes.prepare.fold_sqb

RECIPE_NAMES = (
    "best", "best_thorough", "mptq_vit", "lampq", "mix_qvit", "lrp_qvit", "vt_ptq", "tsptq_vit", "adalog", "repq_vit",
    "ptq4vit", "fq_vit", "psaq_vit", "optq", "erq", "brecq", "qdrop", "fima_q", "naive_min_max",
)  # fmt: skip
"""All recipes; `passes.recipes.RECIPES` has them by these names."""


class SharedOptions(TypedDict, total=False):
    """Options of every recipe and of whatever compiles."""

    overrides: Annotated[
        "collections.abc.Mapping[str, allocators.problem.overrides.Bits] | None",
        "Bits that you set yourself: for a layer's name, a role or a glob the bits, later ones win; or for one input "
        "of a product, such as blocks.0.attn.av.left.",
    ]
    first_last_bits: Annotated[
        "int | None",
        "Bits of the patch embedding's weight and of the head; if not given, they are chosen as all others are.",
    ]
    fully_quantized: Annotated["bool", "Quantize the inputs of softmax and LayerNorm too."]
    bits: Annotated[
        "tuple[int, ...]", "The widths that a layer may get, ascending, from 2 to 8; all of these if not given."
    ]
    backend: Annotated[
        "str", "Choose only among quantizers and widths that this backend runs as integers; simulated: among all. The "
        "result is simulated in either case, loads with a backend, and reports how many layers will run as integers.",
    ]  # fmt: skip
    latency: Annotated[
        "passes.allocate.measure_latency.MeasureLatency | None",
        "Batch size and threads that a budget in ms is for; if not given, one image on one thread.",
    ]


class RecipeOptions(SharedOptions, total=False):
    """Options of every recipe."""

    allocator: Annotated["allocators.allocator.Allocator | None", "What chooses bits; None for the recipe's own."]
    fold: Annotated["passes.prepare.fold_sqb.FoldSqb | None", "FoldSqb with other switches, or None for no fold."]


def words(options: type, name: str) -> str:
    """What an option means."""
    return str(options.__annotations__[name].__metadata__[0])


def described(options: type) -> str:
    """All options and what they mean, one item each, as docstrings have them after "Args:"."""
    items = [f"{name}: {words(options, name)}" for name in options.__annotations__]
    return "\n".join(textwrap.fill(item, 116, subsequent_indent="    ") for item in items)


Function = TypeVar("Function", bound=Callable[..., Any])


def documented(options: type) -> Callable[[Function], Function]:
    """A decorator: `{options}` in the docstring becomes the list of these options."""

    def decorate(function: Function) -> Function:
        function.__doc__ = (function.__doc__ or "").replace(
            "{options}", textwrap.indent(described(options), " " * 8).lstrip()
        )
        return function

    return decorate
