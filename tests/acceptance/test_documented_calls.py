"""Every code block of the documented API, literally, over a real daemon and model: a test a block,
in the page's order.

Only what stands in its import, and the names of models, trainers and buckets, are this machine's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from support import documented_page
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.documented_page import BLOCKS, Page

from firetitan_client import (
    FiretitanServiceClient,
    FixedConcurrencyController,
    GradAccNormalization,
    TrainerJobConfig,
    TrainerJobManager,
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("documented") / "home")
    process.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRETITAN_ADDRESS", process.address)
        yield process
    process.stop()


@pytest.fixture(scope="module")
def base_model(tiny_llama: Path) -> str:
    return str(tiny_llama)


@pytest.fixture(scope="module")
def datums() -> list[tinker.Datum]:
    return ragged_data(seed=4, count=3)


def page_of(base_model: str, **changes: str) -> Page:
    page = Page(
        {documented_page.MODEL: base_model, documented_page.TOKENIZER: base_model, **changes}
    )
    page.run("import", base_model=base_model)
    return page


@pytest.fixture(scope="module")
def full(running: DaemonProcess, base_model: str) -> Iterator[Page]:
    """The page up to its first client: a full-parameter policy with a deployment."""
    page = page_of(base_model)
    page.run("from_firetitan_config")
    yield page
    page.service.close()


@pytest.fixture
def page(full: Page) -> Page:
    """The same, with nothing accumulated by the block before and a namespace of its own."""
    fresh = page_of(full.base_model)
    fresh.names |= full.names
    client = FiretitanServiceClient(base_url=full.service.base_url).create_training_client()
    fresh.names["training_client"] = client
    return fresh


def lora_service(base_model: str, **config: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        base_model=base_model,
        lora_rank=4,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
        **config,
    )


@pytest.fixture(scope="module")
def lora(running: DaemonProcess, base_model: str) -> Iterator[Page]:
    """The page with a LoRA policy."""
    page = page_of(base_model)
    with lora_service(base_model, create_deployment=False) as service:
        client = service.create_training_client(base_model=base_model, lora_rank=4)
        page.names |= {"service": service, "training_client": client}
        yield page


def train(page: Page, datums: Any) -> None:
    page.training_client.forward_backward(datums, "cross_entropy")
    page.training_client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()


def loss_of(client: Any, datums: Any) -> float:
    return float(client.forward(datums, "cross_entropy").result().metrics["loss:sum"])


def tokens_of(sampler: Any) -> list[int]:
    prompt = tinker.ModelInput.from_ints([72, 105])
    params = tinker.SamplingParams(max_tokens=8, temperature=0.0)
    return list(sampler.sample(prompt, 1, params).result().sequences[0].tokens)


def test_every_block_has_a_test() -> None:
    used = re.findall(r'\.run\(\s*"([^"]+)"', Path(__file__).read_text())
    assert list(dict.fromkeys(used)) == list(BLOCKS)


def test_import(full: Page) -> None:
    assert full.FiretitanServiceClient is FiretitanServiceClient
    assert full.GradAccNormalization is GradAccNormalization


def test_from_firetitan_config(full: Page, base_model: str) -> None:
    assert full.service.trainer_job_id == full.training_client.trainer_job_id
    tokenizer = full.training_client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    with pytest.raises(ValueError, match="already exists on this service"):
        full.service.create_training_client(base_model=base_model, lora_rank=0)


def test_resolved_metadata(full: Page, capsys: pytest.CaptureFixture[str]) -> None:
    full.run("resolved metadata")
    printed = capsys.readouterr().out.split()
    assert printed == [full.service.trainer_job_id, "research-serving", "256", "None"]


@pytest.fixture(scope="module")
def endpoint(running: DaemonProcess, base_model: str) -> Iterator[Any]:
    manager = TrainerJobManager()
    yield manager.create_and_wait(TrainerJobConfig(base_model, requested_job_id="by-hand"))
    manager.delete("by-hand")


def test_bare_constructor_and_create_training_client(endpoint: Any, base_model: str) -> None:
    page = page_of(base_model)
    page.run("bare constructor", endpoint=endpoint)
    page.run("create_training_client")
    assert page.training_client.trainer_job_id == "by-hand"
    with pytest.raises(ValueError, match="base_model"):
        FiretitanServiceClient(base_url=endpoint.base_url).create_training_client("another")


def test_existing_trainer(endpoint: Any, base_model: str) -> None:
    page = page_of(base_model, **{documented_page.TRAINER_URL: endpoint.base_url})
    page.run("existing trainer")
    assert page.training_client.trainer_job_id == "by-hand"


def test_create_base_training_client(lora: Page, datums: list[tinker.Datum]) -> None:
    lora.run("create_base_training_client", datums=datums)
    before = lora.ref.metrics["loss:sum"]
    train(lora, datums)
    assert loss_of(lora.reference_client, datums) == before
    assert loss_of(lora.training_client, datums) != before


def test_create_reference_client_of_a_lora_policy(lora: Page, datums: list[tinker.Datum]) -> None:
    lora.run("create_reference_client", datums=datums)
    assert lora.service.reference_trainer_job_id is None
    train(lora, datums)
    assert loss_of(lora.reference_client, datums) == lora.ref.metrics["loss:sum"]


def test_create_reference_client_of_a_full_parameter_policy(
    full: Page, page: Page, datums: list[tinker.Datum]
) -> None:
    train(page, datums)
    page.run("create_reference_client", datums=datums)
    assert full.service.reference_trainer_job_id not in (None, full.service.trainer_job_id)
    assert loss_of(page.training_client, datums) != page.ref.metrics["loss:sum"]


def test_create_sampling_client(page: Page, datums: list[tinker.Datum]) -> None:
    before = tokens_of(page.service.create_sampling_client())
    for _ in range(4):
        train(page, datums)
    page.run("create_sampling_client")
    assert tokens_of(page.sampler) != before


async def test_create_deployment_sampler(page: Page) -> None:
    saved = await page.training_client.save_weights_for_sampler("native")
    page.run(
        "create_deployment_sampler",
        saved=saved,
        tokenizer=page.training_client.get_tokenizer(),
        controller=FixedConcurrencyController(4),
    )
    sampler = await page.sampler
    completions = await sampler.sample_with_tokens(
        [{"role": "user", "content": "Hi"}], n=2, max_tokens=5, temperature=0.7
    )
    assert len(completions) == 2
    for one in completions:
        assert one.snapshot == saved.path
        assert len(one.full_tokens) == one.prompt_len + one.completion_len
        assert len(one.inference_logprobs) == len(one.sampling_logprobs) == one.completion_len


def test_hotload_sampler_snapshot(page: Page, datums: list[tinker.Datum]) -> None:
    train(page, datums)
    saved = page.training_client.save_weights_for_sampler("low-level").result()
    page.run("hotload_sampler_snapshot", saved=saved)
    answer = page.service.create_sampling_client().sample([72], 1).result()
    assert answer.snapshot == saved.path


def test_forward(page: Page, datums: list[tinker.Datum]) -> None:
    page.run("forward", datums=datums)
    assert len(page.logprobs) == datums[0].model_input.length
    assert all(value < 0 for value in page.logprobs)


def test_weight_only_datums_fail_by_name(page: Page) -> None:
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"weights": [1.0] * 3}
    )
    with pytest.raises(ValueError, match="missing required field 'target_tokens'"):
        page.training_client.forward([datum], "cross_entropy").result()


def test_forward_backward_custom(page: Page, datums: list[tinker.Datum]) -> None:
    def compute_loss(data: Any, logprobs_list: Any) -> Any:
        return -sum(row.sum() for row in logprobs_list) / len(data)

    page.run("forward_backward_custom", datums=datums, compute_loss=compute_loss)
    assert page.result.metrics["loss"] == pytest.approx(page.result.metrics["loss:sum"])
    assert page.training_client.optim_step(tinker.AdamParams()).result().metrics["grad_norm"] > 0


def test_forward_backward_custom_over_embeddings(page: Page, datums: list[tinker.Datum]) -> None:
    def embedding_loss(data: Any, embeddings: Any) -> Any:
        loss = -torch.nn.functional.cosine_similarity(embeddings[0], embeddings[-1], dim=0)
        return loss + 0 * sum(row.sum() for row in embeddings), {"loss": float(loss.item())}

    page.run(
        "forward_backward_custom over embeddings", datums=datums, embedding_loss=embedding_loss
    )
    assert -1.001 <= page.result.metrics["loss"] <= 1.001
    page.training_client.optim_step(tinker.AdamParams(learning_rate=0.0)).result()


def test_optim_step(page: Page, datums: list[tinker.Datum]) -> None:
    before = loss_of(page.training_client, datums)
    page.training_client.forward_backward(datums, "cross_entropy")
    page.run("optim_step")
    assert loss_of(page.training_client, datums) != before
    for mode in (
        GradAccNormalization.NUM_LOSS_TOKENS,
        GradAccNormalization.NUM_SEQUENCES,
        GradAccNormalization.NONE,
    ):
        page.training_client.forward_backward(datums, "cross_entropy")
        step = page.training_client.optim_step(
            tinker.AdamParams(), grad_accumulation_normalization=mode
        ).result()
        assert step.metrics["grad_norm"] > 0


def test_save_weights_for_sampler(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    page.run("save_weights_for_sampler")
    assert re.fullmatch(r"step-100(\.\d+)?-[0-9a-f]{8}\n", capsys.readouterr().out)


def test_save_weights_for_sampler_ext(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    page.run("save_weights_for_sampler_ext")
    assert capsys.readouterr().out == f"{page.result.path}\n"
    sampler = page.service.create_sampling_client(model_path=page.result.snapshot_name)
    assert sampler.sample([72], 1).result().snapshot == page.result.path


@pytest.mark.parametrize("load", ["load_state_with_optimizer", "load_state"])
def test_save_and_load_state(page: Page, datums: list[tinker.Datum], load: str) -> None:
    """With the optimizer the run goes on as if never interrupted, without it another way."""
    train(page, datums)
    page.run("save_state")
    kept = loss_of(page.training_client, datums)
    train(page, datums)
    onwards = loss_of(page.training_client, datums)
    if load == "load_state_with_optimizer":
        page.run("load_state_with_optimizer")
    else:
        page.run("load_state")
    assert loss_of(page.training_client, datums) == kept
    train(page, datums)
    again = loss_of(page.training_client, datums)
    assert (again == onwards) == (load == "load_state_with_optimizer")


def test_load_adapter(
    running: DaemonProcess, base_model: str, lora: Page, datums: list[tinker.Datum]
) -> None:
    """From a local folder; nothing is fetched from a bucket whose driver is not installed."""
    train(lora, datums)
    wanted = loss_of(lora.training_client, datums)
    saved = lora.training_client.save_weights_for_sampler("adapter").result()
    (folder,) = (running.home / "store" / "snapshots").glob(f"{saved.path}*")
    page = page_of(base_model, **{documented_page.BUCKET: str(folder)})
    with lora_service(base_model, create_deployment=False) as service:
        client = service.create_training_client()
        assert loss_of(client, datums) != wanted
        page.run("load_adapter", training_client=client)
        assert loss_of(client, datums) == pytest.approx(wanted, rel=1e-5)
        with pytest.raises(NotImplementedError, match="gcsfs"):
            client.load_adapter(documented_page.BUCKET).result()


def test_list_checkpoints_and_resolve_checkpoint_path(
    running: DaemonProcess, base_model: str
) -> None:
    page = page_of(base_model)
    with lora_service(
        base_model, trainer_job_id="previous-job-id", create_deployment=False
    ) as service:
        client = service.create_training_client(base_model=base_model, lora_rank=4)
        for name in ("step-10", "step-2", "step-4"):
            client.save_state(name)
        client.save_state("step-4", timeout=60)
        page.run("list_checkpoints", training_client=client)
    assert page.checkpoint_names == ["step-2", "step-4", "step-10"]
    with lora_service(base_model, create_deployment=False) as later:
        client = later.create_training_client(base_model=base_model, lora_rank=4)
        page.run("resolve_checkpoint_path", training_client=client)
    assert page.checkpoint_ref == "cross_job://previous-job-id/step-4"


def test_the_same_blocks_in_a_running_loop(
    running: DaemonProcess, base_model: str, datums: list[tinker.Datum]
) -> None:
    """What a script with `asyncio.run` writes, in both generations of tinker's words."""

    async def main() -> None:
        async with lora_service(base_model) as service:
            training_client = await service.create_training_client_async(base_model, 4)
            passes = [training_client.forward_backward(datums, "cross_entropy") for _ in range(40)]
            step = await training_client.optim_step_async(tinker.AdamParams(learning_rate=1e-3))
            await asyncio.gather(*passes)
            assert (await step).metrics["step"] == 1
            saved = await (await training_client.save_weights_for_sampler_async("a"))
            sampler = await service.create_sampling_client(model_path=saved.path)
            params = tinker.SamplingParams(max_tokens=4)
            prompt = tinker.ModelInput.from_ints([72])
            answers = await asyncio.gather(
                *[sampler.sample_async(prompt, 2, params) for _ in range(6)]
            )
            assert {one.snapshot for one in answers} == {saved.path}
            pinned = await training_client.save_weights_and_get_sampling_client_async("b")
            assert (await pinned.sample_async(prompt, 1, params)).snapshot.startswith("b-")

    asyncio.run(main())
