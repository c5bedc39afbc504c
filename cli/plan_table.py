"""A plan for a person: the policy, bars of what lies where, seconds by term, what more would buy."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from cli.amounts import amount

if TYPE_CHECKING:  # the engine's rooms are loaded by the command alone
    from engine.planning.corrections import Corrections
    from engine.planning.plan import Plan
    from engine.planning.policy import Policy
    from engine.planning.prediction import Prediction

_BAR_WIDTH: Final = 40
_COLOURS: Final = {"gpu": "green", "cpu": "cyan", "disk": "yellow"}


def policy_table(policy: "Policy") -> Table:
    table = _table()
    beside = "beside their keys and values" if policy.attends_beside else "over fetched ones"
    away = policy.kv.total_bytes - policy.kv[policy.compute]
    rows = (
        ("computes on", f"{policy.compute}, in {policy.compute_dtype}"),
        ("block", f"{policy.block_rows} rows"),
        ("prompt tokens a sweep", f"{policy.sweep_tokens}"),
        ("micro-batch", f"{policy.micro_batch_tokens} tokens"),
        ("weights streamed", f"{amount(policy.streamed_bytes)}B a sweep"),
        ("rows away attend", beside if away else "there are none"),
        ("hidden states", f"on the {policy.hidden_tier or policy.compute} tier"),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def placement_table(policy: "Policy") -> Table:
    """A bar for each kind of bytes, cut by tier."""
    table = _table("", "", "gpu", "cpu", "disk")
    for name, by_tier in _placed(policy):
        total = sum(by_tier.values())
        if total:
            cells = [f"{amount(size)}B" if size else "" for size in by_tier.values()]
            table.add_row(name, _bar(by_tier, total), *cells)
    return table


def prediction_table(prediction: "Prediction") -> Table:
    """Seconds of a sweep by term, with the lane that each belongs to."""
    from engine.planning.prediction import LANES  # noqa: PLC0415 (see above)

    table = _table("term", "lane", "seconds", "")
    table.columns[2].justify = "right"
    terms = prediction.terms.as_dict()
    lane_of = {term: lane for lane, names in LANES.items() for term in names}
    for term, seconds in sorted(terms.items(), key=lambda each: -each[1]):
        if seconds:
            name = term.removesuffix("_s").replace("_", " ")
            bar = Bar(prediction.sweep_s, 0, seconds, width=_BAR_WIDTH)
            binds = "  binds" if term == prediction.binding_term else ""
            table.add_row(f"{name}{binds}", lane_of.get(term, ""), f"{seconds:.4g}", bar)
    return table


def prediction_text(prediction: "Prediction") -> str:
    return (
        f"{prediction.tokens_per_s:.1f} tokens/s in steady state, {prediction.job_tokens_per_s:.1f} "
        f"over the whole job of {prediction.job_s:,.0f} s; a sweep of {prediction.sweep_s:.4g} s, a "
        f"row's answer after {prediction.latency_s:,.1f} s\n"
        f"the {prediction.binding_lane} lane binds, most of it "
        f"{prediction.binding_term.removesuffix('_s').replace('_', ' ')}"
    )


def sensitivity_table(plan: "Plan") -> Table:
    table = _table("what more would buy", "", "tokens/s")
    table.columns[2].justify = "right"
    for each in plan.sensitivities:
        table.add_row(each.resource, each.change, f"{each.gain:+.1%}")
    return table


def corrections_text(corrections: "Corrections") -> str:
    """What runs have taught, in a line; empty where there were none."""
    told = [
        f"{name} x{each.factor:.2f} ({each.num_runs} runs)"
        for name, each in corrections.terms.items()
    ]
    return f"seconds corrected by what runs have shown: {', '.join(told)}" if told else ""


def _placed(policy: "Policy") -> "Iterator[tuple[str, Mapping[str, int]]]":
    splits = (
        ("layers", policy.layer_splits),
        ("head", (policy.head_split,)),
        ("embedding", (policy.embedding_split,)),
        ("keys and values", (policy.kv,)),
    )
    for name, parts in splits:
        yield (
            name,
            {
                tier: sum(getattr(part, f"{tier}_bytes") for part in parts if part)
                for tier in _COLOURS
            },
        )


def _bar(by_tier: "Mapping[str, int]", total: int) -> Text:
    """As long for every kind, each tier in its colour and letter."""
    bar = Text()
    end = 0.0
    for tier, size in by_tier.items():
        begin, end = end, end + size / total * _BAR_WIDTH
        bar.append(tier[0].upper() * (round(end) - round(begin)), style=_COLOURS[tier])
    return bar


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=bool(headings))
    for heading in headings or ("", ""):
        table.add_column(heading, no_wrap=True)
    return table
