"""Compare runs: a picture, a table, and what of them is not finished."""

from collections.abc import Sequence
from pathlib import Path

from experiments.comparing.folders import unfinished
from experiments.comparing.reading import load_runs, too_short
from experiments.comparing.table import common_accuracy, show
from experiments.plotting.comparison import plot_comparison
from jaxlocal import ConfigurationError

FORMATS = (".png", ".pdf", ".svg")


def compare(folders: Sequence[Path], output: Path, target: float | None) -> None:
    """Draw and tabulate the runs in some folders.

    Args:
      output: file of the picture.
      target: accuracy to which costs are compared; by default the largest that all runs reach.

    Raises:
      ConfigurationError: a folder that is not a run, or a picture that cannot be written.
    """
    if not folders:
        raise ConfigurationError("give the folders of the runs to compare")
    if output.suffix not in FORMATS:
        raise ConfigurationError(f"--output={output} should end in {', '.join(FORMATS)}")
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output={output} is in a folder that does not exist")
    short = [folder for folder in folders if too_short(folder)]
    folders = [folder for folder in folders if folder not in short] or folders
    runs = load_runs(folders)
    if target is not None and not any(run.has_accuracy for run in runs):
        raise ConfigurationError(f"--target_accuracy={target:g}, and no run has an accuracy")
    show(runs, common_accuracy(runs) if target is None else target)
    for folder in folders:
        for path, reason in unfinished(folder).items():
            print(f"{path}: {reason}")
    for folder in short:
        print(f"{folder}: left out, since a curve needs 2 measurements or more")
    try:
        plot_comparison(runs, output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}") from None
    print(output)
