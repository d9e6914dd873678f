"""Top-1 of one artefact on every runtime, against the same graph in float64, and the size of its export.

python benchmarks/export_agreement.py vit.fxq --data validation.npz --limit 100
python benchmarks/export_agreement.py embedded.fxq

Float32 moves values beside a threshold to the next code, in every runtime and in ours: `equal` says how often the class
stays that of float64, `error` the median over images of the largest difference of a score, relative to the largest
score. "openvino default" computes in bfloat16 what is not int8, on processors with AMX.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inference import processor
from peers import installed, onnxruntime_session, openvino_runner
from torch import Tensor

import fxquant
from fxquant.data.images import ImageData, embedded_test
from fxquant.data.preprocessing import Preprocessing
from fxquant.graph.notes import IMAGE_SHAPE


def scores(run: Callable[[Tensor], Any], data: ImageData, limit: int | None) -> tuple[Tensor, Tensor]:
    """Class scores, float64 (N, classes), and labels, int64 (N,)."""
    found, labels = [], []
    with torch.inference_mode():
        for images, classes in data.batches(20, limit):
            result = run(images)
            found.append(torch.as_tensor(result if isinstance(result, Tensor) else result[0]).double())
            labels.append(classes)
    return torch.cat(found), torch.cat(labels)


def main() -> None:
    """Measure, print JSON and keep it in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path)
    parser.add_argument(
        "--data", type=Path, help=".npz with images and labels, mean and std 0.5; the embedded ones otherwise"
    )
    parser.add_argument("--limit", type=int)
    parser.add_argument("--name", help="of the result file; the artefact's name otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    simulated = fxquant.load(options.artefact)
    shape = IMAGE_SHAPE.of(simulated.graph_module)
    data = embedded_test() if options.data is None else ImageData.open(options.data, Preprocessing(shape))
    exact = copy.deepcopy(simulated.graph_module).double()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        layers = simulated.export_onnx(path)
        variants: dict[str, Callable[[Tensor], Any]] = {
            "float64": lambda images: exact(images.double()),
            "simulated": simulated,
            "fxquant": simulated.lowered(),
            "onnxruntime": onnxruntime_session(path, 1),
            "openvino": simulated.lowered("openvino"),
            "openvino default": openvino_runner(path, 1),
        }
        found = {name: scores(run, data, options.limit) for name, run in variants.items()}
        size_mb = path.stat().st_size / 1e6
    truth, labels = found["float64"]
    rows = {}
    for name, (result, _) in found.items():
        error = (result - truth).abs().amax(1) / truth.abs().max()
        rows[name] = {
            "right": int((result.argmax(1) == labels).sum()),
            "equal": int((result.argmax(1) == truth.argmax(1)).sum()),
            "error": float(error.median()),
            "moved": int((error > 1e-4).sum()),
        }
    report = {
        "artefact": options.artefact.name,
        "budget": str(simulated.allocation.budget) if simulated.allocation else None,
        "images": len(labels),
        "int8_layers": sum(how == "int8" for how in layers.values()),
        "layers": len(layers),
        "onnx_mb": round(size_mb, 3),
        "artefact_mb": round(options.artefact.stat().st_size / 1e6, 3),
        "processor": processor(),
        "versions": installed(),
        "rows": rows,
    }
    out = Path(__file__).parent / "results" / f"export_{options.name or options.artefact.stem}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
