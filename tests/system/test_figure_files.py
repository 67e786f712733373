"""Files of figures: what they say, and one sentence for each mistake."""

import re

import pytest
from small_figure import TUNED

from experiments.building.config import Config
from experiments.reproducing.figure import folder_name, parse_figure
from jaxlocal import ConfigurationError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "figure one has no 'title'"),
        (TUNED.replace("title", "titel"), "unknown key 'titel'"),
        (TUNED.replace("[small]", "[large]"), "unknown key 'large'"),
        (re.sub(r"(?s)\[small\].*?(?=\[\[)", "", TUNED), "no scale: give a table small or full"),
        (TUNED.replace("seeds = 2", "seeds = 0"), "seeds must be a whole number of 1 or more"),
        (TUNED.replace("seeds = 2", 'until = "8"'), "until must be a number, got '8'"),
        (TUNED.replace('["its size"]', '"its size"'), "differs must be a list of texts"),
        (TUNED.replace("steps = 8", "stepps = 8", 1), "stepps"),
        (TUNED.replace("steps = 8", "seeds = 8", 1), "--seeds=8 is the same"),
        (TUNED.replace("steps = 8", "steps = [8]", 1), "flags must be a table of texts, numbers"),
        (TUNED.replace('"least_squares"', "="), "figure one"),
        (TUNED.replace("momentum = 0", 'momentum = "much"'), "momentum"),
        (TUNED.replace('"step"', '"stepp"'), "x: 'stepp' is not one of step, round"),
        (TUNED.replace('"step"', '["step", 3]'), "x must be a text or a list of texts"),
        (TUNED.replace('["train_loss"]', '"train_loss"'), "y must be a list of texts"),
        (TUNED.replace('["train_loss"]', '["train_los"]'), "y: 'train_los' is not one of"),
        (TUNED.replace("train_loss = 0.5", "eval_loss = 0.5"), "'eval_loss' is not one of train_"),
        (TUNED.replace("[small]", "[small.flag]"), "scale small: unknown key 'flag'"),
        (TUNED.replace('"step"', '"step"\nslopes = [1]'), "slopes must be two positive numbers"),
        (TUNED.replace('"step"', '"step"\nlog = "z"'), "log must be"),
        (TUNED.replace('"step"', '"step"\nlines = [{name = "a", x = [1], y = []}]'), "line 'a': y"),
        (
            TUNED.replace('"step"', '"step"\nlines = [{name = "a", x = [1, 2], y = [1]}]'),
            "2 values",
        ),
        (TUNED.replace("[1e-3, 0.05]", "[]"), "tune must be a table of lists of values"),
        (TUNED.replace("[1e-3, 0.05]", "[0.05, 5e-2]"), "tuned over equal values"),
        (TUNED.replace("[1e-3, 0.05]", '["fast", 0.05]'), "learning_rate"),
        (TUNED.replace("{ learning_rate = [1", "{ seed = [1"), "seed"),
        (TUNED.replace("name = ", "nome = "), "unknown key 'nome'"),
        (TUNED.replace('"data parallel"', '"Local SGD, H = 4"'), "two curves are named"),
        (TUNED.replace('"data parallel"', '"Local SGD / H = 4"'), "would run in the folder"),
        (TUNED + "small = { flag = {} }", "'data parallel', scale small: unknown key 'flag'"),
        (TUNED + "points = {}", "points must be a table of tables"),
        (TUNED + "points.1 = 3", "points must be a table of tables"),
        (TUNED + "points.1 = { flag = {} }", "point '1': unknown key 'flag'"),
        (TUNED + "points.1 = { small = { flag = {} } }", "'1', scale small: unknown key 'flag'"),
        (TUNED + "points.few = {}", "point 'few'"),
        (TUNED + "points.nan = {}", "point 'nan'"),
        (TUNED + "points.1 = {}", "has a sweep of step; only figures of kind"),
        (TUNED + 'sweep = { flag = "workers" }', "sweep has no 'values'"),
        (TUNED + 'sweep = { flag = "workers", values = [1], x = 2 }', "unknown key 'x'"),
        (
            TUNED + 'sweep = { flag = "workers", values = [1] }\npoints.1 = {}',
            "has a sweep and points",
        ),
        (TUNED + 'averages = { ema = "EMA" }', "'ema' needs the flag ema_decay"),
        (TUNED + 'averages = { sma = "EMA" }', "running average 'sma'"),
        (TUNED + 'small.flags = { ema_decay = 0.5 }\naverages = { ema = "data parallel" }', "two"),
        (
            TUNED + 'small.flags = { ema_decay = 0.5 }\naverages = { ema = "Local SGD, H = 4" }',
            "two curves are named",
        ),
    ],
)
def test_a_wrong_file_is_told_by_its_key(text, words):
    with pytest.raises(ConfigurationError, match=words):
        parse_figure(text, "one", "small", Config())


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('x = "workers"', 'x = ["workers", "step"]', "ends are drawn over one x"),
        ('x = "workers"', 'x = "step"', "has a sweep of workers; ends are over step"),
        ("sweep = ", "group = 'one' # ", "has no sweep or points; ends are over workers"),
        ("values = [2, 4]", "values = [2, 2]", "would run in the folder"),
        ("values = [2, 4]", 'values = ["2"]', "values must be a list of numbers"),
    ],
)
def test_ends_are_over_what_is_swept(before, after, words):
    text = TUNED.replace('x = "step"', 'x = "workers"\nkind = "ends"')
    text = re.sub(r"(?s)\[\[curves\]\]\nname = .Local.*?(?=\[\[)", "", text)
    text += 'sweep = { flag = "workers", values = [2, 4] }\n'
    assert len(parse_figure(text, "one", "small", Config()).curves) == 2
    assert before in text
    with pytest.raises(ConfigurationError, match=words):
        parse_figure(text.replace(before, after), "one", "small", Config())


def test_points_of_a_curve_have_flags_and_grids_of_their_own():
    text = TUNED.replace('x = "step"', 'x = "workers"\nkind = "ends"')
    own = "flags = { workers = 8 }, small = { flags = { seed = 3 }, tune = { momentum = [1, 2] } }"
    text = text.replace("flags = { local_steps = 4 }", "points.1 = {}")
    text += f"points.2 = {{}}\npoints.8 = {{ {own} }}\n"
    two, eight = parse_figure(text, "one", "small", Config()).curves[1:]
    assert (two.sweep, eight.sweep) == (("workers", 2.0), ("workers", 8.0))
    assert (two.config.workers, eight.config.workers, eight.config.seed) == (2, 8, 3)
    assert (two.tune, eight.tune) == ({}, {"momentum": [1.0, 2.0]})
    assert two.config.learning_rate == eight.config.learning_rate == 0.05
    assert folder_name(eight) == "data_parallel-workers=8"


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ("step", "curve", "a plan shows local_steps over step"),
        ("hours", "local_steps", "a plan shows local_steps over step"),
        ("hours", "curve", "'Local SGD, H = 4': its hours follow from no group"),
    ],
)
def test_plans_are_drawn_over_steps_or_as_bars(x, y, words):
    text = re.sub(r"tune = .*|published = .*", "", TUNED)
    text = text.replace('"step"', f'"{x}"\nkind = "plan"').replace('"train_loss"', f'"{y}"')
    with pytest.raises(ConfigurationError, match=words):
        parse_figure(text, "p", "small", Config())
