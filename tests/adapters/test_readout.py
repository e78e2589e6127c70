"""Read-outs of an adapter: at a rank, at a share of each module's energy, at a share of all; also of one in no singular form."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from coordinator.adapters import PREFIX
from coordinator.cards import Facts
from coordinator.readout import ReadOut, Wanted, read_out, singular
from protocol.contents import Label
from protocol.course import Cohort, Training
from protocol.plan import Adapter, BaseFacts, CausalLM, Choice, Dtype, Layout, Model, Plan, Ranks
from protocol.slices import Factors, Slice, pack
from tests.adapters import folders

CAP = 6
SHAPES = {"block.q": (20, 12), "block.v": (12, 30), "narrow": (6, 9)}
FACTS = Facts(run="letters", plan="sha256:0", round=7, metrics={})


def make_plan(strategy: str = "delta") -> Plan:
    return Plan(
        name="letters",
        model=Model(id="base"),
        task=CausalLM(),
        data="texts",
        adapter=Adapter(modules=["q", "v"]),
        layout=Layout(modules=SHAPES, base=BaseFacts(parameters=1, layers=1, hidden=12, vocabulary=1)),
        training=Training(learning_rate=1e-3),
        strategy=Choice(name=strategy),
        ranks=Ranks(ladder=[2, CAP]),
        cohort=Cohort(target=1, quorum=1),
        rounds=9,
    )


def turned(adapter: dict[str, Factors]) -> dict[str, Factors]:
    """The same products in another gauge, b m and m⁻¹ a, where no direction stands alone."""
    g = torch.Generator().manual_seed(3)
    found = {}
    for module, factors in adapter.items():
        m = torch.eye(CAP) + torch.randn(CAP, CAP, generator=g) / 3
        found[module] = Factors(b=factors.b @ m, a=torch.linalg.inv(m) @ factors.a)
    return found


def make_adapter() -> dict[str, Factors]:
    """Singular form, with singular values that fall faster in one module than in the next."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for fall, (module, (n_out, n_in)) in zip((0.2, 0.6, 0.9), SHAPES.items(), strict=True):
        u, _, vt = torch.linalg.svd(torch.randn(n_out, n_in, generator=g), full_matrices=False)
        r = min(CAP, n_out, n_in)
        s = (fall ** torch.arange(r)).sqrt()
        b, a = u[:, :r] * s, s[:, None] * vt[:r]
        missing = CAP - r
        found[module] = Factors(b=torch.nn.functional.pad(b, (0, missing)), a=torch.nn.functional.pad(a, (0, 0, 0, missing)))
    return found


def files(adapter: dict[str, Factors], wanted: Wanted, strategy: str = "delta") -> dict[str, bytes]:
    plan = make_plan(strategy)
    assert plan.layout is not None
    return folders.files(plan, FACTS, pack(Slice(Label(rank=CAP, scale=1.0, round=7), adapter, {}), plan.layout, Dtype.float32), wanted)


def products(files: dict[str, bytes]) -> dict[str, Tensor]:
    found = load(files["adapter_model.safetensors"])
    return {m: found[f"{PREFIX}{m}.lora_B.weight"].double() @ found[f"{PREFIX}{m}.lora_A.weight"].double() for m in SHAPES}


def ranks(files: dict[str, bytes]) -> dict[str, int]:
    found = load(files["adapter_model.safetensors"])
    return {m: len(found[f"{PREFIX}{m}.lora_A.weight"]) for m in SHAPES}


def spectrum(factors: Factors) -> Tensor:
    """Squared singular values of the product, float64."""
    found: Tensor = torch.linalg.svdvals(factors.b.double() @ factors.a.double()).square()
    return found[:CAP]


