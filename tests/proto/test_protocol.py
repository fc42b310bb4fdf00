"""The protocol's files: linted, compatible, and equal to the checked-in stubs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from firetitan.v1 import error_pb2

from firetitan_daemon.core.errors import CODES, Reason

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
COMPILER = ROOT / ".venv-proto" / "bin" / "python"
BUF = Path(sys.executable).parent / "buf"


def generate(what: str, target: Path) -> None:
    assert COMPILER.exists(), "no .venv-proto; run `make verify-proto` once"
    command = [str(COMPILER), str(PROTO / "generate.py"), what, str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def buf(*arguments: str) -> str:
    command = [str(BUF), *arguments, "--config", str(PROTO / "buf.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 100), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.binpb"
    generate("image", path)
    return path


def test_buf_lint(image: Path) -> None:
    assert buf("lint", str(image)) == ""


def test_buf_breaking(image: Path) -> None:
    assert buf("breaking", str(image), "--against", str(PROTO / "baseline.binpb")) == ""


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    generate("stubs", tmp_path)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    kept = {
        path.relative_to(PROTO): path.read_text()
        for path in PROTO.rglob("*_pb2*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert sorted(fresh) == sorted(kept), "run `make proto`"
    different = [str(path) for path in fresh if fresh[path] != kept[path]]
    assert different == [], "run `make proto`"


def test_reasons_agree_with_the_protocol() -> None:
    numbers = dict(error_pb2.ErrorReason.items())
    assert numbers.pop("ERROR_REASON_UNSPECIFIED") == 0
    assert {f"ERROR_REASON_{reason.name}" for reason in Reason} == set(numbers)
    assert all(reason.name == reason.value for reason in Reason)


def test_codes_agree_with_the_comments() -> None:
    text = (PROTO / "firetitan/v1/error.proto").read_text()
    documented = dict(
        (name, code)
        for code, name in re.findall(r"// ([A-Z_]+)\. .*\n  ERROR_REASON_([A-Z_]+) =", text)
    )
    assert documented == {reason.name: code for reason, code in CODES.items()}
