"""What the outputs of a traced program are made of."""

from typing import Any

_CALLS = ("jit", "pjit", "remat", "remat2", "checkpoint", "closed_call")


def depends(jaxpr: Any) -> list[bool]:
    """Whether each output of a program depends on its inputs."""
    dependent = set(jaxpr.invars)
    known = lambda variable: not hasattr(variable, "val") and variable in dependent
    for equation in jaxpr.eqns:
        if any(map(known, equation.invars)):
            dependent.update(equation.outvars)
    return [known(variable) for variable in jaxpr.outvars]


def origin(jaxpr: Any, variable: Any) -> Any:
    """The input that a variable of a program is, also through programs that it calls; or itself."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _CALLS and variable in equation.outvars:
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            inner = getattr(inner, "jaxpr", inner)
            found = origin(inner, inner.outvars[equation.outvars.index(variable)])
            if found in inner.invars:
                return origin(jaxpr, equation.invars[inner.invars.index(found)])
    return variable
