"""
The replay buffer that SB3 lacks, and returns that end where an episode is cut off.
"""

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer


class NStepDictReplayBuffer(NStepReplayBuffer, DictReplayBuffer):  # type: ignore[misc]
    """
    n-step returns for dictionaries of observations: SB3's, which takes rows of observations and makes tensors of them, with
    rows that are dictionaries.

    Arguments as for SB3's ``NStepReplayBuffer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observations = Rows(self.observations)  # type: ignore[assignment]
        self.next_observations = Rows(self.next_observations)  # type: ignore[assignment]

    def to_torch(self, array: Any, copy: bool = True) -> Any:
        """
        :param array: an array, or a dictionary of arrays
        :param copy: whether to copy the data
        :return: the same as tensors on the buffer's device
        """
        if isinstance(array, dict):
            return {key: self.to_torch(value, copy) for key, value in array.items()}
        return super().to_torch(array, copy)


def cut_returns(buffer: NStepReplayBuffer) -> None:
    """
    No return over several steps may reach from the newest transitions into an episode that begins next.

    :param buffer: replay buffer of environments that will be reset, not empty
    """
    newest = buffer.pos - 1
    buffer.timeouts[newest] = np.maximum(buffer.timeouts[newest], 1 - buffer.dones[newest])


class Rows(dict[Any, np.ndarray]):
    """
    Arrays by their names; anything but a name picks the same rows of all of them.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return {name: array[key] for name, array in self.items()}
