"""Run the suite `scaling`."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from experiments.benchmarks.machine_load import wait_until_idle
from experiments.benchmarks.scaling.link_costs import measure_over_link
from experiments.benchmarks.scaling.setups import OVER_LINK, sized
from experiments.benchmarks.scaling.slow_link import NoLink, check_speed, slow_link
from experiments.benchmarks.scaling.speedups import measure_speedups
from experiments.benchmarks.scaling.tables import show_link_costs, show_speedups
from experiments.benchmarks.workloads import Workload


def run(
    workloads: Sequence[Workload],
    repeats: int,
    limit: float,
    link_mbps: float,
    link_ms: float,
    wait_idle: float,
    console: Console,
) -> dict[str, Any]:
    """Measure speed-ups on more devices and steps over a slow link, and print the tables.

    Args:
      workloads: what is trained; their workers, steps and examples are replaced, see `sized`.
      repeats: rounds of each method that count.
      limit: seconds to wait for one round.
      link_mbps, link_ms: rate and delay of the slow link, see `Link`.
      wait_idle: seconds to wait for an idle machine.
      console: where tables are printed.

    Returns:
      The figures: "workloads", "scaling", "link", "link_missing" with the reason if this machine
      cannot slow down a link, "complete" if no process failed, "other_load_before" and
      "other_load_during".

    Raises:
      ConfigurationError: no link has that rate and delay.
    """
    workloads = [sized(workload) for workload in workloads]
    check_speed(link_mbps, link_ms)
    before, scaling = wait_until_idle(wait_idle), []
    for workload in workloads:
        scaling.append(measure_speedups(workload, repeats, limit))
        show_speedups(workload, scaling[-1], console)
    link, missing = _over_slow_link(workloads, repeats, limit, (link_mbps, link_ms), console)
    parts = scaling + link
    during = [part.pop("other_load") for part in parts]
    return {
        "workloads": [workload._asdict() for workload in workloads],
        "scaling": scaling,
        "link": link,
        "link_missing": missing,
        "complete": not any(part["failures"] for part in parts),
        "other_load_before": before,
        "other_load_during": during,
    }


def _over_slow_link(
    workloads: Sequence[Workload],
    repeats: int,
    limit: float,
    speed: tuple[float, float],
    console: Console,
) -> tuple[list[dict[str, Any]], str | None]:
    """The figures of every workload over a link of that rate and delay, or why there are none."""
    processes, parts = max(setup.processes for setup in OVER_LINK), []
    try:
        with slow_link(processes, *speed) as link:
            if link.ms != speed[1]:
                console.print(f"\nwithout --link_ms={speed[1]:g}: this kernel has no netem")
            for workload in workloads:
                parts.append(measure_over_link(workload, repeats, limit, link))
                show_link_costs(workload, parts[-1], console)
    except NoLink as reason:
        console.print(Text(f"\nthis machine cannot slow down a link: {reason}"), soft_wrap=True)
        return [], str(reason)
    return parts, None
