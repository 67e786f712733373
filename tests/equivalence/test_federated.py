"""FedAvgM and FedAdam against slow float64 loops written from the equations."""

import jax
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh

LAYOUT = Layout(1, 4, weights=[1, 2, 3, 4])
STEPS, ROUNDS, RATE = 3, 8, 0.1


def fedavgm(learning_rate=1.0, momentum=0.9):
    """m ← β m + d; y ← y − η m."""
    m = 0.0

    def server(y, d):
        nonlocal m
        m = momentum * m + d
        return y - learning_rate * m

    return server


def fedadam(learning_rate=0.01, beta1=0.9, beta2=0.99, tau=1e-3):
    """m ← β1 m + (1 − β1) d; v ← β2 v + (1 − β2) d², from τ²; y ← y − η m / (√v + τ)."""
    m, v = 0.0, tau**2

    def server(y, d):
        nonlocal m, v
        m, v = beta1 * m + (1 - beta1) * d, beta2 * v + (1 - beta2) * d**2
        return y - learning_rate * m / (np.sqrt(v) + tau)

    return server


def federated_loop(server, batches):
    """The server's models after every round, [ROUNDS, 4]; clients run SGD from the server's."""
    gradient, shares = problems.numpy_gradient(batches), LAYOUT.weight.ravel()
    y, models = np.concatenate([problems.START["weight"], [problems.START["bias"]]]), []
    for number in range(ROUNDS):
        clients = np.stack([y] * len(shares))
        for step in range(number * STEPS, (number + 1) * STEPS):
            for worker in range(len(shares)):
                clients[worker] -= RATE * gradient(worker, clients[worker], step)
        y = server(y, y - shares @ clients)
        models.append(y)
    return np.stack(models)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4)])
@pytest.mark.parametrize(("method", "server"), [("fedavgm", fedavgm), ("fedadam", fedadam)])
def test_federated_methods_are_their_loops(method, server, mesh):
    build = getattr(jaxlocal, method)
    round_fn = RoundFn(
        build(problems.grad_fn, optax.sgd(RATE), period=STEPS),
        LAYOUT,
        make_mesh(LAYOUT, shape=mesh),
    )
    batches = problems.make_batches(LAYOUT, ROUNDS * STEPS)
    expected = federated_loop(server(), batches)
    state = round_fn.init(problems.START, jax.random.key(0))
    for number in range(ROUNDS):
        part = problems.steps_of(batches, number * STEPS, (number + 1) * STEPS)
        state, _ = round_fn(state, part)
        # Float32 rounds at 6e-8; a step of FedAdam divides by √v + τ, a thousandth at least.
        found = problems.vectors(state.params)
        np.testing.assert_allclose(found, [expected[number]] * 4, rtol=2e-5, atol=2e-5)


def test_a_server_optimizer_may_be_chosen():
    method = jaxlocal.fedavgm(
        problems.grad_fn, optax.sgd(RATE), outer_optimizer=optax.sgd(0.5), period=2
    )
    average = jaxlocal.diloco(
        problems.grad_fn, optax.sgd(RATE), outer_optimizer=optax.sgd(0.5), period=2
    )
    ends = []
    for built in (method, average):
        round_fn = problems.on_one_device(built, LAYOUT)
        state = round_fn.init(problems.START, jax.random.key(0))
        state, _ = round_fn(state, problems.make_batches(LAYOUT, 2))
        ends.append(problems.vectors(state.params))
    np.testing.assert_array_equal(*ends)
