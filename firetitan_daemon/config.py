"""The daemon's settings: default < `$FIRETITAN_HOME/config.toml` < environment < command line.

Knows: every setting, its default and where a value came from. Must not know: what uses it.
A key `section.name` is `[section] name = ...` in the file and `FIRETITAN_SECTION_NAME` in the
environment. Unknown keys are errors, and variables that are nearly a setting's.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firetitan_daemon.core.model_names import NamedModel
from firetitan_daemon.core.model_records import Shape
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.core.recovery import RecoveryLimits
from firetitan_daemon.core.shapes import DEVICES, DTYPES, MODES
from firetitan_daemon.setting_values import (
    ConfigError,
    check_variable,
    convert,
    separated,
    unknown,
)


@dataclass(frozen=True)
class ServerConfig:
    """The gRPC server."""

    drain_timeout_s: float = 30.0
    """How long a stop waits for the running commands; what is left is finished at the next
    start."""
    fsync_operations: bool = False
    """Let accepted commands survive a power loss, not just the death of the process."""
    adapter_roots: str = "/"
    """Folders, with `:` between them, below which `load_adapter` may read local adapters."""

    @property
    def adapter_folders(self) -> tuple[Path, ...]:
        """`adapter_roots` one by one, absolute."""
        return _folders(self.adapter_roots)


@dataclass(frozen=True)
class TcpConfig:
    """Serving over TCP, beside the Unix socket."""

    address: str = ""
    """`host:port` to serve at, e.g. `127.0.0.1:7465`; empty: not over TCP. Beyond loopback clients
    need a certificate beside the token."""
    names: str = ""
    """What clients call this machine, with `,` between them, beside its host name and addresses."""
    roots: str = ""
    """Folders, with `:` between them, below which requests over TCP may name paths."""

    @property
    def host(self) -> str:
        """The host of `address`, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def host_names(self) -> tuple[str, ...]:
        """`names` one by one."""
        return separated(self.names)

    @property
    def folders(self) -> tuple[Path, ...]:
        """`roots` one by one, absolute."""
        return _folders(self.roots)


def _folders(text: str) -> tuple[Path, ...]:
    return tuple(Path(one).expanduser().absolute() for one in text.split(":") if one)


@dataclass(frozen=True)
class WorkersConfig:
    """The worker processes."""

    num_threads: int = 0
    """Threads each computes with; 0: OMP_NUM_THREADS, else as many as there are cores."""
    adopt_timeout_s: float = 5.0
    """How long one attempt to reach a worker of a former daemon may take."""


@dataclass(frozen=True)
class LeasesConfig:
    """Clients that say they are there."""

    ttl_s: float = 60.0
    """How long a client that does not renew its lease counts as there."""


@dataclass(frozen=True)
class IdleConfig:
    """Trainers and deployments that nobody uses."""

    timeout_s: float = 0.0
    """How long one may be unused before its worker is stopped, where whoever made it did not say;
    0: for ever."""


@dataclass(frozen=True)
class RetentionConfig:
    """What is kept although nobody asks for it any more."""

    results_s: float = 86400.0
    """How long a result stays that its client has not taken, once that client is gone."""
    operations_s: float = 604800.0
    """How long the row of an ended creation or hotload stays."""


@dataclass(frozen=True)
class LogConfig:
    """The log, on standard error."""

    level: str = "info"
    """debug, info, warning or error."""


