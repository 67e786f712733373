"""The README's own program, as it stands there, and what it promises of it."""

import importlib
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import optax

import jaxlocal
from jaxlocal.methods import METHODS
from jaxlocal.methods.__main__ import rows as method_rows

README = (Path(__file__).parents[2] / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROGRAM, WITH_NNX, WITH_CHECKPOINTS, HUBS, COMPRESSED, *OWN, SHARDED, FAST = PROGRAMS
OWN_METHOD, OWN_COMPRESSOR, OWN_MIXER = OWN


def test_the_program_of_the_readme_finds_its_target(capsys):
    names = {}
    exec(compile(PROGRAM, "README.md", "exec"), names)
    np.testing.assert_allclose(names["params"]["w"], names["target"], atol=1e-2)
    assert names["info"].worker["loss"].shape == (16, 1, 8)
    assert "(16, 1, 8)" in capsys.readouterr().out


def test_the_second_program_follows_the_first_and_learns():
    names = {}
    exec(compile(PROGRAM + WITH_NNX, "README.md", "exec"), names)
    assert names["info"].worker["loss"].mean() < 0.5 < np.log(4)
    assert int(names["state"].step) == 200


def test_the_third_program_saves_and_resumes(tmp_path, monkeypatch, capsys):
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


def test_the_fourth_program_counts_payloads(capsys):
    exec(compile(PROGRAM + WITH_NNX + COMPRESSED, "README.md", "exec"), {})
    *_, last = capsys.readouterr().out.splitlines()
    model, blocks, entries = 512 * 256 + 256, 2048 + 4, (2048 + 4) * 32 + 2048 * 16 + 4 * 8
    factors = 4 * (512 + 256) + 256
    assert eval(last) == [32 * model, 32 * blocks, entries, 32 * factors]


def test_the_sharded_program_shards_each_worker_over_all_devices():
    names = {}
    exec(compile(PROGRAM + SHARDED, "README.md", "exec"), names)
    up, down = (names["state"].params[name] for name in ("up", "down"))
    assert up.sharding.shard_shape(up.shape) == (1, 2, 32, 64 // jax.device_count())
    assert down.sharding.shard_shape(down.shape) == (1, 2, 64 // jax.device_count(), 8)
    losses = names["info"].worker["loss"]
    assert losses.shape == (4, 1, 2) and (losses[-1] < losses[0]).all()


def test_the_program_of_fast_layers_has_the_gradients_of_plain_ones():
    names = {}
    exec(compile(PROGRAM + WITH_NNX + FAST, "README.md", "exec"), names)
    plain = jaxlocal.gradients(names["loss"], stateful=True)
    params, state = names["from_nnx"](names["Network"]).init(jax.random.key(0))
    images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    batch = {"inputs": images, "targets": np.arange(4)}
    ours, theirs = (jax.jit(f)(params, state, batch, None)[0] for f in (names["grad_fn"], plain))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_program_of_hubs_trains_a_round_of_thirty_two_steps():
    names = {}
    exec(compile(PROGRAM + WITH_NNX + HUBS, "README.md", "exec"), names)
    round_fn = names["round_fn"]
    assert names["mll"].period.length(0, 1000) == 32
    state = round_fn.init(names["params"], jax.random.key(0), names["model_state"])
    x = names["rng"].normal(size=(32, 4, 5, 8, 3)).astype("float32")
    state, info = round_fn(state, {"inputs": x, "targets": x.argmax(-1)})
    taken = np.asarray(info.worker["active"]).mean(axis=(0, 1))
    # 128 draws of 0.6, and 512 of 0.9: four standard errors are 0.17 and 0.05.
    assert abs(taken[0] - 0.6) < 0.17 and abs(taken[1:].mean() - 0.9) < 0.05
    assert info.worker["loss"][-8:].mean() < info.worker["loss"][:8].mean()


def test_the_own_method_converges_to_the_target_of_the_first_program():
    names = {}
    exec(compile(PROGRAM + OWN_METHOD, "README.md", "exec"), names)
    method = names["clipped_sgd"](jaxlocal.gradients(names["loss"]), optax.sgd(0.1), limit=0.5)
    round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=4))
    state = round_fn.init({"w": np.zeros(3)}, jax.random.key(0))
    for _ in range(40):
        x = names["rng"].normal(size=(4, 1, 4, 32, 3))
        state, _ = round_fn(state, {"x": x, "y": x @ names["target"]})
    np.testing.assert_allclose(round_fn.mean(state)[0]["w"], names["target"], atol=1e-3)


def test_own_code_is_ten_to_fifteen_lines_each():
    for code in OWN:
        body = re.sub(r'""".*?"""', "", code[code.index("\ndef ") :], flags=re.DOTALL)
        lines = [line for line in body.splitlines() if line.strip() and "COMPRESSORS" not in line]
        assert 8 <= len(lines) <= 16, code


def test_own_code_uses_public_names_only():
    for code in OWN:
        for module, names in re.findall(r"from (jaxlocal[\w.]*) import (.*)", code):
            exported = importlib.import_module(module)
            assert set(names.split(", ")) <= set(getattr(exported, "__all__", dir(exported)))


def test_the_table_of_methods_is_that_of_the_library():
    rows = re.findall(
        r"^\| `\w+` \| .* \| .*\|$", README[README.index("## Methods") :], re.MULTILINE
    )
    documented = [row for row in rows if row.split("`")[1] in METHODS]
    known = dict(zip(METHODS, method_rows(), strict=True))
    assert len(documented) >= 16
    for row in documented:
        tidy = lambda text: re.sub(r"\s+", " ", text)
        assert tidy(row) == tidy(known[row.split("`")[1]])


def test_the_program_is_a_loop_of_fifteen_lines():
    body = PROGRAM[PROGRAM.index("def loss") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


def test_the_two_commands_are_there_for_ci():
    for extra, command in [("experiments", "python -m experiments.train"), ("test", "pytest")]:
        assert f"\npip install -e '.[{extra}]' && {command}\n" in README
