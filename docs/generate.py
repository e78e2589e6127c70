"""The documents that follow from the code: `python -m docs.generate` writes them, `--check` says which are not current."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

import admin.settings
import agent.settings
import coordinator.settings
from coordinator import aggregation
from coordinator.app import build, create_app
from coordinator.problems import answer, status
from docs import plan_page
from protocol import errors
from protocol.errors import HLoRAError, Refusal, every_error

HERE = Path(__file__).parent
WRITTEN = "<!-- Written by `make docs`; change the code that it is made from. -->\n"


def problems() -> str:
    """Every problem: its name, its status, whether to repeat the request, what it means."""
    served = [kind for kind in every_error() if not issubclass(kind, Refusal)]
    told = [kind for kind in every_error(Refusal) if kind is not Refusal]
    example = answer(errors.StaleLease("the job is held under epoch 3; yours is 2: stop working on it", epoch=3))
    return f"""{WRITTEN}
# Problems

Every refusal is one class of `protocol/errors.py`, on both sides of the wire: the coordinator raises it, the answer is a problem
document after RFC 9457, and agent and operator's command raise the same class again. `type` is the stable name to program
against; `detail` is for people and may change; facts of the refusal, such as `epoch`, are members of their own.

```http
HTTP/1.1 {example.status_code} {status(errors.StaleLease).phrase}
Content-Type: {example.media_type}

{json.dumps(json.loads(bytes(example.body)), indent=2)}
```

*Repeat* says whether the same request may succeed later as it is; `Retry-After` then says when, where that is known.

| type | status | repeat | meaning |
|---|---|---|---|
{_lines(f"| `{k.slug()}` | {status(k).value} | {'yes' if k.retryable else 'no'} | {k.title()} |" for k in served)}

## Refusals of a device

