"""How many hours a planned run takes: on a cluster, by a model; or by a fit to known hours."""

from typing import Any

from rich.console import Console

from experiments.building.job import Plan
from experiments.planning.cluster import on_cluster, show_cluster
from experiments.planning.hours_fit import fitted, show_fit
from experiments.planning.options import Options


def plan_hours(plan: Plan, options: Options) -> dict[str, Any]:
    """The figures of the hours that the options ask for: "cluster", "fit", both or none.

    Raises:
      ConfigurationError: options that do not fit the run.
    """
    figures = {}
    if options.bandwidth_gbps is not None:
        figures["cluster"] = on_cluster(plan, options)
    if options.hours_planned is not None and options.hours_data_parallel is not None:
        figures["fit"] = fitted(plan, options.hours_data_parallel, options.hours_planned)
    return figures


def show_hours(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `plan_hours` as tables."""
    if "cluster" in figures:
        show_cluster(console, figures["cluster"])
    if "fit" in figures:
        show_fit(console, figures["fit"])
