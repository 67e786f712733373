"""Run the suite `peers`."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from experiments.benchmarks.machine_load import wait_until_idle
from experiments.benchmarks.peers.contender import PEERS
from experiments.benchmarks.peers.environment import installed_versions, interpreter
from experiments.benchmarks.peers.tables import different_models, markdown_table
from experiments.benchmarks.report import describe_machine
from experiments.benchmarks.speed.comparison import compare_commands, contender_command
from experiments.benchmarks.speed.contender import JAXLOCAL
from experiments.benchmarks.workloads import Workload


def run(
    workloads: Sequence[Workload],
    peers: Sequence[str],
    repeats: int,
    limit: float,
    wait_idle: float,
    console: Console,
) -> dict[str, Any]:
    """Compare jaxlocal with its peers on each workload, and print one table of all.

    Args:
      workloads: what is trained.
      peers: names in `PEERS`; those that are not installed are named and left out.
      repeats: rounds of each contender that count.
      limit: seconds to wait for one round.
      wait_idle: seconds to wait for an idle machine.
      console: where sentences and the table are printed.

    Returns:
      The figures: "workloads", "peer_versions", "complete" if jaxlocal failed on none,
      "other_load_before" and "other_load_during".
    """
    names = [name for name in PEERS if name == JAXLOCAL or name in peers]
    packages = dict.fromkeys(PEERS[name].package for name in names if PEERS[name].package)
    versions = installed_versions(packages)
    say = lambda sentence: console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    for sentence in (*missing_peers(peers, versions), machine_sentence(versions)):
        say(sentence)
    before, parts = wait_until_idle(wait_idle), []
    for workload in workloads:
        commands = {
            name: command(name, workload) for name in names if runs(name, versions, workload)
        }
        parts.append(compare_commands(workload, commands, repeats, limit))
        for sentence in (*_failures(parts[-1]), *different_models(parts[-1])):
            say(sentence)
    say("\n" + markdown_table(parts))
    during = [part.pop("other_load") for part in parts]
    complete = not any(part["contenders"][JAXLOCAL]["failure"] for part in parts)
    load = {"other_load_before": before, "other_load_during": during}
    return {"workloads": parts, "peer_versions": versions, "complete": complete, **load}


def missing_peers(peers: Sequence[str], versions: dict[str, str]) -> Iterator[str]:
    """A sentence for each package that is not installed and that some of the peers need.

    >>> list(missing_peers(["drjax", "jax"], {}))
    ['without drjax, which is not installed: python -m experiments.benchmarks.peers.install']
    """
    for package in dict.fromkeys(PEERS[name].package for name in peers):
        if package and package not in versions:
            how = "python -m experiments.benchmarks.peers.install"
            yield f"without {package}, which is not installed: {how}"


def machine_sentence(versions: dict[str, str]) -> str:
    """What was measured where, in words."""
    machine = describe_machine()
    known = ", ".join(f"{name} {v}" for name, v in (machine["versions"] | versions).items())
    return f"{machine['processor']}, {machine['cores']} cores; {known}"


def runs(name: str, versions: dict[str, str], workload: Workload) -> bool:
    """Whether a peer is installed and can train a workload."""
    peer = PEERS[name]
    return (not peer.package or peer.package in versions) and workload.method in peer.methods


def command(name: str, workload: Workload) -> list[str]:
    """The command that starts a peer's process, by the interpreter that has its packages."""
    python = {"python": interpreter()} if PEERS[name].package else {}
    module = "experiments.benchmarks.peers.contender"
    return contender_command(name, workload, module=module, **python)


def _failures(figures: dict[str, Any]) -> Iterator[str]:
    for name, row in figures["contenders"].items():
        if row["failure"]:
            yield f"{PEERS[name].label}, {figures['name']}: {row['failure']}"
