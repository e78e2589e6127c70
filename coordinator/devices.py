"""Merge tasks on a GPU. They do not know it: what they make is made there, and what they read is brought there.

torch makes tensors on the device that is the thread's default, which is all that a worker is given. Seeds are drawn, files read
and fully trained tensors averaged by the processor all the same, so that they are the same everywhere.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from protocol import errors

PROCESSOR = "cpu"
# What says something of the GPU and nothing of the round: its memory is full, or it needs a new process (torch 2.8 and later).
FAILED = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Device(ThreadPoolExecutor):
    """One thread that computes on one device.

    More would wait for each other at the device's one stream of work, and while there is one, sums repeat bit for bit.
    """

    def __init__(self, place: torch.device, name: str) -> None:
        super().__init__(1, thread_name_prefix="merge", initializer=_begin, initargs=(place,))
        self.name = name


def gpu(number: int) -> Device:
    """The CUDA device of that number, counted from 0. Raises InvalidRequest where torch has none."""
    if number >= (count := torch.cuda.device_count()):
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise errors.InvalidRequest(
            f"cuda://{number} needs CUDA device {number}; torch {build} and sees {count}: use threads://N without one"
        )
    return _open(number)


def _open(number: int) -> Device:  # pragma: no cover: needs a GPU
    torch.set_float32_matmul_precision("highest")  # the default, unless an environment says otherwise; shortened merges' proofs need it
    return Device(torch.device("cuda", number), torch.cuda.get_device_name(number))


def name(executor: Executor) -> str:
    """What an executor's tasks compute on: cpu, or the name of a GPU."""
    return executor.name if isinstance(executor, Device) else PROCESSOR


def _begin(place: torch.device) -> None:
    torch.set_num_threads(1)
    torch.set_default_device(place)
