"""Print the table of methods in Markdown: python -m jaxlocal.methods."""

from jaxlocal.methods.table import METHODS


def rows() -> list[str]:
    """A row for every method."""
    return [f"| `{name}` | {spec.summary} | {spec.source} |" for name, spec in METHODS.items()]


if __name__ == "__main__":
    print("\n".join(["| method | what workers do | source |", "|---|---|---|", *rows()]))
