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


def public_files() -> list[str]:
    """What clients in other languages need: all but what the daemon says to its workers."""
    return [name for name in proto_files() if not name.startswith("firetitan/worker/")]


def generate_typescript(folder: Path, plugin: Path) -> None:
    """Write messages and @grpc/grpc-js clients, as ES modules with 64-bit integers as bigint."""
    folder.mkdir(parents=True, exist_ok=True)
    run_protoc(
        [*public_files(), "google/rpc/error_details.proto"],
        f"--plugin=protoc-gen-ts_proto={plugin}",
        f"--ts_proto_out={folder}",
        "--ts_proto_opt=outputServices=grpc-js,env=node,forceLong=bigint,importSuffix=.js",
        "--ts_proto_opt=esModuleInterop=true,useExactTypes=false,outputJsonMethods=false",
    )


def generate_go(folder: Path, plugins: Path, module: str) -> None:
    """Write messages and gRPC clients as packages below `module`."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{plugins}{os.pathsep}{os.environ['PATH']}"
    packages = ",".join(f"M{name}={module}/firetitan/v1" for name in public_files())
    run_protoc(
        public_files(),
        *(f"--{kind}_out={folder}" for kind in ("go", "go-grpc")),
        *(f"--{kind}_opt=module={module},{packages}" for kind in ("go", "go-grpc")),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["stubs", "image", "typescript", "go"])
    parser.add_argument("target", type=Path, help="folder of the stubs, or file of the image")
    parser.add_argument("--plugin", type=Path, help="protoc-gen-ts_proto, or the folder of Go's")
    parser.add_argument("--module", default="example.com/firetitan/gen", help="Go: import path")
    arguments = parser.parse_args()
    if arguments.what == "stubs":
        generate_stubs(arguments.target)
    elif arguments.what == "image":
        write_image(arguments.target)
    elif arguments.what == "typescript":
        generate_typescript(arguments.target, arguments.plugin.resolve())
    else:
        generate_go(arguments.target, arguments.plugin.resolve(), arguments.module)


if __name__ == "__main__":
    main()
