"""What the pages say is so: their code runs, and the files, pictures, defaults and numbers that they name are there."""

import ast
import importlib.util
import inspect
import io
import json
import math
import re
import tokenize
from pathlib import Path

import matplotlib
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from sb3_qsm import QSM, samplers, schedules
from sb3_qsm.losses import box_target

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_README = [ROOT / "README.md", *PAGES]
ALL = [*WITH_README, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"))]
# What a page needs beside the package
EXTRAS = {"export.md": ["onnx", "onnxruntime", "onnxscript"]}
STEPS = 150


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_blocks(page: Path, language: str = "python") -> list[str]:
    """
    :param page: Markdown file
    :param language: language of the blocks
    :return: code of each block
    """
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)


def shortened(code: str) -> str:
    """
    :param code: Python
    :return: the same, with every number from 1000 on made ``STEPS``, so that a training takes seconds
    """
    tokens = [
        (kind, str(STEPS) if kind == tokenize.NUMBER and float(ast.literal_eval(text)) >= 1000 else text)
        for kind, text, *_ in tokenize.generate_tokens(io.StringIO(code).readline)
    ]
    return tokenize.untokenize(tokens)


@pytest.mark.parametrize("page", WITH_README, ids=by_name)
def test_code_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as a reader would type them."""
    blocks = code_blocks(page)
    if not blocks:
        pytest.skip("no code")
    for package in EXTRAS.get(page.name, []):
        pytest.importorskip(package)
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for number, block in enumerate(blocks, start=1):
        exec(compile(shortened(block), f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=by_name)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    """Its cells one after the other; they are kept without results."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    namespace = {"__name__": notebook.stem}
    for number, cell in enumerate(cells, start=1):
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        exec(compile(shortened(code), f"{notebook.name}, cell {number}", "exec"), namespace)


def test_shortened():
    assert ast.unparse(ast.parse(shortened("f(1e6, 10_000, 999, tau=0.5)"))) == f"f({STEPS}, {STEPS}, 999, tau=0.5)"


def anchors(page: Path) -> set[str]:
    """
    :param page: Markdown file
    :return: what a link can name in it: labels, and headings as GitHub and MyST spell them
    """
    text = page.read_text(encoding="utf8")
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", ALL, ids=by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", ALL, ids=by_name)
def test_named_files_exist(page):
    """Files of this repository that a page names as code."""
    for name in re.findall(r"`((?:sb3_qsm|benchmarks|examples|tests|docs)/[\w./-]+\.\w+)`", page.read_text(encoding="utf8")):
        assert (ROOT / name).exists(), name


def test_pictures_are_shown():
    shown = {
        (page.parent / target).resolve()
        for page in ALL
        for target in re.findall(r"!\[[^\]]+\]\(((?!https:)[^)]+)\)", page.read_text(encoding="utf8"))
    }
    assert shown == set((DOCS / "images").iterdir())


def test_pages_are_short():
    lines = {page.name: len(page.read_text(encoding="utf8").splitlines()) for page in WITH_README}
    assert lines.pop("README.md") <= 120
    assert lines["resume.md"] <= 80
    assert sum(lines.values()) <= 1100, lines


