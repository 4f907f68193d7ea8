"""Every algorithm by name. A new one is one line here and one file of hyperparameters."""

from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM, PublishedQSM

from .baselines import DIPO, QVPO, DACERStyle, DiffusionQL
from .gaussian import SACActor, TD3Actor

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {
    "qsm": QSM,
    "published_qsm": PublishedQSM,
    "sac": SAC,
    "td3": TD3,
    "tqc": TQC,
    "crossq": CrossQ,
    "diffusion_ql": DiffusionQL,
    "dipo": DIPO,
    "qvpo": QVPO,
    "dacer_style": DACERStyle,
    "sac_actor": SACActor,
    "td3_actor": TD3Actor,
}


def algorithm_class(name: str) -> type[OffPolicyAlgorithm]:
    """
    The class behind a name. A variant carries a label after a dash: ``qsm-T12`` is QSM under its own hyperparameters.

    :param name: a key of ``ALGORITHMS``, with or without a label
    :return: the class
    :raises ValueError: for an unknown name
    """
    key = name.split("-")[0]
    if key not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}, valid: {', '.join(ALGORITHMS)} (a variant is named as in 'qsm-label')")
    return ALGORITHMS[key]
