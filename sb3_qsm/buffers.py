"""
Replay buffers with returns over several steps: for dictionaries, too, and only over transitions that follow each other.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize


class NStepReplayBuffer(buffers.NStepReplayBuffer):
    """
    SB3's n-step returns, which end where the next transition does not start from the state that the one before led to: at
    the reset of an environment, in demonstrations between other data, in shuffled transitions.

    Arguments as for SB3's.
    """

    def add(self, obs: Any, next_obs: Any, action: np.ndarray, reward: np.ndarray, done: np.ndarray, infos: Any) -> None:
        """As in SB3; the newest transition counts as cut off in time where ``obs`` does not continue it."""
        if self.size() > 0:
            newest = self.pos - 1
            broken = self._differs(self.next_observations[newest], obs)
            self.timeouts[newest] = np.maximum(self.timeouts[newest], broken * (1 - self.dones[newest]))
        super().add(obs, next_obs, action, reward, done, infos)

    def sample_transitions(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: number of transitions
        :param env: environment that normalises observations and rewards
        :return: single steps, with their own rewards
        """
        return ReplayBuffer._get_samples(self, np.random.randint(self.size(), size=batch_size), env)

    def _differs(self, stored: Any, obs: Any) -> np.ndarray:
        """
        :param stored: observations of all environments, in the buffer's type
        :param obs: others
        :return: whether they differ, shape (n_envs,)
        """
        given = np.asarray(obs, dtype=stored.dtype).reshape(stored.shape)
        return (stored != given).reshape(self.n_envs, -1).any(axis=1)


class NStepDictReplayBuffer(NStepReplayBuffer, DictReplayBuffer):  # type: ignore[misc]
    """
    n-step returns for dictionaries of observations: SB3's, which takes rows of observations and makes tensors of them, with
    rows that are dictionaries.

    Arguments as for SB3's ``NStepReplayBuffer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observations = Rows(self.observations)
        self.next_observations = Rows(self.next_observations)

    def _differs(self, stored: Any, obs: Any) -> np.ndarray:
        differences = [super(NStepDictReplayBuffer, self)._differs(stored[key], obs[key]) for key in stored]
        return np.any(differences, axis=0)

    def to_torch(self, array: Any, copy: bool = True) -> Any:
        """
        :param array: an array, or a dictionary of arrays
        :param copy: whether to copy the data
        :return: the same as tensors on the buffer's device
        """
        if isinstance(array, dict):
            return {key: self.to_torch(value, copy) for key, value in array.items()}
        return super().to_torch(array, copy)


class Rows(dict[Any, np.ndarray]):
    """
    Arrays by their names; anything but a name picks the same rows of all of them.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return {name: array[key] for name, array in self.items()}


def choose_replay_buffer(
    observation_space: spaces.Space[Any], n_steps: int | None, given: type[ReplayBuffer] | None, one_step: bool
) -> tuple[int, type[ReplayBuffer] | None]:
    """
    The number of steps and the class that go with a user's arguments: three steps where these leave it open.

    :param observation_space: space of observations
    :param n_steps: steps of the return, None for the default
    :param given: class that the user asks for
    :param one_step: whether the default is one step, for instance where each observation shall be stored once
    :return: steps of the return, and the class; None leaves the class to SB3
    """
    dictionaries = isinstance(observation_space, spaces.Dict)
    if n_steps is None and given is None and not one_step:
        return 3, NStepDictReplayBuffer if dictionaries else NStepReplayBuffer
    n_steps = n_steps or 1
    if n_steps > 1 and given is None and not dictionaries:
        return n_steps, NStepReplayBuffer
    return n_steps, given
