"""What this machine can do: its device, memory, precisions, and the speed of a measured trial step."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from agent.policy import Policy
from protocol import VERSION, errors
from protocol.messages import Dataset, Profile
from protocol.plan import Dtype

CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit, of which the machine's own memory says nothing
WIDTH, HEADS, TOKENS, ROWS = 384, 12, 64, 16  # the trial step: one block of a small encoder
TRIALS = 3
LIBRARIES = ("torch", "transformers", "peft")


def device(wish: str) -> str:
    """The torch device for a wish of the policy: auto takes CUDA where there is some. Raises PolicyRefusal if it is not there."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wish)
    except (RuntimeError, AssertionError) as error:
        raise errors.PolicyRefusal(f"the policy's device is {wish}, which torch cannot use here; choose another, or auto") from error
    return wish


def precisions(device: str) -> list[Dtype]:
    """The precisions in which the device trains well, float32 first."""
    if device.startswith("cuda"):  # pragma: no cover: needs a GPU
        return [Dtype.float32, Dtype.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else Dtype.float16]
    quick = device == "cpu" and platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx512_bf16_supported()
    return [Dtype.float32, Dtype.bfloat16] if quick else [Dtype.float32]


def memory_bytes(device: str) -> int:
    """The memory that the device has: the accelerator's, or the machine's within the container's limit."""
    if device.startswith("cuda"):  # pragma: no cover: needs a GPU
        return torch.cuda.get_device_properties(device).total_memory
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(psutil.virtual_memory().total, int(limit)) if limit.isdigit() else psutil.virtual_memory().total


def used_bytes(device: str) -> int:
    """The memory that this process uses now; on CUDA the most that it used since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else psutil.Process().memory_info().rss


def forget_peak(device: str) -> None:
    """Let the peak of an accelerator's memory be counted anew."""
    if device.startswith("cuda"):  # pragma: no cover: needs a GPU
        torch.cuda.reset_peak_memory_stats(device)


def training_flops(device: str, dtype: Dtype) -> float:
    """Floating-point operations per second of a trial step: the best of a few, forward and backward through a frozen block.

    A block of width d takes 24 d² operations a token for its matrices and 4 T d for its attention; the backward pass to the
    inputs takes as many again.
    """
    with torch.random.fork_rng(devices=[]):
        block = _Block().to(device).requires_grad_(False)
        rows = torch.randn(ROWS, TOKENS, WIDTH, device=device, requires_grad=True)
    half = torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype), enabled=dtype is not Dtype.float32)
    seconds = []
    for _ in range(TRIALS + 1):  # the first one warms up
        start = time.perf_counter()
        with half:
            loss = block(rows).float().sum()
        torch.autograd.backward(loss)
        float(loss.detach())  # waits for the accelerator
        seconds.append(time.perf_counter() - start)
    return 2 * ROWS * TOKENS * (24 * WIDTH**2 + 4 * TOKENS * WIDTH) / max(min(seconds[1:]), 1e-9)


class _Block(nn.Module):
    """One block as transformers computes it; torch's own block takes another way through attention, in bfloat16 a slow one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (rows, tokens, width) → the same
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first(x + self.out(attended))
        y: Tensor = self.second(x + self.down(functional.gelu(self.up(x))))
        return y


def profile(policy: Policy, datasets: dict[str, Dataset]) -> Profile:
    """What the coordinator is told of this machine: what it has, or what its owner offers of that. Takes a fraction of a second."""
    place = device(policy.device)
    known = precisions(place)
    return Profile(
        device=torch.cuda.get_device_name(place) if place.startswith("cuda") else place,
        cores=psutil.cpu_count() or 1,
        memory_bytes=policy.offered(memory_bytes(place)),
        training_flops=training_flops(place, known[-1]),
        up_bytes_per_second=policy.up_bytes_per_second,
        down_bytes_per_second=policy.down_bytes_per_second,
        precisions=known,
        datasets=datasets,
        limits=policy.limits(),
        software={"hlora": VERSION, "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    )
