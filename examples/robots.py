"""
Trained robots side by side in one GIF: ``python examples/robots.py Ant-v5=ant.zip HalfCheetah-v5=cheetah.zip``.

Files are models of ``QSM.save``, such as ``benchmarks/runs/mujoco-100k/Ant-v5/qsm/seed0/model.zip``.
"""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported; no display is needed

import gymnasium as gym
from PIL import Image

from sb3_qsm import QSM


def film(task, path, size, n_frames, start=100):
    """Every second picture of a run, from step ``start`` on, when the robot is on its way."""
    env = gym.make(task, render_mode="rgb_array", camera_name="track", width=480, height=480)
    model = QSM.load(path, device="cpu")
    obs, _ = env.reset(seed=0)
    for step in range(start + 2 * n_frames):
        obs, _, terminated, _, _ = env.step(model.predict(obs, deterministic=True)[0])
        if terminated:
            obs, _ = env.reset()
        if step >= start and step % 2 == 0:
            yield Image.fromarray(env.render()).resize((size, size), Image.Resampling.LANCZOS)


def main(robots, path="robots.gif", size=180, n_frames=50):
    frames = []
    for pictures in zip(*(film(*robot.split("="), size, n_frames) for robot in robots), strict=True):
        frame = Image.new("RGB", (size * len(robots), size))
        for column, picture in enumerate(pictures):
            frame.paste(picture, (size * column, 0))
        frames.append(frame)
    palette = frames[0].quantize(128)  # one for all, or colours flicker
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=60, loop=0)
    print(f"film: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
