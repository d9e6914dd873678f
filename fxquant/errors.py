"""Typed errors: each says what, where and what to do.

Every error raised on purpose derives from `FxQuantError`, so one `except` catches them all and nothing else.
"""

from __future__ import annotations


class FxQuantError(Exception):
    """Base of every error fxquant raises on purpose."""


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
