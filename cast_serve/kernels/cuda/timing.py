"""Seconds that kernels take on the GPU alone: many calls in one CUDA graph, so that launching from Python is free."""

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

BETWEEN_READS = 256 << 20
"""Bytes that other calls read before a call finds its weight again: several times a second-level cache."""


def copies(nbytes: int) -> int:
    """How many copies of a weight of so many bytes to rotate through, so that each is read from memory."""
    return max(2, -(-BETWEEN_READS // nbytes))


def seconds_per_call(calls: Sequence[Callable[[], object]], *, repeats: int = 10, budget: float = 0.05) -> float:
    """The median time of one of `calls`, which follow each other in a graph that is replayed.

    Args:
        calls: work on the current device without waiting for it; each uses weights of its own.
        repeats: timed replays, at most; budget: seconds after which no other one is begun.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # whatever a first call does
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = captured(calls)
    graph.replay()
    taken: list[float] = []
    while len(taken) < repeats and (len(taken) < 3 or sum(taken) < budget):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return sorted(taken)[len(taken) // 2] / len(calls)


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`. What one of them raises, or the driver afterwards; other graphs can be captured nevertheless.

    Unlike after torch.cuda.graph, which leaves its stream the current one; and torch before 2.12 then keeps the graph's
    memory and random numbers for the capture that has failed.
    """
    graph, pool, device = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_device()
    gc.collect()  # nothing may be freed meanwhile
    torch.cuda.synchronize()
    failure: Exception | None = None
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(pool)
        try:
            for call in calls:
                call()
        except Exception as error:  # compilers and libraries have many
            failure = error
        try:
            graph.capture_end()
        except RuntimeError as error:
            failure = failure or error
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, pool)
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
    if failure is not None:
        raise failure
    return graph


def copy_bandwidth() -> float:
    """Bytes/s, read and written, of a copy of 1 GB within the GPU's memory: what memory really gives."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_per_call([lambda: target.copy_(source)] * 4)
