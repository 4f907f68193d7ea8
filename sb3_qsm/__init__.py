"""Q-score matching for Stable-Baselines3: diffusion policies learnt from rewards."""

from pathlib import Path

from sb3_qsm.policies import CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_qsm.published import PublishedQSM
from sb3_qsm.qsm import QSM

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["QSM", "CnnPolicy", "DiffusionPolicy", "MlpPolicy", "MultiInputPolicy", "PublishedQSM", "__version__"]
