"""Generates the checked-in stubs, or the descriptor image that `buf` checks.

Runs in an environment of its own with the oldest supported compiler, so that the stubs load under
every supported protobuf runtime: grpcio-tools 1.71.2 and mypy-protobuf 3.6.0 (`make proto`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import google.rpc.status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SHARED = Path(google.rpc.status_pb2.__file__).parents[2]
"""Where google/rpc/*.proto are installed."""


def proto_files() -> list[str]:
    """Paths of our .proto files, relative to the folder of this script."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "firetitan").rglob("*.proto"))


def run_protoc(files: list[str], *options: str) -> None:
    """Run the compiler on `files`; ends the process where it refuses."""
    # protoc finds its plugins on PATH: those of this environment.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    includes = [f"-I{ROOT}", f"-I{SHARED}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    status = protoc.main(["protoc", *includes, *options, *files])
    if status:
        sys.exit(status)


def generate_stubs(folder: Path) -> None:
    """Write messages for every file, and gRPC stubs for those that declare a service."""
    files = proto_files()
    services = [name for name in files if "\nservice " in (ROOT / name).read_text()]
    run_protoc(files, f"--python_out={folder}", f"--mypy_out=quiet:{folder}")
    run_protoc(services, f"--grpc_python_out={folder}", f"--mypy_grpc_out=quiet:{folder}")


def write_image(path: Path) -> None:
    """Write the descriptors of all files with their comments, for `buf`."""
    run_protoc(
        proto_files(), f"--descriptor_set_out={path}", "--include_imports", "--include_source_info"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["stubs", "image"])
    parser.add_argument("target", type=Path, help="folder of the stubs, or file of the image")
    arguments = parser.parse_args()
    if arguments.what == "stubs":
        generate_stubs(arguments.target)
    else:
        write_image(arguments.target)


if __name__ == "__main__":
    main()
