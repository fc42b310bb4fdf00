"""Nothing in the packages reads a format that can run code (R26): read off their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("firetitan_client", "firetitan_daemon", "proto")
MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
)
"""Never imported, not even for something harmless in them."""
NAMES = frozenset({"eval", "exec", "compile", "__import__", "execfile"})
CALLS = frozenset(
    {
        "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "dcp.load", "dcp.save",
        "checkpoint.load", "np.load", "numpy.load", "np.save", "pandas.read_pickle",
        "jinja2.Template", "os.system", "subprocess.getoutput",
    }
)  # fmt: skip
PRETRAINED = frozenset({"from_pretrained", "from_config"})
"""Of transformers: each call says that the folder's code is not trusted."""
OURS = "firetitan_daemon/engine/resolve.py"
"""Converts the one GGUF file of a package that is installed with the project."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def found(name: str, tree: ast.AST) -> Iterator[str]:
    """What a module has that it must not have."""
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in [one.name for one in node.names] + [getattr(node, "module", None) or ""]:
                if module.partition(".")[0] in MODULES:
                    yield f"{where} imports {module}"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{where} {node.arg}"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    if not (isinstance(value, ast.Constant) and value.value is False):
                        yield f"{where} trust_remote_code"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in NAMES or any(called == one or called.endswith(f".{one}") for one in CALLS):
            yield f"{where} calls {called}"
        if called.rpartition(".")[2] in PRETRAINED and name != OURS:
            said = {one.arg for one in node.keywords}
            if "trust_remote_code" not in said and None not in said:
                yield f"{where} calls {called} without trust_remote_code=False"


def test_nothing_reads_a_format_that_can_run_code() -> None:
    trees = dict(sources())
    assert len(trees) > 200, "the packages are not where they are looked for"
    assert [one for name, tree in trees.items() for one in found(name, tree)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "import torch\nx = torch.load('x')",
        "import torch.distributed.checkpoint as dcp\ndcp.load({})",
        "eval('1')",
        "exec('1')",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=wanted)",
        "settings = {'trust_remote_code': True}",
        "AutoModel.from_pretrained('x')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_what_is_looked_for_is_found(code: str) -> None:
    assert list(found("module.py", ast.parse(code)))


def test_handles_of_samplers_hold_an_address_and_names() -> None:
    """A sampling client can be pickled by its user: what is in the pickle is its handle alone."""
    from firetitan_client.sampler_handles import SamplerHandle

    handle = SamplerHandle("unix:/x", "deployments/d", "snapshots/s", "model", "tokenizer")
    assert SamplerHandle.parse(str(handle)) == handle
    assert set(vars(handle)) == {"address", "deployment", "snapshot", "base_model", "tokenizer"}
