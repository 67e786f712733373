"""The comparison of runs: their labels, the costs to reach an accuracy, the table, the picture and
the errors."""

import dataclasses
import json
import math

import matplotlib
import numpy as np
import pytest
from binaries import call, one_sentence
from matplotlib.figure import Figure
from short_runs import SMALL, run

from experiments.building.config import Config
from experiments.comparing.compare import compare
from experiments.comparing.labels import labels
from experiments.comparing.reading import load_runs
from experiments.comparing.table import common_accuracy, cost_to_reach
from jaxlocal import ConfigurationError

matplotlib.use("Agg")
SAVE = Figure.savefig
ACCURACIES = [0.1, 0.5, 0.9, 0.8]


def lines(accuracies=ACCURACIES, bits=8_000_000):
    """The metrics of a run that is measured every 10 steps and sends `bits` in between."""
    return [
        {
            "step": 10 * i,
            "round": i,
            "wall_seconds": 1.0 + 2 * i,
            "train_loss": 2.0**-i,
            "eval_loss": 3.0 * 2.0**-i,
            "eval_accuracy": accuracy,
            "bits_workers": bits * i,
            "bits_hubs": 0,
            "local_steps": 10,
            "learning_rate": 0.1,
            "consensus_distance": 0.0,
        }
        for i, accuracy in enumerate(accuracies)
    ]


