"""`fxquant demo`: the whole tool on the model and data that come with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fxquant.commands.early_checks import check_output
from fxquant.commands.options import AllocatorName, Json, Limit, Recipe, allocator_or_none


def demo(
    budget: Annotated[str, typer.Option(help='"W4A4", "W3", "0.4MB", "W4, 0.5GBOPs", ...')] = "W4A4",
    recipe: Recipe = "best",
    allocator: AllocatorName = None,
    out: Annotated[Path, typer.Option(help="Folder for the artefact, the picture and the page.")] = Path(
        "fxquant-demo"
    ),
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Quantize the embedded Vision Transformer: accuracy before and after, bits of every layer, artefact and page."""
    import torch

    from allocators.problem.budget import Budget
    from fxquant.artefact.container import write_file
    from fxquant.commands.console import emit, say, show
    from fxquant.data import embedded
    from fxquant.data.images import embedded_test
    from fxquant.data.models import load_model
    from fxquant.errors import ArtefactError
    from fxquant.measure.accuracy import evaluate
    from fxquant.measure.timing import measure
    from fxquant.report.progress import RichProgress
    from fxquant.session.compiled import load
    from fxquant.session.session import compile

    started_s = time.perf_counter()
    wanted, chosen = Budget.parse(budget), allocator_or_none(allocator)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"{out} cannot be made a folder: {error}; give another --out") from error
    artefact_path, picture_path, page_path = out / "model.fxq", out / "bits.svg", out / "report.html"
    check_output(artefact_path, picture_path, page_path)
    say("The embedded ViT (6 blocks, 0.68 M parameters, Fashion-MNIST); 32 calibration images; takes about a minute.")
    named, data, images = load_model("embedded"), embedded_test(), embedded.calibration_images(32)
    with RichProgress() as progress:
        common: dict[str, Any] = {"calibration": images, "progress": progress}
        quantized = compile(
            named.model, wanted, recipe=recipe, allocator=chosen, card={**named.card, "recipe": recipe}, **common
        )
        # The contrast gets the same mean bits; a budget of bytes or operations alone has none, then 4.
        means = wanted.mean_weight_bits or 4, wanted.mean_activation_bits or 4
        same_bits = {"mean_weight_bits": means[0], "mean_activation_bits": means[1]}
        naive = compile(named.model, same_bits, recipe="naive_min_max", **common)
        accuracy = {
            name: evaluate(model, data, limit=limit, progress=progress, label=f"evaluating {name}")
            for name, model in {"float32": named.model, "quantized": quantized, "naive min-max": naive}.items()
        }
        quantized.card["float_accuracy"] = accuracy["float32"].to_dict()
        quantized.card["accuracy"] = accuracy["quantized"].to_dict()
        quantized.save(artefact_path)
        quantized.draw(picture_path)
        with torch.inference_mode():
            is_identical = torch.equal(load(artefact_path)(images), quantized(images))
        lowered = load(artefact_path, backend="auto")
        accuracy["as integers"] = evaluate(lowered, data, limit=limit, progress=progress, label="evaluating integers")
        variants = {"float32": named.model, "as integers": lowered}
        timing = measure(variants, images, seconds=1.0, progress=progress)[1]
    report = quantized.report()
    write_file(page_path, report.to_html().encode())
    seconds = time.perf_counter() - started_s
    size = artefact_path.stat().st_size
    if json:
        results = {name.replace(" ", "_").replace("-", "_"): found.to_dict() for name, found in accuracy.items()}
        files = {
            "artefact": str(artefact_path),
            "picture": str(picture_path),
            "page": str(page_path),
            "artefact_bytes": size,
        }
        emit({"accuracy": results, **files, "reloaded_identical": is_identical, "seconds": seconds,
              "lowered": {"execution": lowered.card["execution"], **timing.to_dict()},
              "report": report.to_dict()})  # fmt: skip
    else:
        contrast = f"naive min-max at W{means[0]:g}A{means[1]:g}"
        rows = {"float32": "float32", "quantized": f"{recipe} at {wanted}",
                "as integers": "the same as integers", "naive min-max": contrast}  # fmt: skip
        width = max(map(len, rows.values()))
        show(report)
        show("\nTop-1 accuracy, +/- one standard error")
        for name, label in rows.items():
            show(f"  {label:<{width}}  {accuracy[name]}")
        verdict = "identical outputs" if is_identical else "DIFFERENT OUTPUTS, which is a bug"
        show(f"\n{artefact_path}: {size / 1e6:.3f} MB (float32: {report.totals.float_bytes / 1e6:.3f} MB); "
             f"loaded again: {verdict}")  # fmt: skip
        show(f"as integers: {timing.speedup:.1f}x float32 on one core, batch of {timing.batch_size}; "
             f"{lowered.card['execution']}")  # fmt: skip
        show(f"{picture_path}: the bits, drawn\n{page_path}: the report, to open in a browser\n{seconds:.0f} s in all")
    if not is_identical:
        raise typer.Exit(1)
