"""Compose a pipeline: take a recipe apart, replace its allocator, and put a pass of your own into it.

    python examples/own_pipeline.py

How to write a pass, step by step: docs/how_to/writing_a_pass.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

import fxquant
from allocators.greedy import Greedy
from fxquant.data import embedded
from fxquant.errors import PipelineError
from fxquant.graph.annotation import Role, annotate_operands, annotation_of, nodes_with_role
from fxquant.graph.facts import Fact
from passes.allocate.allocate_bits import AllocateBits
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes import mptq_vit
from passes.substitute.substitute_quantizers import BITS_ALLOCATED


@dataclass(frozen=True)
class KeepHigh:
    """Raise every node of one role to at least `bits`, whatever the budget says."""

    role: Role
    bits: int = 8

    requires: ClassVar[frozenset[Fact]] = frozenset({BITS_ALLOCATED})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        changed = 0
        for node in nodes_with_role(graph_module, self.role):
            annotation = annotation_of(node)
            raised = [None if bits is None else max(bits, self.bits) for bits in annotation.bits]
            changed += raised != list(annotation.bits)
            annotate_operands(node, bits=raised, pinned=[True] * len(raised))
        return changed


model, images = embedded.load_model(), embedded.calibration_images(32)

# A recipe is a pipeline; a pipeline is a tuple of frozen passes that is edited by making another one.
pipeline = mptq_vit("W4A4", allocator=Greedy(), fold=FoldSqb(mu="midrange"))
pipeline = pipeline.after(AllocateBits, KeepHigh(Role.PROJ, bits=6))
for index, step in enumerate(pipeline):
    print(index, type(step).__name__)

# Run it pass by pass: the first run ends before AllocateBits, and two endings start from its result.
middle = pipeline.position(AllocateBits)
context = PassContext(images)
searched = pipeline[:middle].run(fxquant.trace(model, images[:2]), context)
with_mine = pipeline[middle:].run(searched, context)
without_mine = pipeline[middle:].without(KeepHigh).run(searched, context)
for node, other in zip(nodes_with_role(with_mine, Role.PROJ), nodes_with_role(without_mine, Role.PROJ), strict=True):
    mine, theirs = annotation_of(node), annotation_of(other)
    print(f"{mine.layer}: {theirs.bits} -> {mine.bits}")

# Or let the one call run it; the pipeline brings the budget.
quantized = fxquant.compile(model, None, calibration=images, recipe=pipeline)
print([f"{entry.step.split('(')[0]} {entry.nodes_changed}" for entry in quantized.journal.entries])

# A pass in the wrong place is refused when the pipeline is built, not when it runs.
try:
    Pipeline([AssignRoles(), KeepHigh(Role.PROJ)])
except PipelineError as error:
    print("refused:", error)
