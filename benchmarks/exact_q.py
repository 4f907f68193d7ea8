"""
What a score target makes of a Q that is known: ``python -m benchmarks.exact_q`` (two minutes).

One state, one action dimension, no neural network: the denoiser is a table over noisy actions, moved towards the mean of the
targets. Each round noises actions drawn from all that were ever taken, fits the table and takes new actions.
"""

import numpy as np
import torch as th

from benchmarks.targets import at_answer, at_flat, at_noisy
from sb3_qsm.losses import QFn, ScoreTarget, box_score, truncated_normal_mean
from sb3_qsm.samplers import ddpm_sample
from sb3_qsm.schedules import NoiseSchedule, box_betas

N_ACTIONS, N_ROUNDS, N_FITS, RATE, N_BINS, LIMIT = 20_000, 8, 8, 0.4, 400, 4.0


def bell(actions: th.Tensor, centre: float, height: float, width: float) -> th.Tensor:
    """
    :param actions: any shape
    :param centre: of the bell
    :param height: of the bell
    :param width: standard deviation
    :return: values, shape of ``actions``
    """
    return height * th.exp(-0.5 * ((actions - centre) / width) ** 2)


LANDSCAPES: dict[str, QFn] = {
    "linear": lambda a: a,
    "one parabola": lambda a: -4 * (a - 0.3) ** 2,
    "two equal bells": lambda a: bell(a, -0.6, 1.0, 0.25) + bell(a, 0.6, 1.0, 0.25),
    "two bells, one half as high": lambda a: bell(a, -0.6, 1.0, 0.25) + bell(a, 0.6, 0.5, 0.25),
    "parabola with ripples": lambda a: -((a - 0.3) ** 2) + 0.2 * th.sin(10 * a),
}


def learn(q_fn: QFn, score_target: ScoreTarget, ent_coef: float) -> th.Tensor:
    """
    :param q_fn: the known Q
    :param score_target: a function like :func:`~sb3_qsm.losses.box_score`
    :param ent_coef: temperature
    :return: actions of the last round, shape (N_ACTIONS, 1)
    """
    schedule = NoiseSchedule(box_betas(6))
    x = th.linspace(-LIMIT, LIMIT, N_BINS)
    alphas, sigmas = schedule.alpha[:, None], schedule.sigma[:, None]
    table = truncated_normal_mean(x / alphas, sigmas / alphas).numpy()  # right for a flat Q

    def place(x_t: th.Tensor) -> np.ndarray:
        return ((x_t[:, 0].numpy() + LIMIT) / (2 * LIMIT) * (N_BINS - 1)).clip(0, N_BINS - 1)

    def denoise(x_t: th.Tensor, t: int) -> th.Tensor:
        return th.as_tensor(np.interp(place(x_t), np.arange(N_BINS), table[t]), dtype=th.float32)[:, None]

    actions = 2 * th.rand(N_ACTIONS, 1) - 1
    replay = actions
    for _ in range(N_ROUNDS):
        for t in range(schedule.n_steps):
            levels = th.full((N_ACTIONS,), t)
            alpha, sigma = schedule.alpha[levels, None], schedule.sigma[levels, None]
            for _ in range(N_FITS):
                drawn = replay[th.randint(len(replay), (N_ACTIONS,))]
                noisy_actions = schedule.add_noise(drawn, th.randn(N_ACTIONS, 1), levels)
                denoised = denoise(noisy_actions, t)
                target, _ = score_target(q_fn, denoised, noisy_actions, alpha, sigma, th.tensor(ent_coef))
                bins = place(noisy_actions).round().astype(int)
                count, total = np.bincount(bins, minlength=N_BINS), np.bincount(bins, target[:, 0].numpy(), N_BINS)
                seen = count > 5
                means = np.interp(np.arange(N_BINS), np.flatnonzero(seen), (total[seen] / count[seen]))
                table[t] += RATE * (means - table[t])
        actions = ddpm_sample(denoise, schedule, th.randn(N_ACTIONS, 1), th.randn(schedule.n_steps, N_ACTIONS, 1))
        replay = th.cat([replay, actions])
    return actions


def exact(q_fn: QFn, ent_coef: float) -> th.Tensor:
    """
    :param q_fn: the known Q
    :param ent_coef: temperature
    :return: actions of the policy exp(Q / lambda), shape (N_ACTIONS, 1)
    """
    grid = th.linspace(-1, 1, 4001)
    return grid[th.multinomial(th.softmax(q_fn(grid) / ent_coef, dim=0), N_ACTIONS, replacement=True)][:, None]


def main() -> None:
    print("| lambda | Q | exact | at_noisy | at_flat | at_answer | box |", "|---|---|---|---|---|---|---|", sep="\n")
    for ent_coef in (0.05, 0.2):
        for name, q_fn in LANDSCAPES.items():
            th.manual_seed(0)
            targets = (at_noisy, at_flat, at_answer, box_score)
            policies = [exact(q_fn, ent_coef), *(learn(q_fn, score, ent_coef) for score in targets)]
            cells = [f"{q_fn(a).mean():.2f} ({a.mean():.2f}, {a.std():.2f})" for a in policies]
            print(f"| {ent_coef} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
