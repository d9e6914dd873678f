"""Several budgets from one calibration, several limits in one budget, and bits that you set yourself.

python examples/budgets_and_overrides.py
"""

from allocators.greedy import Greedy
from allocators.problem.budget import Budget
from fxquant import Session
from fxquant.data import embedded
from fxquant.errors import InfeasibleBudgetError, OverrideError

model, images = embedded.load_model(), embedded.calibration_images(32)

# Overrides: a layer's name, a role or a glob; bits, or (weight bits, activation bits); later ones win.
overrides = {"fc2": (None, 5), "blocks.0.*": (5, None), "head": 8}
session = Session(model, images, overrides=overrides)

# Calibration and search run once, at the first of these; each further budget takes a moment.
BUDGETS = [
    "W4A4",
    "W4A5, 0.7GBOPs",  # mean bits and bit operations together
    "0.35MB, A5",  # bytes of weights
    Budget(mean_weight_bits=4, mean_activation_bits=5, activation_mean="layers"),  # a plain mean over layers
]
print(f"{'budget':<20}{'W bits':>8}{'A bits':>8}{'weights MB':>12}{'BOPs G':>8}  binding")
for budget in BUDGETS:
    allocation = session.compile(budget).allocation
    assert allocation is not None
    used = allocation.usage
    print(
        f"{allocation.budget!s:<20}{used['mean_weight_bits']:>8.3f}{used['mean_activation_bits']:>8.3f}"
        f"{used['weight_bytes'] / 1e6:>12.3f}{used['bit_operations'] / 1e9:>8.3f}  {', '.join(allocation.binding)}"
    )

# The allocators read the same table of costs, so their answers can be compared.
milp, greedy = (session.compile("W4A4", allocator).allocation for allocator in (None, Greedy()))
assert milp is not None
assert greedy is not None
print(f"predicted loss at W4A4: integer program {milp.objective:.3g} ({milp.status}), greedy {greedy.objective:.3g}")

# What cannot be met is refused before any image is touched, with the least that can.
for wrong in ({"budget": "W1.5A4"}, {"budget": "W4A4", "overrides": {"blocks.9.*": 8}}):
    try:
        Session(model, images, overrides=wrong.get("overrides")).check(wrong["budget"])
    except (InfeasibleBudgetError, OverrideError) as error:
        print(f"refused: {error}")
