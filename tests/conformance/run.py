"""
Run Stable-Baselines3's own tests on QSM: ``make conformance``, or ``make conformance SUITE=contrib``.

The tests come from the source release of the installed version. QSM takes the seat of its peer (SAC; TD3 where a test
knows no SAC; TQC in sb3-contrib): in every test the peer's name is replaced by QSM's. No assertion is changed.
"""

import argparse
import ast
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

DISTRIBUTIONS = {"sb3": "stable-baselines3", "contrib": "sb3-contrib"}
PEERS = {"sb3": ("SAC", "TD3"), "contrib": ("TQC",)}
# These test an option or a network that only the peer has
NOT_APPLICABLE = {
    "test_sac",  # SAC's own values of ent_coef
    "test_tqc",  # TQC's own values of ent_coef
    "test_sde",  # gSDE
    "test_sde_multi_dim",  # gSDE
    "test_state_dependent_noise",  # gSDE
    "test_save_load_pytorch_var",  # SAC's log_ent_coef and ent_coef_tensor
    "test_td3_train_with_batch_norm",  # TD3's actor_target
}
# ``model_class == SAC`` asks for gSDE everywhere but here, where it picks the arguments of an off-policy algorithm
OFF_POLICY_ARGUMENTS = {"test_infinite_horizon"}

PLUGIN = "from sb3_qsm import QSM\n"
# What fails for the peer itself is no fault of QSM
STANDIN = """
from functools import partialmethod
from {package} import {peer}

class QSM({peer}):
    learn = partialmethod({peer}.learn, tb_log_name="QSM")
"""


def names(*nodes: ast.AST) -> set[str]:
    """
    :param nodes: pieces of a program
    :return: every name they use
    """
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def called(function: ast.FunctionDef) -> set[str]:
    """
    :param function: a test
    :return: names X that it uses as ``X(...)`` or ``X.method(...)``
    """
    targets = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
    return {n.id for n in (t.value if isinstance(t, ast.Attribute) else t for t in targets) if isinstance(n, ast.Name)}


class TakeSeat(ast.NodeTransformer):
    """
    Replace the peer by QSM.

    :param peer: name of the algorithm whose seat QSM takes
    :param keep_equality: leave ``model_class == PEER`` alone
    """

    def __init__(self, peer: str, keep_equality: bool = False) -> None:
        self.peer = peer
        self.keep_equality = keep_equality

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name("QSM", node.ctx) if node.id == self.peer else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("qsm") if node.value == self.peer.lower() else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        equality = isinstance(node.ops[0], ast.Eq | ast.NotEq)
        return node if equality and self.keep_equality else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        if "use_sde" not in names(node.test):  # a list of the algorithms that have gSDE
            node.test = self.visit(node.test)
        node.body = [self.visit(child) for child in node.body]
        node.orelse = [self.visit(child) for child in node.orelse]
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg == "n_quantiles" else self.generic_visit(node)  # TQC's critic


def transform(source: str, peers: tuple[str, ...]) -> str | None:
    """
    Put QSM into a file of tests.

    :param source: text of the file
    :param peers: algorithms whose seat QSM takes, the first that a test knows
    :return: new text, None if no test concerns QSM
    """
    tree = ast.parse(source)
    lists = {t.id for n in tree.body if isinstance(n, ast.Assign) and peers[0] in names(n.value) for t in n.targets}
    body: list[ast.stmt] = []
    found = False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            known = names(*node.decorator_list)
            if known & lists:
                known.add(peers[0])
            parametrised = [p for p in peers if p in known]
            hard_coded = [p for p in peers if p in called(node)]
            if node.name in NOT_APPLICABLE or not parametrised + hard_coded:
                continue
            if not parametrised:
                node.name += "__qsm"
            peer = (parametrised + hard_coded)[0]
            keep_equality = peer == peers[0] and node.name not in OFF_POLICY_ARGUMENTS
            node = TakeSeat(peer, keep_equality).visit(node)
            found = True
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            node = TakeSeat(peers[0]).visit(node)
        body.append(node)
        if isinstance(node, ast.ImportFrom) and node.module in ("stable_baselines3", "sb3_contrib"):
            body.append(ast.ImportFrom("plugin", [ast.alias("QSM")], 0))
    tree.body = body
    return ast.unparse(ast.fix_missing_locations(tree)) if found else None


def download_tests(distribution: str, folder: Path) -> None:
    """
    Put the tests of the installed version in ``folder / "tests"``; the package itself stays behind, so that the installed
    one is tested.

    :param distribution: name on the package index
    :param folder: where to work
    """
    version = importlib.metadata.version(distribution)
    print(f"Tests of {distribution} {version}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"{distribution}=={version}"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        for member in archive.getmembers():
            member.name = member.name.partition("/")[2]
            if member.isfile() and member.name.startswith("tests/"):
                archive.extract(member, folder, filter="data")


def main() -> int:
    """
    :return: exit status of pytest
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(PEERS), default="sb3", help="whose tests")
    parser.add_argument("--standin", action="store_true", help="run the peer itself under QSM's name")
    parser.add_argument("-k", metavar="EXPRESSION", help="only the tests that match, as in pytest")
    args, pytest_args = parser.parse_known_args()
    peers, distribution = PEERS[args.suite], DISTRIBUTIONS[args.suite]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download_tests(distribution, folder)
        standin = STANDIN.format(package=distribution.replace("-", "_"), peer=peers[0])
        (folder / "plugin.py").write_text(standin if args.standin else PLUGIN)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = expensive\n")
        files = []
        for path in sorted(folder.glob("tests/test_*.py")):
            text = transform(path.read_text(), peers)
            if text is not None:
                path.write_text(text)
                files.append(str(path.relative_to(folder)))
        keyword = f"qsm and ({args.k})" if args.k else "qsm"
        pytest = [sys.executable, "-m", "pytest", "-q", "-n=auto", "-m", "not expensive", "-k", keyword, *pytest_args, *files]
        # one thread: these networks are tiny; a fixed hash seed, as in SB3
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONHASHSEED": "0"}
        return subprocess.run(pytest, cwd=folder, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
