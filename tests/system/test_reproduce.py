"""Figures of papers: their files, what a figure writes, and what of it is not run again."""

import csv
import math
import re

import numpy as np
import pytest
from small_figure import TUNED

from experiments.building.config import Config
from experiments.reproducing import figure as figures
from experiments.reproducing import picture
from experiments.reproducing import reproduce as reproducing
from experiments.reproducing.figure import (
    folder_name,
    names,
    parse_figure,
    read_figure,
    scales,
)
from experiments.reproducing.reproduce import CSV, PICTURE, TABLE, list_figures, reproduce
from experiments.reproducing.results import measured, measurements, slopes, table
from experiments.reproducing.running import Found
from experiments.reproducing.series import over_runs
from experiments.running.metrics import read_metrics
from experiments.tuning import runs
from jaxlocal import ConfigurationError
from jaxlocal.data import load


def found_of(y, sweep=None, x=None, seeds=1):
    """Runs with given measurements, of a figure of one curve."""
    curve = figures.Curve("a", Config(), {}, {}, sweep)
    lines = [{"step": s, "train_loss": value} for s, value in zip(x, y, strict=True)]
    ended = ["finished"] * seeds
    return Found(curve, {}, (), [*range(seeds)], [lines] * seeds, ended, {})


@pytest.fixture
def two_methods(monkeypatch, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "two_methods.toml").write_text(TUNED)
    monkeypatch.setattr(figures, "FOLDER", folder)
    return tmp_path / "out"


def test_a_figure_is_tuned_run_and_written_once(two_methods, monkeypatch, capsys):
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0
    text = (two_methods / TABLE).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Local SGD"))
    assert re.fullmatch(r"\| Local SGD, H = 4 \| 0.05 \(edge\) \| \S+ ± \S+ \| 0.5000 \|", row), row
    assert "Differs from the paper in: its size." in text and text in capsys.readouterr().out
    lines = list(csv.DictReader((two_methods / CSV).open()))
    ends = [float(x["train_loss"]) for x in lines if x["curve"][0] == "L" and x["step"] == "8"]
    shown = row.split("|")[3].split("±")
    assert float(shown[0]) == pytest.approx(np.mean(ends), rel=1e-3)
    assert float(shown[1]) == pytest.approx(abs(ends[0] - ends[1]) / 2, rel=0.06)
    assert (two_methods / PICTURE).stat().st_size > 10_000
    assert "2 seeds, tuned on seed 0. Differs" in text
    drawn = {(x["curve"], x["seed"], x["tuned_learning_rate"]) for x in lines}
    tuned = {("Local SGD, H = 4", seed, "0.05") for seed in "12"}
    assert drawn == tuned | {("data parallel", seed, "") for seed in "01"}
    monkeypatch.setattr(runs, "train", lambda config: pytest.fail("run again"))
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0


def test_running_averages_are_curves_of_the_same_runs(two_methods):
    text = TUNED.replace("learning_rate = 0.05 }", "learning_rate = 0.05, ema_decay = 0.5 }")
    text = text.replace('y = ["train_loss"]', 'y = ["train_loss", "eval_loss"]')
    (figures.FOLDER / "two_methods.toml").write_text(text + 'averages = { ema = "its EMA" }\n')
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0
    rows = [line for line in (two_methods / TABLE).read_text().splitlines() if line[:1] == "|"]
    own, average = (
        {cells[1]: cells for cells in ([c.strip() for c in row.split("|")] for row in rows)}[name]
        for name in ("data parallel", "its EMA")
    )
    assert average[3] == "—" and average[5] != own[5]
    ended = [read_metrics(two_methods / "data_parallel" / f"seed_{seed}")[-1] for seed in (0, 1)]
    expected = np.mean([line["eval_loss_ema"] for line in ended])
    assert float(average[5].split("±")[0]) == pytest.approx(expected, rel=1e-3)
    assert not (two_methods / "its_EMA").exists()


