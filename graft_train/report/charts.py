"""The plots, as Vega-Lite specifications that Vega-Altair makes.

Why Altair: twelve plots of this page's kind, with all that draws them, took 0.96 MB with Altair 6.3 (Vega, Vega-Lite
and vega-embed), 1.3 MB and more with Bokeh 3.9, and 4.9 MB with Plotly 7.1. Its plots take their colours from the
page's style sheet, so that light and dark need no second drawing, and they run without `eval` and without the network.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

Rows = Sequence[Mapping[str, Any]]
Spec = dict[str, Any]

METHOD_COLORS = {
    "graft": "var(--graft)",
    "eagle3": "var(--eagle3)",
    "retrieve": "var(--retrieve)",
    "autoregressive": "var(--plain)",
}
SOURCE_COLORS = {
    "target": "var(--target)",
    "head": "var(--head)",
    "matrix": "var(--matrix)",
    "lookup": "var(--lookup)",
}
PHASE_COLORS = {
    "draft": "var(--head)",
    "graft": "var(--matrix)",
    "verify": "var(--plain)",
    "commit": "var(--lookup)",
}
PLAN_COLORS = {
    "learned": "var(--graft)",
    "chain": "var(--graft)",
    "eagle3": "var(--eagle3)",
    "draft_only": "var(--head)",
    "retrieve_only": "var(--retrieve)",
    "paper": "var(--lookup)",
}
OTHERS = ("var(--series1)", "var(--series2)", "var(--series3)", "var(--series4)", "var(--series5)", "var(--series6)")
"""For what has no colour of its own, such as draft steps."""
ROW = 34
"""Pixels of a bar."""


def speed(rows: Rows) -> Spec:
    """Args:
    rows: method, speedup, low, high, tokens_per_second.
    """
    y = alt.Y("method:N", sort=None, title=None)
    data = alt.Data(values=list(rows))
    shown: list[Any] = ["method:N", alt.Tooltip("speedup:Q", format=".2f"), alt.Tooltip("low:Q", format=".2f")]
    shown += [alt.Tooltip("high:Q", format=".2f"), alt.Tooltip("tokens_per_second:Q", format=".1f")]
    bars = alt.Chart(data).mark_bar(size=18, cornerRadius=3).encode(
        y=y,
        x=alt.X("speedup:Q", title="speed-up"),
        color=_color("method", METHOD_COLORS, rows),
        tooltip=shown,
    )  # fmt: skip
    line = alt.Chart(data).mark_rule(strokeWidth=2, color="var(--text)").encode(y=y, x="low:Q", x2="high:Q")
    return _spec(bars + line, height=ROW * len(rows))


def stacked(rows: Rows, part: str, value: str, title: str, colors: Mapping[str, str]) -> Spec:
    """Bars of several parts, one for each method.

    Args:
        rows: method, `part` and `value`.
        title: of the values.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    order = list(dict.fromkeys(row[part] for row in rows))
    ranked = [{**row, "order": order.index(row[part])} for row in rows]
    chart = alt.Chart(alt.Data(values=ranked)).mark_bar(size=18).encode(
        y=alt.Y("method:N", sort=methods, title=None),
        x=alt.X(f"{value}:Q", title=title),
        color=_color(part, colors, rows),
        order="order:Q",
        tooltip=["method:N", f"{part}:N", alt.Tooltip(f"{value}:Q", format=".3~f", title=title)],
    )  # fmt: skip
    return _spec(chart, part, height=ROW * len(methods))


def grouped(rows: Rows, group: str, value: str, title: str) -> Spec:
    """A point for each method in each group.

    Args:
        rows: method, `group` and `value`.
    """
    groups = list(dict.fromkeys(row[group] for row in rows))
    y = alt.Y(f"{group}:N", sort=groups, title=None)
    x = alt.X(f"{value}:Q", title=title, scale=alt.Scale(zero=False))
    data = alt.Data(values=list(rows))
    points = alt.Chart(data).mark_point(filled=True, size=90, opacity=1).encode(
        y=y,
        x=x,
        color=_color("method", METHOD_COLORS, rows),
        tooltip=[f"{group}:N", "method:N", alt.Tooltip(f"{value}:Q", format=".2f", title=title)],
    )  # fmt: skip
    return _spec(points, "method", height=max(80, 26 * len(groups)))


