"""Spec strings of compressors, there and back, and every error about a wrong one."""

import math

import pytest
import registry

from jaxlocal.compression import COMPRESSORS, parse
from jaxlocal.errors import ConfigurationError

NAMES = [
    *("identity", "zero", "sign", "two_bit", "int8", "bfloat16", "qsgd:2", "qsgd:8", "powersgd:3"),
    *("grbs:64", "grbs:2.5", "random_k:8", "top_k:64", "top_k:8:tensor", "top_k:8:model"),
    *("grbs:8+int8", "random_k:8+qsgd:4", "top_k:64+bfloat16", "top_k:8:model+sign"),
    *("top_k:64+two_bit", "grbs_tensors:64:8", "grbs_tensors:1:4"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_parsed_to_its_compressor(name):
    code = parse(name)
    assert code.name == name
    assert parse(code.name)._replace(**_functions(code)) == code._replace(**_functions(code))


def _functions(code):
    """Replacements that compare equal, for the fields that are functions and for a ratio of nan."""
    functions = {name: None for name, value in code._asdict().items() if callable(value)}
    return {**functions, "second": None, **({"ratio": 0} if math.isnan(code.ratio) else {})}


def test_every_compressor_is_among_the_names():
    names = {name.split(":")[0].split("+")[0] for name in NAMES}
    assert names == set(COMPRESSORS) - set(registry.COMPRESSORS)


@pytest.mark.parametrize(
    "spec, name",
    [("grbs:64.0", "grbs:64"), ("top_k:1e3", "top_k:1000"), ("top_k:8:chunk", "top_k:8")],
)
def test_spec_strings_of_one_compressor_have_one_name(spec, name):
    assert parse(spec).name == name


def test_ratios_and_granularities():
    ratios = {"top_k:64+int8": 256, "grbs:8+qsgd:4": 64, "zero": math.inf, "identity": 1}
    ratios["top_k:64+two_bit"] = 1024
    assert {spec: parse(spec).ratio for spec in ratios} == ratios
    assert math.isnan(parse("powersgd:2").ratio)
    granularities = {
        "identity": "value",
        "bfloat16": "value",
        "grbs:8": "tensor",
        "sign": "tensor",
        "two_bit": "tensor",
        "powersgd:2": "tensor",
        "top_k:8": "chunk",
        "int8": "chunk",
        "qsgd:4": "chunk",
        "top_k:8:tensor": "tensor",
        "top_k:8:model": "model",
    }
    assert {spec: parse(spec).granularity for spec in granularities} == granularities


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (None, "the spec string of a compressor must be a string, got None"),
        (b"sign", "the spec string of a compressor must be a string, got b'sign'"),
        (("grbs", 64), "the spec string of a compressor must be a string, got ('grbs', 64)"),
        ("", "unknown compressor ''; known: " + ", ".join(COMPRESSORS)),
        ("GRBS:64", "unknown compressor 'GRBS'; known: " + ", ".join(COMPRESSORS)),
        ("grbs: 64", "grbs needs a ratio, as in grbs:64, got 'grbs: 64'"),
        ("grbs:64\n", "grbs needs a ratio, as in grbs:64, got 'grbs:64\\n'"),
        ("grbs:\uff16\uff14", "grbs needs a ratio, as in grbs:64, got 'grbs:\uff16\uff14'"),
        ("grbs:1_0", "grbs needs a ratio, as in grbs:64, got 'grbs:1_0'"),
        ("grbs:0", "the ratio of grbs must be a finite number of at least 1, got 0.0"),
        ("grbs:1e999", "the ratio of grbs must be a finite number of at least 1, got inf"),
        ("grbs:nan", "the ratio of grbs must be a finite number of at least 1, got nan"),
        ("top_k:-1", "the ratio of top_k must be a finite number of at least 1, got -1.0"),
        ("grbs", "grbs needs a ratio, as in grbs:64, got 'grbs'"),
        ("grbs:many", "grbs needs a ratio, as in grbs:64, got 'grbs:many'"),
        ("grbs:", "grbs needs a ratio, as in grbs:64, got 'grbs:'"),
        ("grbs:8:tensor", "grbs takes a ratio, got 'grbs:8:tensor'"),
        ("top_k:8:model:3", "top_k takes a ratio and a granularity, got 'top_k:8:model:3'"),
        ("sign:1", "sign takes no argument, got 'sign:1'"),
        ("qsgd", "qsgd needs a number of bits, as in qsgd:4, got 'qsgd'"),
        ("qsgd:3.5", "qsgd needs a number of bits, as in qsgd:4, got 'qsgd:3.5'"),
        ("qsgd:9", "the bits of qsgd must be an integer from 2 to 8, got 9"),
        ("powersgd", "powersgd needs a rank, as in powersgd:2, got 'powersgd'"),
        ("powersgd:0", "the rank of powersgd must be an integer ≥ 1, got 0"),
        ("grbs:0.5", "the ratio of grbs must be a finite number of at least 1, got 0.5"),
        ("top_k:8+qsgd", "qsgd needs a number of bits, as in qsgd:4, got 'qsgd'"),
        (
            "sign+int8",
            "sign is not a sparsifier whose kept values 'int8' could code, got 'sign+int8'; the "
            "sparsifiers are grbs, random_k, top_k",
        ),
        (
            "gbrs:64",
            "unknown compressor 'gbrs'; did you mean 'grbs'? known: " + ", ".join(COMPRESSORS),
        ),
        (
            "topk:64+int8",
            "unknown compressor 'topk'; did you mean 'top_k'? known: " + ", ".join(COMPRESSORS),
        ),
        ("grbs_tensors:8", "grbs_tensors needs a number of groups, as in grbs_tensors:64:8, got "
         "'grbs_tensors:8'"),
        ("two_bit:2", "two_bit takes no argument, got 'two_bit:2'"),
        ("grbs:8+int", "unknown value coder 'int'; did you mean 'int8'? known: sign, two_bit, "
         "qsgd, int8, bfloat16"),
        ("grbs:8+", "unknown value coder ''; known: sign, two_bit, qsgd, int8, bfloat16"),
        (
            "top_k:8:block",
            "unknown granularity of top_k 'block'; known: chunk, tensor, model",
        ),
    ],
)  # fmt: skip
def test_a_wrong_spec_string_is_an_error_of_one_sentence(spec, sentence):
    with pytest.raises(ConfigurationError) as error:
        parse(spec)
    assert str(error.value) == sentence
