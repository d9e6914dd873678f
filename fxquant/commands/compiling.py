"""Options of whatever compiles, as `compile`, `sweep` and `frontier` take them, in the words of their Python calls.

    @compiling
    def compile_model(model: o.Model, given: Compiling = Compiling(), json: o.Json = False) -> None:

`given` becomes one option a field on the command line, and arrives as the value of all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Unpack, get_type_hints

import typer

from fxquant.commands.options import BACKENDS_HELP, QUANTIZATION, Device
from fxquant.commands.texts import parse_bits, parse_inputs, parse_overrides, parse_sizes
from fxquant.errors import OptionError
from fxquant.session.options import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_OBJECTIVE,
    DEFAULT_RECIPE,
    DEFAULT_SEED,
    SessionOptions,
)
from passes.options import words


def _says(name: str, more: str = "") -> str:
    """Help: what the option means, and how it is written here."""
    return f"{words(SessionOptions, name)} {more}".rstrip()


_option = functools.partial(typer.Option, rich_help_panel=QUANTIZATION)


@dataclass(frozen=True)
class Compiling:
    """All options of `fxquant.compile` that a command line can give but the recipe, the allocator and the cache."""

    override: Annotated[
        list[str] | None,
        _option(help=_says("overrides", "layer=6, or layer=4/8 for weight/activation bits. Repeatable.")),
    ] = None
    option: Annotated[
        list[str] | None,
        _option(help="Of the recipe: name=value, the value as JSON or text, such as base=repq_vit. Repeatable."),
    ] = None
    recipe_file: Annotated[
        Path | None, _option(help="Recipe to read, .json or .toml: a recipe's name and options, or passes.")
    ] = None
    image_sizes: Annotated[str | None, _option(help=_says("image_sizes", "With commas: 224x224,256x320."))] = None
    first_last_bits: Annotated[int | None, _option(help=_says("first_last_bits"))] = None
    fully_quantized: Annotated[bool, _option("--fully-quantized", help=_says("fully_quantized"))] = False
    bits: Annotated[str | None, _option(help=_says("bits", "With commas: 3,4,8."))] = None
    backend: Annotated[str, _option(help=_says("backend", f"{BACKENDS_HELP}."))] = "simulated"
    latency_batch: Annotated[int, _option(min=1, help="Images per batch that a budget in ms is for.")] = 1
    latency_threads: Annotated[int, _option(min=1, help="Threads that a budget in ms is for.")] = 1
    objective: Annotated[str, _option(help=_says("objective"))] = DEFAULT_OBJECTIVE
    input: Annotated[list[str] | None, _option(help=_says("inputs", "name=value, the value as JSON. Repeatable."))] = (
        None
    )
    seed: Annotated[int, _option(help=_says("seed", "And of which calibration images are taken."))] = DEFAULT_SEED
    batch_size: Annotated[int, _option(min=1, help=_says("batch_size"))] = DEFAULT_BATCH_SIZE
    device: Device = "cpu"

    def options(self, **more: Unpack[SessionOptions]) -> SessionOptions:
        """As Python takes them, with more beside them.

        Raises OverrideError, OptionError, DataError and PipelineError for what cannot be read.
        """
        from passes.allocate.measure_latency import MeasureLatency

        found: SessionOptions = {
            "overrides": parse_overrides(self.override),
            "first_last_bits": self.first_last_bits,
            "fully_quantized": self.fully_quantized,
            "backend": self.backend,
            "latency": MeasureLatency(self.latency_batch, self.latency_threads),
            "objective": self.objective,
            "inputs": parse_inputs(self.input),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        if self.bits is not None:
            found["bits"] = parse_bits(self.bits)
        if self.image_sizes is not None:
            found["image_sizes"] = parse_sizes(self.image_sizes)
        if self.recipe_file is not None or self.option:
            found["recipe"] = more["recipe"] = self._written(more.get("recipe", DEFAULT_RECIPE))
        return {**found, **more}

    def label(self, recipe: str) -> str:
        """What reports and results call the recipe: its name or that of its file, and the options given."""
        name = recipe if self.recipe_file is None else self.recipe_file.stem
        return name if not self.option else f"{name} ({', '.join(self.option)})"

    def _written(self, recipe: Any) -> Any:
        """The recipe of a file, or the one of a name, with the options given."""
        from passes.recipes.written import read_recipe, with_texts

        if self.recipe_file is None:
            return with_texts(recipe, self.option or [])
        if recipe != DEFAULT_RECIPE:
            raise OptionError(f"--recipe-file brings a recipe and --recipe names {recipe!r}: give one of them")
        return with_texts(read_recipe(self.recipe_file), self.option or [])


def compiling(command: Callable[..., None]) -> Callable[..., None]:
    """A decorator: the parameter annotated as `Compiling` becomes one option a field."""
    signature = inspect.signature(command, eval_str=True)
    hints = get_type_hints(Compiling, include_extras=True)
    fields = dataclasses.fields(Compiling)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.annotation is Compiling:
            parameters += [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
                )
                for field in fields
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        own = Compiling(**{field.name: given.pop(field.name) for field in fields})
        command(given=own, **given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