def by_bucket(rows: Rows, title: str) -> Spec:
    """Acceptance length of each method along buckets of tokens.

    Args:
        rows: method, bucket, acceptance_length, rounds; buckets in order.
    """
    buckets = list(dict.fromkeys(row["bucket"] for row in rows))
    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(point={"size": 60}, strokeWidth=2).encode(
        x=alt.X("bucket:N", sort=buckets, title=title, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("acceptance_length:Q", title="tokens per round", scale=alt.Scale(zero=False)),
        color=_color("method", METHOD_COLORS, rows),
        tooltip=["method:N", "bucket:N", alt.Tooltip("acceptance_length:Q", format=".2f"), "rounds:Q"],
    )  # fmt: skip
    return _spec(chart, "method")


def frontier(predicted: Rows, measured: Rows) -> Spec:
    """Speed against acceptance length.

    Args:
        predicted: plan, num_draft_tokens, acceptance_length and tokens_per_second, along them.
        measured: the same of the plans that raced, without num_draft_tokens.
    """
    shown: list[Any] = ["plan:N", alt.Tooltip("acceptance_length:Q", format=".2f")]
    shown.append(alt.Tooltip("tokens_per_second:Q", format=".1f"))
    x = alt.X("acceptance_length:Q", title="tokens per round", scale=alt.Scale(zero=False))
    y = alt.Y("tokens_per_second:Q", title="tokens/s", scale=alt.Scale(zero=False))
    color = _color("plan", PLAN_COLORS, measured)
    lines = alt.Chart(alt.Data(values=list(predicted))).mark_line(point={"size": 40}, strokeWidth=1.5).encode(
        x=x, y=y, color=color, order="num_draft_tokens:Q", tooltip=[*shown, "num_draft_tokens:Q"]
    )  # fmt: skip
    stars = alt.Chart(alt.Data(values=list(measured))).encode(x=x, y=y, color=color, tooltip=shown)
    stars = stars.mark_point(filled=True, size=220, shape="diamond", opacity=1)
    return _spec(lines + stars, "plan", height=320)


def calibration(rows: Rows) -> Spec:
    """P(accepted), claimed against met.

    Args:
        rows: proposer, claimed, met, nodes.
    """
    share = alt.Scale(domain=[0, 1])
    diagonal = alt.Chart(alt.Data(values=[{"claimed": 0, "met": 0}, {"claimed": 1, "met": 1}])).mark_line(
        strokeDash=[4, 4], strokeWidth=1, color="var(--muted)"
    )
    lines = alt.Chart(alt.Data(values=list(rows))).mark_line(point={"size": 45}, strokeWidth=2).encode(
        color=_color("proposer", SOURCE_COLORS, rows),
        order="claimed:Q",
        tooltip=[
            "proposer:N",
            alt.Tooltip("claimed:Q", format=".1%"),
            alt.Tooltip("met:Q", format=".1%"),
            "nodes:Q",
        ],
    )  # fmt: skip
    x = alt.X("claimed:Q", title="P(accepted), claimed", scale=share, axis=alt.Axis(format="%"))
    y = alt.Y("met:Q", title="share that was accepted", scale=share, axis=alt.Axis(format="%"))
    return _spec(diagonal.encode(x=x, y=y) + lines.encode(x=x, y=y), "proposer", height=320)


def curves(rows: Rows, series: str, value: str, title: str) -> Spec:
    """What was logged along the optimizer steps.

    Args:
        rows: step, `series` and `value`.
    """
    names = list(dict.fromkeys(row[series] for row in rows))
    colors = dict(zip(names, OTHERS * len(names), strict=False))
    chart = alt.Chart(alt.Data(values=list(rows))).mark_line(point={"size": 25}, strokeWidth=1.8).encode(
        x=alt.X("step:Q", title="optimizer step"),
        y=alt.Y(f"{value}:Q", title=title, scale=alt.Scale(zero=False)),
        color=_color(series, colors, rows),
        tooltip=["step:Q", f"{series}:N", alt.Tooltip(f"{value}:Q", format=".4~g", title=title)],
    )  # fmt: skip
    return _spec(chart, series)


def _color(name: str, colors: Mapping[str, str], rows: Rows) -> alt.Color:
    """The colours of the names that occur, in the order in which they do."""
    domain = list(dict.fromkeys(row[name] for row in rows))
    spare = iter(OTHERS * len(domain))
    scale = alt.Scale(domain=domain, range=[colors.get(one) or next(spare) for one in domain])
    return alt.Color(f"{name}:N", scale=scale, legend=None)


def _spec(chart: alt.Chart | alt.LayerChart, named: str | None = None, height: int = 240) -> Spec:
    """As wide as its place on the page.

    Args:
        named: the column whose names stand beside their colours. The page shows them, as text that wraps.
    """
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    spec = {name: value for name, value in spec.items() if name not in ("config", "$schema")}
    colors = [layer["encoding"].get("color", {}) for layer in spec.get("layer", [spec])]
    scales = [color["scale"] for color in colors if named and color.get("field") == named]
    legend = list(zip(scales[0]["domain"], scales[0]["range"], strict=True)) if scales else []
    return spec | {"usermeta": {"legend": legend if len(legend) > 1 else []}}
