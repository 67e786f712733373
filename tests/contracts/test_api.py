"""What a user reaches after `import jaxlocal`, and how deep a traceback of the library is."""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxlocal
from jaxlocal import Layout

PACKAGE = str(Path(jaxlocal.__file__).parent)
REACHED = [
    "jaxlocal.stages.local_step",
    "jaxlocal.stages.averaged_gradients",
    "jaxlocal.stages.synced_updates",
    "jaxlocal.stages.sync",
    "jaxlocal.stages.outer_step",
    "jaxlocal.stages.error_feedback",
    "jaxlocal.stages.error_reset",
    "jaxlocal.stages.partial_average",
    "jaxlocal.stages.overlapped",
    "jaxlocal.stages.partial_sync",
    "jaxlocal.stages.repeat",
    "jaxlocal.stages.sequence",
    "jaxlocal.stages.in_turn",
    "jaxlocal.stages.Stage",
    "jaxlocal.stages.Method",
    "jaxlocal.stages.Context",
    "jaxlocal.stages.Memory",
    "jaxlocal.stages.Info",
    "jaxlocal.stages.Message",
    "jaxlocal.stages.TrainState",
    "jaxlocal.training.RoundFn",
    "jaxlocal.training.run",
    "jaxlocal.training.Progress",
    "jaxlocal.training.Checkpoints",
    "jaxlocal.evaluation.Evaluation",
    "jaxlocal.evaluation.Reestimation",
    "jaxlocal.checkpoints.Checkpoints",
    "jaxlocal.checkpoints.export",
    "jaxlocal.communication.audit.audit",
    "jaxlocal.communication.message_bits",
    "jaxlocal.communication.collectives",
    "jaxlocal.topology.hub_graph",
    "jaxlocal.mixing.mean",
    "jaxlocal.periods.qsr",
    "jaxlocal.compression.parse",
    "jaxlocal.sharding.fsdp",
    "jaxlocal.parallel.weighted_sum",
    "jaxlocal.methods.METHODS",
    "jaxlocal.types.Mixer",
    "jaxlocal.models.from_nnx",
    "jaxlocal.models.training_loss",
    "jaxlocal.models.evaluation_metrics",
    "jaxlocal.data.Stream",
    "jaxlocal.data.load",
    "jaxlocal.nn.fast_layers",
    "jaxlocal.scheduled",
    "jaxlocal.local_sgd",
    "jaxlocal.make_mesh",
    "jaxlocal.Layout",
    "jaxlocal.RoundFn",
    "jaxlocal.Method",
    "jaxlocal.ConfigurationError",
]


def test_everything_is_reached_after_import_jaxlocal():
    code = "import jaxlocal, json\nmissing = []\nfor name in NAMES:\n    try: eval(name)\n"
    code += "    except AttributeError: missing.append(name)\nprint(json.dumps(missing))"
    code = code.replace("NAMES", repr(REACHED))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_dir_lists_what_is_loaded_lazily_and_other_names_are_refused():
    assert {"models", "nn", "data", "local_sgd"} <= set(dir(jaxlocal))
    with pytest.raises(AttributeError, match="has no attribute 'mdoels'"):
        jaxlocal.mdoels  # noqa: B018


def test_all_names_of_all_exist():
    for module in (jaxlocal, jaxlocal.stages, jaxlocal.parallel, jaxlocal.communication):
        assert all(hasattr(module, name) for name in module.__all__), module
    for module in (jaxlocal.training, jaxlocal.methods, jaxlocal.compression, jaxlocal.models):
        assert all(hasattr(module, name) for name in module.__all__), module
    assert len(set(jaxlocal.__all__)) == len(jaxlocal.__all__)


@pytest.mark.parametrize("rates", [1.0, 0.5])
@pytest.mark.parametrize("name", ["local_sgd", "data_parallel", "diloco"])
def test_at_most_twelve_frames_lie_between_a_round_and_the_loss(name, rates):
    depths = []

    def loss(w, batch, key):
        frames = traceback.extract_stack()
        depths.append(sum(frame.filename.startswith(PACKAGE) for frame in frames))
        return (w - batch) ** 2

    method = getattr(jaxlocal, name)(jaxlocal.gradients(loss), optax.sgd(0.1))
    layout = Layout(workers_per_hub=2, rates=rates)
    round_fn = jaxlocal.RoundFn(method, layout, jaxlocal.make_mesh(layout, jax.devices()[:1]))
    state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    round_fn(state, jnp.ones((1, 1, 2)))
    assert 0 < max(depths) <= 12
