"""What all dashboards share: how a panel looks, where the data come from, the variables.

Lives here: the house's kinds of panels, made with grafana-foundation-sdk. Rules: every panel says
in a sentence what it shows; a line of panels is 24 units wide; rates are asked over
`$__rate_interval`, so that they fit the scrape interval. Must not come in: expressions.
"""

from __future__ import annotations

from typing import NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

__all__ = ["Graph", "Query", "Sheet", "figure", "graph"]

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_TAG = "shadowsvc"

Graph = timeseries.Panel


class Query(NamedTuple):
    """An expression, and what its series are called (`{{label}}` is a label's value)."""

    expression: str
    legend: str = "{{instance}}"


def graph(
    title: str, description: str, unit: str, *queries: Query, width: int = 8, stacked: bool = False
) -> Graph:
    """Lines over time; `unit` is one of Grafana's (`s`, `bytes`, `ops`, `short`)."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .min(0)
        .span(width)
        .height(8)
        .line_width(1)
        .fill_opacity(20 if stacked else 5)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel.with_target(_target(letter, query))
    return panel


def figure(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    decimals: int | None = None,
    warning: float | None = None,
    critical: float | None = None,
) -> stat.Panel:
    """One figure, with its course behind it; it changes colour from `warning` and `critical` on."""
    steps = [models.Threshold(value=None, color="green")]
    if warning is not None:
        steps.append(models.Threshold(value=warning, color="orange"))
    if critical is not None:
        steps.append(models.Threshold(value=critical, color="red"))
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .span(width)
        .height(4)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_target("A", query))
    )
    return panel if decimals is None else panel.decimals(decimals)


def _target(letter: str, query: Query) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(letter)
        .datasource(_SOURCE)
        .expr(query.expression)
        .legend_format(query.legend)
        .range()
    )


class Sheet:
    """A dashboard that is being made: rows of panels, numbered as they come."""

    def __init__(self, uid: str, title: str, description: str) -> None:
        """Make it empty; `uid` is a part of its address."""
        self._dashboard = (
            builders.Dashboard(title)
            .uid(uid)
            .description(description)
            .tags([_TAG])
            .editable()
            .time("now-1h", "now")
            .timezone("browser")
            .refresh("10s")
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .with_variable(
                builders.DatasourceVariable("datasource")
                .label("Data source")
                .type("prometheus")
                .current(
                    models.VariableOption(selected=True, text="Prometheus", value="prometheus")
                )
            )
            .link(
                builders.DashboardLink("Dashboards")
                .type(models.DashboardLinkType.DASHBOARDS)
                .tags([_TAG])
                .as_dropdown(True)
                .include_vars(True)
                .keep_time(True)
            )
        )
        self._number = 0

    def choose(self, name: str, label: str, query: str) -> None:
        """Let the reader choose among the values of a label; all are chosen at first."""
        self._dashboard.with_variable(
            builders.QueryVariable(name)
            .label(label)
            .datasource(_SOURCE)
            .query(query)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
        )

    def row(self, title: str, *panels: Graph | stat.Panel) -> None:
        """Put a heading and panels below it."""
        self._dashboard.with_row(builders.Row(title).id(self._next()))
        for panel in panels:
            self._dashboard.with_panel(panel.id(self._next()))

    def build(self) -> models.Dashboard:
        """Return it."""
        return self._dashboard.build()

    def _next(self) -> int:
        self._number += 1
        return self._number
