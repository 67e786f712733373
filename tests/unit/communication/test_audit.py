"""The audit finds the collectives of programs written by hand, in every form that XLA writes."""

import re

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxlocal import ConfigurationError
from jaxlocal.communication.accounting import by_kind
from jaxlocal.communication.audit import audit

MESH = AbstractMesh((4, 2), ("hubs", "workers"))


def program(*lines, computations="", devices=8):
    body = "\n  ".join(["x = f32[3,5]{1,0} parameter(0)", *lines])
    entry = f"ENTRY %main (x: f32[3,5]) -> f32[3] {{\n  {body}\n}}\n"
    return f"HloModule m, num_partitions={devices}\n{computations}\n{entry}"


def audited(text):
    return [(one.kind, one.axes, one.dtype, one.nbytes, one.loops) for one in audit(text, MESH)]


def all_reduce(groups):
    return f"%r.1 = f32[3,5]{{1,0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("workers",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("hubs",)),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("hubs", "workers")),
        ("replica_groups={}", ("hubs", "workers")),
        ("replica_groups=[4,2]<=[8]", ("workers",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("hubs",)),
        ("replica_groups=[1,8]<=[8]", ("hubs", "workers")),
        ("replica_groups=mesh['hubs'=4,'workers'=2] {'workers'}", ("workers",)),
        ("replica_groups=mesh['hubs'=4,'workers'=2] {'hubs'}", ("hubs",)),
        ("replica_groups=mesh['hubs'=4,'workers'=2] {'hubs','workers'}", ("hubs", "workers")),
        # A part of an axis is that axis.
        ("replica_groups={{0,4},{2,6},{1,5},{3,7}}", ("hubs",)),
    ],
)
def test_groups_are_read_in_every_form(groups, axes):
    assert audited(program(all_reduce(groups))) == [("all-reduce", axes, "float32", 60, ())]


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
        "replica_groups=[8,1]<=[8]",
        "replica_groups=mesh['hubs'=4,'workers'=2] {}",
    ],
)
def test_a_group_of_one_device_sends_nothing(groups):
    assert audited(program(all_reduce(groups))) == []


def test_an_unknown_form_of_groups_is_an_error():
    with pytest.raises(ValueError, match="the groups of devices of a collective have an unknown"):
        audit(program(all_reduce("replica_groups=whoever")), MESH)


def test_permutes_are_counted_by_type_and_axis():
    line = "%p = (f32[4]{{0}}, bf16[2]) collective-permute(%a, %b), source_target_pairs={pairs}"
    along_hubs = line.format(pairs="{{0,2},{2,4},{4,6},{6,0}}")
    assert audited(program(along_hubs)) == [
        ("collective-permute", ("hubs",), "float32", 16, ()),
        ("collective-permute", ("hubs",), "bfloat16", 4, ()),
    ]
    assert audited(program(line.format(pairs="{{0,0},{1,1}}"))) == []
    assert audited(program(line.format(pairs="{{0,0},{1,0}}")))[0][1] == ("workers",)


def test_asynchronous_collectives_are_counted_once_by_their_results():
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    text = program(
        f"%a = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%x), {groups}, dimensions={{0}}",
        "%b = f32[8]{0} all-gather-done(%a)",
        "%c = (u8[3], u8[3], u32[], u32[]) collective-permute-start(%y), "
        "source_target_pairs={{0,1}}",
        "%d = u8[3] collective-permute-done(%c)",
        f"%e = (f32[2], s32[7]) all-reduce-start(%x, %z), {groups}, to_apply=%add",
        "%f = (f32[2], s32[7]) all-reduce-done(%e)",
        "%g = ((f32[6]), f32[3]) async-start(%x), calls=%scatter",
        "%h = f32[3] async-done(%g)",
        computations=f"%scatter (x: f32[6]) -> f32[3] {{\n"
        f"  ROOT %s = f32[3] reduce-scatter(%x), {groups}, to_apply=%add\n}}\n",
    )
    assert audited(text) == [
        ("all-gather", ("workers",), "float32", 32, ()),
        ("collective-permute", ("workers",), "uint8", 3, ()),
        ("all-reduce", ("workers",), "float32", 8, ()),
        ("all-reduce", ("workers",), "int32", 28, ()),
        ("reduce-scatter", ("workers",), "float32", 12, ()),
    ]


def trips(number):
    return f'backend_config={{"known_trip_count":{{"n":"{number}"}}}}'


LOOPS = f"""
%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %s = f32[] add(%a, %b)
}}
%inner (c: (f32[3,5])) -> (f32[3,5]) {{
  {all_reduce("replica_groups=[4,2]<=[8]")}
}}
%condition_with_all_reduce (c: (f32[3,5])) -> pred[] {{
  %q = pred[] all-reduce(%c), replica_groups=[1,8]<=[8], to_apply=%or
}}
%never (c: (f32[3,5])) -> pred[] {{
  ROOT %q = pred[] constant(false)
}}
%outer (c: (f32[3,5])) -> (f32[3,5]) {{
  %w = (f32[3,5]) while(%c), condition=%condition_with_all_reduce, body=%inner, {trips(3)}
  %z = (f32[3,5]) while(%c), condition=%never, body=%inner
}}
%left (c: f32[3,5]) -> f32[3,5] {{
  %l = f32[3,5] call(%c), to_apply=%inner
}}
"""


def test_loops_are_counted_with_their_trips():
    while_ = "%w = (f32[3,5]) while(%t), condition=%never, body=%outer"
    found = audit(program(f"{while_}, {trips(5)}", computations=LOOPS), MESH)
    # A loop evaluates its condition once more than its body.
    assert [(one.dtype, one.loops, one.times) for one in found] == [
        ("bool", (5, 4), 20),
        ("float32", (5, 3), 15),
        ("float32", (5, None), None),
    ]
    assert by_kind(one.collective() for one in found) == {
        ("all-reduce", ("hubs", "workers"), "bool"): 20,
        ("all-reduce", ("workers",), "float32"): 60 * (15 + 1),
    }


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%left, %never}",
        "true_computation=%left, false_computation=%never",
    ],
)
def test_conditionals_and_calls_are_followed(branches):
    text = program(f"%c = f32[3,5] conditional(%p, %x, %x), {branches}", computations=LOOPS)
    (found,) = audit(text, MESH)
    assert (found.kind, found.branches, found.loops) == ("all-reduce", 1, ())


def test_types_are_read_by_their_names():
    words = {"pred": 1, "s8": 1, "u16": 2, "bf16": 2, "f16": 2, "f64": 8, "c64": 8, "f8e4m3fn": 1}
    line = "%r = {}[2] all-reduce(%x), replica_groups={{}}, to_apply=%add"
    for word, size in words.items():
        (found,) = audit(program(line.format(word)), MESH)
        assert found.nbytes == 2 * size and np.dtype(found.dtype).itemsize == size


def test_another_mesh_and_a_text_that_is_not_a_program_are_refused():
    message = "the program runs on 4 devices, and the mesh has 8"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        audit(program(devices=4), MESH)
    with pytest.raises(ValueError, match="it is not a program in HLO"):
        audit("module @jit_f {}", MESH)
