"""Every rival by name. A new one is one line here and one file of hyperparameters."""

from pkgutil import resolve_name

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

# Imported on first use, so that a rival whose package is missing does not keep the others from running.
ALGORITHMS = {
    "qsm": "sb3_qsm:QSM",
    "qsm_paper": "sb3_qsm:QSM",
    "sac": "stable_baselines3:SAC",
    "td3": "stable_baselines3:TD3",
    "tqc": "sb3_contrib:TQC",
    "crossq": "sb3_contrib:CrossQ",
    "diffusion_ql": "benchmarks.peers:DiffusionQL",
    "dipo": "benchmarks.peers:DIPO",
    "qvpo": "benchmarks.peers:QVPO",
    "dacer_style": "benchmarks.peers:DACERStyle",
}


def algorithm_class(name: str) -> type[OffPolicyAlgorithm]:
    """
    The class behind a name. A variant carries a label after a dash: ``qsm-T20`` is QSM under its own hyperparameters.

    :param name: a key of ``ALGORITHMS``, with or without a label
    :return: the class
    :raises ValueError: for an unknown name
    """
    key = name.split("-")[0]
    if key not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}, valid: {', '.join(ALGORITHMS)} (a variant is named as in 'qsm-label')")
    return resolve_name(ALGORITHMS[key])
