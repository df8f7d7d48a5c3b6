"""Steps of a solver as one launch each: those of a small problem take a GPU less time than a CPU needs to ask for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Replayed"]


class Replayed:
    """A step of a state, recorded once as a CUDA graph and then played.

    The state that a call returns is overwritten by the next.

    Args:
        step: makes a state of a state, of the same shapes, on a CUDA device and without waiting for it; it has been run before.
            It may overwrite tensors of the given state and return them.
        state: a dataclass of tensors, of such, and of None.
    """

    def __init__(self, step: Callable[[Any], Any], state: Any) -> None:
        self.state = _cloned(state)
        self.graph = torch.cuda.CUDAGraph()
        device = next(_leaves(self.state)).device
        known = _LAST.__dict__.setdefault("graphs", {})
        here = torch.cuda.current_stream(device)
        last, aside, there = known.get(device) or (None, torch.cuda.Stream(device), here)
        pool = {} if last is None else {"pool": last.pool()}
        here.wait_stream(there)  # for what somebody has left half done
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.graph.capture_begin(**pool, capture_error_mode="thread_local")  # other threads may load data meanwhile
            try:
                self._take(step(self.state))
            finally:
                self.graph.capture_end()
        here.wait_stream(aside)
        known[device] = self.graph, aside, here

    def __call__(self, state: Any) -> Any:
        if state is not self.state:
            self._take(state)
        self.graph.replay()
        return self.state

    def _take(self, state: Any) -> None:
        for own, new in zip(_leaves(self.state), _leaves(state), strict=True):
            if own is not new:  # as of what the step has overwritten
                own.copy_(new)


_LAST = threading.local()
"""Of every device the last recording of a thread, and the streams that it was made on and for: the next one's intermediate
results take its place in memory, which is nobody's once a solve has asked for its answer. ``torch.cuda.graph`` would give back
all memory that torch has cached, the caller's too.
"""


def _leaves(state: Any) -> Iterator[Tensor]:
    for field in fields(state):
        value = getattr(state, field.name)
        if is_dataclass(value):
            yield from _leaves(value)
        elif value is not None:
            yield value


def _cloned(state: Any) -> Any:
    found = {field.name: getattr(state, field.name) for field in fields(state)}
    copies = {
        name: _cloned(x) if is_dataclass(x) else x.clone(memory_format=torch.contiguous_format)
        for name, x in found.items()
        if x is not None
    }
    return replace(state, **copies)