A device that cannot or will not do a job gives it back with one of these names, or with `insufficient-storage` or `non-finite-slice`;
[what to do](agent.md#when-something-is-wrong) stands on the agent's page. They stand with the job in `rounds show`, and
the device is not asked again in this run before it sent a new profile. `python -m agent doctor` finds most of them beforehand.

| problem | meaning |
|---|---|
{_lines(f"| `{k.slug()}` | {k.title()} |" for k in told)}

## The tree

What handles a class handles all below it.

```text
{_lines(_tree(HLoRAError))}
```
"""


def _tree(kind: type[HLoRAError]) -> Iterator[str]:
    yield kind.__name__
    children = kind.__subclasses__()
    for child in children:
        last = child is children[-1]
        first, *rest = _tree(child)
        yield f"{'└── ' if last else '├── '}{first}"
        yield from (f"{'    ' if last else '│   '}{line}" for line in rest)


SIDES: Mapping[str, tuple[type[BaseSettings], str]] = {
    "Coordinator": (coordinator.settings.Settings, "Read by every command of `python -m coordinator`."),
    "Agent": (agent.settings.Settings, "Read by every command of `python -m agent`."),
    "Operator": (admin.settings.Settings, "Read by every command of `python -m admin`; its options `--url` and `--token` go before."),
}


def configuration() -> str:
    """Every environment variable with its default and meaning."""
    return f"""{WRITTEN}
# Configuration

Coordinator, agent and operator's command are each configured by environment variables, and every variable has a default that works on
one machine. What a run shall do is in its [plan](plan.md), and what a device allows in its
[`policy.toml`](agent.md#policy).
{"".join(_side(name, *side) for name, side in SIDES.items())}
## Of the libraries

| variable | meaning |
|---|---|
| `OMP_NUM_THREADS` | processor threads of one torch operation; set it to 1 where several agents share a machine |
| `HF_HOME` | where base models from the hub are kept |
| `HF_HUB_OFFLINE` | `1`: use what is kept there and never ask the hub |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT` | the account for blobs in `s3://` |

Tests skip what needs PostgreSQL where its server's binaries are missing; with `HLORA_TEST_POSTGRES=required` they fail instead.
"""


def _side(name: str, settings: type[BaseSettings], intro: str) -> str:
    prefix = settings.model_config["env_prefix"]
    rows = (f"| `{prefix}{field.upper()}` | {_default(info)} | {info.description} |" for field, info in settings.model_fields.items())
    return f"\n## {name}\n\n{intro}\n\n| variable | default | meaning |\n|---|---|---|\n{_lines(rows)}\n"


def _default(info: FieldInfo) -> str:
    if info.default is None or info.default is PydanticUndefined:
        return "–"
    return f"`{str(info.default).lower() if isinstance(info.default, bool) else info.default}`"


def openapi() -> str:
    """The application's OpenAPI description."""
    with tempfile.TemporaryDirectory() as folder:
        context = build(coordinator.settings.Settings(data=Path(folder), blobs_url="memory://openapi"))
        description = create_app(context).openapi()
        context.close()
    return json.dumps(description, indent=1, ensure_ascii=False) + "\n"


def strategies() -> str:
    """What every strategy says of itself."""
    kinds = {name: aggregation.load(name) for name in aggregation.names()}
    return f"""{WRITTEN}
# Strategies

A strategy says how the contributions of a round become the next global adapter. A plan names it; its options are the fields of
its class. To add one, see [writing a strategy](writing-a-strategy.md).

Which one? What follows is what [the evidence](evidence.md) shows, on small models:

- `folded`, the default, where clients' machines differ: whoever can carry the whole adapter at the plan's cap trains its own rank of it
  and runs all of it, and every class of devices gains alike; whoever cannot starts from its slice, as under `delta`. Where each strategy
  was tuned it ended 0.028 ± 0.006 below `delta` in the loss, for half as many bytes again, and with momentum lowest of all that merge
  unequal ranks; `fedex`, which hands out the whole adapter too, was level with that, with twice the cap and two thirds more bytes.
- `delta` where little shall travel: each starts from its own slice, and what that does not hold is kept. Devices of larger ranks gain
  by it. Those of the smallest run a cut of what was learned as a whole: in the language model's experiment that was worse (by 0.06 in
  the loss) than what they learn among themselves at that rank; on QQP it was not.
- `training.cooling = 0.1` took 0.03 off the last loss of either; `momentum = 0.5` took 0.018 ± 0.006 off that of `folded`, and off
  that of `delta`, and on QQP off either, nothing beyond chance. With both, `reweight = 0.5` and the balanced split took another
  0.023 ± 0.007 off `folded`: so unequal ranks ended lowest. It was not tried on a classifier.
- `raflora` averages each direction over those who train it, for the bytes of `delta`. Leave `adapter.split` at `balanced` for it: in
  the left split it ended 0.081 ± 0.020 higher, in the balanced one it is level with `folded`, while devices of rank 2 lose by it.
- On QQP `folded` and `delta`, with momentum or without, and `raflora` learn soonest, and none of them ends beyond chance above another;
  `folded` ends above rank 2 for all, `zero_pad` and `flora`.
- Where all machines can train one rank, let them: unequal ranks did not beat equal ranks of the same mean that were trained by the same
  means, though they beat such ranks as federated averaging trains them. `delta` with momentum ended a little lower there than `fedavg`
  (by 0.015).
- `hlora` and `zero_pad` lose, round by round, what lies beyond the smallest rank; `flora` with a cap of twice the largest rank is level
  with `delta`, for three times its bytes; `hetlora` and `ffa` are there to be compared with. Where one of these departs from its
  paper, its file in `coordinator/aggregation` says so. Compare on rows like yours: [experiments](experiments.md).

*Exact*: the sum is a weighted mean of what the clients made, without cross terms between clients. *Linear*: the sum is linear in
the products that clients send, so that it could be formed without anybody seeing a single one. *Gauge-free*: a client that sends
other factors of the same product changes nothing. *Ranks*: whether clients may differ. *Down*, *up*: numbers per module that
travel to a client of rank r and back, with D = n_out + n_in and R_g the plan's cap, in the plan's types of number. *Cost*:
multiplications to merge one module, with R the ranks of all contributions added up, r the largest; where R reaches the smaller
side n of the matrix, n_out n_in R + n³ take the place of D R² + R³. Claims are those of the default options.

| strategy | exact | linear | gauge-free | ranks | down | up | cost | source |
|---|---|---|---|---|---|---|---|---|
{_lines(_claims(n, k) for n, k in kinds.items())}

A client of rank r trains r directions and sends these back. What it starts from, and which of it is trained, is the first of a
strategy's choices:

| down | what a client starts from | what it trains |
|---|---|---|
| r D | the adapter's first r directions | all of them |
| R_g D | all of the adapter | the first r, or r that are drawn for it anew in every round; the others stay frozen |
| (R_g + r) D | all of the adapter, and r fresh directions on top | the fresh ones; the adapter stays frozen |

Under `folded` each client that its link, memory and owner let carry the whole adapter beside its rank starts from it, at no step less; the
others start from their first r directions, in the same round. The rank comes first: it is what `delta` would give. `rounds show` says
who started from what, and why.

With one scale for all ranks, which is the default, those who start from all of the adapter share one file. What a strategy keeps
is the sum's best approximation at the cap, in singular form, or factors that go on being trained as they are: the clients' own
averages (`fedavg`, `hetlora`, `zero_pad`), averages and what they miss (`fedex`), b beside an a that never changes (`ffa`).
Whatever is kept, slices and adapters that are fetched are cut from its best approximation; a client measures what it would train from next.

With a [buffer](concepts.md#rounds-that-merge-what-comes) contributions begin from different versions of the adapter. Those that can merge
such: {", ".join(f"`{n}`" for n, k in kinds.items() if k.stale)}.

In formulas: W is the adapter, p the clients' shares of the weight, s their scales, b and a their factors, b₀ a₀ the directions
that each was given to train, qᵢ the share of those who trained direction i.

Those that add changes share these options; what another default makes of one of them stands with the strategy.

{_lines(_told(name, field) for name, field in aggregation.Changes.model_fields.items())}

{_lines(f"- `{n}`: {k.equation}. {(k.__doc__ or '').splitlines()[0]}{_options(k)}" for n, k in kinds.items())}

Merging finds the best approximation of the sum at the plan's cap by one of three methods, chosen by size; `rounds show` says for
every module how much of the sum's energy each rank holds, and how much more the best choice could hold at most.
"""


def _claims(name: str, kind: type[aggregation.Strategy]) -> str:
    ranks, travels = "one" if kind.equal_ranks else "any", f"{aggregation.DOWN[kind.portion]} | {aggregation.UP[kind.sides]}"
    claims = " | ".join([_yes(kind.exact), _yes(kind.linear), _yes(kind.gauge_free), ranks])
    return f"| `{name}` | {claims} | {travels} | {kind.cost} | {kind.source} |"


def _yes(claim: bool) -> str:
    return "yes" if claim else "no"


def _options(kind: type[aggregation.Strategy]) -> str:
    shared = aggregation.Changes.model_fields
    own = {n: field for n, field in kind.model_fields.items() if n not in shared or field.default != shared[n].default}
    return "".join(f"\n  {_told(name, field)}" for name, field in own.items())


def _told(name: str, field: FieldInfo) -> str:
    return f"- `{name}` ({field.default}): {field.description}"


def decisions() -> str:
    """The list of decisions."""
    found = sorted((HERE / "decisions").glob("[0-9]*.md"))
    titles = (path.read_text("utf-8").splitlines()[0].removeprefix("# ") for path in found)
    return f"""{WRITTEN}
# Decisions

What is hard to undo, and what one would otherwise ask again. A new one starts from the [template](template.md).

{_lines(f"{title.partition(' ')[0]} [{title.partition(' ')[2]}]({path.name})" for title, path in zip(titles, found, strict=True))}
"""


def _lines(lines: Iterator[str]) -> str:
    return "\n".join(lines)


DOCUMENTS: Mapping[str, Callable[[], str]] = {
    "problems.md": problems,
    "configuration.md": configuration,
    "plan.md": lambda: plan_page.plan(WRITTEN),
    "strategies.md": strategies,
    "decisions/README.md": decisions,
    "openapi.json": openapi,
}


def stale() -> list[str]:
    """The documents that are not what the code says."""
    return [name for name, make in DOCUMENTS.items() if not (HERE / name).exists() or (HERE / name).read_text("utf-8") != make()]


def main(arguments: list[str]) -> int:
    """Write the documents, or check them."""
    found = stale()
    if arguments == ["--check"]:
        print("\n".join(f"docs/{name} is not current: run make docs" for name in found), file=sys.stderr, end="\n" if found else "")
        return 1 if found else 0
    for name in found:
        (HERE / name).write_text(DOCUMENTS[name](), "utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
