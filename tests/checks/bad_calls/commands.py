"""The command line, with options as texts."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import CliRunner

from fxquant.cli import app
from fxquant.errors import FxQuantError
from tests.checks.bad_calls.generator import Entry, Good


def commands(good: Good) -> list[Entry]:
    """The command line, with options as texts."""
    files = ["", str(good.folder), "x" * 300, "missing/x", str(good.folder / "good.npz" / "x")]
    numbers = ["x", "0", "-1", "2.5", "9" * 400, "nan", ""]
    shared: dict[str, list[str]] = {
        "--recipe": ["x", "", "BEST"], "--backend": ["gpu", ""], "--first-last-bits": ["1", "9", "x", "9" * 400],
        "--seed": ["x", "-1", "9" * 30, "2.5"], "--batch-size": numbers, "--images": [*numbers, "100000"],
        "--calibration": [*files, str(good.folder / "good.fxq")], "--weights": files[1:], "--mean": ["a", "1,2", "nan"],
        "--std": ["0", "-1", "inf", "1,,2"], "--image-size": ["0", "-3", "x", "9" * 9], "--crop-pct": ["0", "2", "nan"],
        "--interpolation": ["best", ""], "--crop-mode": ["middle", ""],
        "--model-option": ["x", "=3", "a b=3", "pretrained=true", "num_classes=3"],
        "--num-classes": ["-1", "0", "x", "3"], "--override": ["head", "head=x", "head=9", "=3", "head=\u00b2", "zz=4"],
        "--nonsense": ["1"],
    }  # fmt: skip
    budgets = ["W", "", "W1A1", "-4", "0B", "W4A4, 5ms", "MP" + "9" * 5000]
    both = [option for option in shared if option not in ("--override", "--first-last-bits")]
    return [
        Entry("fxquant compile", _command("compile", "embedded"), {"budget": lambda: "W4A4"}, {
            "budget": budgets, **shared, "--out": files, "--report": files, "--picture": [*files, "x.png"],
            "--allocator": ["x", ""], "--cache": [str(good.folder / "good.npz" / "x")],
            "--latency-batch": numbers, "--synthesis-steps": numbers}),
        Entry("fxquant evaluate", _command("evaluate", "embedded"), {}, {
            "--data": files[1:], "--classes": files[1:], "--labels": files[1:], "--limit": ["x", "0", "-1", "2.5", ""],
            **{name: shared[name] for name in ("--batch-size", "--weights", "--mean", "--image-size")}}),
        Entry("fxquant sweep", _command("sweep", "embedded"), {"--budgets": lambda: "W4A4", "--limit": lambda: "1"}, {
            "--budgets": budgets, **{name: shared[name] for name in both if name != "--images"},
            "--results": files[1:], "--plot": [*files[1:], "x.gif"]}),
        Entry("fxquant frontier", _command("frontier", "embedded"), {"--limits": lambda: "4"}, {
            **shared, "--limits": ["x", "", "1", "nan", "4,x"], "--axis": ["x", "", "bits"],
            "--plot": [*files, "x.gif"]}),
        Entry("fxquant synthesize", _command("synthesize", "embedded"), {"--out": lambda: "x.npz"}, {
            "--out": [*files, "x.png"], "--sheet": [*files[1:], "x.gif"], "--count": numbers, "--steps": numbers,
            "--learning-rate": ["x", "0", "-1", "nan", "inf"],
            **{name: shared[name] for name in ("--seed", "--mean")}}),
        Entry("fxquant inspect", _command("inspect"), {"artefact": lambda: str(good.folder / "good.fxq")}, {
            "artefact": [*files, str(good.folder / "good.npz")], "--picture": [*files, "x.png"]}),
        Entry("fxquant export", _command("export"), {
            "artefact": lambda: str(good.folder / "good.fxq"), "out": lambda: "m.onnx"}, {
                "artefact": [*files, str(good.folder / "good.npz")], "out": files, "--weight-type": ["int2", ""]}),
        Entry("fxquant benchmark", _command("benchmark"), {
            "artefact": lambda: str(good.folder / "good.fxq"), "--seconds": lambda: "0"}, {
                "artefact": files, "--backend": ["gpu", ""], "--batch-size": numbers, "--threads": numbers,
                "--seconds": ["x", "-1", "nan"], "--plot": [*files, "x.gif"]}),
    ]  # fmt: skip


class RefusedError(FxQuantError):
    """A command ended with exit code 2, as it does after one line on stderr."""


def _command(*first: str) -> Callable[..., None]:
    """A function that runs a command; what has no dashes stands for itself."""

    def run(**options: str) -> None:
        words = list(first)
        for name, value in options.items():
            words += [name, value] if name.startswith("--") else [value]
        result = CliRunner().invoke(app, words)
        if isinstance(result.exception, Exception):
            raise result.exception
        if result.exit_code == 2:
            raise RefusedError

    return run
