"""One way to publish a file: nothing in the daemon writes one outside of the places listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

DAEMON = Path(__file__).parents[2] / "firetitan_daemon"
_CALLS = {
    "write_text", "write_bytes", "copy", "copy2", "copyfile", "copytree", "move", "rename",
    "hardlink_to", "link", "symlink_to", "serialize_file", "save_file", "save_pretrained",
    "mkstemp", "NamedTemporaryFile",
}  # fmt: skip
_STAGED = "into a staging folder, which is sealed or flushed before it gets its name"
_LOCK = "a lock: its content is for people"
_ALLOWED = {
    "doctor.py": (["copyfile"], "a copy to look at, in a temporary folder"),
    "durable.py": (["open", "rename"], "the one way"),
    "engine/adapter.py": (["write_text"], _STAGED),
    "engine/export.py": (["copyfile", "write_text"], _STAGED),
    "engine/exporter.py": (["copyfile"], _STAGED),
    "engine/raw.py": (["serialize_file"], _STAGED),
    "engine/resolve.py": (["open", "save_pretrained"], f"{_LOCK}; {_STAGED}"),
    "host.py": (["os.open"], "a file without a name, to see whether one could be made"),
    "launch/bundle.py": (["os.open"], _LOCK),
    "launch/local.py": (["open"], "a worker's log"),
    "store/adapters.py": (["open"], _STAGED),
    "store/disk.py": (["open"], "the reserve against a full disk: nothing is in it"),
    "store/folders.py": (["hardlink_to", "rename"], _STAGED),
    "store/lock.py": (["os.open"], _LOCK),
}


def writes(source: str) -> Iterator[str]:
    """Calls that make, fill or name files."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = function.value if isinstance(function, ast.Attribute) else None
        module = owner.id if isinstance(owner, ast.Name) else ""
        if name in ("copy", "move") and module != "shutil":
            continue
        if name in _CALLS or (name == "replace" and module == "os"):
            yield name
        elif name == "open" and module == "os":
            flags = ast.unparse(node)
            if any(flag in flags for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")):
                yield "os.open"
        elif name == "open":
            modes = [*node.args[:2], *(word.value for word in node.keywords if word.arg == "mode")]
            texts = [one.value for one in modes if isinstance(one, ast.Constant)]
            if any(isinstance(text, str) and set(text) <= set("rwxabt+") and set(text) & set("wxa+")
                   for text in texts):  # fmt: skip
                yield "open"


def test_files_are_written_in_known_places_only() -> None:
    found = {}
    for path in sorted(DAEMON.rglob("*.py")):
        calls = sorted(set(writes(path.read_text())))
        if calls:
            found[str(path.relative_to(DAEMON))] = calls
    assert found == {file: calls for file, (calls, _) in _ALLOWED.items()}


def test_each_way_to_write_would_be_found() -> None:
    for call in ("path.write_text(x)", "open(p, 'w')", "path.open('xb')", "p.open(mode='ab')",
                 "os.replace(a, b)", "os.open(p, os.O_WRONLY)", "save_file(t, p)",
                 "shutil.move(a, b)"):  # fmt: skip
        assert list(writes(call)), call
    for call in ("path.open('rb')", "open(p)", "text.replace('w', 'a')", "os.open(p, os.O_RDONLY)",
                 "replace(record, mode='w')"):  # fmt: skip
        assert not list(writes(call)), call