def write_run(folder, metrics=None, ended="finished", **flags):
    folder.mkdir(parents=True)
    metrics = lines() if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "summary.json").write_text(json.dumps({"ended": ended}))
    config = dataclasses.replace(Config(workdir=str(folder)), **flags)
    (folder / "flags.txt").write_text("\n".join(config.flag_lines()) + "\n")
    return folder


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures that are saved, as empty files: rendering one takes a second."""
    return _saved_figures(monkeypatch, lambda figure, path, **options: path.touch())


@pytest.fixture
def rendered(monkeypatch, drawn):
    """The figures that are saved, in files as a user gets them."""
    return _saved_figures(monkeypatch, SAVE)


def _saved_figures(monkeypatch, save):
    figures = []

    def record(figure, *arguments, **options):
        figures.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def test_labels_are_the_flags_in_which_the_runs_differ(tmp_path):
    one = write_run(tmp_path / "one", local_steps=4)
    two = write_run(tmp_path / "two", local_steps=16)
    three = write_run(tmp_path / "three", local_steps=16, period="constant")
    assert labels([one, two]) == ["local_steps=4", "local_steps=16"]
    assert labels([two, three]) == ["default", "period=constant"]
    assert labels([one, two, three])[2] == "local_steps=16, period=constant"


def test_labels_are_names_where_flags_are_too_long_the_same_or_missing(tmp_path):
    one = write_run(tmp_path / "one")
    same = write_run(tmp_path / "same")
    long = write_run(tmp_path / "long", rates=",".join(["0.5"] * 20))
    assert labels([one, same]) == ["one", "same"]
    assert labels([one, long]) == ["one", "long"]
    assert labels([one]) == ["one"]
    (long / "flags.txt").unlink()
    assert labels([write_run(tmp_path / "two", local_steps=8), long]) == ["two", "long"]
    namesake = write_run(tmp_path / "more" / "one")
    assert labels([one, namesake]) == [str(one), str(namesake)]


def test_costs_are_those_of_the_first_measurement_at_the_target(tmp_path):
    folders = [
        write_run(tmp_path / "high", lines()),
        write_run(tmp_path / "low", lines([0.1, 0.6, 0.7, 0.75], bits=1_000_000)),
    ]
    high, low = load_runs(folders)
    assert common_accuracy([high, low]) == 0.75
    assert cost_to_reach(high, 0.75, "megabytes") == 2.0  # two messages of 8 million bits
    assert cost_to_reach(high, 0.75, "wall_seconds") == 5.0
    assert cost_to_reach(low, 0.75, "megabytes") == pytest.approx(3 / 8)
    assert cost_to_reach(low, 0.9, "megabytes") is None
    assert cost_to_reach(high, 0.9, "step") == 20.0


def test_the_table_shows_the_last_measurements_and_the_costs(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "four", local_steps=4),
        write_run(tmp_path / "two", lines([0.1, 0.4, 0.5, 0.6], 800), ended="diverged: NaN"),
    ]
    compare(folders, tmp_path / "compare.png", None)
    header, four, two, *rest = capsys.readouterr().out.splitlines()
    assert "sent to 0.6000" in header  # the most that both reach
    columns = lambda line: " ".join(line.split())
    assert columns(four) == "four 0.125 0.375 0.8000 0.9000 3 3 MB 7.0 2 MB 5.0"
    assert columns(two) == "two 0.125 0.375 0.6000 0.6000 3 300 B 7.0 300 B 7.0"
    assert f"{folders[1]}: diverged: NaN" in rest
    compare(folders, tmp_path / "compare.png", 0.95)
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["—", "—"]
    compare(folders, tmp_path / "compare.png", 0.0)
    assert "sent to 0.0000" in capsys.readouterr().out.splitlines()[0]


def test_a_run_that_waits_is_compared_over_time_slots(tmp_path, drawn, capsys):
    """A run without the count is one of an earlier version, whose slots are its steps."""
    waiting = [line | {"time_slots": 3 * line["step"]} for line in lines()]
    folders = [write_run(tmp_path / "waits", waiting), write_run(tmp_path / "earlier")]
    compare(folders, tmp_path / "compare.png", None)
    header, *rows = capsys.readouterr().out.splitlines()[:3]
    assert "time slots" in header and "time slots to 0.9000" in header
    assert [row.split()[-1] for row in rows] == ["60", "20"]
    axes = np.array(drawn[0].axes).reshape(3, 4)
    drawn_over = [list(line.get_xdata()) for line in axes[2, 3].get_lines()]
    assert drawn_over == [[0, 30, 60, 90], [0, 10, 20, 30]]
    assert axes[2, 3].get_xlabel() == "time slots"
    compare(folders[1:], tmp_path / "compare.png", None)
    assert "slots" not in capsys.readouterr().out and len(drawn[1].axes) == 9


def test_the_picture_has_every_result_over_every_cost(tmp_path, rendered):
    folders = [
        write_run(tmp_path / name, lines(bits=b))
        for name, b in [("a", 8_000_000), ("b", 80_000_000)]
    ]
    compare(folders, tmp_path / "compare.png", None)
    axes = np.array(rendered[0].axes).reshape(3, 3)
    for row, key in zip(axes, ["train_loss", "eval_loss", "eval_accuracy"], strict=True):
        wanted = [line[key] for line in lines()]
        assert all(list(line.get_ydata()) == wanted for axis in row for line in axis.get_lines())
    steps, sent, seconds = (
        [list(line.get_xdata()) for line in axis.get_lines()] for axis in axes[0]
    )
    assert steps == [[0, 10, 20, 30]] * 2
    assert sent == [[0, 1, 2, 3], [0, 10, 20, 30]]
    assert seconds == [[1, 3, 5, 7]] * 2
    assert [text.get_text() for text in rendered[0].legends[0].get_texts()] == ["a", "b"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "compare.png"]


def test_a_folder_of_seeds_is_their_mean_and_its_standard_error(tmp_path, drawn, capsys):
    for seed, last in enumerate([0.6, 0.8, 0.7]):
        write_run(tmp_path / "many" / f"seed_{seed}", lines([0.1, 0.5, last]), seed=seed)
    one = write_run(tmp_path / "one", lines([0.1, 0.5, 0.9]), learning_rate=0.1)
    (tmp_path / "many" / "summary.json").write_text("{}")
    folders = [tmp_path / "many", one]
    many, _ = load_runs(folders)
    assert many.label == "learning_rate=0.05, seed=0…2"
    np.testing.assert_allclose(many.mean("eval_accuracy"), [0.1, 0.5, 0.7])
    compare(folders, tmp_path / "compare.png", None)
    # s = 0.1 over three seeds, and its error 0.1 / √3 = 0.058
    assert "0.7000 ± 0.06" in capsys.readouterr().out
    (band,) = drawn[0].axes[6].collections
    corners = band.get_paths()[0].vertices
    last = corners[corners[:, 0] == 20][:, 1]
    assert [last.min(), last.max()] == pytest.approx(
        [0.7 - 0.1 / math.sqrt(3), 0.7 + 0.1 / math.sqrt(3)]
    )


def test_seeds_are_compared_as_far_as_all_of_them_have_come(tmp_path):
    write_run(tmp_path / "many" / "seed_9", lines([0.1, 0.5, 0.9]))
    write_run(tmp_path / "many" / "seed_10", lines([0.1, 0.7]), seed=10)
    (many,) = load_runs([tmp_path / "many"])
    np.testing.assert_allclose(many.values["eval_accuracy"], [[0.1, 0.5], [0.1, 0.7]])


def test_a_seed_that_has_not_ended_is_left_out(tmp_path, capsys):
    write_run(tmp_path / "many" / "seed_0")
    late = write_run(tmp_path / "many" / "seed_1", lines([0.1]))
    (late / "summary.json").unlink()
    compare([tmp_path / "many"], tmp_path / "compare.png", None)
    out = capsys.readouterr().out
    assert "0.8000" in out and "±" not in out and f"{late}: still running" in out


def test_a_regression_has_losses_only(tmp_path, drawn, capsys):
    folders = [write_run(tmp_path / name, lines([None] * 4)) for name in ("a", "b")]
    compare(folders, tmp_path / "compare.png", None)
    assert len(drawn[0].axes) == 6
    assert "accuracy" not in capsys.readouterr().out
    compare([folders[0], write_run(tmp_path / "c")], tmp_path / "compare.png", None)
    assert len(drawn[1].axes) == 9
    with pytest.raises(ConfigurationError, match="0.5, and no run has an accuracy"):
        compare(folders, tmp_path / "compare.png", 0.5)


def test_a_run_that_diverged_or_sends_nothing_is_drawn(tmp_path, rendered):
    broken = lines(bits=0)
    broken[-1] |= {"train_loss": None, "eval_loss": None, "eval_accuracy": None}
    one = write_run(tmp_path / "one", broken)
    compare([one], tmp_path / "compare.png", None)
    assert np.isnan(rendered[0].axes[0].get_lines()[0].get_ydata()[-1])
    nothing = [line | {"train_loss": None} for line in lines([0.1, None, None, None])]
    compare([write_run(tmp_path / "at_once", nothing)], tmp_path / "compare.png", None)
    compare([one, tmp_path / "at_once"], tmp_path / "compare.png", None)


def test_a_line_that_is_being_written_is_left_out(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "rou')
    (run,) = load_runs([folder])
    assert run.mean("step").tolist() == [0, 10, 20, 30]
    compare([folder], tmp_path / "compare.png", None)
    assert f"{folder}: still running" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ("", "holds 0 measurements"),
        (json.dumps(lines()[0]) + "\n", "holds 1 measurements"),
        ('{"step": 0\n' + json.dumps(lines()[0]) + "\n", "damaged"),
        ('{"step": 0}\n{"step": 1}\n', "damaged"),
        ("[1, 2]\n[3, 4]\n", "damaged"),
        ("\x00\x01\n\n", "damaged"),
        (2 * (json.dumps(lines()[0] | {"train_loss": "low"}) + "\n"), "damaged"),
    ],
)
def test_metrics_that_no_run_left_are_refused(tmp_path, metrics, words):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(metrics)
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_runs([folder])
    assert str(folder) in str(caught.value)


def test_other_mistakes_are_reported_with_their_values(tmp_path):
    good, picture = write_run(tmp_path / "run"), tmp_path / "compare.png"
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "odd" / "seed_0")
    write_run(tmp_path / "odd" / "seed_1", [line | {"step": 2 * line["step"]} for line in lines()])
    for folders, output, words in [
        ([], picture, "give the folders of the runs"),
        ([good, tmp_path / "none"], picture, "there is no folder .*none"),
        ([good, tmp_path / "empty"], picture, "empty is not a run"),
        ([good, tmp_path / "odd" / ".." / "run"], picture, "given twice"),
        ([tmp_path / "odd"], picture, "odd were not measured at the same steps"),
        ([good], tmp_path / "compare.txt", "compare.txt should end in .png"),
        ([good], tmp_path / "none" / "compare.png", "is in a folder that does not exist"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            compare(folders, output, None)
    assert not picture.exists()


def test_the_binary_compares_two_runs_of_the_other(tmp_path, rendered):
    for name, method in [("often", "data_parallel"), ("rarely", "local_sgd")]:
        short = dataclasses.replace(SMALL, method=method, steps=8, eval_every=4)
        assert run(dataclasses.replace(short, checkpoint_every=0), tmp_path / name)[0] == 0
    done = call(
        "compare", tmp_path / "often", tmp_path / "rarely", f"--output={tmp_path / 'both.png'}"
    )
    assert done.status == 0, done.error
    assert "method=data_parallel" in done.out and "method=local_sgd" in done.out
    assert done.out.splitlines()[-1] == str(tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_of_the_binary_end_in_one_sentence_and_status_two(tmp_path):
    for arguments, words in [
        ([tmp_path / "none"], "there is no folder"),
        (["--target_accuracy=1.5"], "target_accuracy"),
        ([tmp_path, "--target_accuracy=nan"], "must be a number from 0 to 1, got nan"),
    ]:
        done = call("compare", *arguments)
        assert done.status == 2
        assert one_sentence(done.error) and words in done.error
    done = call("compare", "--help")
    assert done.status == 0 and "WORKDIR" in done.out and "--output:" in done.out
