"""
Runs of SB3's off-policy algorithms that go on as if they had never stopped.
"""

from sb3_qsm.resume._storage import checkpoints
from sb3_qsm.resume.callback import ResumeCallback

__all__ = ["ResumeCallback", "checkpoints"]
