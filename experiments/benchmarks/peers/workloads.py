"""The rounds that jaxlocal and its peers run: ten steps of every worker, then an average."""

from experiments.benchmarks.workloads import Workload

_DIGITS, _CHARACTERS, _STEPS = (28, 28, 1), 97, 10


def _transformer(layers: int, width: int, length: int) -> Workload:
    shape, name = (length,), f"diloco_{width}"
    sizes = (layers, width)
    return Workload(name, "transformer", 8, 4, _STEPS, shape, _CHARACTERS, 9_000, "diloco", sizes)


PEER_WORKLOADS = {
    w.name: w
    for w in (
        Workload("cnn_20", "mll_cnn", 20, 32, _STEPS, _DIGITS, 62),
        Workload("cnn_100", "mll_cnn", 100, 32, _STEPS, _DIGITS, 62),
        Workload("softmax_100", "logistic", 100, 32, _STEPS, _DIGITS, 10),
        Workload("softmax_1000", "logistic", 1000, 32, _STEPS, _DIGITS, 10),
        Workload("logistic_100", "logistic", 100, 32, _STEPS, _DIGITS, 1),
        Workload("mlp_100", "mlp", 100, 32, _STEPS, _DIGITS, 10),
        _transformer(layers=4, width=128, length=128),
        _transformer(layers=6, width=256, length=256),
    )
}
