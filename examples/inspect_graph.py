"""Inspect the annotated graph: roles before quantization, bits after it, and questions asked through networkx.

    python examples/inspect_graph.py

Writes graph.dot into the current folder, for Graphviz.
"""

from collections import Counter

import fxquant
from fxquant.data import embedded
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.facts import QUANTIZED, ROLES_ASSIGNED, TRACED, verify
from fxquant.graph.notes import COVERAGE
from fxquant.graph.printer import describe, format_graph
from passes.pipeline.contract import PassContext
from passes.pipeline.pipeline import Pipeline
from passes.prepare.assign_roles import AssignRoles
from passes.substitute.substitute_quantizers import BITS_ALLOCATED

model, images = embedded.load_model(), embedded.calibration_images(32)

# A trace is a torch.fx GraphModule; AssignRoles finds out what its nodes do.
context = PassContext()
graph_module = Pipeline([AssignRoles()]).run(fxquant.trace(model, images[:2]), context)
print(f"coverage: {COVERAGE.of(graph_module):.0%} of all weight elements are visible")
print("not matched:", context.journal.entries[0].notes["unmatched"])

macs: Counter[Role] = Counter()
for node in nodes_with_role(graph_module):
    annotation = annotation_of(node)
    assert annotation.role is not None
    macs[annotation.role] += annotation.macs
print("multiply-accumulates:", ", ".join(f"{role} {count:,}" for role, count in macs.most_common(4)))

print("\nBlock 0 before:")
for node in graph_module.graph.nodes:
    if annotation_of(node).block == 0:
        print("  ", describe(node))

# After compiling, the same lines show bits.
quantized = fxquant.compile(model, "W4A4", calibration=images)
print("\nBlock 0 after:")
for node in quantized.graph_module.graph.nodes:
    if annotation_of(node).block == 0:
        print("  ", describe(node))
for fact in (TRACED, ROLES_ASSIGNED, BITS_ALLOCATED, QUANTIZED):
    verify(quantized.graph_module, fact)
print(f"\n{len(format_graph(quantized.graph_module).splitlines())} lines in all; every fact holds")

# networkx: which matmuls multiply attention's operands in fewer than five bits?
graph = quantized.to_networkx()
nodes = {node.name: annotation_of(node) for node in quantized.graph_module.graph.nodes}
products = [name for name in graph if nodes[name].role in (Role.QK, Role.AV)]
narrow = [name for name in products if min(operand.bits or 0 for operand in nodes[name].inputs) < 5]
print(f"{len(narrow)} of {6 * 2} attention matmuls have fewer than 5 bits, such as {narrow[:2]}")
quantized.draw("graph.dot")
