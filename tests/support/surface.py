"""The documented API, literally: every class, call, default, field and alias, written by hand.

`test_compatibility.py` holds `firetitan_client` and docs/compatibility.md against it. Each entry is
a call with its arguments, a field with its default, or a bare name; `+async` adds a call's twin.
"""

from __future__ import annotations

import re

CLASSES = {
    "FiretitanServiceClient": """
        FiretitanServiceClient(base_url=None, api_key=None, default_headers=None,
            user_metadata=None, project_id=None, *, address=None, trainer_job_id=None,
            autostart=None, credentials=None)
        from_firetitan_config(*, api_key=None, managed_config=None, base_url=None,
            inference_url=None, hotload_api_url=None, additional_headers=None, verify_ssl=None,
            user_metadata=None, project_id=None, address=None, autostart=None,
            credentials=None, **managed_config_kwargs)
        create_training_client(base_model=None, lora_rank=None, seed=None, train_mlp=None,
            train_attn=None, train_unembed=None, lora_alpha=<as configured>, user_metadata=None,
            projection_head_dim=None, lora_init_method=None, *, session=None) +async
        create_lora_training_client(base_model=None, rank=None, seed=None, train_mlp=None,
            train_attn=None, train_unembed=None, user_metadata=None, alpha=<as configured>, *,
            optimizer=None) +async
        create_training_client_from_state(path=None, user_metadata=None,
            weights_access_token=None, *, name=None, base_model=None, optimizer=None) +async
        create_training_client_from_state_with_optimizer(path=None, user_metadata=None,
            weights_access_token=None, *, name=None, base_model=None) +async
        create_base_training_client(base_model=None, user_metadata=None) +async
        create_reference_client(base_model=None, lora_rank=None, user_metadata=None, *,
            policy_client=None) +async
        create_sampling_client(model_path=None, base_model=None, retry_config=None,
            deployment_sampler=None, *, tokenizer=None, concurrency_controller=None,
            training_client=None, pinned=False, record_stability_info=False) +async
        create_deployment_sampler(model_path=None, tokenizer=None,
            concurrency_controller=None) +async
        create_deployment_sampler_for_model(model, *, tokenizer=None,
            concurrency_controller=None, inference_url=None)
        create_inference_deployment_sampler(deployment_config, *, timeout_s=5400,
            cleanup_on_close=None, tokenizer=None, concurrency_controller=None)
        hotload_sampler_snapshot(model_path) +async
        requires_initial_sampler_sync()
        list_checkpoints(job_id, *, page_size=200)
        promote_checkpoint(job_id=None, checkpoint_id=None, output_model_id=None,
            base_model=None, *, name=None, hot_load_deployment_id=None)
        release_references()
        close(status='success', detail=None)
        create_custom_loss(fn, input_ranks)
        copy_weights(*_, **__)
        get_console_url()
        create_rest_client()
        get_server_capabilities() +async
        get_telemetry()
        trainer_job_id, managed_trainer_job_id, deployment_id, managed_deployment_id,
        max_context_length, managed_max_context_length, deployment_shape, managed_deployment_shape,
        reference_trainer_job_id, reference_client_job_id, training_profile, accelerator_type,
        accelerator_count, training_session_id, training_session_name, base_url, config, stubs,
        holder
    """,
    "FiretitanTrainingClient": """
        forward(data, loss_fn, loss_fn_config=None) +async
        forward_backward(data, loss_fn, loss_fn_config=None) +async
        forward_backward_custom(data, loss_fn, *, loss_type_input='logprobs', output='logprobs',
            pooling='mean', precomputed_forward=None) +async
        forward_backward_contrastive(data, *, num_queries, temperature, pooling='last',
            num_extra_negatives=0) +async
        optim_step(adam_params=None, grad_accumulation_normalization=None,
            emit_grad_norm_metrics=None, *, optim_params=None) +async
        save_weights_for_sampler(name, ttl_seconds=None, checkpoint_type=None,
            export_precision=None, *, user_metadata=None) +async
        save_weights_for_sampler_ext(name, checkpoint_type=None, ttl_seconds=None,
            export_precision=None)
        save_weights_and_get_sampling_client(name=None, retry_config=None,
            record_stability_info=False, kind='snapshot') +async
        save_weights_and_get_sampling_client_submit(name=None, retry_config=None,
            record_stability_info=False, kind='snapshot')
        save_weights_external(*_, **__) +async
        get_console_url()
        save_state(name, ttl_seconds=None, timeout=None, *, overwrite=True,
            user_metadata=None) +async
        load_state(path=None, weights_access_token=None, *, name=None) +async
        load_state_with_optimizer(path=None, weights_access_token=None, *, name=None) +async
        load_adapter(adapter_path) +async
        list_checkpoints()
        resolve_checkpoint_path(checkpoint_name, source_job_id=None)
        create_sampling_client(model_path, retry_config=None, **options) +async
        create_base_training_client(base_model=None, user_metadata=None) +async
        get_tokenizer()
        get_info() +async
        get_telemetry()
        unload_model() +async
        weight_sync() +async
        result(timeout=None) +async
        future()
        coroutine()
        run_id, run_name, model_id, holder, session_name, trainer_job_id, service, user_metadata
    """,
    "APIFuture": """
        result(timeout=None) +async
        exception(timeout=None)
        add_done_callback(fn)
        done()
        cancel()
        cancelled()
        future()
        coroutine()
    """,
    "FiretitanSamplingClient": """
        create(inference_url=None, model=None, api_key=None, tokenizer=None,
            concurrency_controller=None, **_)
        sample(prompt, num_samples=1, sampling_params=None, include_prompt_logprobs=False,
            topk_prompt_logprobs=0, topk_sample_logprobs=0, target_prompt_logprobs=None,
            prompt_alt_tokens_k=0, prompt_logprobs_last_n=None, *, images=None) +async
        sample_stream(prompt, num_samples=1, sampling_params=None)
        compute_logprobs(prompt, prompt_logprobs_last_n=None) +async
        get_tokenizer()
        get_base_model() +async
        get_telemetry()
        close(drain_timeout_s=3600)
        get_sampler_handle()
        from_sampler_handle(handle, *, api_key=None)
        result(timeout=None) +async
        future()
        coroutine()
        deployment_sampler
    """,
    "DeploymentSampler": """
        DeploymentSampler(inference_url=None, model=None, api_key=None, tokenizer=None,
            concurrency_controller=None, max_concurrency=None, additional_headers=None, *,
            ready=None, request_context=None)
        sample_with_tokens(messages, n=1, max_tokens=None, temperature=1.0, max_seq_len=None,
            **options)
        sample_with_prompt_tokens(prompt_token_ids, n=1, max_tokens=None, temperature=1.0,
            max_seq_len=None, stop=None, prompt_cache_key=None, **options)
        sample_with_prompt_tokens_result(prompt_token_ids, max_tokens=None, temperature=1.0,
            max_seq_len=None, stop=None, prompt_cache_key=None, **options)
        async_completions_stream(prompt, max_tokens=1024, temperature=1.0, **options)
        drain_metrics()
        close()
        result(timeout=None) +async
        future()
        coroutine()
        model, base_url, tokenizer, concurrency_controller
    """,
    "FixedConcurrencyController": """
        FixedConcurrencyController(max_concurrency)
        acquire()
        release(metrics=None)
        step_completed()
        window_size
    """,
    "AdaptiveConcurrencyController": """
        AdaptiveConcurrencyController(initial_window=8, min_window=1, max_window=256,
            prefill_queue_target=0.5, additive_increase=1.0, multiplicative_decrease=0.5,
            ema_alpha=0.3, adjustment_interval=32, shrink_cooldown_s=1.0)
        acquire()
        release(metrics=None)
        step_completed()
        window_size
    """,
    "FireworksClient": """
        FireworksClient(api_key=None, base_url=None, additional_headers=None, verify_ssl=None,
            *, address=None, autostart=None, credentials=None)
        delete_checkpoint(name)
        list_checkpoints(job_id, *, page_size=200)
        promote_checkpoint(job_id=None, checkpoint_id=None, output_model_id=None,
            base_model=None, *, name=None, hot_load_deployment_id=None)
        export_checkpoint(name, folder)
        list_models()
        delete_model(name)
        model_is_moe(model)
        resolve_training_profile(training_shape_id, *, base_model=None, **_)
        account_id, base_url
        close()
    """,
    "TrainerJobManager": """
        TrainerJobManager(api_key=None, base_url=None, additional_headers=None, verify_ssl=None,
            *, address=None, autostart=None, credentials=None)
        create(config)
        create_and_wait(config, poll_interval_s=5.0, timeout_s=900.0,
            pending_timeout_s=172800.0)
        wait_for_ready(job_id, job_name=None, poll_interval_s=5.0, timeout_s=900.0,
            pending_timeout_s=172800.0)
        wait_for_existing(job_id, poll_interval_s=5.0, timeout_s=900.0,
            pending_timeout_s=172800.0)
        resume_and_wait(job_id, poll_interval_s=5.0, timeout_s=900.0,
            pending_timeout_s=172800.0)
        reconnect_and_wait(job_id, poll_interval_s=5.0, timeout_s=600.0,
            max_wait_for_resumable_s=120.0, pending_timeout_s=172800.0)
        get(job_id)
        try_get(job_id)
        delete(job_id)
    """,
    "TrainerJobConfig": """
        validate()
        base_model, lora_rank = 0, max_context_length = None, learning_rate = 1e-05,
        gradient_accumulation_steps = None, node_count = None, trainer_replica_count = None,
        display_name = None, hot_load_deployment_id = None, region = None, custom_image_tag = None,
        extra_args = None, extra_values = None, accelerator_type = None, accelerator_count = None,
        training_shape_ref = None, forward_only = False, auto_select_training_shape = False,
        inactivity_timeout = None, disable_inactivity_cleanup = False, skip_validations = False,
        purpose = None, preemptible = False, managed_by = None, requested_job_id = None,
        use_reservation = True, reservation_target = None
    """,
    "CreatedTrainerJob": """
        job_name, job_id
    """,
    "TrainerServiceEndpoint": """
        job_name, job_id, base_url, max_context_length = None
    """,
    "DeploymentManager": """
        DeploymentManager(api_key=None, base_url=None, inference_url=None, hotload_api_url=None,
            additional_headers=None, verify_ssl=None, *, address=None, autostart=None,
            credentials=None)
        create_or_get(config, force_recreate=False)
        get(deployment_id)
        delete(deployment_id)
        scale_to_zero(deployment_id)
        update(deployment_id, body, update_mask)
        wait_for_ready(deployment_id, timeout_s=5400.0, poll_interval_s=5.0)
        reattach_trainer(deployment, *, base_model, trainer_job_name, timeout_s,
            poll_interval_s=5.0, hot_load_transition_type=None)
        hotload(deployment_id, base_model, snapshot_identity,
            incremental_snapshot_metadata=None, reset_prompt_cache=True, timeout=60, path=None,
            cmek_resource=None)
        hotload_check_status(deployment_id, base_model, timeout=30)
        wait_for_hotload(deployment_id, base_model, expected_identity, timeout_seconds=400,
            poll_interval=5)
        hotload_and_wait(deployment_id, base_model, snapshot_identity,
            incremental_snapshot_metadata=None, reset_prompt_cache=True, timeout_seconds=400,
            path=None, cmek_resource=None)
        warmup(model, max_retries=30, retry_interval_s=10.0)
        last_hotload_error_message, inference_url
    """,
    "DeploymentConfig": """
        from_training_profile(*, deployment_id, base_model, profile, **settings)
        validate()
        deployment_id, base_model, description = None, deployment_shape = None,
        expected_deployment_shape = None, region = None, min_replica_count = 0,
        max_replica_count = 1, accelerator_type = 'NVIDIA_H200_141GB',
        hot_load_bucket_type = 'FW_HOSTED', hot_load_trainer_job = None, enable_hot_load = True,
        hot_load_transition_type = None, skip_shape_validation = False,
        accept_shapeless_risk = False, disable_speculative_decoding = False, extra_args = None,
        extra_values = None, annotations = None, for_training = False, preemptible = False
    """,
    "DeploymentInfo": """
        deployment_id, name, state, hot_load_bucket_url = None, hot_load_trainer_job = None,
        hot_load_transition_type = None, deployment_shape_version = None, inference_model = None,
        base_model = None
    """,
    "WeightSyncer": """
        save_and_hotload(name, checkpoint_type=None)
        save_only(name, checkpoint_type=None)
        hotload(snapshot_name, checkpoint_type=None)
        reset_delta_chain()
        wait_for_hotload_ready(timeout_s=600, poll_interval_s=5)
        check_deployment_state()
        get_deployment_sampler(tokenizer=None)
        get_sampling_client(tokenizer=None)
        policy_client, deploy_mgr = None, deployment_id = None, base_model = '',
        hotload_timeout = 600, first_checkpoint_type = 'base', compression_format = 'arc_v2',
        reset_prompt_cache = True, lora_rank = 0, warmup_after_hotload = True,
        warmup_max_retries = 10, base_saved = False, base_identity = None, last_timing
    """,
    "TrainingShapeProfile": """
        training_shape_version, trainer_image_tag, max_supported_context_length, node_count,
        deployment_shape_version, deployment_image_tag, accelerator_type, accelerator_count,
        base_model_weight_precision, pipeline_parallelism, trainer_mode = '', deployment_shape,
        supports_lora, training_shape
    """,
    "FiretitanProvisioningConfig": """
        base_model = None, tokenizer_model = None, lora_rank = None, training_shape_id = None,
        reference_training_shape_id = None, trainer_job_id = None, reference_trainer_job_id = None,
        create_deployment = True, deployment_id = None, deployment_shape = None,
        trainer_replica_count = None, replica_count = 1, cleanup_trainer_on_close = False,
        cleanup_reference_trainer_on_close = True, cleanup_deployment_on_close = None,
        learning_rate = 1e-05, max_lora_rank = None, lora_alpha = None, seed = None,
        train_mlp = None, train_attn = None, train_unembed = None, projection_head_dim = None,
        reference_required = False, forward_only = False, max_context_length = None, region = None,
        gradient_accumulation_steps = 1, custom_image_tag = None, extra_args = None,
        extra_values = None, deployment_extra_args = None, deployment_extra_values = None,
        trainer_timeout_s = 3600.0, trainer_pending_timeout_s = 172800.0,
        deployment_timeout_s = 5400.0, hotload_timeout_s = 600.0, reattach_settle_timeout_s = 600.0,
        reattach_poll_interval_s = 5.0, inactivity_timeout = None,
        disable_inactivity_cleanup = False, hot_load_transition_type = None, display_name = None,
        purpose = None, preemptible = False, managed_by = None, skip_validations = False,
        disable_speculative_decoding = False, use_reservation = True, reservation_target = None,
        wait_for_trainer_before_deployment = False, weight_sync_transport = None,
        accelerator_type = None, accelerator_count = None, node_count = None
    """,
    "SaveSamplerResult": """
        path, snapshot_name
    """,
    "GradAccNormalization": """
        NUM_LOSS_TOKENS = 'num_loss_tokens', NUM_SEQUENCES = 'num_sequences', NONE = 'none'
    """,
    "GradNormMetricsMode": """
        OFF = 'off', BASIC = 'basic', DETAILED = 'detailed'
    """,
    "FiretitanSamplingParams": """
        max_tokens = None, seed = None, stop = None, temperature = 1.0, top_k = -1, top_p = 1.0,
        include_routing_matrix = False, top_sampling_logprobs = 0, sampling_mask = None,
        r3_ttl_seconds = None
    """,
    "SampledCompletion": """
        text, full_tokens, prompt_len, finish_reason = 'unknown', completion_len = 0,
        inference_logprobs = None, sampling_logprobs = None, logprobs_echoed = False,
        routing_matrices = None, echoed_prompt_logprob_count = 0, inference_topk_token_ids = None,
        inference_topk_logprobs = None, snapshot = '', snapshots = None
    """,
    "ServerMetrics": """
        num_concurrent_requests = None, prefill_queue_duration = None,
        generation_queue_duration = None, server_ttft = None, cached_prompt_tokens = None,
        prompt_tokens = None, server_processing_time = None, tokenizer_queue_duration = None,
        tokenizer_duration = None, prefill_duration = None, generation_duration = None,
        client_ttft = None, http_status_code = None, transport_error = False, retry_attempt = None,
        response_request_id = None, backend_host = None, deployment = None, completion_tokens = None
    """,
}
"""Class to its entries."""

