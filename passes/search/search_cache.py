"""What a pipeline does before bits are allocated: no budget has any say in it, so it is done once and kept.

    prefix, rest = split(pipeline)
    searched = run_prefix(prefix, traced, context)          # recalled where context.cache has a folder
    quantized = rest.run(searched, context)

Kept under a signature of the traced model, the images, seed, batch size, versions, our sources and the passes' options.
Gram matrices that CompensateWeights will need (`SearchScales(keep_grams=True)`) are kept with the graph; of several
ranks the first collects and writes them, and all are given them where they are recalled. Until the last
pass is done, the graph after the passes so far is kept as a part, for a process that takes the place of a killed one.
Not kept, and so run anew: passes from outside this package, whose code we cannot know, and graphs a file cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch.fx import GraphModule

from fxquant import ranks
from fxquant.artefact.cache import Kept, signature
from fxquant.artefact.searched_graph import searched_from_file, searched_to_file
from fxquant.checks.untrusted import from_json, to_json
from fxquant.errors import ArtefactError
from fxquant.graph.facts import facts_of
from passes.pipeline.checkpoint import Checkpoint
from passes.pipeline.contract import PassContext
from passes.pipeline.journal import JournalEntry
from passes.pipeline.pipeline import Pipeline
from passes.search.calibrate import CALIBRATED
from passes.search.owners import collected
from passes.search.search_scales import SCALES_SEARCHED


def split(pipeline: Pipeline) -> tuple[Pipeline, Pipeline]:
    """The passes before the first that works with candidates (scores or times layers, allocates bits), and the rest.

    What such a pass provides rests on SCALES_SEARCHED. Where there is none, the first part has all passes. Scores and
    times have signatures of their own in the cache: pipelines that differ in them share the first part.
    """
    decides = [any(fact.falls_with([SCALES_SEARCHED]) for fact in step.provides) for step in pipeline]
    position = decides.index(True) if True in decides else len(pipeline)
    return pipeline[:position], pipeline[position:]


def run_prefix(prefix: Pipeline, traced: GraphModule, context: PassContext, *, in_place: bool = False) -> GraphModule:
    """The graph after these passes, recalled or made. Recalled passes enter the journal with 0 s and `recalled`.

    Args:
        prefix: see the module.
        traced: the model.
        context: with the cache.
        in_place: change `traced` itself where nothing is kept, for which nobody else may need it.

    Says nothing about budgets: `check_budget` comes first. Raises what the passes raise.
    """
    cache, journal = context.cache, context.journal
    if cache.folder is None or not _can_be_kept(prefix):
        return prefix.run(traced, context, in_place=in_place)
    key = context.signature(traced, "searched graph", context.batch_size, [repr(step) for step in prefix])
    known = _read(cache.read(key), prefix, traced)
    if known is not None and len(known.entries) == len(prefix):
        journal.entries += [replace(e, seconds=0.0, notes={**e.notes, "recalled": True}) for e in known.entries]
        cache.forget_parts(key)  # of a process that was killed right after it had kept the whole
        return known.graph_module
    cache.forget(key)  # what is there does not fit
    with cache.work(key):
        searched, kept = _resumed(prefix, traced, context)
    is_kept = False
    with collected(searched), suppress(ArtefactError):  # a graph that no file can hold is a result all the same
        is_kept = cache.write(key, *kept())
    if ranks.once("keeping the searched graph", lambda: is_kept):
        cache.forget_parts(key)
    return searched


def _resumed(prefix: Pipeline, traced: GraphModule, context: PassContext) -> tuple[GraphModule, Callable[[], Kept]]:
    """The graph after these passes, begun where a killed process was; and what to keep of it."""
    journal, first_entry = context.journal, len(context.journal.entries)
    checkpoint = Checkpoint(context.cache, signature("searched graph"))
    start = _read(checkpoint.load(), prefix, traced) or _Searched(traced, [])
    journal.entries += start.entries

    def written(graph_module: GraphModule) -> Kept:
        texts, tensors = searched_to_file(graph_module, traced)
        entries = [asdict(entry) for entry in journal.entries[first_entry:]]
        return {**texts, "journal": to_json(entries, "the journal")}, tensors

    def keep(graph_module: GraphModule) -> None:
        """Between two passes; not while observers hold statistics, which Calibrate keeps itself."""
        done = len(journal.entries) - first_entry
        if done < len(prefix) and CALIBRATED not in facts_of(graph_module):
            with suppress(ArtefactError):
                checkpoint.save(lambda: written(graph_module))

    searched = prefix[len(start.entries) :].run(start.graph_module, context, keep)
    return searched, partial(written, searched)


def _can_be_kept(prefix: Pipeline) -> bool:
    is_ours = all(type(step).__module__.partition(".")[0] in ("passes", "fxquant") for step in prefix)
    return is_ours and SCALES_SEARCHED in prefix.provides and CALIBRATED not in prefix.provides


@dataclass(frozen=True)
class _Searched:
    """A graph after some passes, and the journal's entries of these."""

    graph_module: GraphModule
    entries: list[JournalEntry]


def _read(kept: Kept | None, prefix: Pipeline, traced: GraphModule) -> _Searched | None:
    """What was kept, where it is of the first passes of this pipeline; None for anything that does not fit."""
    if kept is None:
        return None
    texts, tensors = kept
    try:
        entries = [JournalEntry.from_dict(entry) for entry in from_json(texts.get("journal", ""), list, "the journal")]
        if [entry.step for entry in entries] != [repr(step) for step in prefix[: len(entries)]]:
            return None
        facts = prefix.assumes.union(*(step.provides for step in prefix))
        return _Searched(searched_from_file(texts, tensors, traced, facts), entries)
    except (ArtefactError, TypeError, ValueError, KeyError):
        return None
