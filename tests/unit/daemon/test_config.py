"""Settings: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from firetitan_daemon.config import home_folder, load_config
from firetitan_daemon.setting_values import ConfigError


def origin(settings: list, key: str) -> tuple[object, str]:
    return next((one.value, one.origin) for one in settings if one.key == key)


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[log]\nlevel = "error"\n[limits]\nmax_operations = 7\ngap_timeout_s = 3\n')
    config, settings = load_config(
        home=tmp_path,
        environment={"FIRETITAN_LOG_LEVEL": "warning", "FIRETITAN_LIMITS_MAX_OPERATIONS": "8"},
        flags={"log.level": "debug"},
    )
    assert (config.log.level, config.limits.max_operations) == ("debug", 8)
    assert config.limits.gap_timeout_s == 3.0
    assert origin(settings, "log.level") == ("debug", "command line")
    assert origin(settings, "limits.max_operations") == (8, "FIRETITAN_LIMITS_MAX_OPERATIONS")
    assert origin(settings, "limits.gap_timeout_s") == (3.0, str(file))
    assert origin(settings, "workers.num_threads") == (0, "default")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[log]\nlevle = 'info'\n", "log.levle"),
        ("[logs]\nlevel = 'info'\n", "logs.level"),
        ("level = 'info'\n", "level"),
        ("[log]\nlevel = 'loud'\n", "log.level = 'loud'"),
        ("[limits]\nmax_operations = 'many'\n", "limits.max_operations = 'many'"),
        ("[limits]\nmax_operations = -1\n", "limits.max_operations = -1"),
        ("[limits]\nmax_operations = true\n", "limits.max_operations = True"),
        ("[server\n", "config.toml"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(home=tmp_path, environment={})
    assert named in str(caught.value)


def test_an_unknown_variable_of_a_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.port.*FIRETITAN_SERVER_PORT"):
        load_config(home=tmp_path, environment={"FIRETITAN_SERVER_PORT": "80"})


def test_home_comes_from_the_environment() -> None:
    assert home_folder(None, {"FIRETITAN_HOME": "/a/b"}) == Path("/a/b")
    assert home_folder(Path("c"), {"FIRETITAN_HOME": "/a/b"}) == Path("c").absolute()
    assert home_folder(None, {}) == Path.home() / ".firetitan"
    with pytest.raises(ConfigError, match=r"home: '~no-such-user/x' .*--home or FIRETITAN_HOME"):
        home_folder(None, {"FIRETITAN_HOME": "~no-such-user/x"})


def test_names_of_models_are_read_from_their_table(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        "[models]\n"
        '"accounts/me/models/a" = "/models/a"\n'
        '"b" = { location = "org/b", revision = "v1" }\n'
    )
    config, settings = load_config(home=tmp_path, environment={})
    assert {name: one.reference for name, one in config.models.items()} == {
        "accounts/me/models/a": "/models/a",
        "b": "org/b@v1",
    }
    origins = {one.key: one.origin for one in settings if one.key.startswith("models.")}
    assert set(origins.values()) == {str(tmp_path / "config.toml")}
    for wrong in ("1", '""', "{ revision = 'v' }", "{ location = 'a', more = 'b' }"):
        (tmp_path / "config.toml").write_text(f"[models]\na = {wrong}\n")
        with pytest.raises(ConfigError, match=r"models\.a"):
            load_config(home=tmp_path, environment={})


def test_shapes_are_read_from_their_tables(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        "[training_shapes.small]\n"
        'version = 2\nmax_context_length = 64\ntrainer_mode = "LORA_TRAINER"\n'
        '[deployment_shapes."accounts/me/deploymentShapes/d"]\ndevice = "cpu"\n'
    )
    config, _ = load_config(home=tmp_path, environment={})
    (training,), (deployment,) = config.training_shapes, config.deployment_shapes
    assert (training.name, training.version, training.max_context_length) == ("small", 2, 64)
    assert training.deployment_shape == "local"
    assert (deployment.device, deployment.deployment_shape) == ("cpu", "")
    for wrong in (
        "[training_shapes]\na = 1\n",
        "[training_shapes.a]\nmore = 1\n",
        "[training_shapes.a]\ndevice = 'tpu'\n",
        "[training_shapes.a]\nmax_context_length = 'x'\n",
        "[deployment_shapes.a]\ntrainer_mode = 'LORA_TRAINER'\n",
    ):
        (tmp_path / "config.toml").write_text(wrong)
        with pytest.raises(ConfigError, match=r"_shapes\.a"):
            load_config(home=tmp_path, environment={})
