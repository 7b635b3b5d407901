"""Fixtures of the tests of generation: which way `generate` runs the layers."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from dnd_hf.generation import cuda_graphs, mixin


@pytest.fixture
def plain(monkeypatch):
    """Lets `generate` run the layers as they are, on this CPU too."""
    monkeypatch.setattr(mixin, "can_run_packed", lambda model: False)


@pytest.fixture
def graphed(monkeypatch) -> list[Callable[[], None]]:
    """Lets models with `cuda_graphs` do so on this CPU: a captured step runs again. The list of captured steps."""
    captured = []

    def capture(step, others):
        captured.append(step)
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(mixin.ImageGenerationMixin, "_check_cuda_graphs", lambda model, device: None)
    return captured


@pytest.fixture(params=["packed", "plain"])
def decoder(request):
    """Both ways in which `generate` runs the layers on a CPU."""
    if request.param == "plain":
        request.getfixturevalue("plain")


@pytest.fixture(params=["packed", "plain", "graphed"])
def any_decoder(request, monkeypatch):
    """All ways in which `generate` runs the layers."""
    if request.param != "packed":
        request.getfixturevalue(request.param)
    monkeypatch.setattr(mixin.ImageGenerationMixin, "cuda_graphs", request.param == "graphed")
    return request.param
