"""Which equations of a traced program need the results of which others."""


def kind(eqn):
    name = eqn.primitive.name
    return "psum" if name.startswith("psum") else name


def jaxprs(node):
    """All jaxprs in a jaxpr or an equation, at any depth, itself included."""
    node = getattr(node, "jaxpr", node)
    if hasattr(node, "eqns"):
        yield node
        for eqn in node.eqns:
            yield from jaxprs(eqn)
    else:
        for value in getattr(node, "params", {}).values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from jaxprs(sub)


def reaches(jaxpr, first, last):
    """Whether an equation of the last kind needs a result of one of the first kind."""
    found = set()
    for eqn in jaxpr.eqns:
        needs = any(not hasattr(v, "val") and v in found for v in eqn.invars)
        if needs and kind(eqn) == last:
            return True
        if needs or kind(eqn) == first:
            found.update(eqn.outvars)
    return False
