"""Text dataset of the docstrings of Python's standard library, which every machine has.

The docstrings are read from the library's sources; nothing is imported or downloaded. Tokens are
characters: the 95 printable ASCII characters in their order, the newline, and one token for all
other characters.
"""

import ast
import functools
import numbers
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.examples import Examples
from jaxlocal.errors import ConfigurationError

ALPHABET = "".join(map(chr, range(32, 127))) + "\n" + "\N{REPLACEMENT CHARACTER}"
VOCABULARY = len(ALPHABET)
_NEWLINE, _OTHER = 95, 96

# Modules that are not installed everywhere or not part of the library, and long files with hardly
# any docstrings.
_LEFT_OUT = {
    *("test", "tests", "site-packages", "dist-packages", "__pycache__", "lib-dynload"),
    *("idlelib", "tkinter", "turtle.py", "turtledemo", "lib2to3", "distutils", "ensurepip"),
    *("encodings", "pydoc_data", "msilib", "_pyrepl"),
    *("sitecustomize.py", "usercustomize.py", "_distutils_system_mod.py", "macholib"),
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load_docstrings(length: int = 128) -> tuple[Examples, Examples]:
    """Load Python's docstrings as sequences of characters with the next character as target.

    Equal docstrings are taken once. About every tenth module, chosen by its name, is held out for
    the test. The docstrings of each side are joined by empty lines and cut into sequences, so no
    sequence is in both. The text depends on the version of Python: about 1.2 million characters for
    training and 0.1 million for the test.

    Args:
      length: number of characters in a sequence.

    Returns:
      Training and test examples {"inputs", "targets"}, int32 tokens [n, length] below
      `VOCABULARY`.

    Raises:
      ConfigurationError: the length is not a positive integer or is longer than the text, or the
        sources of Python's library are not installed.

    >>> train, test = load_docstrings(64)
    >>> train["inputs"].shape[1], bool((train["inputs"][:, 1:] == train["targets"][:, :-1]).all())
    (64, True)
    """
    if not isinstance(length, numbers.Integral) or length < 1:
        raise ConfigurationError(f"the length of a sequence must be 1 or more, got {length!r}")
    train, test = _tokens()
    if length >= len(test):
        raise ConfigurationError(
            f"sequences of {length} characters do not fit the {len(test)} of the test text"
        )
    return _cut(train, int(length)), _cut(test, int(length))


def encode(text: str) -> NDArray[np.int32]:
    """Encode a text as tokens, int32 [characters].

    >>> encode("Hi\\n").tolist()
    [40, 73, 95]
    """
    if not isinstance(text, str):
        raise ConfigurationError(f"a text must be a str, got {type(text).__name__}")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int32)
    printable = (codes >= 32) & (codes < 127)
    return np.where(printable, codes - 32, np.where(codes == 10, _NEWLINE, _OTHER)).astype(np.int32)


def decode(tokens: NDArray[Any]) -> str:
    """Decode tokens [characters] to a text; characters without a token become U+FFFD.

    Raises:
      ConfigurationError: one is not a token.

    >>> decode(encode("π is 3.14"))
    '� is 3.14'
    """
    tokens = np.asarray(tokens)
    whole = tokens.ndim == 1 and (np.issubdtype(tokens.dtype, np.integer) or not tokens.size)
    if not whole or not all(0 <= token < VOCABULARY for token in tokens):
        got = f"from {tokens.min()} to {tokens.max()}" if whole else f"{tokens.dtype} values"
        raise ConfigurationError(
            f"tokens [characters] must be integers from 0 to {VOCABULARY - 1}, got {got}"
        )
    return "".join(ALPHABET[token] for token in tokens)


def _cut(tokens: NDArray[Any], length: int) -> Examples:
    whole = len(tokens) // (length + 1) * (length + 1)
    sequences = tokens[:whole].reshape(-1, length + 1)
    return {"inputs": sequences[:, :-1].copy(), "targets": sequences[:, 1:].copy()}


@functools.cache
def _tokens() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The tokens of the text for training, and of the text for the test."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = list(_modules(root))
    if not modules:
        raise ConfigurationError(
            f"docstrings come from the sources of Python's library, and {root} holds none"
        )
    seen: set[str] = set()
    texts: tuple[list[str], list[str]] = ([], [])
    for module in modules:
        name = module.relative_to(root).as_posix()
        held_out = zlib.crc32(name.encode()) % 10 == 9  # does not depend on other modules
        for text in _docstrings(ast.parse(module.read_bytes())):
            if text not in seen:
                seen.add(text)
                texts[held_out].append(text)
    train, test = (encode("\n\n".join(part)) for part in texts)
    return train, test


def _modules(folder: Path) -> Iterator[Path]:
    """The source files of a folder's modules and packages, in a fixed order."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in _LEFT_OUT or path.name.startswith("_sysconfigdata"):
            continue
        if path.suffix == ".py":
            yield path
        elif (path / "__init__.py").is_file():
            yield from _modules(path)


def _docstrings(definition: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function, and of the definitions in its body."""
    if isinstance(definition, _DOCUMENTED):
        yield from filter(None, [ast.get_docstring(definition)])
        for statement in definition.body:
            yield from _docstrings(statement)
