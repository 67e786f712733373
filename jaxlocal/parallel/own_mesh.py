"""A mesh that a caller has made: whether a layout of workers fits it, and how its axes behave."""

from typing import Any

from jax.sharding import AxisType, Mesh

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.layout import AXES, MODEL, Layout


def usable_mesh(mesh: Any, layout: Layout) -> Mesh:
    """The mesh with automatic axes, in which rounds run: `jax.make_mesh` makes explicit ones.

    Args:
      mesh: with the axes 'hubs' and 'workers', and 'model' where workers are sharded.
      layout: the workers.

    Raises:
      ConfigurationError: it is no mesh, or has other axes, or the workers do not divide over it.

    >>> import jax
    >>> mesh = jax.make_mesh((1, 1), AXES, devices=jax.devices()[:1])
    >>> mesh.axis_types, usable_mesh(mesh, Layout()).axis_types
    ((Explicit, Explicit), (Auto, Auto))
    """
    if not isinstance(mesh, Mesh):
        raise ConfigurationError(
            f"a mesh is made by jaxlocal.make_mesh or jax.make_mesh, got {type(mesh).__name__}"
        )
    if set(mesh.axis_names) - {MODEL} != set(AXES):
        raise ConfigurationError(
            f"a mesh of workers has the axes {', '.join(AXES)} and perhaps {MODEL}, got "
            f"{', '.join(map(str, mesh.axis_names))}"
        )
    for name, count in zip(AXES, layout.shape, strict=True):
        if count % mesh.shape[name]:
            raise ConfigurationError(
                f"{count} {name} do not divide over {mesh.shape[name]} devices of the mesh axis "
                f"{name!r}"
            )
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
