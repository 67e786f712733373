"""The table of methods. A new method is a function in its file, a line here, and its tests."""

from jaxlocal.methods.averaging import data_parallel, local_sgd, post_local_sgd, swap
from jaxlocal.methods.error_feedback import SPARSE_LOCO, ef_sgd, qsparse_local_sgd, sparse_loco
from jaxlocal.methods.error_reset import csea, cser, cser_pl
from jaxlocal.methods.federated import FEDADAM, FEDAVGM, fedadam, fedavgm
from jaxlocal.methods.networks import cooperative_sgd, hl_sgd, mll_sgd
from jaxlocal.methods.outer import DILOCO, SLOWMO, diloco, slowmo, streaming_diloco
from jaxlocal.methods.spec import MethodSpec

__all__ = [
    "METHODS",
    "cooperative_sgd",
    "csea",
    "cser",
    "cser_pl",
    "data_parallel",
    "diloco",
    "ef_sgd",
    "fedadam",
    "fedavgm",
    "hl_sgd",
    "local_sgd",
    "mll_sgd",
    "post_local_sgd",
    "qsparse_local_sgd",
    "slowmo",
    "sparse_loco",
    "streaming_diloco",
    "swap",
]

METHODS: dict[str, MethodSpec] = {
    "data_parallel": MethodSpec(
        data_parallel,
        "average gradients at every step",
        own_period=True,
        every_step=True,
        compressors={"gradient": None},
    ),
    "local_sgd": MethodSpec(
        local_sgd,
        "average models every H steps; H may follow the learning rate (QSR)",
        "[Stich 2019](https://arxiv.org/abs/1805.09767), "
        "[Gu et al. 2024](https://arxiv.org/abs/2310.14423)",
        period="quadratic",
    ),
    "post_local_sgd": MethodSpec(
        post_local_sgd,
        "average at every step first, then every H steps",
        "[Lin et al. 2020](https://arxiv.org/abs/1808.07217)",
        period="post_local",
        own_period=True,
    ),
    "swap": MethodSpec(
        swap,
        "average at every step first, then once at the end",
        "[Gupta et al. 2020](https://arxiv.org/abs/2001.02312)",
        period="swap",
        own_period=True,
    ),
    "mll_sgd": MethodSpec(
        mll_sgd,
        "average in hubs, mix hubs over a graph; workers skip steps by their rates",
        "[Castiglia et al. 2021](https://arxiv.org/abs/2007.13819)",
        compressors={"sync": None},
        network="hubs",
    ),
    "hl_sgd": MethodSpec(
        hl_sgd,
        "average in hubs, and all hubs less often",
        "[Castiglia et al. 2021](https://arxiv.org/abs/2007.13819)",
        compressors={"sync": None},
        network="hubs",
    ),
    "cooperative_sgd": MethodSpec(
        cooperative_sgd,
        "mix models with neighbours, without hubs",
        "[Wang, Joshi 2021](https://arxiv.org/abs/1808.07576)",
        network="workers",
    ),
    "slowmo": MethodSpec(
        slowmo,
        "smooth averages by an outer momentum, in units of the gradient",
        "[Wang et al. 2020](https://arxiv.org/abs/1910.00643)",
        outer_optimizer=SLOWMO,
    ),
    "diloco": MethodSpec(
        diloco,
        "step an outer optimizer on the pseudo-gradient",
        "[Douillard et al. 2023](https://arxiv.org/abs/2311.08105)",
        outer_optimizer=DILOCO,
    ),
    "streaming_diloco": MethodSpec(
        streaming_diloco,
        "the same for one fragment of the model at a time, overlapped with local steps",
        "[Douillard et al. 2025](https://arxiv.org/abs/2501.18512)",
        compressors={"sync": None},
        outer_optimizer=DILOCO,
        own_options={
            "fragments": "fragments",
            "delay_steps": "delay_steps",
            "mixing_factor": "mixing_factor",
        },
    ),
    "fedavgm": MethodSpec(
        fedavgm,
        "average models, with momentum on the server",
        "[Hsu et al. 2019](https://arxiv.org/abs/1909.06335)",
        outer_optimizer=FEDAVGM,
    ),
    "fedadam": MethodSpec(
        fedadam,
        "average models, with Adam on the server",
        "[Reddi et al. 2021](https://arxiv.org/abs/2003.00295)",
        outer_optimizer=FEDADAM,
    ),
    "ef_sgd": MethodSpec(
        ef_sgd,
        "send compressed updates at every step, with error feedback",
        "[Karimireddy et al. 2019](https://arxiv.org/abs/1901.09847)",
        own_period=True,
        every_step=True,
        compressors={"gradient": "grbs:32"},
    ),
    "qsparse_local_sgd": MethodSpec(
        qsparse_local_sgd,
        "send compressed differences of models every H steps, with error feedback",
        "[Basu et al. 2019](https://arxiv.org/abs/1906.02367)",
        compressors={"sync": "grbs:8"},
    ),
    "cser": MethodSpec(
        cser,
        "apply locally what compressed updates leave out, and reset it in part every H steps",
        "[Xie et al. 2020](https://arxiv.org/abs/2007.13221)",
        compressors={"gradient": "grbs:64", "reset": "grbs:4"},
        own_options={"cser_implementation": "implementation"},
    ),
    "csea": MethodSpec(
        csea,
        "take local steps, and reset in part at every step",
        "[Xie et al. 2020](https://arxiv.org/abs/2007.13221)",
        own_period=True,
        every_step=True,
        compressors={"reset": "grbs:32"},
    ),
    "cser_pl": MethodSpec(
        cser_pl,
        "take local steps, and reset in part every H steps",
        "[Xie et al. 2020](https://arxiv.org/abs/2007.13221)",
        compressors={"reset": "grbs:8"},
    ),
    "sparse_loco": MethodSpec(
        sparse_loco,
        "send the largest entries of pseudo-gradients, with decayed error feedback",
        "[Sarfi et al. 2025](https://arxiv.org/abs/2508.15706)",
        compressors={"sync": "top_k:64"},
        outer_optimizer=SPARSE_LOCO,
        own_options={"error_decay": "error_decay"},
    ),
}
