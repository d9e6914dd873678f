"""Typed errors: each says what, where and what to do.

Every error raised on purpose derives from `FxQuantError`, so one `except` catches them all and nothing else. A value of
the wrong Python type raises the twin of its error, which is a `TypeError` too: `CalibrationTypeError` is caught by
`except CalibrationError`, by `except TypeError` and by `except FxQuantError`.

    raise CalibrationError.for_type(f"calibration images must be a tensor, found {type(images).__name__}")
"""

from __future__ import annotations


class FxQuantError(Exception):
    """Base of every error fxquant raises on purpose."""

    @classmethod
    def for_type(cls, message: str) -> FxQuantError:
        """This error for a value of the wrong Python type: the twin that is a TypeError as well."""
        return next(_TWINS[base] for base in cls.__mro__ if base in _TWINS)(message)


class TraceError(FxQuantError):
    """The model could not be traced into a graph, or its graph does not compute what the model computes."""


class CoverageError(TraceError):
    """Too few of the model's quantizable weights are visible in its graph."""


class PatternError(FxQuantError):
    """A pattern that a pass needs was not found in the graph."""


class PipelineError(FxQuantError):
    """A pipeline is put together wrongly: a pass needs a fact that no earlier pass provides."""


class VerificationError(FxQuantError):
    """A graph does not have a fact it claims to have."""


class BudgetError(FxQuantError, ValueError):
    """A budget cannot be read, contradicts itself or names no quantity."""


class InfeasibleBudgetError(BudgetError):
    """No allocation meets the budget: the message names the minimum reachable and the layers that pin it."""


class OverrideError(FxQuantError, ValueError):
    """An override matches no layer, or asks for bits that are not among the candidates."""


class SensitivityError(FxQuantError, ValueError):
    """A score is NaN, infinite or negative: the message names the layer."""


class CalibrationError(FxQuantError, ValueError):
    """The calibration images are missing, empty, of the wrong shape or dtype, or not finite."""


class ModelError(FxQuantError, ValueError):
    """The model itself cannot be quantized: NaN or infinite weights, no parameters, wrong dtype."""


class OptionError(FxQuantError, ValueError):
    """An option is not one the call takes: a seed, a path, a callback, a card, a field of a pass."""


class InputError(FxQuantError, ValueError):
    """The images a quantized model is called with are not what it was compiled for: shape, dtype, device or values."""


class StateError(ModelError, RuntimeError):
    """A state dict does not belong to the quantized model it is loaded into, or a model has none."""


class DataError(FxQuantError, ValueError):
    """Images or labels on disk cannot be read as asked."""


class ArtefactError(FxQuantError):
    """A file is not an fxquant artefact, is damaged, or was written by an incompatible version."""


class ExportError(FxQuantError):
    """A model cannot be written for other runtimes."""


class BackendError(FxQuantError):
    """A backend cannot run here, or refuses what it was given."""


class MissingExtraError(FxQuantError, ImportError):
    """An optional dependency is missing: the message gives the pip command that installs it."""


class DistributedError(FxQuantError, RuntimeError):
    """The processes of a process group do not work together: one has failed, is gone, or was given something else."""


class LostRankError(DistributedError):
    """Another process of the group has died, or does not answer."""


class TraceTypeError(TraceError, TypeError):
    """A model to trace is of the wrong Python type."""


class PatternTypeError(PatternError, TypeError):
    """The name of a quantizer family is of the wrong Python type."""


class PipelineTypeError(PipelineError, TypeError):
    """A pass, a recipe or a part of a pipeline is of the wrong Python type."""


class BudgetTypeError(BudgetError, TypeError):
    """A budget or an allocator is of the wrong Python type."""


class OverrideTypeError(OverrideError, TypeError):
    """An override is of the wrong Python type."""


class SensitivityTypeError(SensitivityError, TypeError):
    """A score, or an option of what computes it, is of the wrong Python type."""


class CalibrationTypeError(CalibrationError, TypeError):
    """Calibration images, or an option of calibration, are of the wrong Python type."""


class ModelTypeError(ModelError, TypeError):
    """A model, its name or its weights is of the wrong Python type."""


class OptionTypeError(OptionError, TypeError):
    """An option is of the wrong Python type."""


class InputTypeError(InputError, TypeError):
    """What a quantized model is called with is of the wrong Python type."""


class DataTypeError(DataError, TypeError):
    """Images, labels or a path to them are of the wrong Python type."""


class ArtefactTypeError(ArtefactError, TypeError):
    """An artefact or its path is of the wrong Python type."""


class ExportTypeError(ExportError, TypeError):
    """An option of an export is of the wrong Python type."""


class BackendTypeError(BackendError, TypeError):
    """The name of a backend is of the wrong Python type."""


_TWINS: dict[type[FxQuantError], type[FxQuantError]] = {
    TraceError: TraceTypeError,
    PatternError: PatternTypeError,
    PipelineError: PipelineTypeError,
    BudgetError: BudgetTypeError,
    OverrideError: OverrideTypeError,
    SensitivityError: SensitivityTypeError,
    CalibrationError: CalibrationTypeError,
    ModelError: ModelTypeError,
    OptionError: OptionTypeError,
    InputError: InputTypeError,
    DataError: DataTypeError,
    ArtefactError: ArtefactTypeError,
    ExportError: ExportTypeError,
    BackendError: BackendTypeError,
}

BY_ARGUMENT: dict[str, type[FxQuantError]] = {
    "model": ModelError,
    "budget": BudgetError,
    "calibration": CalibrationError,
    "images": CalibrationError,
    "batch_size": CalibrationError,
    "recipe": PipelineError,
    "allocator": BudgetError,
    "overrides": OverrideError,
    "outside_bits": OverrideError,
    "first_last_bits": BudgetError,
    "fully_quantized": PipelineError,
    "latency": BudgetError,
    "backend": BackendError,
    "cache": ArtefactError,
}
"""What an argument of this name raises, in every call that compiles."""
