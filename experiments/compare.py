"""Compare runs that experiments.train left: a picture over steps, communication and time, and a
table.

Takes folders of runs: python -m experiments.compare WORKDIR... [--output=compare.png]. A folder of
seeds, with runs in its subfolders seed_0, seed_1, ..., is one run: the mean over the seeds, in a
band of one standard error. A run that is still going on is shown as far as it has come.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from absl.flags import FLAGS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.building.config import PLACE, Config
from experiments.launching.command_line import INTERRUPTED, fail
from experiments.plotting.comparison import Curves, plot_comparison
from experiments.plotting.display import data_size, number
from experiments.running.recording import FLAGS as FLAGS_FILE
from experiments.running.recording import METRICS, SUMMARY, read_metrics
from experiments.running.seeds import mean_and_error
from jaxlocal import ConfigurationError

LABEL = 60  # characters beyond which folders' names are shorter to read than flags
FORMATS = (".png", ".pdf", ".svg")
KEYS = (
    *("step", "round", "wall_seconds", "train_loss", "eval_loss", "eval_accuracy"),
    *("bits_workers", "bits_hubs"),
)


def load_runs(folders: Sequence[Path]) -> list[Curves]:
    """The runs of some folders, with labels that tell them apart.

    Raises:
      ConfigurationError: a folder that is no run, whose metrics are damaged or hold less than two
        measurements, or that is given twice.
    """
    places = [folder.resolve() for folder in folders]
    for before, folder in enumerate(folders):
        if places[before] in places[:before]:
            raise ConfigurationError(f"{folder} is given twice")
    values = [_read(folder) for folder in folders]
    return [Curves(*pair) for pair in zip(labels(folders), values, strict=True)]


def seeds(folder: Path) -> list[Path]:
    """The folders of a run's seeds: its own, or its subfolders, of which those count that have
    ended if any has."""
    parts = _parts(folder)
    return [part for part in parts if (part / SUMMARY).exists()] or parts


def _parts(folder: Path) -> list[Path]:
    if (folder / METRICS).exists():
        return [folder]
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}")
    parts = [path.parent for path in folder.glob(f"seed_*/{METRICS}")]
    if not parts:
        raise ConfigurationError(f"{folder} is no run: it holds neither {METRICS} nor seed_*")
    return sorted(parts, key=lambda part: (len(part.name), part.name))


def labels(folders: Sequence[Path]) -> list[str]:
    """The flags in which the runs differ, or the folders' names where that is too long or no
    help."""
    chosen = [_flags(folder) for folder in folders]
    default = _named(Config().flag_lines())
    names = list(dict.fromkeys(name for flags_ in chosen for name in flags_))
    # What flags.txt does not tell is a default, empty if it depends on other flags.
    full = [{name: (default | flags_).get(name, "") for name in names} for flags_ in chosen]
    differing = [name for name in names if len({flags_[name] for flags_ in full}) > 1]
    told = [
        ", ".join(f"{name}={flags_[name]}" for name in differing if flags_[name]) or "default"
        for flags_ in full
    ]
    if len(set(told)) == len(told) > 1 and max(map(len, told)) <= LABEL and all(chosen):
        return told
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _flags(folder: Path) -> dict[str, str]:
    """The flags of a run that say what it is, by name; none where it left no record of them."""
    parts = seeds(folder)
    path = parts[0] / FLAGS_FILE
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    chosen = _named(lines)
    if len(parts) > 1 and "seed" in chosen:
        chosen["seed"] = f"{chosen['seed']}…{parts[-1].name.removeprefix('seed_')}"
    return chosen


def _named(lines: list[str]) -> dict[str, str]:
    """Lines of flags by name, without those that say where a run lies."""
    pairs = [line.partition("=") for line in lines]
    return {name.removeprefix("--"): value for name, _, value in pairs if name not in PLACE}


def _read(folder: Path) -> dict[str, np.ndarray]:
    """The metrics of all seeds, [seeds, measurements], as far as all of them have come."""
    lines = [_lines(path) for path in seeds(folder)]
    length = min(map(len, lines))
    lines = [seed[:length] for seed in lines]
    values = {key: np.array([[line[key] for line in seed] for seed in lines]) for key in KEYS}
    if (values["step"] != values["step"][0]).any():
        raise ConfigurationError(f"the seeds in {folder} were not measured at the same steps")
    return values


def too_short(folder: Path) -> bool:
    """Whether a run ended, or still is, before its second measurement."""
    return min(len(_lines(path, least=0)) for path in seeds(folder)) < 2


def _lines(folder: Path, least: int = 2) -> list[dict[str, Any]]:
    """The measurements of one seed."""
    path = folder / METRICS
    try:
        lines = [{key: _number(line[key]) for key in KEYS} for line in read_metrics(folder)]
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{path} is damaged: it has lines that no run wrote") from None
    if len(lines) < least:
        raise ConfigurationError(
            f"{path} holds {len(lines)} measurements, and a curve needs 2 or more"
        )
    return lines


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def common_accuracy(runs: Sequence[Curves]) -> float | None:
    """The largest accuracy that all runs reach; None where one has none."""
    if not all(run.has_accuracy for run in runs):
        return None
    return min(float(np.nanmax(run.mean("eval_accuracy"))) for run in runs)


def cost_to_reach(run: Curves, target: float, cost: str) -> float | None:
    """What the run had cost when it was first measured at the accuracy or above; None if never."""
    reached = np.flatnonzero(run.mean("eval_accuracy") >= target)
    return float(run.mean(cost)[reached[0]]) if len(reached) else None


def show(runs: Sequence[Curves], target: float | None) -> None:
    """The table: how good the runs ended, and what they cost to their end and to the target."""
    accuracies = any(run.has_accuracy for run in runs)
    names = ["train loss", "test loss", *(["accuracy", "best"] if accuracies else [])]
    names += ["rounds", "said", "seconds"]
    names += [f"{cost} to {target:.4f}" for cost in ("said", "seconds")] if target else []
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(Text(run.label), *map(Text, _row(run, accuracies, target)))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)  # nothing there makes lines wrap
    console.print(table, highlight=False)


def _row(run: Curves, accuracies: bool, target: float | None) -> list[str]:
    cells = [_measured(run, "train_loss", ".4g"), _measured(run, "eval_loss", ".4g")]
    if accuracies:
        best = np.nanmax(run.mean("eval_accuracy")) if run.has_accuracy else None
        cells += [_measured(run, "eval_accuracy", ".4f"), _or_dash(best, "{:.4f}".format)]
    said = lambda megabytes: data_size(round(megabytes * 8e6))
    cells += [number(round(run.mean("round")[-1])), said(run.mean("megabytes")[-1])]
    cells += [f"{run.mean('wall_seconds')[-1]:.1f}"]
    if target:
        cells += [_or_dash(cost_to_reach(run, target, "megabytes"), said)]
        cells += [_or_dash(cost_to_reach(run, target, "wall_seconds"), "{:.1f}".format)]
    return cells


def _measured(run: Curves, key: str, form: str) -> str:
    """The last measurement, and its standard error over seeds."""
    values = run.values[key][:, -1]
    if not np.isfinite(values).all():
        return "—"
    figure = mean_and_error(values.tolist())
    error = f" ± {figure['error']:.1g}" if len(values) > 1 else ""
    return f"{figure['mean']:{form}}{error}"


def _or_dash(value: Any, form: Any) -> str:
    return "—" if value is None else form(value)


def say_unfinished(folder: Path) -> None:
    """A sentence for each seed that has not finished."""
    for path in _parts(folder):
        try:
            ended = json.loads((path / SUMMARY).read_text(errors="replace"))["ended"]
        except (OSError, ValueError, KeyError, TypeError):
            ended = "still going on, or was killed"
        if ended != "finished":
            print(f"{path}: {ended}")


def compare(folders: Sequence[Path], output: Path, target: float | None) -> None:
    """Draw and tabulate the runs of some folders."""
    if not folders:
        raise ConfigurationError("which runs? give the folders that experiments.train left")
    if output.suffix not in FORMATS:
        raise ConfigurationError(f"--output={output} should end in {', '.join(FORMATS)}")
    short = [folder for folder in folders if too_short(folder)]
    folders = [folder for folder in folders if folder not in short] or folders
    runs = load_runs(folders)
    if target and not any(run.has_accuracy for run in runs):
        raise ConfigurationError(f"--target_accuracy={target:g}, and no run has an accuracy")
    show(runs, target if target else common_accuracy(runs))
    for folder in folders:
        say_unfinished(folder)
    for folder in short:
        print(f"{folder}: left out, since a curve needs 2 measurements or more")
    try:
        plot_comparison(runs, output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}") from None
    print(output)


def _parse(argv: list[str]) -> list[str]:
    if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        own = FLAGS.get_key_flags_for_module(sys.modules["__main__"].__file__ or "")
        print((__doc__ or "").strip() + "\n")
        for flag in own:
            default = "" if flag.default is None else f" [{flag.default}]"
            print(f"  --{flag.name}: {flag.help}{default}")
        sys.exit(0)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(str(error))


def _guarded(argv: list[str]) -> int:
    try:
        compare([Path(name) for name in argv[1:]], Path(FLAGS.output), FLAGS.target_accuracy)
        return 0
    except ConfigurationError as error:
        fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def main() -> None:
    flags.DEFINE_string("output", "compare.png", "The picture: a file of png, pdf or svg.")
    flags.DEFINE_float(
        "target_accuracy",
        None,
        "Test accuracy to which costs are compared; by default the largest that all runs reach.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    app.run(_guarded, flags_parser=_parse)


if __name__ == "__main__":
    main()