def test_mistakes_are_one_sentence_before_the_first_run(two_methods):
    for name, scale, words in (
        ("two_method", "small", "two_methods"),
        ("two_methods", "large", "scale"),
        ("two_methods", "full", "has no scale 'full', only small"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            reproduce(name, scale, two_methods, None, 1)
    assert not two_methods.exists()


def test_slopes_of_powers_are_their_exponents():
    text = TUNED.replace('y = ["train_loss"]', 'y = ["train_loss"]\nslopes = [2, 64]')
    figure = parse_figure(text, "one", "small", Config())
    x = 2.0 ** np.arange(8)
    slope = slopes(figure, [found_of(3 * x**-1.5, x=x)])["a"]
    assert slope.value == pytest.approx(-1.5) and slope.half_width == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(0).normal(0, 0.1, x.size)
    slope = slopes(figure, [found_of(np.exp(noise) / x, x=x)])["a"]
    # By the textbook, of the six points in the range.
    u, v = np.log(x[1:7]), (noise - np.log(x))[1:7]
    by_hand = ((u - u.mean()) * (v - v.mean())).sum() / ((u - u.mean()) ** 2).sum()
    rest = v - v.mean() - by_hand * (u - u.mean())
    error = math.sqrt((rest**2).sum() / 4 / ((u - u.mean()) ** 2).sum())
    assert slope.value == pytest.approx(by_hand)
    assert slope.half_width == pytest.approx(2.7764 * error, rel=1e-4)  # Student's t, 4 degrees


def test_a_diverged_run_has_no_mean():
    figure = parse_figure(TUNED, "one", "small", Config())
    one = found_of([1.0, 2.0], x=[0, 8], seeds=2)._replace(ended=["finished", "diverged: ∞"])
    assert measured(figure, one, "train_loss") == "1 of 2 diverged"
    assert "1 of 2 diverged" in table(figure, [one])


def test_a_curve_whose_trials_all_diverge_is_told_in_its_row(two_methods, monkeypatch):
    text = TUNED.replace("[1e-3, 0.05]", "[1e30, 1e31]")
    (figures.FOLDER / "two_methods.toml").write_text(text)
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0
    written = (two_methods / TABLE).read_text()
    assert "| Local SGD, H = 4 |  | all diverged | 0.5000 |" in written
    assert re.search(r"data parallel \|  \| 0\.\d+ ± ", written)
    assert {row["curve"] for row in csv.DictReader((two_methods / CSV).open())} == {"data parallel"}


def test_a_run_with_other_flags_is_told_before_the_first_run(two_methods, monkeypatch):
    text = TUNED.replace("tune = ", "# ").replace(
        "flags = { local", "flags = { batch_size=4, local"
    )
    (figures.FOLDER / "two_methods.toml").write_text(text)
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0
    # Another grid chooses other values, whose runs have folders of their own.
    tuned = text.replace("# learn", "tune = learn").replace("# {", "tune = {")
    (figures.FOLDER / "two_methods.toml").write_text(tuned)
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0
    changed = text.replace('"data_parallel"', '"data_parallel", batch_size = 2')
    (figures.FOLDER / "two_methods.toml").write_text(changed)
    monkeypatch.setattr(runs, "train", lambda config: pytest.fail("run"))
    with pytest.raises(ConfigurationError, match="holds a run with other flags"):
        reproduce("two_methods", "small", two_methods, None, 1)


def test_a_grid_of_one_value_needs_no_trial(two_methods):
    (figures.FOLDER / "two_methods.toml").write_text(TUNED.replace("[1e-3, 0.05]", "[0.05]"))
    assert reproduce("two_methods", "small", two_methods, None, 1) == 0
    folders = {path.name for path in (two_methods / "Local_SGD_H_=_4").iterdir()}
    assert folders == {"seed_0,learning_rate=0.05", "seed_1,learning_rate=0.05"}


def test_curves_are_compared_at_the_same_x():
    text = TUNED.replace("seeds = 2", "seeds = 1\nuntil = 6")
    figure = parse_figure(text, "one", "small", Config())
    one = found_of([3.0, 2.0, 0.5], x=[0, 5, 8])
    assert measured(figure, one, "train_loss") == "1.5000"  # a third of the way from 2 to 0.5
    assert over_runs(figure, one, "step", "train_loss") == ([0, 5, 6], [[3.0, 2.0, 1.5]])
    assert "1 seed, at 6 steps, interpolated." in table(figure, [one])
    early = found_of([3.0, 2.0], x=[0, 5])
    assert measured(figure, early, "train_loss") == "—"


def test_seeds_that_are_measured_at_other_x_are_drawn_at_the_same():
    figure = parse_figure(TUNED, "one", "small", Config())
    one = found_of([4.0, 2.0, 1.0], x=[0, 4, 8])
    other = found_of([4.0, 1.0], x=[0, 6])
    both = one._replace(runs=one.runs + other.runs, seeds=[0, 1], ended=["finished"] * 2)
    x, y = over_runs(figure, both, "step", "train_loss")
    assert x == [0, 4, 6] and y == [[4, 2, 1.5], [4, 2, 1]]


def test_diverged_runs_are_no_points_of_ends_and_have_no_slope():
    text = TUNED.replace('x = "step"', 'x = "workers"\nkind = "ends"\nslopes = [1, 8]')
    text = re.sub(r"(?s)\[\[curves\]\]\nname = .Local.*?(?=\[\[)", "", text)
    figure = parse_figure(text + "points.2 = {}", "one", "small", Config())
    found = [found_of([1.0, 1 / k], ("workers", k), x=[0, 8], seeds=2) for k in (1, 2, 4)]
    assert slopes(figure, found)["a"].value == pytest.approx(-1)
    found = [one._replace(ended=["diverged: ∞"] * 2) for one in found]
    assert math.isnan(slopes(figure, found)["a"].value)
    assert "a none" in table(figure, found)
    (drawn,) = picture._over_sweep(figure, found, "workers", "train_loss")
    assert np.isnan(drawn.y).all()


def test_a_list_of_x_makes_a_panel_of_each_and_slopes_of_the_first(monkeypatch, tmp_path):
    text = TUNED.replace('x = "step"', 'x = ["step", "round"]\nslopes = [1, 8]')
    figure = parse_figure(text, "one", "small", Config())
    one = found_of([8.0, 2.0, 1.0], x=[1, 4, 8])
    for line in one.runs[0]:
        line["round"] = line["step"] // 4
    drawn = []
    monkeypatch.setattr(picture, "draw", lambda panels, *_: drawn.extend(panels))
    picture.draw_figure(figure, [one], tmp_path)
    assert [(panel.x, panel.y) for panel in drawn] == [
        ("step", "train_loss"),
        ("round", "train_loss"),
    ]
    assert [panel.curves[0].x for panel in drawn] == [[1, 4, 8], [0, 1, 2]]
    assert [panel.curves[0].name for panel in drawn] == ["a, slope -1.00", "a"]


def test_of_ends_only_the_last_measurements_are_written():
    figure = read_figure("overparam_partitions", "small", Config())
    found = [found_of([3.0, 1.0 / h], ("local_steps", h), x=[0, 8], seeds=2) for h in (1, 4)]
    rows = list(csv.DictReader(measurements(figure, found).splitlines()))
    written = [(row["sweep"], row["seed"], row["train_loss"]) for row in rows]
    assert written == [("1", "0", "1.0"), ("1", "1", "1.0"), ("4", "0", "0.25"), ("4", "1", "0.25")]


def test_the_bound_of_the_perceptron_is_that_of_gradient_descent():
    figure = read_figure("overparam_rates", "small", Config())
    (bound,) = figure.lines
    rate = figure.curves[0].config.learning_rate
    train = load("perceptron", None, 0).train()
    sides = 2.0 * train["targets"] - 1
    weights = 2 * load("perceptron", None, 0).normal
    assert (sides * (train["inputs"] @ weights)).min() > 1 - 1e-6  # no loss on any example
    inputs = np.column_stack([train["inputs"], np.ones(len(sides))])
    assert rate <= 1 / (2 * np.linalg.norm(inputs.T @ inputs / len(sides), 2))  # η ≤ 1/L
    expected = [weights @ weights / (2 * rate * steps) for steps in bound.x]
    np.testing.assert_allclose(bound.y, expected, rtol=1e-6)


def test_every_figure_is_listed_with_its_cost():
    text = list_figures()
    for name in names():
        assert re.search(rf"^{name}$", text, re.MULTILINE)
    assert text.count("small: ") + text.count("full: ") >= len(names())


@pytest.mark.parametrize(("name", "scale"), [(n, scale) for n in names() for scale in scales(n)])
def test_every_figure_is_read(name, scale):
    figure = read_figure(name, scale, Config())
    assert figure.curves and figure.seeds >= 1 and figure.cost
    own = [curve for curve in figure.curves if curve.runs_of is None]
    assert len(set(map(folder_name, own))) == len(own)


@pytest.mark.parametrize(
    "name", [name for name in names() if name.startswith(("mll", "overparam"))]
)
def test_their_periods_do_not_follow_the_learning_rate(name):
    for scale in scales(name):
        for curve in read_figure(name, scale, Config()).curves:
            constant = "constant" in (curve.config.period, curve.config.schedule)
            assert constant or curve.config.method != "local_sgd", (scale, curve.name)


def test_the_bound_of_the_tight_instance_is_its_formula():
    (bound,) = read_figure("overparam_lower_bound", None, Config()).lines
    expected = [1 / (4 * math.e * (rounds + 0.5)) for rounds in bound.x]
    np.testing.assert_allclose(bound.y, expected, rtol=1e-6)


def test_plans_need_no_runs(tmp_path, monkeypatch):
    text = TUNED.replace('x = "step"', 'x = "step"\nkind = "plan"').replace(
        'y = ["train_loss"]', 'y = ["local_steps"]'
    )
    text = re.sub(r"tune = .*", "", text).replace("train_loss = 0.5", "communication_volume = 0.25")
    monkeypatch.setattr(
        reproducing, "read_figure", lambda *_: parse_figure(text, "p", "small", Config())
    )
    assert reproduce("p", "small", tmp_path, None, 1) == 0
    assert "| Local SGD, H = 4 | 0.2500 | 0.2500 |" in (tmp_path / TABLE).read_text()
    rows = list(csv.DictReader((tmp_path / CSV).open()))
    assert [row["rounds"] for row in rows] == ["2", "8"]
    steps, text = (tmp_path / PICTURE).read_bytes(), text.replace("local_steps]", "curve]")
    text = text.replace('"step"', '"communication_volume"').replace('"local_steps"]', '"curve"]')
    assert reproduce("p", "small", tmp_path, None, 1) == 0
    assert (tmp_path / PICTURE).read_bytes() != steps