@pytest.mark.parametrize("strategy", ["zero_pad", "gone"])
@pytest.mark.parametrize("rank", [1, 3, CAP])
def test_an_adapter_in_any_gauge_is_read_out_as_its_best_approximation(strategy: str, rank: int) -> None:
    adapter = turned(make_adapter())
    found = products(files(adapter, Wanted(rank), strategy))
    for module, factors in adapter.items():
        u, s, vt = torch.linalg.svd(factors.b.double() @ factors.a.double(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(found[module], best, rtol=0, atol=16 * torch.finfo(torch.float32).eps * float(s[0]))


def test_the_gauge_changes_neither_the_ranks_nor_what_is_left_out() -> None:
    def chosen(adapter: dict[str, Factors]) -> ReadOut:
        return read_out({module: partial(singular, factors) for module, factors in adapter.items()}, CAP, Wanted(CAP, 0.9))

    straight, other = chosen(make_adapter()), chosen(turned(make_adapter()))
    assert straight.ranks == other.ranks
    assert other.left_out == pytest.approx(straight.left_out, rel=1e-4)


def test_an_adapter_in_singular_form_is_read_out_as_its_leading_directions_bit_for_bit() -> None:
    adapter = make_adapter()
    found = load(files(adapter, Wanted(3))["adapter_model.safetensors"])
    for module, factors in adapter.items():
        assert torch.equal(found[f"{PREFIX}{module}.lora_B.weight"], factors.b[:, :3])
        assert torch.equal(found[f"{PREFIX}{module}.lora_A.weight"], factors.a[:3])


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99, 1.0])
def test_uniform_is_the_smallest_rank_that_holds_the_share_of_all_modules_together(kept: float) -> None:
    adapter = make_adapter()
    found = files(adapter, Wanted(CAP, kept, uniform=True))
    (rank,) = set(ranks(found).values())
    together = torch.stack([torch.nn.functional.pad(s, (0, CAP - len(s))) for s in map(spectrum, adapter.values())]).sum(dim=0)
    assert together[:rank].sum() >= (kept - 1e-6) * together.sum()
    assert rank == 1 or together[: rank - 1].sum() < kept * together.sum()
    assert json.loads(found["adapter_config.json"])["rank_pattern"] == {}


def test_a_share_of_each_module_needs_unequal_ranks_and_at_most_the_rank_that_is_asked_for() -> None:
    """Energies fall by 0.04, 0.36 and 0.81: 0.9 of them are 1 of 1.04, 1.49 of 1.56 and 3.43 of 3.78."""
    adapter = make_adapter()
    assert ranks(files(adapter, Wanted(CAP, 0.9))) == {"block.q": 1, "block.v": 3, "narrow": 5}
    assert ranks(files(adapter, Wanted(3, 0.9))) == {"block.q": 1, "block.v": 3, "narrow": 3}


@pytest.mark.parametrize("wanted", [Wanted(CAP), Wanted(2), Wanted(CAP, 0.9), Wanted(CAP, 0.9, uniform=True)])
def test_the_model_card_says_the_ranks_the_bytes_and_what_is_left_out(wanted: Wanted) -> None:
    adapter = make_adapter()
    found = files(adapter, wanted)
    card, each = found["README.md"].decode(), ranks(found)
    told = re.search(
        r"\| this folder \| ranks? (\d+)(?: to (\d+), ([\d.]+) on average)?, over 3 modules; ([\d,]+) bytes of numbers \|", card
    )
    assert told is not None
    smallest, largest = int(told[1]), int(told[2] or told[1])
    assert (smallest, largest) == (min(each.values()), max(each.values()))
    assert float(told[3] or told[1]) == pytest.approx(sum(each.values()) / 3, rel=1e-3)
    assert int(told[4].replace(",", "")) == len(found["adapter_model.safetensors"])
    assert card.count(f"# letters, round 7, rank{'s' if smallest < largest else ''} {smallest}") == 1
    spectra = {module: spectrum(factors) for module, factors in adapter.items()}
    lost = sum(float(s[each[m] :].sum()) for m, s in spectra.items()) / sum(float(s.sum()) for s in spectra.values())
    (said,) = re.findall(r"\| left out of the global adapter \| (nothing|[\d.e-]+ % of its energy ‖ΔW‖²) \|", card)
    assert said == "nothing" if wanted == Wanted(CAP) else float(said.split()[0]) == pytest.approx(100 * lost, rel=1e-2)


def test_an_adapter_that_changes_nothing_keeps_one_direction_and_leaves_nothing_out() -> None:
    nothing = {module: Factors(b=torch.zeros(n_out, CAP), a=torch.zeros(CAP, n_in)) for module, (n_out, n_in) in SHAPES.items()}
    for strategy in ("delta", "zero_pad"):
        found = files(nothing, Wanted(CAP, 0.5), strategy)
        assert set(ranks(found).values()) == {1}
        assert "| left out of the global adapter | nothing |" in found["README.md"].decode()
