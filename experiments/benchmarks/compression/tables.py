"""Print the figures of the suite `compression`."""

from typing import Any

from rich.console import Console

from experiments.plotting.display import data_size, number, show_table


def show_sync_times(figures: dict[str, Any], model: str, batch_size: int, console: Console) -> None:
    """Print the time and the size of a message of each compressor, see `sync_times`."""
    gradient, model_bits = figures["gradient"], 32 * figures["parameters"]
    rows = [("gradient", f"{gradient['median'] * 1e3:.4g} ms")]
    for name, row in figures["compressors"].items():
        share = "{median:.1%} ({min:.1%} to {max:.1%})".format(**row["ratio"])
        saving = f", {model_bits / row['bits']:.3g}×" if row["bits"] else ""
        rows.append((name, f"{row['seconds']['median'] * 1e3:.4g} ms, {share}{saving}"))
    task = f"{model}, {number(figures['parameters'])} parameters, batch {batch_size}"
    meaning = "time, share of a gradient's time (min to max), compression ratio"
    show_table(console, f"\npartial synchronisation of {task}: {meaning}", rows)


def show_memory(figures: dict[str, Any], model: str, console: Console) -> None:
    """Print the memory of each method above that of Local SGD, see `method_memory`."""
    size = data_size(8 * figures["model_bytes"])
    task = f"{model} of {size}, {figures['workers']} workers on one device"
    rows = [(name, _memory(row)) for name, row in figures["methods"].items()]
    show_table(console, f"\nmemory above that of Local SGD, in models: {task}", rows)


def _memory(row: dict[str, Any]) -> str:
    state, peak = row["state_above"], row["peak_above"]
    return f"state {state:+.2f}, peak of a round {peak:+.2f} ({data_size(8 * row['peak_bytes'])})"