FUNCTIONS = """
    compute_lr(spec, step, base_lr, total_steps=None)
    default_constant_schedule()
    has_v1_scheduler_fields(flat)
    parse_lr_scheduler_spec(data)
    normalize_lr_scheduler_spec(data=None, *, legacy_lr_schedule=None, legacy_warmup_steps=None,
        legacy_warmup_ratio=None, legacy_min_lr_ratio=None)
    validate_output_model_id(output_model_id)
    install_tinker_service_client(**managed_config_kwargs)
    patched_tinker_service_client(**managed_config_kwargs)
    restore_tinker_service_client(original)
    format_sdk_error(what, cause, solution, docs_url=None, show_support=False)
    parse_api_error(response)
    request_with_retries(func, *args, max_wait_time=300.0, **kwargs)
"""

VALUES = """
    CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE = 'delete'
    CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO = 'scale_to_zero'
    DEFAULT_CHECKSUM_FORMAT = 'alder32'
    DEFAULT_DELTA_COMPRESSION = 'arc_v2'
    DEFAULT_MERGED_BASE_EXPORT_PRECISION = 'source'
    DOCS_SDK = 'docs/api.md'
"""

EXPORTS = """
    FiretitanServiceClient FiretitanTrainingClient FiretitanSamplingClient FiretitanSamplingParams
    FiretitanSampleResponse FiretitanSampledSequence SaveSamplerResult GradAccNormalization
    GradNormMetricsMode FiretitanProvisioningConfig TrainingAPIError TrainerJobConfig
    CreatedTrainerJob TrainerJobManager TrainerServiceEndpoint CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE
    CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO DeploymentCleanupOnClose DEFAULT_CHECKSUM_FORMAT
    DEFAULT_DELTA_COMPRESSION DeploymentInfo DeploymentConfig DeploymentManager ServerMetrics
    DeploymentSampler SampledCompletion SamplingRequestError DeploymentSamplerTimeoutError
    SamplingConcurrencyController AdaptiveConcurrencyController FixedConcurrencyController
    install_tinker_service_client patched_tinker_service_client restore_tinker_service_client
    WSDSchedule CosineSchedule LinearSchedule ConstantSchedule LRSchedulerSpec compute_lr
    has_v1_scheduler_fields parse_lr_scheduler_spec default_constant_schedule
    normalize_lr_scheduler_spec WeightSyncer DEFAULT_MERGED_BASE_EXPORT_PRECISION ExportPrecision
    FireworksClient TrainingShapeProfile validate_output_model_id
""".split()
"""Names of `fireworks.training.sdk`."""

