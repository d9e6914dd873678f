"""Latency and size of our integer models beside other int8 runtimes, in turns, in one process.

python benchmarks/peers.py vit_tiny_patch16_224 --num-classes 200 --artefact vit.fxq --threads 1 2 --seconds 60

Ratios are to timm's own model in torch, eager float32 with fused attention; medians over rounds, by processor time.
Weights and images are random: they do not change the speed. Without --artefact one is compiled from random images at
--budget. With --instruction-set torch, OpenVINO and fxquant stay within that set; ONNX Runtime cannot be told to, and
is left out below AVX512-VNNI. Peers that are not installed, or fail, are left out with a message; install those wanted:

pip install torchao onnx onnxscript onnxruntime openvino nncf
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from inference import processor
from torch import Tensor, nn

import fxquant
from fxquant.measure.timing import bfloat16_variant, measure
from fxquant.runtime.native.library import instruction_set, select_instruction_set

PACKAGES = ("torch", "torchao", "onnxruntime", "openvino", "nncf")
Runner = Callable[[Tensor], Any]
Peer = tuple[Callable[[int], Runner], int]  # makes what runs, given the number of threads; bytes on disk


# What holds torch, MKL and oneDNN (in torch and in OpenVINO) to an instruction set; they read it when they start.
LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx-vnni": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512-vnni": {},
}  # fmt: skip


def limit_to(name: str) -> None:
    """Hold this process to an instruction set; where the variables of `LIMITS` are not set, start again with them."""
    if any(os.environ.get(variable) != value for variable, value in LIMITS[name].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | LIMITS[name])
    select_instruction_set(name)


def state_bytes(model: nn.Module) -> int:
    """Size of the state dict as torch saves it."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def fresh(model: Runner, **options: Any) -> Callable[[int], Runner]:
    """What `torch.compile` makes for a number of threads: generated code has it in it."""

    def build(threads: int) -> Runner:
        torch._dynamo.reset()
        return torch.compile(model, dynamic=False, **options)

    return build


