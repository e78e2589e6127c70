"""What the way costs: the error that a trained slice's number format adds, as a share of what training changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protocol import errors
from protocol.checks import change_energy
from protocol.compact import arrived
from protocol.messages import Job
from protocol.plan import Dtype, Sides
from protocol.slices import Factors, Slice


def share(slice: Slice, start: Slice, job: Job) -> float | None:
    """‖s b' a' − s b a‖_F / ‖s b a − s₀ b₀ a₀‖_F over all modules, exactly: b', a' are what the coordinator reads.

    None where nothing is rounded, nothing was changed, or there is no number. One module in memory at a time.
    """
    if job.upload is Dtype.float32:
        return None
    error = change = 0.0
    for module, new in slice.factors.items():
        old = start.factors[module].of(job.directions)
        try:
            read = _read(module, new, old, job)
        except errors.NonFiniteSlice:  # the coordinator will say so
            return None
        error += slice.label.scale**2 * error_energy(read, new)
        change += change_energy(new, slice.label.scale, old, start.label.scale)
    found = math.sqrt(error / change) if change > 0 else math.nan
    return found if math.isfinite(found) else None


def _read(module: str, new: Factors, old: Factors, job: Job) -> Factors:
    """The factors as the coordinator reads them."""
    a = arrived(f"factors/{module}/a", new.a, old.a, job.upload) if job.sides is Sides.both else new.a
    return Factors(b=arrived(f"factors/{module}/b", new.b, old.b, job.upload), a=a)


def error_energy(read: Factors, meant: Factors) -> float:
    """‖b' a' − b a‖²_F in float64 from Gram matrices of size 2 r, written as (b' − b) a' + b (a' − a) so that nothing cancels."""

    def difference(x: Tensor, y: Tensor) -> Tensor:
        return x.double() - y.double()

    b = torch.cat([difference(read.b, meant.b), meant.b.double()], dim=1)  # (n_out, 2 r)
    a = torch.cat([read.a.double(), difference(read.a, meant.a)], dim=0)  # (2 r, n_in)
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