ALIASES = {
    "model_name": "base_model",
    "training_shape": "training_shape_id",
    "training_shape_ref": "training_shape_id",
    "trainer_id": "trainer_job_id",
    "deployment_replica_count": "replica_count",
}
"""Other names of settings."""

LOSSES = "cross_entropy importance_sampling ppo cispo dro dapo gspo dppo reinforce".split()
CHECKPOINT_KINDS = """
    CHECKPOINT_TYPE_TRAINING CHECKPOINT_TYPE_TRAINING_LORA CHECKPOINT_TYPE_INFERENCE_LORA
    CHECKPOINT_TYPE_INFERENCE_BASE CHECKPOINT_TYPE_INFERENCE_ARC_V2
""".split()
SCHEDULES = "ConstantSchedule LinearSchedule CosineSchedule WSDSchedule LRSchedulerSpec".split()
CODES = """
    INVALID_ARGUMENT NOT_FOUND ALREADY_EXISTS FAILED_PRECONDITION UNIMPLEMENTED DEADLINE_EXCEEDED
    UNAVAILABLE DATA_LOSS RESOURCE_EXHAUSTED
""".split()
"""gRPC codes with an exception of Python's each."""
DIFFERENCES = [f"C{number}" for number in range(1, 9)]


def entries(text: str) -> list[str]:
    """The calls, fields and bare names of a table above."""
    joined = re.sub(r"\s*\n\s*", "\n", text.strip())
    found: list[str] = []
    for line in joined.split("\n"):
        if found and found[-1].count("(") > found[-1].count(")"):
            found[-1] += f" {line}"
        elif "(" in line:
            found.append(line)
        else:
            found += [one for one in re.split(r",\s*", line) if one]
    return found


def calls(text: str) -> dict[str, str]:
    """Call to its signature; a twin has its call's."""
    found = {}
    for entry in entries(text):
        match = re.fullmatch(r"(\w+)(\(.*\))( \+async)?", entry)
        if match is not None:
            name, signature, twin = match.groups()
            found[name] = signature
            if twin:
                found[f"{name}_async"] = signature
    return found


def fields(text: str) -> dict[str, str]:
    """Field to its default as it is written."""
    pairs = (entry.partition(" = ") for entry in entries(text) if "(" not in entry)
    return {name: default for name, equals, default in pairs if equals}


def names(text: str) -> list[str]:
    """Every name of a table, twins too."""
    bare = [entry.partition(" = ")[0] for entry in entries(text) if "(" not in entry]
    return [*calls(text), *bare]