def torch_peers(model: nn.Module) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """torch's own float formats, eager and compiled, and torchao's dynamic int8."""
    size, half = state_bytes(model), bfloat16_variant(model)
    yield "float32 eager", lambda: (lambda _: model, size)
    yield "float32 compiled", lambda: (fresh(model), size)
    yield "bfloat16 eager", lambda: (lambda _: half, size // 2)
    yield "bfloat16 compiled", lambda: (fresh(half), size // 2)

    def torchao_model() -> nn.Module:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantized = copy.deepcopy(model)
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
        return quantized

    def eager() -> Peer:
        quantized = torchao_model()
        return (lambda _: quantized), state_bytes(quantized)

    def compiled() -> Peer:
        quantized = torchao_model()
        return fresh(quantized), state_bytes(quantized)

    yield "torchao int8 dynamic", eager
    yield "torchao int8 dynamic compiled", compiled


def float_onnx(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """The float model as ONNX, with a free batch; made once."""
    import onnx

    path = folder / "float.onnx"
    if not path.exists():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        torch.onnx.export(
            model, (images[:2],), path, dynamo=True, dynamic_shapes=shapes, input_names=["images"],
            opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip
        written = onnx.load(path)
        del written.graph.value_info[:]  # ONNX Runtime's quantizers would find their own shapes contradicted
        onnx.save(written, path)
    return path


def onnxruntime_session(path: Path, threads: int) -> Runner:
    """An ONNX file in ONNX Runtime; its threads sleep between runs, as others run then."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def onnxruntime_peers(model: nn.Module, images: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """ONNX Runtime in float32, with dynamic and with static int8."""

    def as_peer(path: Path) -> Peer:
        return (lambda threads: onnxruntime_session(path, threads)), path.stat().st_size

    def dynamic() -> Peer:
        from onnxruntime.quantization import quantize_dynamic

        path = folder / "dynamic.onnx"
        quantize_dynamic(float_onnx(model, images, folder), path, per_channel=True)
        return as_peer(path)

    def static() -> Peer:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Images(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.batches = iter(images.split(1))

            def get_next(self) -> dict[str, Any] | None:
                found = next(self.batches, None)
                return None if found is None else {"images": found.numpy()}

        prepared, path = folder / "prepared.onnx", folder / "static.onnx"
        quant_pre_process(str(float_onnx(model, images, folder)), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared, path, Images(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )
        return as_peer(path)

    yield "onnxruntime float32", lambda: as_peer(float_onnx(model, images, folder))
    yield "onnxruntime int8 dynamic", dynamic
    yield "onnxruntime int8 static", static


def openvino_runner(model: Any, threads: int) -> Runner:
    """A model in OpenVINO with its defaults, in which what is not int8 may run in bfloat16 where the set has it."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if instruction_set() in ("avx2", "avx-vnni"):
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda images: compiled(images.numpy())


def openvino_peers(model: nn.Module, images: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """OpenVINO as it is, and quantized by NNCF."""

    def as_peer(converted: Any, name: str) -> Peer:
        import openvino

        path = folder / f"{name}.xml"
        openvino.save_model(converted, path, compress_to_fp16=False)
        size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
        return (lambda threads: openvino_runner(path, threads)), size

    def plain() -> Peer:
        import openvino

        return as_peer(openvino.convert_model(float_onnx(model, images, folder)), "float")

    def quantized() -> Peer:
        import nncf
        import openvino

        converted = openvino.convert_model(float_onnx(model, images, folder))
        batches = nncf.Dataset([batch.numpy() for batch in images.split(1)])
        found = nncf.quantize(converted, batches, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
        return as_peer(found, "nncf")

    yield "openvino", plain
    yield "openvino int8, nncf", quantized


def our_variants(path: Path, folder: Path) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """An artefact on our kernels, and exported to the others."""
    simulated = fxquant.load(path)
    budget = simulated.allocation.budget if simulated.allocation else path.stem

    def lowered(backend: str) -> Peer:
        model = simulated.lowered(backend)
        print(f"fxquant {budget}, {backend}: {model.card['execution']}")
        return (lambda _: model), path.stat().st_size

    def exported() -> Peer:
        import onnxruntime  # noqa: F401

        file = folder / f"{path.stem}.onnx"
        simulated.export_onnx(file, runtime="onnxruntime", weight_type="packed")
        return (lambda threads: onnxruntime_session(file, threads)), file.stat().st_size

    yield f"fxquant {budget}", lambda: lowered("auto")
    yield f"fxquant {budget}, openvino", lambda: lowered("openvino")
    yield f"fxquant {budget}, exported to onnxruntime", exported


def built(peers: dict[str, Peer], threads: int) -> Iterator[tuple[str, Runner]]:
    """What runs, of the peers that can be built for this number of threads."""
    for variant, (build, _) in peers.items():
        try:
            yield variant, build(threads)
        except Exception as error:  # a peer's own failure is a result, not ours
            print(f"{variant}: left out, it failed: {type(error).__name__}: {str(error)[:200]}")


def compiled_artefact(model: nn.Module, images: Tensor, budget: str, folder: Path) -> Path:
    """An artefact from random images, for its speed."""
    path = folder / "model.fxq"
    fxquant.compile(model, budget, calibration=images).save(path)
    return path


def installed() -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measure, print a table and keep it as JSON in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm architecture")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--artefact", type=Path, nargs="*", help="of this architecture")
    parser.add_argument("--budget", default="W8A8", help="of the artefact made where none is given")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all variants at one batch size and threads")
    parser.add_argument("--only", nargs="*", help="variants whose names start so; the first always runs")
    parser.add_argument("--skip", nargs="*", default=[], help="variants with one of these in their names")
    parser.add_argument("--instruction-set", choices=sorted(LIMITS), help="of all that can be told; the best otherwise")
    parser.add_argument("--name", help="of the result file; the model's name otherwise")
    options = parser.parse_args()
    if options.instruction_set is not None:
        limit_to(options.instruction_set)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=options.num_classes).eval().requires_grad_(False)
    images = torch.randn(8, *timm.data.resolve_model_data_config(model)["input_size"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artefacts = options.artefact or [compiled_artefact(model, images, options.budget, folder)]
        candidates = [*torch_peers(model), *onnxruntime_peers(model, images, folder)]
        candidates += [*openvino_peers(model, images, folder), *(v for a in artefacts for v in our_variants(a, folder))]
        peers: dict[str, Peer] = {}
        for variant, build in candidates:
            wanted = options.only is None or variant.startswith(tuple(options.only)) or not peers
            wanted &= options.instruction_set in (None, "avx512-vnni") or "onnxruntime" not in variant
            wanted &= not any(part in variant for part in options.skip)
            if not wanted:
                continue
            try:
                peers[variant] = build()
            except ImportError as error:
                print(f"{variant}: left out, {error}")
            except Exception as error:  # a peer's own failure is a result, not ours
                print(f"{variant}: left out, it failed: {type(error).__name__}: {str(error)[:200]}")
        rows = []
        for threads in options.threads:
            torch.set_num_threads(threads)
            runners = dict(built(peers, threads))
            for size in options.batch_size:
                batch = torch.randn(size, *images.shape[1:])
                for timing in measure(runners, batch, threads=threads, seconds=options.seconds):
                    rows.append({**timing.to_dict(), "mb": peers[timing.variant][1] / 1e6})
                    print(
                        f"{timing.variant:44} {threads} threads, batch {size:3} {timing.latency_ms:9.2f} ms "
                        f"{timing.cpu_speedup:6.2f}x by CPU time {rows[-1]['mb']:8.2f} MB",
                        flush=True,
                    )
    result = {
        "model": options.model,
        "processor": processor(),
        "instruction_set": instruction_set(),
        "versions": installed(),
        "timings": rows,
    }
    path = Path(__file__).parent / "results" / f"peers_{options.name or options.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
