"""A user's second process: it does with a service what it is told, line by line.

Run as a program it reads words from standard input and answers each with one line.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.daemon import DaemonProcess

NAME = "other.py"
"""What the program calls itself to the daemon."""


class OtherProcess:
    """The program, and what to tell it."""

    def __init__(self, daemon: DaemonProcess) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.other_process", daemon.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    @property
    def label(self) -> str:
        """What the daemon calls it."""
        return f"{NAME} (pid {self._process.pid})"

    def tell(self, word: str, **arguments: Any) -> Any:
        """Have it do something; returns its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps({'word': word, **arguments})}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def kill(self) -> None:
        """`kill -9` and reap."""
        self._process.kill()
        self._process.wait()
        self._close()

    def end(self) -> None:
        """Let it end by itself, without closing anything."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._close()

    def _close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


class Words:
    """Enough of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """Token ids as words."""
        return " ".join(map(str, ids))


def _main() -> None:
    sys.argv[0] = NAME
    service: Any = None
    policy: Any = None
    sampler: Any = None
    teacher: Any = None
    from firetitan_client import (
        AdamParams,
        DeploymentConfig,
        FiretitanServiceClient,
        SamplingParams,
    )
    from support.data import ragged_data

    for line in sys.stdin:
        told = json.loads(line)
        word = told.pop("word")
        answer: Any = None
        try:
            if word == "open":
                service = FiretitanServiceClient.from_firetitan_config(address=sys.argv[1], **told)
                policy = sampler = teacher = None
            elif word == "train":
                policy = policy or service.create_training_client()
                for datum in ragged_data(seed=1, count=2, vocab_size=64):
                    policy.forward_backward([datum], "cross_entropy")
                answer = policy.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["step"]
            elif word == "sample":
                sampler = sampler or service.create_sampling_client()
                answer = sampler.sample([1, 2, 3], 1, SamplingParams(max_tokens=4, seed=1)).result()
                answer = answer.sequences[0].tokens
            elif word == "reference":
                reference = service.create_reference_client()
                data = ragged_data(seed=1, count=2, vocab_size=64)
                answer = reference.forward(data, "cross_entropy").result().metrics["loss:sum"]
            elif word == "teach":
                teacher = teacher or service.create_inference_deployment_sampler(
                    DeploymentConfig(told["deployment"], told["base_model"]), tokenizer=Words()
                )
                completion = teacher.sample_with_prompt_tokens([1, 2, 3], max_tokens=4, seed=1)
                answer = asyncio.run(completion)[0].full_tokens
            elif word == "pin":
                sampler = service.create_sampling_client(told["snapshot"], pinned=True)
            elif word == "facts":
                answer = {
                    "trainer": service.managed_trainer_job_id,
                    "deployment": service.managed_deployment_id,
                    "needs_sync": service.requires_initial_sampler_sync(),
                }
            elif word == "close":
                service.close()
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        else:
            print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    _main()
