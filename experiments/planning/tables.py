"""Print a plan as tables."""

from typing import Any

from rich.console import Console

from experiments.planning.auditing import show_audit
from experiments.planning.hours import show_hours
from experiments.plotting.display import data_size, number, show_table

ROWS = 12  # most rows of the H schedule that are printed; JSON has all


def show_plan(figures: dict[str, Any]) -> None:
    """Print the figures of a plan, its hours and its audit, as far as they are there."""
    console = Console()
    show_table(console, f"plan: {figures['method']}", _rows(figures))
    segments = figures["local_steps"]
    shown = segments if len(segments) <= ROWS else _thinned(segments)
    more = f", {len(shown)} of {len(segments)} values" if len(shown) < len(segments) else ""
    schedule_rows = [
        (f"from step {number(s['step'])}", f"H = {number(s['local_steps'])}") for s in shown
    ]
    show_table(console, f"\nH schedule{more}", schedule_rows)
    show_hours(console, figures)
    if "audit" in figures:
        show_audit(console, figures["audit"])


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    model, hubs, memory = figures["bits_model"], figures["hubs"], figures["memory_bytes"]
    turns = f" / {figures['turns']} fragments" if figures["turns"] > 1 else ""
    volume = f"{figures['communication_volume']:.2%} (rounds{turns} / steps)"
    held = (f"{name} {data_size(8 * size)}" for name, size in memory.items() if size)
    return [
        ("period", figures["period"]),
        ("steps", number(figures["steps"])),
        ("rounds", number(figures["rounds"])),
        ("communication volume", volume),
        ("sent by a worker", _sent(figures["bits_workers"], model)),
        ("sent by a hub", _sent(figures["bits_hubs"], model)),
        ("data parallel, by a worker", _sent(figures["bits_workers_data_parallel"], model)),
        ("compression ratio R_C", _ratios(figures)),
        *((f"{what} compressor", _compressor(c)) for what, c in figures["compressors"].items()),
        ("workers", f"{hubs} hubs × {figures['workers'] // hubs}"),
        ("ζ of the hub network", "—" if figures["zeta"] is None else f"{figures['zeta']:.4f}"),
        ("parameters", f"{number(figures['parameters'])} ({data_size(model)})"),
        ("devices", f"{number(figures['devices'])}: {_mesh(figures['mesh'])}"),
        ("training programs", number(figures["training_programs"])),
        ("memory on a device", ", ".join(held)),
    ]


def _mesh(sizes: dict[str, int]) -> str:
    return f"{' × '.join(map(str, sizes.values()))} ({' × '.join(sizes)})"


def _sent(total: int, model: int) -> str:
    return f"{number(total)} bits ({data_size(total)}, {total / max(1, model):,.0f} models)"


def _ratios(figures: dict[str, Any]) -> str:
    formula, counted = (figures[f"compression_ratio_{by}"] for by in ("formula", "counted"))
    shown = ["—" if ratio is None else number(float(ratio)) for ratio in (formula, counted)]
    return f"{shown[0]} by formula, {shown[1]} by bits"


def _compressor(figures: dict[str, Any]) -> str:
    delta, bits = f"{figures['delta']:.4g}", number(figures["bits"])
    return f"{figures['name']}, δ ≥ {delta}, {bits} bits per message"


def _thinned(segments: list[dict[str, int]]) -> list[dict[str, int]]:
    """Some of the segments, evenly spaced, with the first and the last."""
    return [segments[round(i * (len(segments) - 1) / (ROWS - 1))] for i in range(ROWS)]
