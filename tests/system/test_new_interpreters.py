"""The commands print the same and end alike in new interpreters as in that of the tests."""

import pytest
from binaries import call, call_new
from short_runs import check_other_devices

pytestmark = pytest.mark.slow

SIGN = ("--method=data_parallel", "--gradient_compressor=sign", "--parameters=64", "--mesh=1x1")


@pytest.mark.parametrize(
    ("module", "arguments", "status"),
    [
        ("train", ["--help"], 0),
        ("train", ["--method=local_sdg"], 2),
        ("train", ["--no_such_flag=1"], 2),
        ("train", ["--flagfile=no_such_file"], 2),
        ("train", ["stray"], 2),
        ("train", ["--method=mll_sgd", "--local_steps=16", "--steps=100"], 2),
        ("train", ["--dataset=mnist", "--data_dir=nowhere"], 2),
        ("plan", SIGN, 0),
        ("plan", ["--format=json", "--mesh=1x1"], 0),
        ("plan", ["--format=jason"], 2),
        ("compare", ["--help"], 0),
        ("compare", ["no_such_folder"], 2),
        ("prepare", ["--datset=mnist"], 2),
    ],
)
def test_a_new_interpreter_prints_and_ends_as_that_of_the_tests(module, arguments, status):
    done = call_new(module, *arguments)
    assert done.status == status, done.error
    assert call(module, *arguments) == done


def test_flags_txt_runs_again_on_more_devices_with_the_same_numbers(tmp_path):
    check_other_devices(
        tmp_path, lambda count, *flags: call_new("train", *flags, JAX_NUM_CPU_DEVICES=str(count))
    )
