"""What an agent finds out about its machine."""

from __future__ import annotations

import psutil
import pytest
import torch

from agent import machine
from agent.policy import Policy
from protocol import VERSION, errors
from protocol.messages import Dataset, Limits
from protocol.plan import Dtype


def test_a_profile_tells_what_the_owner_offers_of_the_machine() -> None:
    policy = Policy(device="cpu", memory_bytes=10**9, largest_rank=4, up_bytes_per_second=1e6)
    things = {"things": Dataset(train=3, columns=["text"])}
    found = machine.profile(policy, things)
    assert (found.device, found.cores) == ("cpu", psutil.cpu_count())
    assert found.memory_bytes == 10**9
    assert found.limits == Limits(largest_rank=4)
    assert (found.up_bytes_per_second, found.down_bytes_per_second) == (1e6, None)
    assert found.datasets == things
    assert found.precisions[0] is Dtype.float32
    assert found.software["hlora"] == VERSION
    assert found.software.keys() == {"hlora", "python", "torch", "transformers", "peft"}


def test_no_more_memory_is_offered_than_there_is() -> None:
    assert 0 < machine.memory_bytes("cpu") <= psutil.virtual_memory().total
    assert Policy(memory_share=1.0).offered(machine.memory_bytes("cpu")) <= psutil.virtual_memory().total


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_a_trial_step_measures_a_speed_and_disturbs_no_random_numbers(dtype: Dtype) -> None:
    state = torch.get_rng_state()
    assert 1e6 < machine.training_flops("cpu", dtype) < 1e15  # between a watch and a rack
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_in_use_is_that_of_this_process() -> None:
    assert 10**6 < machine.used_bytes("cpu") < psutil.virtual_memory().total


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(errors.PolicyRefusal, match=r"the policy's device is cuda:99, which torch cannot use here"):
        machine.device("cuda:99")


def test_a_machine_without_accelerator_trains_on_its_processor() -> None:
    assert machine.device("cpu") == "cpu"
    assert machine.device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
