"""Instructions of the inner loops of products on ARM, counted in what the compiler wrote.

python benchmarks/arm_loops.py [--compiler aarch64-linux-gnu-g++] [--objdump aarch64-linux-gnu-objdump]

No ARM processor is needed: each set is cross-compiled, and every loop with products in it is found as a branch back in
the disassembly. Beside each stands how many instructions it has for every one that multiplies; with one alone a loop
would be as fast as the processor multiplies. SDOT has 16 multiply-accumulates, USMMLA 32, SMULL and SMLAL 8. With NEON
alone, sums in 16 bits have to be added to those in 32 from time to time (SADALP), which the last column counts as
needed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "fxquant/runtime/native"
MACS = {"sdot": 16, "usmmla": 32, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8}
SETS = ("neon", "neon_dotprod", "neon_i8mm")


def loops(disassembly: str) -> dict[str, Counter[str]]:
    """Instructions by name of the longest loop of each piece of a tile."""
    found: dict[str, Counter[str]] = {}
    for function in disassembly.split("\n\n"):
        name = re.search(r"<.*?(\w*piece<[\d, ]+>)", function)
        if name is None:
            continue
        lines = re.findall(r"^ *([0-9a-f]+):[ \t]+(\S+)[ \t]*(.*)$", function, re.MULTILINE)
        places = {int(address, 16): number for number, (address, _, _) in enumerate(lines)}
        for number, (_, operation, rest) in enumerate(lines):
            target = re.search(r"([0-9a-f]+) <", rest)
            first = places.get(int(target[1], 16), number) if target else number
            if first >= number or not operation.startswith(("b.", "cb", "tb")):
                continue
            body = Counter(operation for _, operation, _ in lines[first : number + 1])
            if MACS.keys() & body.keys() and body.total() > found.get(name[1], Counter()).total():
                found[name[1]] = body
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    arguments = parser.parse_args()
    flags = ["-O3", *(FOLDER / "flags.txt").read_text(encoding="utf-8").split()]
    print(f"{'set':<14} {'loop':<14} instructions  products  MACs  MACs/instruction  to one product each  with SADALP")
    for name in SETS:
        with tempfile.TemporaryDirectory() as folder:
            made = f"{folder}/{name}.o"
            subprocess.run([arguments.compiler, *flags, "-c", str(FOLDER / f"{name}.cpp"), "-o", made], check=True)
            command = [arguments.objdump, "-d", "-C", "--no-show-raw-insn", made]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for loop, body in sorted(loops(text).items()):
            products = sum(body[operation] for operation in MACS)
            macs = sum(body[operation] * count for operation, count in MACS.items())
            total = body.total()
            print(
                f"{name:<14} {loop:<14} {total:>12} {products:>9} {macs:>5} {macs / total:>17.1f} "
                f"{total / products:>20.2f} {total / (products + body['sadalp']):>12.2f}"
            )


if __name__ == "__main__":
    main()
