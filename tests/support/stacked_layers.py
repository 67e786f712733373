"""Layers of NNX that are made by `nnx.vmap` and applied by `nnx.scan`."""

from flax import nnx


class Stacked(nnx.Module):
    """Three layers that `make_layer(rngs)` makes, whose variables and streams are stacked."""

    def __init__(self, make_layer, rngs):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)

    def __call__(self, inputs):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, carry):
            return layer(carry)

        return forward(self.layers, inputs)
