"""What a pipeline does before bits are allocated: no budget has any say in it, so it is done once and kept.

    prefix, rest = split(pipeline)
    searched = run_prefix(prefix, traced, context)          # recalled where context.cache has a folder
    quantized = rest.run(searched, context)

Kept under a signature of the traced model, the images, seed, batch size, versions, our sources and the passes' options.
Gram matrices that CompensateWeights will need (`SearchScales(keep_grams=True)`) are kept with the graph. Not kept, and
so run anew: passes from outside this package, whose code we cannot know, and graphs a file cannot hold.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from torch.fx import GraphModule

from fxquant.errors import ArtefactError
from fxquant.graph.annotation import Fact
from fxquant.runtime.searched import searched_from_file, searched_to_file
from fxquant.runtime.untrusted import from_json, to_json
from passes.check_budget import CheckBudget
from passes.contract import JournalEntry, PassContext
from passes.pipeline import Pipeline


def split(pipeline: Pipeline) -> tuple[Pipeline, Pipeline]:
    """The passes before layers are scored or timed or bits allocated, and the rest; all where none does any of it.

    Scores and times have signatures of their own in the cache: pipelines that differ in them share the first part.
    """
    deciding = {Fact.SCORED, Fact.LATENCY_KNOWN, Fact.BITS_ALLOCATED}
    position = next((index for index, step in enumerate(pipeline) if deciding & step.provides), len(pipeline))
    return pipeline[:position], pipeline[position:]


def run_prefix(prefix: Pipeline, traced: GraphModule, context: PassContext) -> GraphModule:
    """The graph after these passes, recalled or made. Recalled passes enter the journal with 0 s and `recalled`.

    Says nothing about budgets: `check_budget` comes first. Raises what the passes raise.
    """
    if context.cache.folder is None or not _can_be_kept(prefix):
        return prefix.run(traced, context)
    steps = [repr(step) for step in prefix]
    key = context.signature(traced, "searched graph", context.batch_size, steps)
    found = _recall(key, prefix, traced, context)
    if found is not None:
        return found
    first = len(context.journal.entries)
    searched = prefix.run(traced, context)
    kept = [asdict(entry) for entry in context.journal.entries[first:]]
    try:
        texts, tensors = searched_to_file(searched, traced)
        context.cache.write(key, {**texts, "journal": to_json(kept, "the journal")}, tensors)
    except ArtefactError:
        return searched  # a graph that no file can hold is a result all the same
    return searched


def check_budget(pipeline: Pipeline, with_roles: GraphModule) -> None:
    """Refuse a budget before anything long is done. with_roles: the traced model after AssignRoles; unchanged.

    Raises InfeasibleBudgetError or OverrideError.
    """
    CheckBudget().apply(with_roles, PassContext(ahead=tuple(pipeline)))


def _can_be_kept(prefix: Pipeline) -> bool:
    is_ours = all(type(step).__module__.partition(".")[0] in ("passes", "fxquant") for step in prefix)
    return is_ours and Fact.SCALES_SEARCHED in prefix.provides and Fact.CALIBRATED not in prefix.provides


def _recall(key: str, prefix: Pipeline, traced: GraphModule, context: PassContext) -> GraphModule | None:
    found = context.cache.read(key)
    if found is None:
        return None
    texts, tensors = found
    try:
        searched = searched_from_file(texts, tensors, traced)
        entries = [JournalEntry.from_dict(entry) for entry in from_json(texts.get("journal", ""), list, "the journal")]
        if [entry.step for entry in entries] != [repr(step) for step in prefix]:
            raise ArtefactError("the journal kept is another pipeline's")
    except (ArtefactError, TypeError, ValueError, KeyError):
        context.cache.forget(key)
        return None
    context.journal.entries += [replace(e, seconds=0.0, notes={**e.notes, "recalled": True}) for e in entries]
    return searched
