"""The README's own program, as it stands there, and what it promises of it."""

import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np

import jaxlocal

README = (Path(__file__).parents[2] / "README.md").read_text()
PROGRAM, WITH_NNX, WITH_CHECKPOINTS, COMPRESSED, SPLIT, FAST = re.findall(
    r"```python\n(.*?)```", README, re.DOTALL
)


def test_the_program_of_the_readme_finds_its_target(capsys):
    names = {}
    exec(compile(PROGRAM, "README.md", "exec"), names)
    np.testing.assert_allclose(names["params"]["w"], names["target"], atol=1e-2)
    assert names["info"].worker["loss"].shape == (16, 1, 8)
    assert "(16, 1, 8)" in capsys.readouterr().out


def test_the_second_program_goes_on_from_the_first_and_learns():
    names = {}
    exec(compile(PROGRAM + WITH_NNX, "README.md", "exec"), names)
    assert names["info"].worker["loss"].mean() < 0.5 < np.log(4)
    assert int(names["state"].step) == 200


def test_the_third_program_saves_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = compile(PROGRAM + WITH_NNX + WITH_CHECKPOINTS, "README.md", "exec")
    exec(program, {})
    *_, last = capsys.readouterr().out.splitlines()
    step, accuracy, bits = last.split()
    assert (int(step), int(bits) > 0) == (200, True) and float(accuracy) > 0.9
    assert sorted(path.name for path in (tmp_path / "my_run").iterdir()) == ["150", "200"]
    shutil.rmtree(tmp_path / "my_run" / "200")
    exec(program, {})
    assert capsys.readouterr().out.splitlines()[-1] == last  # of steps 150 to 200 only


def test_the_fourth_program_counts_what_is_said(capsys):
    exec(compile(PROGRAM + WITH_NNX + COMPRESSED, "README.md", "exec"), {})
    *_, last = capsys.readouterr().out.splitlines()
    model, blocks, entries = 512 * 256 + 256, 2048 + 4, (2048 + 4) * 32 + 2048 * 16 + 4 * 8
    factors = 4 * (512 + 256) + 256
    assert eval(last) == [32 * model, 32 * blocks, entries, 32 * factors]


def test_the_fifth_program_splits_each_worker_over_all_devices():
    names = {}
    exec(compile(PROGRAM + SPLIT, "README.md", "exec"), names)
    up, down = (names["state"].params[name] for name in ("up", "down"))
    assert up.sharding.shard_shape(up.shape) == (1, 2, 32, 64 // jax.device_count())
    assert down.sharding.shard_shape(down.shape) == (1, 2, 64 // jax.device_count(), 8)
    losses = names["info"].worker["loss"]
    assert losses.shape == (4, 1, 2) and (losses[-1] < losses[0]).all()


def test_the_sixth_program_has_the_gradients_of_plain_layers():
    names = {}
    exec(compile(PROGRAM + WITH_NNX + FAST, "README.md", "exec"), names)
    plain = jaxlocal.gradients(names["loss"], stateful=True)
    params, state = names["from_nnx"](names["Network"]).init(jax.random.key(0))
    images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    batch = {"inputs": images, "targets": np.arange(4)}
    ours, theirs = (jax.jit(f)(params, state, batch, None)[0] for f in (names["grad_fn"], plain))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_program_is_a_loop_of_fifteen_lines():
    body = PROGRAM[PROGRAM.index("def loss") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


def test_the_two_commands_are_there_for_ci():
    for extra, command in [("experiments", "python -m experiments.train"), ("test", "pytest")]:
        assert f"\npip install -e '.[{extra}]' && {command}\n" in README
