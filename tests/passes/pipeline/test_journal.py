"""The journal: what it says of memory on systems that count it otherwise, or not at all."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from passes.pipeline.journal import peak_mib

pytestmark = pytest.mark.quick


def test_memory_is_in_mib_whatever_the_system_counts_in(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"linux": 300 * 2**10, "darwin": 300 * 2**20}
    for platform, value in counted.items():
        usage = type("Usage", (), {"ru_maxrss": value})
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(resource, "getrusage", lambda who, usage=usage: usage)
        assert peak_mib() == 300


def test_pipelines_need_no_module_that_windows_has_not() -> None:
    code = "import sys; sys.modules['resource'] = None; import passes.pipeline.pipeline as p; print(p.peak_mib())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0.0"
