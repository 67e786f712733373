"""Communication between workers: averages, what they send, and how long that takes.

- `mixing`: mixers, the averages over workers and over hubs.
- `topology`: hub graphs and their mixing matrices.
- `routes`: how devices send hubs' models to neighbours.
- `accounting`: bits of messages, and collectives of a mesh, from the messages of stages.
- `audit`: the collectives of a compiled program, and `hlo`, the parser of its text.
- `cost_model`: the hours of a run on a cluster.
- `collective_costs`: the seconds of a collective on a cluster.
- `stragglers`: waiting for the slowest of several devices.
- `time_slots`: the time slots of a run that waits for its slowest workers.
- `bounds`: the convergence bound of Multi-Level Local SGD.
- `hours_fit`: compute and communication of runs whose hours are known.
"""

from jaxlocal.communication import accounting, audit, mixing, topology
from jaxlocal.communication.accounting import by_kind, collectives, message_bits, model_bits
from jaxlocal.communication.audit import Audited
from jaxlocal.communication.bounds import MllBound, mll_bound
from jaxlocal.communication.collective_costs import ALL_REDUCE, Cluster
from jaxlocal.communication.cost_model import Hours, hours
from jaxlocal.communication.hours_fit import Fit, fit
from jaxlocal.communication.topology import hub_graph, mixing_matrix, zeta

__all__ = [
    "ALL_REDUCE",
    "Audited",
    "Cluster",
    "Fit",
    "Hours",
    "MllBound",
    "accounting",
    "audit",
    "by_kind",
    "collectives",
    "fit",
    "hours",
    "hub_graph",
    "message_bits",
    "mixing",
    "mixing_matrix",
    "mll_bound",
    "model_bits",
    "topology",
    "zeta",
]
