"""What the compiled programs say to each other: collectives, read off the optimised HLO."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, topology
from jaxlocal.nn import conv_general_dilated, max_pool

COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(-start)?\("
)
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
WIDTH = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4}
ITEM = re.compile(r"(f32|bf16|s32|u32)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    bytes: int  # of the result on one device
    line: str

    def groups(self, mesh_shape) -> list[list[int]]:
        """The devices that speak with each other, whichever way the text spells it."""
        devices = np.arange(math.prod(mesh_shape)).reshape(mesh_shape)
        if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", self.line):
            return [[int(d) for d in g.split(",")] for g in re.findall(r"{([\d,]+)}", listed[1])]
        if iota := re.search(
            r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", self.line
        ):
            shape = [int(n) for n in iota[3].split(",")]
            order = [int(n) for n in iota[5].split(",")] if iota[5] else range(len(shape))
            grid = devices.reshape(shape).transpose(*order)
            return grid.reshape(int(iota[1]), int(iota[2])).tolist()
        named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", self.line)
        assert named, f"replica groups in no known spelling: {self.line}"
        names = re.findall(r"'(\w+)'", named[1])
        inner = [axis for axis, name in enumerate(names) if f"'{name}'" in named[2]]
        outer = [axis for axis in range(len(names)) if axis not in inner]
        sizes = [int(size) for size in re.findall(r"=(\d+)", named[1])]
        grid = devices.reshape(sizes).transpose(*outer, *inner)
        return grid.reshape(-1, math.prod(sizes[axis] for axis in inner)).tolist()


class Program:
    """The computations of an HLO module, and which call which."""

    def __init__(self, text: str):
        self.lines: dict[str, list[str]] = {}
        name = ""
        for line in text.splitlines():
            if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
                name = start[1]
            elif name and line.startswith("  "):
                self.lines.setdefault(name, []).append(line)

    def called(self, name: str) -> set[str]:
        found, waiting = set(), [name]
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                for one, many in CALLED.findall(" ".join(self.lines.get(name, []))):
                    waiting += [one] if one else re.findall(r"[\w.-]+", many)
        return found

    def collectives(self, *names: str) -> list[Collective]:
        lines = [line for name in names or self.lines for line in self.lines.get(name, [])]
        return [
            Collective(match["kind"], size(match["type"]), line)
            for line in lines
            if (match := COLLECTIVE.search(line))
        ]

    def loops(self) -> set[str]:
        """The computations that run inside some loop."""
        text = "\n".join(line for lines in self.lines.values() for line in lines)
        bodies = re.findall(r" while\(.*\bbody=%?([\w.-]+)", text)
        return {name for body in bodies for name in self.called(body)}


def size(types: str) -> int:
    return sum(
        WIDTH[kind] * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in ITEM.findall(types)
    )


def dense(params, batch, key):
    hidden = jax.nn.relu(batch.reshape(len(batch), -1) @ params["first"] + params["bias"])
    return jnp.square(hidden @ params["second"]).mean()


def convolutional(params, batch, key):
    kept = batch * jax.random.bernoulli(key, 0.5, batch.shape)
    images = conv_general_dilated(
        kept, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    pooled = max_pool(jax.nn.relu(images), (2, 2), (2, 2))
    return jnp.square(pooled.reshape(len(batch), -1) @ params["second"]).mean()


IMAGES = (2, 4, 4, 3)  # [batch, height, width, channels]
PARAMS = {
    dense: {"first": np.zeros((48, 5)), "bias": np.zeros(5), "second": np.zeros((5, 2))},
    convolutional: {"kernel": np.zeros((3, 3, 3, 5)), "second": np.zeros((20, 2))},
}
BYTES = {loss: 4 * sum(x.size for x in tree.values()) for loss, tree in PARAMS.items()}


def compiled(rounds, layout: Layout, loss, inner_stages: int | None) -> Program:
    """The program of so many inner stages, or of what ends a round."""
    round_fn = RoundFn(rounds, layout)
    state = round_fn.init(PARAMS[loss], jax.random.key(0))
    if inner_stages is None:
        program, batches = round_fn._program("outer", state), ()
    else:
        program = round_fn._program(inner_stages, state)
        shape = (inner_stages * rounds.inner.ticks, *layout.shape, *IMAGES)
        batches = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Program(program.lower(state, batches, round_fn.world).compile().as_text())


FLAT = Layout(workers_per_hub=16)  # two workers on each of eight devices
HUBS = Layout(hubs=4, workers_per_hub=2)


@pytest.mark.parametrize("worker_map", ["map", "vmap"])
@pytest.mark.parametrize("loss", [dense, convolutional], ids=lambda loss: loss.__name__)
def test_no_collective_runs_in_the_local_steps_of_local_sgd(loss, worker_map):
    grad_fn = jaxlocal.gradients(loss)
    rounds = jaxlocal.local_sgd(grad_fn, optax.adam(0.1), 4, worker_map=worker_map)
    program = compiled(rounds, FLAT, loss, inner_stages=4)
    assert program.loops()
    assert program.collectives() == []


def test_data_parallelism_averages_its_gradients_inside_the_loop_of_ticks():
    rounds = jaxlocal.data_parallel(jaxlocal.gradients(dense), optax.adam(0.1))
    program = compiled(rounds, FLAT, dense, inner_stages=4)
    (average,) = program.collectives(*program.loops())
    assert (average.kind, average.bytes) == ("all-reduce", BYTES[dense])
    assert average.groups((1, 8)) == [list(range(8))]


@pytest.mark.parametrize("loss", [dense, convolutional], ids=lambda loss: loss.__name__)
def test_local_sgd_ends_a_round_with_one_all_reduce_of_the_model(loss):
    rounds = jaxlocal.local_sgd(jaxlocal.gradients(loss), optax.adam(0.1), 4)
    (average,) = compiled(rounds, FLAT, loss, inner_stages=None).collectives()
    assert (average.kind, average.bytes) == ("all-reduce", BYTES[loss])
    assert average.groups((1, 8)) == [list(range(8))]


def mll_sgd(graph: str):
    matrix = topology.mixing_matrix(topology.hub_graph(graph, 4), HUBS.hub_weight)
    return jaxlocal.mll_sgd(jaxlocal.gradients(dense), optax.sgd(0.1), matrix, 4, 2)


def test_hub_averages_stay_within_the_hubs_and_outside_the_loop_of_ticks():
    program = compiled(mll_sgd("ring"), HUBS, dense, inner_stages=1)
    assert program.loops()
    assert program.collectives(*program.loops()) == []
    (average,) = program.collectives()
    assert (average.kind, average.bytes) == ("all-reduce", BYTES[dense])
    assert average.groups((4, 2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_several_hub_averages_are_one_all_reduce_each_turn_of_the_loop():
    program = compiled(mll_sgd("ring"), HUBS, dense, inner_stages=4)
    (average,) = program.collectives(*program.loops())
    assert average.groups((4, 2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_ring_of_hubs_passes_models_to_both_neighbours_and_to_nobody_else():
    permutes = compiled(mll_sgd("ring"), HUBS, dense, inner_stages=None).collectives()
    assert {one.kind for one in permutes} == {"collective-permute"}
    assert sum(one.bytes for one in permutes) == 2 * BYTES[dense]
    on, back = [(i + 2) % 8 for i in range(8)], [(i - 2) % 8 for i in range(8)]
    for one in permutes:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", one.line)[1]
        to = dict(map(int, pair.split(",")) for pair in re.findall(r"\d+,\d+", pairs))
        assert [to[device] for device in range(8)] in (on, back)


def test_a_complete_hub_graph_is_one_all_reduce_across_hubs():
    (average,) = compiled(mll_sgd("complete"), HUBS, dense, inner_stages=None).collectives()
    assert (average.kind, average.bytes) == ("all-reduce", BYTES[dense])
    assert sorted(average.groups((4, 2))) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_any_other_hub_graph_gathers_one_model_of_every_hub():
    gathers = compiled(mll_sgd("star"), HUBS, dense, inner_stages=None).collectives()
    assert {one.kind for one in gathers} == {"all-gather"}
    assert sum(one.bytes for one in gathers) == 4 * BYTES[dense]
    assert all(sorted(one.groups((4, 2))) == [[0, 2, 4, 6], [1, 3, 5, 7]] for one in gathers)
