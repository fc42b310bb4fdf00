"""The code of the documented API's page, literally and in its order."""

from __future__ import annotations

from typing import Any

MODEL = "accounts/fireworks/models/qwen3-8b"
TOKENIZER = "Qwen/Qwen3-8B"
TRAINER_URL = "https://<existing-trainer-url>"
BUCKET = "gs://my-bucket/adapters/run-42"

BLOCKS = {
    "import": """
from fireworks.training.sdk import FiretitanServiceClient, GradAccNormalization
""",
    "from_firetitan_config": """
service = FiretitanServiceClient.from_firetitan_config(
    api_key="<FIREWORKS_API_KEY>",
    base_url="https://api.fireworks.ai",
    base_model="accounts/fireworks/models/qwen3-8b",
    tokenizer_model="Qwen/Qwen3-8B",
    lora_rank=0,
    training_shape_id="accounts/fireworks/trainingShapes/qwen3-8b-128k-h200",
    deployment_id="research-serving",   # set create_deployment=False for trainer-only flows
    learning_rate=1e-5,
    replica_count=1,                     # deployment replicas
    cleanup_trainer_on_close=True,
    cleanup_deployment_on_close="scale_to_zero",
)

training_client = service.create_training_client(
    base_model="accounts/fireworks/models/qwen3-8b",
    lora_rank=0,
)
""",
    "resolved metadata": """
print(service.trainer_job_id)
print(service.deployment_id)
print(service.max_context_length)
print(service.reference_trainer_job_id)  # None when the reference is shared
""",
    "bare constructor": """
service = FiretitanServiceClient(
    base_url=endpoint.base_url,  # From TrainerJobManager.create_and_wait(...)
    api_key="<FIREWORKS_API_KEY>",
)
""",
    "create_training_client": """
training_client = service.create_training_client(
    base_model="accounts/fireworks/models/qwen3-8b",
    lora_rank=0,  # Must match lora_rank from job creation
)
""",
    "existing trainer": """
service = FiretitanServiceClient(
    base_url="https://<existing-trainer-url>",
    api_key="<FIREWORKS_API_KEY>",
)
training_client = service.create_training_client(
    base_model="accounts/fireworks/models/qwen3-8b",
    lora_rank=0,
)
""",
    "create_base_training_client": """
reference_client = service.create_base_training_client(base_model=base_model)
ref = reference_client.forward(datums, "cross_entropy").result()
""",
    "create_reference_client": """
reference_client = service.create_reference_client(base_model, lora_rank=0)
ref = reference_client.forward(datums, "cross_entropy").result()
""",
    "create_sampling_client": """
saved = training_client.save_weights_for_sampler("step-100").result()
sampler = service.create_sampling_client(model_path=saved.path)
""",
    "create_deployment_sampler": """
sampler = service.create_deployment_sampler(
    model_path=saved.path,
    tokenizer=tokenizer,
    concurrency_controller=controller,
)
""",
    "hotload_sampler_snapshot": """
service.hotload_sampler_snapshot(saved.path)
""",
    "forward": """
result = training_client.forward(datums, "cross_entropy").result()
logprobs = result.loss_fn_outputs[0]["logprobs"].data
""",
    "forward_backward_custom": """
def my_loss(data, logprobs_list):
    loss = compute_loss(data, logprobs_list)
    return loss, {"loss": float(loss.item())}

result = training_client.forward_backward_custom(datums, my_loss).result()
print(result.metrics)  # {"loss": 0.42}
""",
    "forward_backward_custom over embeddings": """
result = training_client.forward_backward_custom(
    datums,
    embedding_loss,
    output="embedding",
    pooling="mean",
).result()
""",
    "optim_step": """
import tinker

training_client.optim_step(
    tinker.AdamParams(
        learning_rate=1e-5,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
    )
).result()
""",
    "save_weights_for_sampler": """
saved = training_client.save_weights_for_sampler(
    "step-100",
    checkpoint_type="base",  # optional: "base" or "delta"
).result()
print(saved.path)  # Snapshot identity for create_sampling_client(model_path=...)
""",
    "save_weights_for_sampler_ext": """
result = training_client.save_weights_for_sampler_ext(
    "step-100",
    checkpoint_type="base",  # "base" for full weights, "delta" for incremental
)
print(result.snapshot_name)  # Session-qualified name for weight sync
""",
    "save_state": """
training_client.save_state("train_state_step_100").result()
""",
    "load_state_with_optimizer": """
training_client.load_state_with_optimizer("train_state_step_100").result()
""",
    "load_state": """
training_client.load_state("train_state_step_100").result()
""",
    "load_adapter": """
training_client.load_adapter("gs://my-bucket/adapters/run-42").result()
""",
    "list_checkpoints": """
checkpoint_names = training_client.list_checkpoints()
print(checkpoint_names)  # e.g. ["step-2", "step-4"]
""",
    "resolve_checkpoint_path": """
checkpoint_ref = training_client.resolve_checkpoint_path(
    "step-4",
    source_job_id="previous-job-id",
)
training_client.load_state_with_optimizer(checkpoint_ref).result()
""",
}


class Page:
    """The page's code, run block by block in one namespace, as a script of a user's would.

    Args:
        changes: Texts of the page to what stands for them here: the models' names, the places in
            angle brackets, a bucket.
    """

    def __init__(self, changes: dict[str, str]) -> None:
        self._changes = {
            "from fireworks.training.sdk import": "from firetitan_client import",
            **changes,
        }
        self.names: dict[str, Any] = {}

    def run(self, title: str, **names: Any) -> None:
        """Run a block, after giving it what the page takes as there: `datums`, `tokenizer` ..."""
        code = BLOCKS[title]
        for text, here in self._changes.items():
            code = code.replace(text, here)
        self.names.update(names)
        exec(compile(code, f"<{title}>", "exec"), self.names)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.names[name]
        except KeyError:
            raise AttributeError(name) from None
