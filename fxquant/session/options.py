"""Options of `fxquant.compile`, `Session`, `frontier` and their commands, each written down once: `passes.options`."""

from typing import TYPE_CHECKING, Annotated

from passes.options import SharedOptions

if TYPE_CHECKING:
    import collections.abc
    import os
    import typing

    import fxquant.sensitivity.objective
    import passes.pipeline.pipeline
    import passes.pipeline.progress


class SessionOptions(SharedOptions, total=False):
    """How a model is calibrated, searched and compiled, besides its images and its budget."""

    recipe: Annotated[
        "str | passes.pipeline.pipeline.Pipeline | collections.abc.Callable[..., passes.pipeline.pipeline.Pipeline]",
        "A name of passes.recipes.RECIPES; or a function like them, such as partial(lampq, update=None), which has "
        "further options; or a Pipeline, which brings its own budget (give None) and options.",
    ]
    objective: Annotated[
        "str | fxquant.sensitivity.objective.Objective",
        "What quantization must keep of the output: classes (the distribution over classes), features (every tensor), "
        "embeddings (the direction of vectors); auto: classes where the model gives class scores, else features.",
    ]
    inputs: Annotated[
        "collections.abc.Mapping[str, typing.Any] | None",
        "Further arguments of the model's forward, by name, with the value that they always have, such as "
        "output_hidden_states=True; the result is called with images alone.",
    ]
    image_sizes: Annotated[
        "collections.abc.Sequence[tuple[int, int]] | None",
        "Further sizes (height, width) of images that the result takes, each by a graph of its own that shares every "
        "layer; all of them are calibrated on images of the size that is given.",
    ]
    seed: Annotated["int", "The seed of every random draw: of images, rotations, gradients and training."]
    batch_size: Annotated[
        "int", "How many images go through the model at a time where outputs are compared, which bounds memory."
    ]
    progress: Annotated[
        "passes.pipeline.progress.ProgressReporter | bool | None",
        "Where long steps report: True draws bars on stderr, False draws none, None draws them where stderr is a "
        "terminal or a notebook; or an object with the methods of ProgressReporter.",
    ]
    cache: Annotated[
        "str | os.PathLike[str] | None",
        "Folder that keeps what was calibrated, searched and scored, so that the next budget on the same model, images "
        "and options only allocates, in any process; None keeps nothing.",
    ]
    card: Annotated[
        "collections.abc.Mapping[str, typing.Any] | None",
        "Entries to add to the protocol card, for example the name of the data; none of what the call finds out.",
    ]


DEFAULT_RECIPE, DEFAULT_OBJECTIVE, DEFAULT_SEED, DEFAULT_BATCH_SIZE = "best", "auto", 0, 8
"""What the options are where they are not given; all others change nothing then."""
