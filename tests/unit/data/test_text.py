"""Docstrings as text: reading, splitting, cutting, and the errors."""

import sys

import numpy as np
import pytest

from jaxlocal.data import load, text
from jaxlocal.data.text import ALPHABET, VOCABULARY, decode, encode, load_docstrings
from jaxlocal.errors import ConfigurationError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty folder in place of the standard library."""
    text._tokens.cache_clear()
    monkeypatch.setattr(text.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    yield tmp_path
    text._tokens.cache_clear()


def write(path, source):
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)


def whole_text(examples):
    """The text of the sequences, joined."""
    ends = np.concatenate([examples["inputs"], examples["targets"][:, -1:]], axis=1)
    return decode(ends.ravel())


def test_characters_are_tokens():
    assert VOCABULARY == 97 == len(set(ALPHABET))
    assert (encode(ALPHABET) == np.arange(97)).all() and encode(ALPHABET).dtype == np.int32
    assert decode(encode(ALPHABET)) == ALPHABET
    assert decode(encode("tab\t, é, \U0001f600.")) == "tab\ufffd, \ufffd, \ufffd."
    assert encode("").shape == (0,)


def test_docstrings_are_read_once_and_names_decide_which_are_for_the_test(library):
    write(
        library / "a.py",
        '"""Module a.\n\n    Indented."""\n'
        'class C:\n    """Class C."""\n    def f(self):\n        """Method f."""\n'
        "        def g():\n            'Nested g.'\n"
        'async def h():\n    """Method f."""\n'
        'def no():\n    x = """No docstring."""\n',
    )
    write(library / "b" / "__init__.py", '"""Package b."""')
    write(library / "b" / "m.py", '"""Module b.m."""')
    for number in range(5):
        write(library / f"c{number}.py", f'"""Module c{number}."""')
    # Of these names, crc32("d3.py") alone ends in a 9.
    write(library / "d3.py", '"""Tenth."""\ndef f():\n    """Method f."""')
    for name in ("test/__init__", "site-packages/__init__", "nopackage/m", "b/test/__init__"):
        path = library / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        write(path, '"""Left out."""')
    train, test = load_docstrings(1)
    parts = ["Module a.\n\nIndented.", "Class C.", "Method f.", "Nested g."]
    parts += ["Package b.", "Module b.m.", *(f"Module c{number}." for number in range(5))]
    joined = "\n\n".join(parts)
    assert whole_text(train) == joined[: len(joined) // 2 * 2]
    assert whole_text(test) == "Tenth."


def test_sequences_are_cut_and_targets_are_the_next_characters(library):
    for number in range(10):
        write(library / f"m{number}.py", f'"""Number {number}, and no more."""')
    for examples in load_docstrings(7):
        inputs, targets = examples["inputs"], examples["targets"]
        assert inputs.dtype == targets.dtype == np.int32 and inputs.shape == targets.shape
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        assert inputs.flags.c_contiguous and targets.flags.c_contiguous
    assert whole_text(load_docstrings(7)[1]) == "Number 1, and no more."[:16]  # by its crc32


def test_an_extra_module_does_not_change_the_side_of_others(library):
    sides = []
    for extra in (False, True):
        for number in range(30):
            write(library / f"m{number}.py", f'"""Number {number}."""')
        if extra:
            write(library / "a_first.py", '"""More."""')
        text._tokens.cache_clear()
        sides.append(whole_text(load_docstrings(1)[1]))
    assert sides[0] == sides[1]


def test_a_python_without_sources_is_an_error(library):
    for path in (library, library / "python311.zip"):
        text.sysconfig.get_path = {"stdlib": str(path)}.get
        with pytest.raises(ConfigurationError, match=f"sources .* {path} holds none"):
            load_docstrings()


@pytest.mark.parametrize("length", [0, -1, 1.5, "128", None])
def test_a_wrong_length_is_an_error(length):
    with pytest.raises(ConfigurationError, match=f"1 or more, got {length!r}"):
        load_docstrings(length)


def test_docstrings_of_this_python():
    imported = set(sys.modules)
    train, test = load_docstrings()
    assert not {"antigravity", "this", "turtle"} & (set(sys.modules) - imported)
    assert train["inputs"].shape[1] == 128
    assert len(train["inputs"]) > 5000 and len(test["inputs"]) > 500
    for examples in (train, test):
        assert examples["inputs"].min() == 0 and examples["inputs"].max() < VOCABULARY
    # In English text, the commonest character is the space, and the commonest letter the e.
    counts = np.bincount(train["inputs"].ravel(), minlength=VOCABULARY)
    assert [ALPHABET[n] for n in np.argsort(counts)[:-3:-1]] == [" ", "e"]
    held_out = {row.tobytes() for row in test["inputs"]}
    assert not held_out & {row.tobytes() for row in train["inputs"]}
    with pytest.raises(ConfigurationError, match=r"10000000 characters do not fit the \d+"):
        load_docstrings(10**7)


def test_docstrings_enter_the_model_as_tokens():
    data = load("docstrings:32")
    train, test = data.train(), data.test()
    assert data.input_shape == (32,) and data.train_examples == len(train["inputs"])
    assert data.test_examples == len(test["targets"]) and data.targets().shape[1] == 32
    assert data.classes > train["inputs"].max() and train["inputs"].dtype == np.int32
    assert data.normalize(train["inputs"]) is train["inputs"]
    for wrong in ("docstrings:0", "docstrings:-3", "docstrings:x", "docstrings:"):
        with pytest.raises(ConfigurationError, match="length"):
            load(wrong)
