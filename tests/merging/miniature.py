"""A device in miniature: apart from the processor as a GPU is, though it is the processor that computes.

Its tensors say that they are elsewhere, meet no tensor of the processor but by being copied, and show their numbers to nobody
who asks for their memory. So what computes on it without an error forgot no tensor on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from coordinator.devices import Device

PLACE = torch.device("lazy", 0)  # a kind of which torch knows no more than the name
NAME = "miniature"
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}


class Far(Tensor):
    """A tensor of the device; what it holds is a tensor of the processor."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way, whose type it does not know

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        found: Far = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=PLACE
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch gives it the function, and does not say so
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{function} met a tensor of the device in a thread that does not compute there")


class Miniature(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not say how it is made
    """A thread that entered it has the device until it ends."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = {id(x.held): x for x in tensors if isinstance(x, Far)}
        there = _is_there(function, args, bool(far), kwargs.get("device"))
        if far and any(x.dim() and not isinstance(x, Far) for x in tensors) and not _may_meet(function, args):
            raise RuntimeError(f"{function}: tensors of the processor and of the device")
        if there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{function}: a generator of the processor for a tensor of the device")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        return tree_map(lambda x: far[id(x)] if id(x) in far else _far(x), found) if there else found


def _is_there(function: Any, args: Any, far: bool, asked: torch.device | None) -> bool:
    """Whether the result is on the device."""
    if function is torch.ops.aten.copy_.default:
        return isinstance(args[0], Far)
    return far if asked is None else asked == PLACE


def _may_meet(function: Any, args: Any) -> bool:
    """Whether tensors of both may take part: copies do, and positions may come from anywhere."""
    return function in COPIES or (function in INDEXED and isinstance(args[0], Far))


def _far(x: object) -> object:
    return Far(x) if isinstance(x, Tensor) else x


def _held(x: object) -> object:
    return x.held if isinstance(x, Far) else x


@contextmanager
def miniature() -> Iterator[Device]:
    """An executor whose thread has the device, and computes there."""
    with Device(PLACE, NAME) as executor:
        executor.submit(_enter).result()
        yield executor


def _enter() -> None:
    torch._C._set_only_lift_cpu_tensors(True)  # so that what is made of Python's numbers is brought there like the rest
    Miniature().__enter__()  # type: ignore[no-untyped-call]  # torch does not say
