"""
A denoiser of your own in twenty lines: here each action dimension gets its own small network, so that the number of
weights grows only linearly with the number of dimensions. About two minutes:

    pip install -e ".[zoo]"  # for matplotlib and the progress bar
    python examples/custom_denoiser.py
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.networks import Denoiser


class FactorisedDenoiser(Denoiser):
    """Each dimension is denoised from the features, its own noisy value, and one learnt vector for each level."""

    def __init__(self, features_dim, action_dim, n_diffusion_steps, net_arch, output_dim):
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch, output_dim)
        self.levels = nn.Embedding(n_diffusion_steps, 16)
        self.nets = nn.ModuleList(
            nn.Sequential(*create_mlp(features_dim + 1 + 16, output_dim // action_dim, net_arch, nn.SiLU))
            for _ in range(action_dim)
        )

    def forward(self, features, noisy_actions, t):
        level = self.levels(th.as_tensor(t, device=features.device)).expand(len(features), -1)
        outputs = [
            net(th.cat([features, action[:, None], level], dim=1))
            for net, action in zip(self.nets, noisy_actions.unbind(dim=1), strict=True)
        ]
        return th.stack(outputs, dim=2).flatten(1)  # all means, then all variances


def main(steps=4000, path="custom_denoiser.png"):
    policy_kwargs = dict(denoiser_class=FactorisedDenoiser, net_arch=dict(pi=[64, 64], qf=[256, 256]))
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, seed=0)
    model.learn(steps, progress_bar=True)
    returns = model.get_env().envs[0].get_episode_rewards()
    figure, panel = plt.subplots(figsize=(5, 3.5), layout="constrained")
    panel.plot(range(1, len(returns) + 1), returns, ".-")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set(title="QSM with a factorised denoiser, Pendulum-v1", xlabel="training episode", ylabel="return")
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
