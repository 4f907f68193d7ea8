"""
Other ways to train the same diffusion policy, as subclasses of QSM that override the actor's loss.

Everything else is QSM's: critics, TD target, buffer, exploration by the policy's own samples, acting by one sample. So two of
them differ in the actor's loss, and in the noise levels that their hyperparameters set, not in the code base; it also means
that none of them is its authors' method in full. Each docstring says what was kept and what was dropped; what changes the
method itself is called "-style". Observations must be vectors.

Legend: B batch, A action dimension, T diffusion steps, N samples per observation. Scaled actions are in [-1, 1].
"""

from typing import Any

import numpy as np
import torch as th
from scipy.stats import differential_entropy
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_qsm import QSM
from sb3_qsm.samplers import ddpm_sample


class Baseline(QSM):
    """
    What these share: an update of the actor for each of the critics, the values of all critics, the loss of a denoiser, and no
    temperature.

    :param policy: as for QSM
    :param env: as for QSM
    :param kwargs: arguments of QSM
    """

    replay_buffer: ReplayBuffer

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        super().__init__(policy, env, **{"policy_delay": 1, "ent_coef": 1.0, **kwargs})

    def _actor_loss(self, replay_data: ReplayBufferSamples, td_error: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param replay_data: batch of transitions
        :return: loss of the method; no entropy to steer a temperature by, no gradient of Q; each of shape ()
        """
        return self._loss(replay_data), th.zeros(()), th.zeros(())

    def _loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        :param replay_data: batch of transitions
        :return: loss of the actor, shape ()
        """
        raise NotImplementedError

    def _q_values(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param observations: shape (B, ...)
        :param actions: scaled actions, shape (B, A)
        :return: value by each online critic, shape (B, n_critics)
        """
        return th.cat(self.critic(observations, actions), dim=1)

    def _denoising_loss(self, observations: th.Tensor, actions: th.Tensor, weights: float | th.Tensor = 1.0) -> th.Tensor:
        """
        Denoising loss of Ho et al. (2020, arXiv:2006.11239, Eq. 14), for a network that predicts the noise.

        :param observations: shape (B, ...)
        :param actions: scaled actions to imitate, shape (B, A)
        :param weights: weight of each sample, shape (B, 1)
        :return: mean squared error in units of the network's output, shape ()
        """
        t = th.randint(len(self.actor.ratios), (len(actions),), device=self.device)
        ratio = self.actor.ratios[t, None]
        noisy_actions = actions + ratio * th.randn_like(actions)
        error = (self.actor.denoise(observations, noisy_actions, t)[0] - actions) / self.actor.preconditioning(ratio).c_out
        return (weights * error**2).mean()


class DiffusionQL(Baseline):
    """
    Diffusion-QL, online: imitate the buffer while climbing Q through the whole chain (Wang, Hunt and Zhou, 2023,
    arXiv:2208.06193). The method was published for offline data; learning while the buffer grows is our adaptation.

    Kept, from the authors' code: denoising loss on replay actions + eta * (-Q_i / mean |Q_j|) at sampled actions, (i, j) the
    two critics in random order; T = 5, VP schedule, noise prediction (in the hyperparameters). Dropped: the averaged actor in
    the TD target, the choice among 50 candidates by softmax(Q) when acting, clipped gradients, decay of the learning rate,
    max-Q backup.

    :param policy: as for QSM
    :param env: as for QSM
    :param eta: weight of the Q term
    :param kwargs: arguments of QSM
    """

    def __init__(self, policy: Any, env: Any, eta: float = 1.0, **kwargs: Any) -> None:
        self.eta = eta
        super().__init__(policy, env, **kwargs)

    def _loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        :param replay_data: batch of transitions
        :return: loss, shape ()
        """
        observations = replay_data.observations
        q_values = self._q_values(observations, self.actor(observations))
        climbed, scale = q_values.T[th.randperm(q_values.shape[1])[[0, -1]]]
        q_loss = -climbed.mean() / scale.detach().abs().mean()
        denoising_loss = self._denoising_loss(observations, replay_data.actions)
        self.logger.record_mean("train/q_loss", q_loss.item())
        self.logger.record_mean("train/denoising_loss", denoising_loss.item())
        return denoising_loss + self.eta * q_loss


class ImprovedActionsBuffer(ReplayBuffer):
    """SB3's buffer with a second action for each transition: at first the one taken, later a better one for the actor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.improved_actions = np.zeros_like(self.actions)

    def add(self, obs: np.ndarray, next_obs: np.ndarray, action: np.ndarray, *args: Any) -> None:
        """As in SB3."""
        self.improved_actions[self.pos] = action.reshape(self.n_envs, self.action_dim)
        super().add(obs, next_obs, action, *args)


class DIPO(Baseline):
    """
    DIPO: move the stored actions up the gradient of Q, then imitate them (Yang et al., 2023, arXiv:2305.13122).

    Kept, from the authors' code: a second copy of the stored actions, which the improved ones replace, so that they go on from
    there the next time they are drawn; 20 steps of Adam at 0.03 on the smaller critic, clipped to the box; a batch of its own;
    cosine schedule, noise prediction; its buffer gives one-step returns. Dropped: the slow copy of the actor in the TD
    target, clipped gradients of networks and actions. The hyperparameters have T = 20, not 100, for a CPU's sake.

    :param policy: as for QSM
    :param env: as for QSM
    :param n_action_steps: gradient steps on the stored actions per update
    :param action_lr: step of Adam on them, in half-widths of the box
    :param kwargs: arguments of QSM
    """

    replay_buffer: ImprovedActionsBuffer

    def __init__(self, policy: Any, env: Any, n_action_steps: int = 20, action_lr: float = 0.03, **kwargs: Any) -> None:
        self.n_action_steps = n_action_steps
        self.action_lr = action_lr
        super().__init__(policy, env, **{"replay_buffer_class": ImprovedActionsBuffer, **kwargs})

    def _loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        :param replay_data: not used but for its size: the stored actions come with their own observations
        :return: loss, shape ()
        """
        buffer, batch_size = self.replay_buffer, len(replay_data.actions)
        place = np.random.randint(buffer.size(), size=batch_size), np.random.randint(buffer.n_envs, size=batch_size)
        stored = buffer.observations[place]
        observations = buffer.to_torch(buffer._normalize_obs(stored, self._vec_normalize_env))  # type: ignore[arg-type]
        actions = self._improve(observations, buffer.to_torch(buffer.improved_actions[place]))
        buffer.improved_actions[place] = actions.cpu().numpy()
        return self._denoising_loss(observations, actions)

    def _improve(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param observations: shape (B, ...)
        :param actions: scaled actions, shape (B, A)
        :return: actions of higher value, in the box, shape (B, A)
        """
        actions = actions.clone().requires_grad_()
        optimizer = th.optim.Adam([actions], lr=self.action_lr)
        for _ in range(self.n_action_steps):
            value = self._q_values(observations, actions).min(dim=1).values.sum()
            (actions.grad,) = th.autograd.grad(-value, actions)
            optimizer.step()
            with th.no_grad():
                actions.clamp_(-1, 1)
        return actions.detach()


class QVPO(Baseline):
    """
    QVPO: imitate the best of the policy's own samples, weighted by its advantage, and a little of the uniform distribution
    (Ding et al., 2024, arXiv:2405.16173).

    Kept, from the authors' code: of N samples the one with the highest Q (smaller critic), with the weight (Q - V)+, V their
    mean; ten uniform actions for each, with ``entropy_coef`` times its weight; cosine schedule, noise prediction. Dropped: the
    best of 4 samples when acting and in the TD target and of 32 in evaluation, the slow copy of the actor in the TD target,
    clipped gradients, the decay of ``entropy_coef``, a learning rate of 1e-4 for the actor. The hyperparameters have N = 8
    and T = 10, not 64 and 20, for a CPU's sake.

    :param policy: as for QSM
    :param env: as for QSM
    :param n_samples: samples N per observation
    :param entropy_coef: weight of the uniform actions
    :param kwargs: arguments of QSM
    """

    def __init__(self, policy: Any, env: Any, n_samples: int = 64, entropy_coef: float = 0.02, **kwargs: Any) -> None:
        self.n_samples = n_samples
        self.entropy_coef = entropy_coef
        super().__init__(policy, env, **kwargs)

    def _loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        :param replay_data: batch of transitions
        :return: loss, shape ()
        """
        observations, n_uniform = replay_data.observations, 10
        with th.no_grad():
            many = observations.repeat(self.n_samples, 1)
            samples = self.actor(many)
            q_values = self._q_values(many, samples).min(dim=1).values
        actions, weights = best_of(samples.unflatten(0, (self.n_samples, -1)), q_values.unflatten(0, (self.n_samples, -1)))
        uniform = 2 * th.rand(n_uniform * len(actions), actions.shape[1], device=self.device) - 1
        self.logger.record_mean("train/advantage", weights.mean().item())
        return self._denoising_loss(observations, actions, weights) + n_uniform * self._denoising_loss(
            observations.repeat(n_uniform, 1), uniform, self.entropy_coef * weights.repeat(n_uniform, 1)
        )


def best_of(samples: th.Tensor, q_values: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param samples: actions, shape (N, B, A)
    :param q_values: their values, shape (N, B)
    :return: the best action of each column, shape (B, A), and its weight (Q - V)+, shape (B, 1)
    """
    best, index = q_values.max(dim=0)
    weights = (best - q_values.mean(dim=0)).clamp(min=0)
    return samples[index, th.arange(samples.shape[1], device=samples.device)], weights[:, None]


class InwardClamp(th.autograd.Function):
    """
    Clamp to [-1, 1] that lets gradients through where they lead back into the box. With a plain clamp, a policy that has come
    to sit on the bounds while Q was wrong never leaves them.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: th.Tensor) -> th.Tensor:
        (x,) = ctx.saved_tensors
        return grad.masked_fill((x.abs() > 1) & (x * grad < 0), 0)  # a descent step goes against the gradient


class DACERStyle(Baseline):
    """
    DACER-style: climb Q through the whole chain, and keep the entropy by normal noise on the action, whose size follows the
    policy's entropy (Wang et al., 2024, arXiv:2405.15177).

    Kept, from the authors' code: maximise the smaller critic at a = chain + 0.1 alpha N(0, I), with the same noise when acting
    and in the TD target; alpha from e^1.2 towards an entropy of -0.9 A; T = 20. Dropped: distributional critics, rewards times
    0.2, a learning rate of 1e-4, updates of the actor and the targets every other step only. Changed, hence "-style": the
    entropy is the sum over dimensions of Vasicek's estimate (SciPy), not that of a fitted mixture of normals; alpha takes a
    step in proportion to the gap every 1000 updates, not one of 0.03 every 10 000; gradients pass the clipping by
    :class:`InwardClamp`. Sampled actions in evaluation are those of the chain, without the noise.

    :param policy: as for QSM
    :param env: as for QSM
    :param noise_scale: standard deviation of the noise for alpha = 1
    :param entropy_interval: updates between two steps of alpha
    :param kwargs: arguments of QSM; ``ent_coef`` is alpha
    """

    n_entropy_observations, n_entropy_samples = 20, 200

    def __init__(self, policy: Any, env: Any, noise_scale: float = 0.1, entropy_interval: int = 1000, **kwargs: Any) -> None:
        self.noise_scale = noise_scale
        self.entropy_interval = entropy_interval
        super().__init__(policy, env, **{"ent_coef": "auto_3.32", **kwargs})

    def _setup_model(self) -> None:
        if self.target_entropy == "auto":
            self.target_entropy = -0.9 * get_action_dim(self.action_space)
        super()._setup_model()

    def _noise_std(self) -> th.Tensor:
        return self.noise_scale * self.temperature.value()

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        sigma = np.full((n_envs, get_action_dim(self.action_space)), self._noise_std().item())
        return super()._sample_action(learning_starts, NormalActionNoise(np.zeros_like(sigma), sigma), n_envs)

    def _next_actions(self, next_observations: th.Tensor) -> th.Tensor:  # type: ignore[override]
        actions = super()._next_actions(next_observations)
        return (actions + self._noise_std() * th.randn_like(actions)).clamp(-1, 1)

    def _actor_loss(self, replay_data: ReplayBufferSamples, td_error: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param replay_data: batch of transitions
        :return: loss; entropy, which is the target between two estimates: alpha stays; no gradient of Q; each of shape ()
        """
        observations = replay_data.observations
        entropy = th.tensor(float(self.target_entropy), device=self.device)
        if self._n_updates % self.entropy_interval == 0:
            entropy = self._entropy(observations[: self.n_entropy_observations])
        return self._loss(replay_data), entropy, th.zeros(())

    def _loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        :param replay_data: batch of transitions
        :return: loss, shape ()
        """
        observations = replay_data.observations
        return -self._q_values(observations, self._noisy_sample(observations)).min(dim=1).values.mean()

    def _noisy_sample(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: shape (B, ...)
        :return: one noisy action each, differentiable in the actor's weights, shape (B, A)
        """

        def denoise(u: th.Tensor, t: int) -> tuple[th.Tensor, float]:
            levels = th.full((len(u),), t, device=self.device)
            return InwardClamp.apply(self.actor.denoise(observations, u, levels)[0]), 0.0  # type: ignore[no-untyped-call]

        ratios = self.actor.levels
        shape = (2 + len(ratios), len(observations), get_action_dim(self.action_space))
        start, *noise, added = th.randn(shape, device=self.device)
        chain = ddpm_sample(denoise, ratios, (1 + ratios[-1] ** 2) ** 0.5 * start, noise)
        return InwardClamp.apply(chain + self._noise_std() * added)  # type: ignore[no-untyped-call]

    def _entropy(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: shape (B, F)
        :return: entropy of the noisy policy in nats, as if its dimensions were independent, mean over the batch, shape ()
        """
        with th.no_grad():
            actions = self._noisy_sample(observations.repeat(self.n_entropy_samples, 1))
        values = actions.unflatten(0, (self.n_entropy_samples, -1)).cpu().numpy()
        # Samples cut off at a bound coincide, and a point has no entropy: what a float can tell apart is the floor
        values = values + np.random.normal(0, 1e-4, values.shape)
        return th.as_tensor(differential_entropy(values, axis=0).sum(axis=-1).mean(), dtype=th.float32, device=self.device)
