"""The examples' own arithmetic: what is trained on, what is rewarded, what the data are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))

import distillation  # noqa: E402
import dpo  # noqa: E402
import embedding  # noqa: E402
import grpo  # noqa: E402
import sft  # noqa: E402
from data import make_chats  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def test_only_the_assistant_is_trained_on(tokenizer: object) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "ok?"},
        {"role": "assistant", "content": "no"},
    ]
    datum = sft.to_datum(tokenizer, chat)
    targets = datum.loss_fn_inputs["target_tokens"].data
    weights = datum.loss_fn_inputs["weights"].data
    trained = [token for token, weight in zip(targets, weights, strict=True) if weight]
    assert tokenizer.decode(trained) == "yes<eos>no<eos>"  # type: ignore[attr-defined]
    assert list(datum.model_input.to_ints())[1:] == list(targets[:-1])


def test_an_answer_keeps_its_logprobs_at_its_tokens() -> None:
    sequence = SimpleNamespace(tokens=[7, 8], logprobs=[-0.5, -0.25])
    datum = grpo.to_datum([1, 2, 3], sequence, advantage=2.0)
    assert list(datum.model_input.to_ints()) == [1, 2, 3, 7]
    inputs = {name: list(tensor.data) for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [2, 3, 7, 8]
    assert inputs["logprobs"] == [0.0, 0.0, -0.5, -0.25]
    assert inputs["advantages"] == [0.0, 0.0, 2.0, 2.0]


def test_an_answer_is_rewarded_where_the_teacher_finds_it_likelier() -> None:
    answer = distillation.Answer([1, 2], [7, 8], student=[-1.0, -2.0], teacher=[-0.5, -3.0])
    datum = distillation.to_datum(answer)
    inputs = {name: list(tensor.data) for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [2, 7, 8]
    assert inputs["logprobs"] == [0.0, -1.0, -2.0]
    assert inputs["advantages"] == [0.0, 0.5, -1.0]


def test_a_pair_has_one_fact_in_two_manners(tokenizer: object) -> None:
    chat = sft.read_chats(EXAMPLES / "data" / "chats.jsonl")[0]
    pair = dpo.to_pair(tokenizer, chat)
    texts = [
        tokenizer.decode(datum.model_input.to_ints())  # type: ignore[attr-defined]
        for datum in (pair.chosen, pair.rejected)
    ]
    fact = chat[1]["content"].removeprefix(dpo.GREETING).removesuffix(dpo.FAREWELL)
    assert all(fact in text and chat[0]["content"] in text for text in texts)
    assert [dpo.GREETING.strip() in text for text in texts] == [True, False]


def test_what_is_held_out_is_never_trained_on() -> None:
    assert not set(embedding.WARES) & set(embedding.HELD_OUT_WARES)
    assert not set(embedding.TOWNS) & set(embedding.HELD_OUT_TOWNS)


def test_the_reward_depends_on_the_question() -> None:
    answer = "The capital of Italy is Rome."
    assert grpo.reward("Italy", "Rome", f" {answer}\n") == 1.0
    assert grpo.reward("France", "Paris", answer) == 0.0
    assert 0 < grpo.reward("Italy", "Rome", "It is rome, of course") < 1.0
    assert not set(grpo.CAPITALS) & set(grpo.HELD_OUT)


def test_the_data_are_what_the_script_writes() -> None:
    for name, facts in (
        ("chats.jsonl", make_chats.FACTS),
        ("heldout.jsonl", make_chats.HELD_OUT_FACTS),
    ):
        written = [json.loads(line) for line in (EXAMPLES / "data" / name).read_text().splitlines()]
        assert written == [{"messages": chat} for chat in make_chats.conversations(facts, 0)]
    assert not set(make_chats.FACTS) & set(make_chats.HELD_OUT_FACTS)