def table(page: str, header: str) -> list[list[str]]:
    """
    :param page: name of a page
    :param header: start of the table's first line
    :return: cells of its rows, stripped
    """
    lines = (DOCS / page).read_text(encoding="utf8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_arguments():
    """The guide's table has what differs from SAC, with the defaults of the signature; the rest is SAC's, in SAC's order."""
    ours, sacs = (
        {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()} for cls in (QSM, SAC)
    )
    sacs = {name: default for name, default in sacs.items() if "sde" not in name}
    assert [name for name in ours if name in sacs] == list(sacs)
    listed = {
        name.strip("`"): ast.literal_eval(default.strip("`")) for name, default, _ in table("guide.md", "| Argument | Default")
    }
    assert listed == {name: ours[name] for name in listed}
    differing = {name for name, default in ours.items() if name not in sacs or (default != sacs[name] and name != "policy")}
    assert set(listed) - {"target_entropy"} == differing  # the same word, another value


class Keys(Logger):
    """A logger that keeps the names of all that was logged."""

    def __init__(self) -> None:
        super().__init__(folder=None, output_formats=[])
        self.keys: set[str] = set()

    def dump(self, step: int = 0) -> None:
        self.keys |= set(self.name_to_value)
        super().dump(step)


def test_metrics():
    """The page lists what a run logs under train/, and nothing else."""
    model = QSM("MlpPolicy", "Pendulum-v1", learning_starts=10, batch_size=8, policy_kwargs=dict(net_arch=[8]), device="cpu")
    logger = Keys()
    model.set_logger(logger)
    model.learn(450, log_interval=1)
    logged = {key.removeprefix("train/") for key in logger.keys if key.startswith("train/")}
    assert {key.strip("`") for key, *_ in table("metrics.md", "| Key | Formula | Notes")} == logged


def test_noise_schedules():
    """The ratios in the table of noise schedules."""
    rows = {name.split('"')[1]: text for name, text, _ in table("algorithm.md", "| `noise_schedule`")}
    assert rows.keys() == schedules.SCHEDULES.keys()
    for name, text in rows.items():
        n_steps = int(re.search(r"T = (\d+)", text)[1])
        ratios = schedules.SCHEDULES[name](n_steps).tolist()
        start, end = (re.findall(r"[\d.]*\d", part) for part in (text.split(":")[1].split("...") * 2)[:2])
        shown = [float(number) for number in (start if start == end else start + end)]
        expected = ratios if start == end else ratios[: len(start)] + ratios[-len(end) :]
        assert shown == pytest.approx(expected, rel=0.01, abs=0.006)


def test_short_chains():
    """Mean and standard deviation of the actions of a chain with the exact target of a linear Q."""
    th.manual_seed(0)
    n = 100_000
    for slope, target, *chains in table("algorithm.md", "| $k$ |"):
        k = float(slope)
        grid = th.linspace(-1, 1, 20_001, dtype=th.float64)
        density = (k * grid).exp() / (k * grid).exp().sum()
        mean = (density * grid).sum()
        std = (density * (grid - mean) ** 2).sum().sqrt()
        assert [float(number) for number in target.split(",")] == pytest.approx([mean.item(), std.item()], abs=0.006)
        columns = [("ddpm", 6, False), ("ddpm", 20, False), ("ddim", 6, False), ("ddpm", 6, True), ("ddpm", 3, True)]
        for (sampler, n_steps, learn_variance), cell in zip(columns, chains, strict=True):
            ratios = schedules.geometric_ratios(n_steps).float()

            def denoise(u, t, ratios=ratios, k=k, learn_variance=learn_variance):
                lower, mean, upper = (box_target(u + h, ratios[t], th.tensor(k), th.tensor(1.0)) for h in (-1e-3, 0, 1e-3))
                variance = ratios[t] ** 2 * (upper - lower) / 2e-3  # implied by the mean
                return mean, variance.clamp(min=0) if learn_variance else 0.0

            start = math.sqrt(1 + float(ratios[-1]) ** 2) * th.randn(n, 1, dtype=th.float64)
            noise = th.randn(n_steps, n, 1, dtype=th.float64)
            actions = samplers.SAMPLERS[sampler](denoise, ratios.tolist(), start, noise)
            drawn = [actions.mean().item(), actions.std().item()]
            assert [float(number) for number in cell.split(",")] == pytest.approx(drawn, abs=0.011)


def test_api_has_no_page_missing():
    """Every module with public names is on the API page, or has a page of its own."""
    api = (DOCS / "api.md").read_text(encoding="utf8")
    for module in ("losses", "schedules", "samplers", "temperature", "buffers", "networks", "policies", "representation"):
        assert importlib.util.find_spec(f"sb3_qsm.{module}") is not None
        assert f"sb3_qsm.{module}" in api
