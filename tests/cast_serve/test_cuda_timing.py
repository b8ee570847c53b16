"""Capturing graphs, with fakes in the place of CUDA."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cast_serve.kernels.cuda import timing


class Graph:
    """As torch's, before 2.12: a capture that failed keeps the pool and the generator."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def capture_begin(self, pool: object) -> None:
        self.state |= {"pool": pool, "generator": "capturing"}

    def capture_end(self) -> None:
        if self.state["broken"]:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.state |= {"pool": None, "generator": "free"}


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    state: dict[str, Any] = {"broken": False, "pool": None, "generator": "free"}
    generator = SimpleNamespace(
        clone_state=lambda: "free", graphsafe_set_state=lambda fresh: state.update(generator=fresh)
    )
    cuda = {
        "CUDAGraph": lambda: Graph(state),
        "graph_pool_handle": lambda: (0, 1),
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "stream": nullcontext,
        "Stream": lambda: None,
        "default_generators": [generator],
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def end(device: int, pool: object) -> None:
        if state["pool"] != pool:
            raise RuntimeError("not currently recording to mempool_id")
        state["pool"] = None

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return state


def test_calls_are_captured_in_turn(state: dict[str, Any]) -> None:
    called: list[str] = []
    assert isinstance(timing.captured([lambda: called.append("a"), lambda: called.append("b")]), Graph)
    assert called == ["a", "b"]
    assert state == {"broken": False, "pool": None, "generator": "free"}


@pytest.mark.parametrize("breaks", [True, False])
def test_a_capture_that_fails_says_why_and_leaves_nothing_behind(state: dict[str, Any], breaks: bool) -> None:
    def refuse() -> None:
        state["broken"] = breaks
        raise ValueError("not while capturing")

    with pytest.raises(ValueError, match="not while capturing"):
        timing.captured([refuse])
    assert (state["pool"], state["generator"]) == (None, "free")
    state["broken"] = False
    timing.captured([])


def test_a_capture_that_only_the_driver_refuses(state: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        timing.captured([lambda: state.update(broken=True)])
    assert (state["pool"], state["generator"]) == (None, "free")
