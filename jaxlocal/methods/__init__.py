"""Training methods by name. Each composes stages in a few lines; `METHODS` is the table of them.

A method takes the gradient function of a worker, any optax optimizer, and its options by name. It
returns a `Method`, which `RoundFn` compiles. Symbols: K workers in D hubs of N; x_i the model of
worker i, g_i its gradient, a_i its weight, p_i the probability that it takes a step; η the learning
rate; H the steps of a round; τ the steps between hub averages and q the hub averages between two
mixings of hubs; y the anchor, a model that all workers know.
"""

from jaxlocal.methods import table
from jaxlocal.methods.spec import MethodSpec, OuterDefault
from jaxlocal.methods.table import *

__all__ = ["MethodSpec", "OuterDefault"]
__all__ += table.__all__
