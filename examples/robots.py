"""
Robots side by side in one GIF, moved by the policies that come along. Half a minute:

    pip install -e ".[mujoco]"  # in a clone
    python examples/robots.py
"""

import os

os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported; no display is needed

from PIL import Image

from sb3_qsm.pretrained import load_pretrained, make_task


def film(task, size, n_frames, start=100):
    """Every second picture of a run, from step ``start`` on, when the robot is on its way."""
    env = make_task(task, render_mode="rgb_array", camera_name="track", width=480, height=480)
    policy = load_pretrained(task)
    obs, _ = env.reset(seed=0)
    for step in range(start + 2 * n_frames):
        obs, _, terminated, _, _ = env.step(policy.predict(obs, deterministic=True))
        if terminated:
            obs, _ = env.reset()
        if step >= start and step % 2 == 0:
            yield Image.fromarray(env.render()).resize((size, size), Image.Resampling.LANCZOS)


def main(tasks=("HalfCheetah-v5", "Ant-v5", "Walker2d-v5"), path="robots.gif", size=220, n_frames=50):
    frames = []
    for pictures in zip(*(film(task, size, n_frames) for task in tasks), strict=True):
        frame = Image.new("RGB", (size * len(tasks), size))
        for column, picture in enumerate(pictures):
            frame.paste(picture, (size * column, 0))
        frames.append(frame)
    palette = frames[-1].quantize(128)  # one for all, or colours flicker
    # The first was drawn before all renderers were there, and has no sky
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames[1:]]
    first.save(path, save_all=True, append_images=others, duration=60, loop=0)
    print(f"film: {path}")


if __name__ == "__main__":
    main()
