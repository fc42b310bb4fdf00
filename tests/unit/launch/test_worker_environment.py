"""The environment a worker starts in."""

from __future__ import annotations

import pytest

from firetitan_daemon.launch.local import environment


def test_threads_are_set_and_spin_for_a_bounded_time() -> None:
    theirs = environment({"OMP_NUM_THREADS": "3"}, 0)
    assert theirs["OMP_NUM_THREADS"] == theirs["MKL_NUM_THREADS"] == "3"
    assert theirs["GOMP_SPINCOUNT"] == "10000"
    assert environment({"OMP_NUM_THREADS": "3"}, 2)["OMP_NUM_THREADS"] == "2"


def test_the_users_choice_of_waiting_stands() -> None:
    chosen = environment({"OMP_WAIT_POLICY": "ACTIVE"}, 0)
    assert chosen["OMP_WAIT_POLICY"] == "ACTIVE" and "GOMP_SPINCOUNT" not in chosen
    assert environment({"GOMP_SPINCOUNT": "7"}, 0)["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "FIREWORKS_API_KEY", "FIRETITAN_API_KEY", "FIRETITAN_TOKEN",
     "HF_SECRET_KEY", "PYTHON_KEYRING_PASSWORD"],
)  # fmt: skip
def test_secrets_of_others_stay_behind(name: str) -> None:
    assert name not in environment({name: "x"}, 0)


@pytest.mark.parametrize("name", ["HF_TOKEN", "TOKENIZERS_PARALLELISM", "FIRETITAN_HOME"])
def test_what_a_worker_needs_goes_with_it(name: str) -> None:
    assert environment({name: "x"}, 0)[name] == "x"


def test_an_empty_search_path_does_not_become_the_folder_the_daemon_was_started_in() -> None:
    assert not environment({"PYTHONPATH": ""}, 0)["PYTHONPATH"]
