"""Where calibration images come from: the caller, or the model itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.artefact.cache import Cache, code_signature, signature
from fxquant.graph.capture.model_checks import check_model
from fxquant.graph.capture.plain_model import copy_of, unwrapped
from fxquant.graph.capture.tracing import trace
from fxquant.graph.nodes import device_of
from fxquant.graph.output_tree import Output, Tree, flat
from fxquant.runtime.known_answers import answer_images_for, range_of
from fxquant.sensitivity.objective import AUTO, Objective, check_objective, objective_named
from fxquant.session.sizes import sized_model
from fxquant.synthesis.pictures import Pictures, Synthesis
from fxquant.synthesis.synthesize import synthesize_for, trace_without_images
from passes.pipeline.contract import PassContext, SizedModel, check_draws
from passes.pipeline.pipeline import Pipeline
from passes.pipeline.progress import ProgressReporter
from passes.pipeline.proof import IMAGES
from passes.prepare.assign_roles import AssignRoles


@dataclass(frozen=True)
class ModelOutputs:
    """What the caller's own model gives.

    Args:
        first: the outputs for the first two calibration images.
        answers: the outputs for the images that known answers are about.
        tree: how its tensors are arranged, with the model's own containers.
    """

    first: Output
    answers: Output
    tree: Tree


class ModelSource:
    """The traced model and its calibration images; synthesised ones are made when they are first asked for.

    Args:
        model: the caller's model, which is not changed. Where it has an attribute `takes_pictures` that is false, no
            other images are made from the calibration images (`PassContext.pictures`).
        calibration: images (N, C, H, W), or how to make them; None makes them by the default options.
        seed: the seed of every random draw.
        batch_size: images per forward where outputs are compared.
        cache: the folder that keeps results.
        progress: what long steps report their progress to.
        objective: what quantization must keep of the output, or its name.
        inputs: arguments of the model's forward besides the images, by name, which are always the same.
        image_sizes: further (height, width) of images, see `fxquant.session.sizes`.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor | Synthesis | None,
        seed: int,
        batch_size: int,
        cache: Cache,
        progress: ProgressReporter,
        objective: str | Objective = AUTO,
        inputs: Mapping[str, Any] | None = None,
        image_sizes: tuple[tuple[int, int], ...] = (),
    ) -> None:
        check_objective(objective)
        check_model(model, inputs)
        self._inputs, self._image_sizes = inputs, image_sizes
        seed, batch_size = check_draws(seed, batch_size)
        self._model, self._given = model, Synthesis() if calibration is None else calibration
        self._seed, self._batch_size, self._cache, self.progress = seed, batch_size, cache, progress
        self._objective = objective

    @cached_property
    def _pictures(self) -> Pictures:
        assert isinstance(self._given, Synthesis)
        return Pictures.of(self._model, self._given)

    @cached_property
    def traced(self) -> GraphModule:
        """The traced model. Raises as `fxquant.trace`, and CalibrationError where the image size is not known."""
        task = self.progress.track("tracing the model", 1)
        if isinstance(self._given, Synthesis):
            found = trace_without_images(self._model, self._pictures, self._inputs)
        else:
            found = trace(self._model, self._given[:IMAGES], inputs=self._inputs)
        task.advance()
        task.close()
        return found

    @cached_property
    def with_roles(self) -> GraphModule:
        """A copy of the traced model after AssignRoles; its tensors are the traced model's own."""
        tensors = {id(tensor): tensor for tensor in (*self.traced.parameters(), *self.traced.buffers())}
        return Pipeline([AssignRoles()]).run(copy.deepcopy(self.traced, tensors), PassContext(), in_place=True)

    @cached_property
    def objective(self) -> Objective:
        """What quantization must keep of the output; "auto" goes by what the traced model gives."""
        return objective_named(self._objective, self.traced)

    @cached_property
    def images(self) -> Tensor:
        """The images, float (N, C, H, W). Raises CalibrationError where they cannot be made."""
        if isinstance(self._given, Synthesis):
            settings = self._seed, self._batch_size, self._cache, self.progress
            return synthesize_for(self.with_roles, self._pictures, self._given, *settings)
        return self._given

    @cached_property
    def context(self) -> PassContext:
        """What passes are given; makes the images, and runs the model on two of them."""
        return PassContext(
            self.images,
            self._batch_size,
            self._seed,
            cache=self._cache,
            progress=self.progress,
            expected=self.model_outputs.first,
            objective=self.objective,
            sized=self.sized,
            pictures=getattr(self._model, "takes_pictures", True),
        )

    @cached_property
    def sized(self) -> tuple[SizedModel, ...]:
        """The model at the other image sizes. Raises as `fxquant.trace`, naming the size."""
        others = [size for size in self._image_sizes if size != tuple(self.images.shape[2:])]
        if not others:
            return ()
        task = self.progress.track("tracing image sizes", len(others))
        found = []
        for size in others:
            found.append(sized_model(self._model, self.first_images, size, self.traced, self._inputs))
            task.advance()
        task.close()
        return tuple(found)

    @property
    def first_images(self) -> Tensor:
        """The first two images, where the model is; one of them twice where there is one."""
        return self.images[torch.arange(IMAGES) % len(self.images)].to(device_of(self._model))

    def float_model(self) -> nn.Module:
        """A copy of the caller's model in inference mode, with all that hangs on it and its fixed inputs."""
        return copy_of(self._model, self._inputs)

    @cached_property
    def model_outputs(self) -> ModelOutputs:
        """Outputs of `float_model`."""
        first = self.first_images
        more = answer_images_for(self.traced, pixels=range_of(self.images)).to(first.device)
        model = self.float_model()
        with torch.no_grad():
            tree, outputs = flat(model(first.clone()))
            return ModelOutputs(outputs, flat(model(more))[1], tree)

    @property
    def argument(self) -> str | None:
        """What the model's forward calls the images; None where they have no name."""
        first = next(iter(inspect.signature(unwrapped(self._model).forward).parameters.values()))
        return first.name if first.kind is first.POSITIONAL_OR_KEYWORD else None

    def given_up(self) -> GraphModule:
        """The traced model, to be changed in place; the source keeps its images and outputs and traces no more."""
        self.context  # noqa: B018 - which is made from the traced model
        traced: GraphModule = self.__dict__.pop("traced")
        copied: GraphModule | None = self.__dict__.pop("with_roles", None)
        # A graph refers to itself, so the copy stays until Python collects its cycles. It is emptied here, or it would
        # keep every tensor that a pass replaces in the traced model.
        for module in () if copied is None else copied.modules():
            module._parameters.clear()
            module._buffers.clear()
        return traced

    @cached_property
    def given(self) -> dict[str, Any]:
        """What decides a result besides the pipeline, by name, to be compared between ranks."""
        given, folder = self._given, self._cache.folder
        return {
            "model": signature(self._model),
            "inputs": signature(self._inputs),
            "calibration images": repr(given) if isinstance(given, Synthesis) else signature(given),
            "image sizes": self._image_sizes,
            "seed": self._seed,
            "batch size": self._batch_size,
            "objective": self._objective if isinstance(self._objective, str) else self._objective.name,
            "cache": "no folder" if folder is None else "a folder",
            "code": code_signature(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "number of threads": torch.get_num_threads(),
        }

    @property
    def described(self) -> str:
        """For the protocol card."""
        given = self._given
        return given.described(self._seed) if isinstance(given, Synthesis) else f"{len(given)} images given"