@dataclass(frozen=True)
class DaemonConfig:
    """Everything that can be set."""

    home: Path
    """Where all state lives."""
    server: ServerConfig = field(default_factory=ServerConfig)
    limits: Limits = field(default_factory=Limits)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    recovery: RecoveryLimits = field(default_factory=RecoveryLimits)
    leases: LeasesConfig = field(default_factory=LeasesConfig)
    idle: IdleConfig = field(default_factory=IdleConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    log: LogConfig = field(default_factory=LogConfig)
    tcp: TcpConfig = field(default_factory=TcpConfig)
    models: Mapping[str, NamedModel] = field(default_factory=dict)
    """What a name of a model stands for, beside the built-in ones."""
    training_shapes: tuple[Shape, ...] = ()
    deployment_shapes: tuple[Shape, ...] = ()


_SECTIONS = ("server", "limits", "workers", "recovery", "leases", "idle", "retention", "log", "tcp")
_MODELS = "models."


@dataclass(frozen=True)
class Setting:
    """One value and where it came from."""

    key: str
    value: object
    origin: str
    """`default`, the file's path, the variable's name or `command line`."""


def home_folder(given: Path | None = None, environment: Mapping[str, str] | None = None) -> Path:
    """`given`, else `$FIRETITAN_HOME`, else `~/.firetitan`.

    Raises:
        ConfigError: It lies in the home of a user whom there is not.
    """
    variables = os.environ if environment is None else environment
    home = Path(given or variables.get("FIRETITAN_HOME") or "~/.firetitan")
    try:
        # One spelling, whatever links lead there: it goes into rows and into sockets' names.
        return Path(os.path.realpath(home.expanduser()))
    except RuntimeError as error:
        raise ConfigError(
            f"home: {str(home)!r} lies in the home of no user; give a folder, by --home or "
            "FIRETITAN_HOME"
        ) from error


def load_config(
    *,
    home: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> tuple[DaemonConfig, list[Setting]]:
    """Collect the settings.

    Args:
        home: Overrides FIRETITAN_HOME.
        environment: Stands in for `os.environ`.
        flags: Values of the command line by key, e.g. `{"log.level": "debug"}`.

    Returns:
        The configuration, and every setting with its origin, by key.

    Raises:
        ConfigError: Unknown key, wrong type, value out of range, or unreadable file; a variable
            that is nearly a setting's.
    """
    variables = os.environ if environment is None else environment
    root = home_folder(home, variables)
    given = _read_file(root / "config.toml")
    environment_given = _read_environment(variables)
    given.update(environment_given)
    given.update({key: Setting(key, value, "command line") for key, value in (flags or {}).items()})
    sections: dict[str, object] = {}
    settings = [
        Setting(
            "home",
            root,
            "command line"
            if home
            else ("FIRETITAN_HOME" if variables.get("FIRETITAN_HOME") else "default"),
        )
    ]
    for section, cls in _section_classes().items():
        values: dict[str, object] = {}
        hints = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            key = f"{section}.{entry.name}"
            setting = given.pop(key, None)
            if setting is not None:
                value = convert(key, setting.value, setting.origin, hints[entry.name])
                values[entry.name] = value
                settings.append(dataclasses.replace(setting, value=value))
            else:
                settings.append(Setting(key, entry.default, "default"))
        sections[section] = cls(**values)
    keys = [one.key for one in settings]
    models = {}
    for key in [key for key in given if key.startswith(_MODELS)]:
        name = key.removeprefix(_MODELS)
        models[name] = _named_model(given[key])
        settings.append(given.pop(key))
    shapes: dict[str, list[Shape]] = {"training_shapes": [], "deployment_shapes": []}
    for section, found in shapes.items():
        for key in [key for key in given if key.startswith(f"{section}.")]:
            found.append(_shape(section, given[key]))
            settings.append(given.pop(key))
    if given:
        other = next(iter(given.values()))
        raise unknown(other.key, other.origin, keys)
    for variable in variables.keys() - {one.origin for one in environment_given.values()}:
        check_variable(variable, keys)
    config = DaemonConfig(
        home=root,
        models=models,
        training_shapes=tuple(shapes["training_shapes"]),
        deployment_shapes=tuple(shapes["deployment_shapes"]),
        **sections,  # type: ignore[arg-type]
    )
    return config, sorted(settings, key=lambda one: one.key)


def _named_model(setting: Setting) -> NamedModel:
    value = {"location": setting.value} if isinstance(setting.value, str) else setting.value
    allowed = {entry.name for entry in dataclasses.fields(NamedModel)}
    if (
        not isinstance(value, dict)
        or not value.get("location")
        or value.keys() - allowed
        or not all(isinstance(one, str) for one in value.values())
    ):
        raise ConfigError(
            f"{setting.key} = {setting.value!r} (from {setting.origin}): must be a folder or a "
            'Hugging Face id, or { location = "...", revision = "..." }'
        )
    return NamedModel(**value)


def _shape(section: str, setting: Setting) -> Shape:
    value, where = setting.value, f"{setting.key} = {setting.value!r} (from {setting.origin})"
    hints = typing.get_type_hints(Shape)
    names = set(hints) - {"name", "notes"}
    if section == "deployment_shapes":
        names -= {"trainer_mode", "deployment_shape"}
    if not isinstance(value, dict) or value.keys() - names:
        raise ConfigError(f"{where}: must be a table of {', '.join(sorted(names))}")
    defaults: dict[str, Any] = {"deployment_shape": "local" if "trainer_mode" in names else ""}
    values = {
        name: convert(f"{setting.key}.{name}", one, setting.origin, hints[name])
        for name, one in value.items()
    }
    shape = Shape(setting.key.removeprefix(f"{section}."), **{**defaults, **values})
    allowed = {"trainer_mode": MODES, "dtype": DTYPES, "device": DEVICES}
    for name, words in allowed.items():
        if getattr(shape, name) not in words:
            raise ConfigError(f"{where}: {name} must be one of {', '.join(filter(None, words))}")
    return shape


def _section_classes() -> dict[str, type]:
    hints = typing.get_type_hints(DaemonConfig)
    return {section: hints[section] for section in _SECTIONS}


def _read_file(path: Path) -> dict[str, Setting]:
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    found = {}
    for section, entries in content.items():
        if not isinstance(entries, dict):
            raise ConfigError(f"{section}: no such setting (from {path}); settings live in tables")
        for name, value in entries.items():
            found[f"{section}.{name}"] = Setting(f"{section}.{name}", value, str(path))
    return found


def _read_environment(variables: Mapping[str, str]) -> dict[str, Setting]:
    found = {}
    for variable, value in variables.items():
        for section in _SECTIONS:
            prefix = f"FIRETITAN_{section.upper()}_"
            if variable.startswith(prefix):
                key = f"{section}.{variable.removeprefix(prefix).lower()}"
                found[key] = Setting(key, value, variable)
    return found
