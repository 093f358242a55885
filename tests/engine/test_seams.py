"""What we override or rely on in vLLM, so that an upgrade fails here first and says where.

Nothing of ours runs: each test names one place of vLLM and what the engine room takes from it.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import pickle
import re
import typing
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
KV_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
POOL = "vllm.v1.core.block_pool:BlockPool"
RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
OUTPUT_PROCESSOR = "vllm.v1.engine.output_processor:OutputProcessor"
STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
ENCODER_CACHE = "vllm.v1.worker.gpu.mm.encoder_cache:EncoderCache"
TABLES = "vllm.v1.worker.gpu.block_table:BlockTables"
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager"
BUILDER = "vllm.v1.attention.backend:AttentionMetadataBuilder"


def load(path):
    """Return what `module:name` names, or fail with that path."""
    module, _, name = path.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"vLLM moved {module}: {error}")
    found = loaded
    for part in filter(None, name.split(".")):
        if not hasattr(found, part):
            pytest.fail(f"vLLM has no {path} any more")
        found = getattr(found, part)
    return found


def parameters(path, method):
    return list(inspect.signature(load(f"{path}.{method}")).parameters)


# methods we override or call by position: the leading parameters, `self` first
OVERRIDDEN = [
    (
        SCHEDULER,
        "_try_schedule_encoder_inputs",
        "request num_computed_tokens num_new_tokens encoder_compute_budget",
    ),
    (SCHEDULER, "_handle_blocked_waiting_request", "request"),
    (SCHEDULER, "_get_local_prefix_cache_hit", "request"),
    (SCHEDULER, "schedule", ""),
    (SCHEDULER, "add_request", "request"),
    (SCHEDULER, "_free_blocks", "request"),
    (SCHEDULER, "update_from_output", "scheduler_output model_runner_output"),
    (MANAGER, "get_num_blocks_to_allocate", "request_id num_tokens new_computed_blocks"),
    (MANAGER, "allocate_new_blocks", "request_id num_tokens"),
    (MANAGER, "cache_blocks", "request num_tokens"),
    (MANAGER, "_cache_partial_tail_block", "request"),
    (MANAGER, "pop_blocks_for_free", "request_id"),
    (KV_MANAGER, "truncate_computed_blocks", "blocks num_computed_tokens"),
    (POOL, "evict_blocks", "block_ids"),
    (POOL, "get_new_blocks", "num_blocks"),
    (POOL, "free_blocks", "ordered_blocks"),
    (RUNNER, "__init__", "vllm_config device"),
    (RUNNER, "prepare_attn", "input_batch"),
    (RUNNER, "add_requests", "scheduler_output"),
    (RUNNER, "update_requests", "scheduler_output"),
    (RUNNER, "_remove_request", "req_id"),
    (RUNNER, "execute_model", "scheduler_output"),
    (WORKER, "execute_model", "scheduler_output"),
    (WORKER, "sample_tokens", "grammar_output"),
    (OUTPUT_PROCESSOR, "update_scheduler_stats", "scheduler_stats"),
    (RUNNER, "get_kv_cache_spec", ""),
    (RUNNER, "load_model", ""),
    (RUNNER, "profile_run", ""),
    (RUNNER, "initialize_kv_cache", ""),
    (STATE, "__init__", "vllm_config model encoder_cache device"),
    (STATE, "initialize_kv_cache", "kv_cache_config block_tables"),
    (
        STATE,
        "prepare_attn",
        "input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config "
        "for_capture",
    ),
    (STATE, "prepare_inputs_embeds", "scheduled_encoder_inputs input_batch req_states"),
    (ENCODER_CACHE, "__init__", ""),
    (ENCODER_CACHE, "reset_encoder_cache", ""),
    (ENCODER_CACHE, "free_encoder_cache", "mm_hash"),
    (TABLES, "gather_block_tables", "idx_mapping"),
    (TABLES, "compute_slot_mappings", "idx_mapping query_start_loc positions"),
    (GRAPHS, "dispatch", "num_reqs num_tokens"),
    (BUILDER, "update_block_table", "metadata blk_table slot_mapping"),
    (WORKER, "_make_model_runner", ""),
]


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    OVERRIDDEN,
    ids=[f"{p.split(':')[1]}.{m}" for p, m, _ in OVERRIDDEN],
)
def test_a_method_takes_the_parameters_we_pass_on(path, method, expected):
    expected = ["self", *expected.split()]
    found = parameters(path, method)
    assert found[: len(expected)] == expected, f"{path}.{method} changed; adapt the override"


@pytest.mark.parametrize(
    ("path", "method", "keyword"),
    [
        (TABLES, "gather_block_tables", "num_reqs_padded"),
        (TABLES, "compute_slot_mappings", "num_tokens_padded"),
        (TABLES, "compute_slot_mappings", "out"),
    ],
)
def test_a_method_takes_the_keyword_we_use(path, method, keyword):
    assert keyword in parameters(path, method)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "vllm.v1.worker.gpu.input_batch:InputBatch",
            "num_reqs num_reqs_after_padding idx_mapping idx_mapping_np num_scheduled_tokens "
            "num_tokens num_tokens_after_padding query_start_loc query_start_loc_np seq_lens "
            "seq_lens_cpu_upper_bound num_computed_tokens_np positions",
        ),
        (
            "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
            "cg_mode num_tokens num_reqs num_active_loras",
        ),
        ("vllm.v1.worker.utils:AttentionGroup", "backend layer_names"),
        ("vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups"),
        ("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "layer_names kv_cache_spec"),
        ("vllm.v1.core.sched.output:NewRequestData", "req_id mm_features sampling_params"),
        (
            "vllm.v1.core.sched.output:SchedulerOutput",
            "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens",
        ),
        ("vllm.v1.core.sched.output:CachedRequestData", "req_ids num_computed_tokens"),
        (
            "vllm.v1.metrics.stats:SchedulerStats",
            "num_running_reqs num_waiting_reqs num_skipped_waiting_reqs "
            "num_kv_fetch_reqs_by_stage kv_cache_usage",
        ),
        (
            "vllm.v1.kv_cache_interface:FullAttentionSpec",
            "block_size sliding_window attention_chunk_size",
        ),
        ("vllm.forward_context:ForwardContext", "skip_compiled"),
        ("vllm.multimodal.inputs:MultiModalFeatureSpec", "modality mm_position identifier data"),
    ],
    ids=lambda value: value.split(":")[1] if ":" in value else "",
)
def test_a_dataclass_has_the_fields_we_read(path, fields):
    known = {field.name for field in dataclasses.fields(load(path))}
    assert set(fields.split()) <= known


@pytest.mark.parametrize(
    ("path", "attributes"),
    [
        ("vllm.v1.request:Request", "num_prompt_tokens resumable request_id"),
        ("vllm.v1.request:Request", "mm_features sampling_params num_computed_tokens"),
        (TABLES, "slot_mappings num_blocks block_tables block_sizes"),
        ("vllm.v1.worker.gpu.states:RequestState", "req_id_to_index prompt_len"),
        ("vllm.v1.worker.gpu.states:RequestState", "num_computed_tokens_np"),
        (RUNNER, "req_states block_tables kv_cache_config cudagraph_manager model_state"),
        (RUNNER, "max_num_reqs encoder_cache"),
        ("vllm.v1.worker.gpu.model_states.interface:ModelState", "max_num_reqs device"),
        (ENCODER_CACHE, "mm_features encoder_outputs"),
        (
            "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention",
            "num_heads scale",
        ),
        ("vllm.model_executor.models.clip:CLIPVisionModel", "vision_model"),
        ("vllm.model_executor.models.siglip:SiglipVisionModel", "vision_model"),
        ("vllm.v1.core.sched.scheduler:Scheduler", "requests running kv_cache_manager"),
        ("vllm.v1.core.sched.scheduler:Scheduler", "vllm_config"),
        ("vllm.v1.core.sched.scheduler:Scheduler", "block_size"),
        (KV_MANAGER, "coordinator enable_caching"),
        (MANAGER, "kv_cache_spec req_to_blocks block_size block_pool num_cached_block"),
        (MANAGER, "new_block_ids records_new_block_ids"),
        ("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id ref_cnt block_hash"),
        ("vllm.model_executor.layers.attention.attention:Attention", "kv_cache impl"),
    ],
)
def test_an_object_has_the_attributes_we_read(path, attributes):
    source = "".join(inspect.getsource(cls) for cls in load(path).__mro__ if cls is not object)
    missing = [
        name
        for name in attributes.split()
        if not re.search(rf"self\.{name}\b[^=\n]*=|def {name}\(|^ +{name}:", source, re.MULTILINE)
    ]
    assert not missing, f"{path} no longer sets {missing}"


@pytest.mark.parametrize(
    ("path", "attributes"),
    [
        (
            "vllm.config:ParallelConfig",
            "pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size "
            "use_ubatching worker_cls tensor_parallel_size data_parallel_index _api_process_count",
        ),
        (
            "vllm.config:SchedulerConfig",
            "max_num_batched_tokens long_prefill_token_threshold disable_hybrid_kv_cache_manager "
            "scheduler_cls",
        ),
        ("vllm.config:CacheConfig", "kv_sharing_fast_prefill cache_dtype"),
        ("vllm.config:CompilationConfig", "static_forward_context"),
        (
            "vllm.config:VllmConfig",
            "additional_config use_v2_model_runner kv_transfer_config speculative_config "
            "lora_config ec_transfer_config",
        ),
        ("vllm.config:MultiModalConfig", "enable_mm_embeds mm_encoder_tp_mode"),
        (
            "vllm.config:ModelConfig",
            "architecture hf_text_config is_multimodal_model uses_mrope get_sliding_window "
            "is_mm_prefix_lm max_model_len use_mla is_hybrid is_attention_free is_encoder_decoder "
            "hf_config multimodal_config",
        ),
    ],
    ids=lambda value: value.split(":")[1] if ":" in value else "",
)
def test_a_config_has_the_settings_we_read(path, attributes):
    config = load(path)
    known = {field.name for field in dataclasses.fields(config)} | set(dir(config))
    assert set(attributes.split()) <= known


def test_a_refused_encoder_schedule_is_told_by_five_values():
    method = load(f"{SCHEDULER}._try_schedule_encoder_inputs")
    returned = typing.get_type_hints(method)["return"]
    assert returned == tuple[list[int], int, int, list[int], list[int]]


def test_the_scheduler_stops_admission_when_no_token_can_be_scheduled():
    source = inspect.getsource(load(f"{SCHEDULER}.schedule"))
    assert source.count("self._try_schedule_encoder_inputs(") == 2, "running and waiting requests"
    waiting = source[source.rindex("self._try_schedule_encoder_inputs(") :]
    assert re.search(r"if num_new_tokens == 0:\n(?: *#.*\n)* *break", waiting)


def test_the_scheduler_counts_a_step_as_computed_before_it_returns():
    # the checksum takes `num_computed_tokens` for the length after the step
    after = inspect.getsource(load(f"{SCHEDULER}._update_after_schedule"))
    base = inspect.getsource(load("vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule"))
    assert "super()._update_after_schedule(" in after or after == base
    assert re.search(r"request\.num_computed_tokens \+= ", base)


def test_requests_finish_through_free_blocks():
    source = inspect.getsource(load("vllm.v1.core.sched.scheduler:Scheduler._free_request"))
    assert "self._free_blocks(" in source


def test_a_scheduler_output_carries_our_attribute_to_the_worker():
    output = load("vllm.v1.core.sched.output:SchedulerOutput").make_empty()
    output.tokenprune = {"r": (5, (5, 3))}
    assert pickle.loads(pickle.dumps(output)).tokenprune == {"r": (5, (5, 3))}


def test_vllms_loggers_read_only_the_stages_they_know_from_the_field_that_carries_figures():
    # `tokenprune.engine.reporting` puts a key of its own there, with the value 0
    source = inspect.getsource(load("vllm.v1.metrics.loggers:"))
    assert source.count("num_kv_fetch_reqs_by_stage") == 4, "a new reader"
    assert source.count("num_kv_fetch_reqs_by_stage.get(stage, 0)") == 1
    assert "if any(kv_fetch.values())" in source


def test_scheduler_stats_are_told_before_any_logger_and_without_one():
    source = inspect.getsource(load("vllm.v1.engine.async_llm:AsyncLLM._run_output_handler"))
    told = source.index("output_processor.update_scheduler_stats(outputs.scheduler_stats)")
    assert told < source.index("if logger_ref[0]:")


def test_a_finished_request_is_followed_by_a_step_even_if_it_was_the_last():
    # it brings the figures of the last step with tokens
    source = inspect.getsource(load("vllm.v1.core.sched.interface:SchedulerInterface.has_requests"))
    assert "self.has_unfinished_requests() or self.has_finished_requests()" in source


def test_the_admission_check_says_that_it_is_one():
    # an evicting request must fit with its highest peak then, and with one step's peak otherwise
    source = inspect.getsource(
        load("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate")
    )
    assert source.count("apply_admission_cap=apply_admission_cap") == 2


def test_a_hit_is_looked_up_once_in_one_place_when_a_request_is_admitted():
    source = inspect.getsource(load(f"{SCHEDULER}.schedule"))
    assert source.count("self._get_local_prefix_cache_hit(request)") == 1
    returned = typing.get_type_hints(load(f"{SCHEDULER}._get_local_prefix_cache_hit"))["return"]
    blocks = load("vllm.v1.core.kv_cache_manager:KVCacheBlocks")
    assert returned == tuple[blocks, int, int, bool]


def test_blocks_are_counted_then_found_ones_are_referenced_then_new_ones_allocated_then_hashed():
    source = inspect.getsource(load(f"{KV_MANAGER}.allocate_slots"))
    calls = [
        "self.coordinator.get_num_blocks_to_allocate(",
        "self.coordinator.allocate_new_computed_blocks(",
        "self.coordinator.allocate_new_blocks(",
        "self.coordinator.cache_blocks(",
    ]
    places = [source.rindex(call) for call in calls]
    assert places == sorted(places)


def test_a_preempted_request_gives_its_blocks_up_through_the_managers():
    coordinator = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
    assert "manager.free(" in inspect.getsource(load(f"{coordinator}.free"))
    assert "self.pop_blocks_for_free(" in inspect.getsource(load(f"{MANAGER}.free"))
    pool = inspect.getsource(load(f"{POOL}.free_blocks"))
    # hashed blocks join the tail of the queue, so what a row leaves can still be found
    assert "self.free_block_queue.append_n(blocks_to_evict_last)" in pool


def test_block_ids_of_running_requests_are_only_ever_appended():
    # the worker shortens its table itself, then appends where that ends
    append = inspect.getsource(load(f"{TABLES}.append_block_ids"))
    assert "start = self.num_blocks.np[i, req_index] if not overwrite else 0" in append
    update = inspect.getsource(load(f"{RUNNER}.update_requests"))
    assert "overwrite=False" in update


def test_rows_of_the_row_layouts_are_key_then_value():
    # read and not imported: the backends need a GPU's libraries
    folder = Path(importlib.util.find_spec("vllm.v1.attention.backends").origin).parent
    for name in ("flash_attn.py", "triton_attn.py"):
        assert re.search(
            r"key_cache, value_cache = kv_cache\.transpose\(1, 2\)\.split\(\s*self\.head_size",
            (folder / name).read_text(),
        ), name


def test_the_cpu_backend_writes_as_the_codec_asks_it_to():
    update = inspect.getsource(
        load("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update")
    )
    assert "kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))" in update
    assert "kv_cache.chunk(2, dim=2)" in update
    operator = load("vllm._custom_ops:cpu_attn_reshape_and_cache")
    expected = ["key", "value", "key_cache", "value_cache", "slot_mapping", "isa"]
    assert list(inspect.signature(operator).parameters)[:6] == expected


def test_attention_calls_its_implementation_as_the_one_that_packs_expects():
    # looked up at each call, with the output by name
    source = inspect.getsource(
        load("vllm.model_executor.layers.attention.attention:unified_attention_with_output")
    )
    assert "self.impl.forward(" in source
    assert "output=output" in source
    update = inspect.getsource(
        load("vllm.model_executor.layers.attention.attention:unified_kv_cache_update")
    )
    assert "attn_layer.impl.do_kv_cache_update(" in update
    expected = ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    path = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl"
    assert parameters(path, "forward")[: len(expected)] == expected
    # read and not imported: the backends need a GPU's libraries
    folder = Path(importlib.util.find_spec("vllm.v1.attention.backends").origin).parent
    for name in ("flash_attn.py", "triton_attn.py"):
        implementation = (folder / name).read_text().partition("Impl(AttentionImpl")[2]
        forward = implementation.partition("    def forward(\n")[2].partition(")")[0]
        assert re.findall(r"^ +(\w+)", forward, re.M)[: len(expected)] == expected, name


def test_new_requests_say_how_long_their_prompt_is():
    assert isinstance(load("vllm.v1.core.sched.output:NewRequestData.prompt_len"), property)


def test_a_placeholder_range_gives_inclusive_ranges_of_embeddings():
    placeholder = load("vllm.multimodal.inputs:PlaceholderRange")
    assert placeholder(3, 4).extract_embeds_range() == [(3, 6)]
    mask = torch.tensor([True, True, False, True])
    assert placeholder(3, 4, mask).extract_embeds_range() == [(3, 4), (6, 6)]


def test_the_async_scheduler_is_the_scheduler():
    assert issubclass(load(SCHEDULER), load("vllm.v1.core.sched.scheduler:Scheduler"))


def test_the_cpu_runner_is_the_v2_runner():
    cpu = load("vllm.v1.worker.cpu.model_runner:CPUModelRunner")
    assert issubclass(cpu, load(RUNNER))
    # ours comes first in the order of resolution, and must reach it through `super()`
    for name in ("prepare_attn", "add_requests", "update_requests", "execute_model"):
        assert name not in vars(cpu), f"the CPU runner now has its own {name}"


def test_the_cpu_worker_takes_its_runner_from_the_module_we_patch():
    source = inspect.getsource(load("vllm.v1.worker.cpu_worker:CPUWorker.init_device"))
    assert re.search(
        r"from vllm\.v1\.worker\.cpu\.model_runner import \(?\s*CPUModelRunner\b", source
    ), "CPUWorker.init_device imports its runner from somewhere else; the patch has no effect"


def test_the_runner_hands_our_slots_to_the_model_state_unchanged():
    source = inspect.getsource(load(f"{RUNNER}.execute_model"))
    assert "block_tables, slot_mappings = self.prepare_attn(input_batch)" in source
    between = source[source.index("self.prepare_attn(input_batch)") :]
    call = r"self\.model_state\.prepare_attn\(\s*input_batch,\s*batch_desc\.cg_mode,\s*block_tables"
    assert re.search(call + r",\s*slot_mappings,\s*attn_groups,\s*self\.kv_cache_config", between)


def test_images_that_are_encoded_already_are_not_encoded_again():
    source = inspect.getsource(
        load("vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.prepare_mm_inputs")
    )
    assert re.search(
        r"if mm_feature\.identifier in self\.encoder_cache\.encoder_outputs:\s*continue", source
    )


def test_towers_hand_queries_and_keys_to_their_attention_by_position():
    for path in ("clip:CLIPAttention", "siglip:SiglipAttention"):
        source = inspect.getsource(load(f"vllm.model_executor.models.{path}.forward"))
        assert "self.attn(query_states, key_states, value_states)" in source


def test_llava_models_pass_pixels_to_their_tower_by_position():
    for path in ("llava:Llava", "llava_next:LlavaNext", "llava_onevision:LlavaOnevision"):
        model = load(f"vllm.model_executor.models.{path}ForConditionalGeneration")
        source = inspect.getsource(model._image_pixels_to_features)
        assert re.search(r"vision_tower\(\s*pixel_values,", source), path


def test_images_are_encoded_behind_attention_metadata_and_before_the_forward_pass():
    source = inspect.getsource(load(f"{RUNNER}.execute_model"))
    calls = ["self.prepare_attn(input_batch)", "self.model_state.prepare_inputs_embeds("]
    places = [source.index(call) for call in calls]
    assert places == sorted(places)
    embeds = inspect.getsource(load(f"{STATE}.prepare_inputs_embeds"))
    assert "self.execute_mm_encoder(scheduled_encoder_inputs)" in embeds


def test_the_runner_updates_requests_before_it_prepares_attention():
    source = inspect.getsource(load(f"{RUNNER}.execute_model"))
    calls = ["self.add_requests(", "self.update_requests(", "self.prepare_attn(input_batch)"]
    places = [source.index(call) for call in calls]
    assert places == sorted(places)


def test_the_runner_asks_for_a_graph_by_position():
    source = inspect.getsource(load("vllm.v1.worker.gpu.model_runner:dispatch_cg_and_sync_dp"))
    assert re.search(r"cudagraph_manager\.dispatch\(\s*num_reqs,\s*num_tokens,", source)


def test_groups_may_have_different_numbers_of_slots():
    by_layer = load("vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer")
    group = load("vllm.v1.kv_cache_interface:KVCacheGroupSpec")
    config = load("vllm.v1.kv_cache_interface:KVCacheConfig")
    groups = [group([name], None) for name in ("a", "b")]
    slots = [torch.arange(3), torch.arange(2)]
    found = by_layer(slots, config(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups))
    assert found["a"] is slots[0]
    assert found["b"] is slots[1]


def test_slots_are_computed_from_whatever_positions_are_passed():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = load(TABLES)([4, 4], 2, 16, [4, 4], device)
    tables.append_block_ids(0, ([5, 7], [9]), overwrite=True)
    tables.append_block_ids(1, ([2], [3]), overwrite=True)
    tables.apply_staged_writes()

    def on_device(values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=device)

    out = torch.zeros_like(tables.slot_mappings)
    slots = tables.compute_slot_mappings(
        on_device([1, 0], torch.int32),
        on_device([0, 1, 4], torch.int32),
        on_device([2, 0, 3, 1]),
        num_tokens_padded=6,
        out=out,
    )
    # one row of request 1, then three of request 0, then padding
    assert slots.tolist() == [[10, 20, 23, 21, -1, -1], [14, 36, 39, 37, -1, -1]]
    assert slots.data_ptr() == out.data_ptr()
    assert not tables.slot_mappings.any()
    assert tables.num_blocks.np[:, 0].tolist() == [2, 1]


def test_padding_slots_are_not_written():
    assert load("vllm.v1.attention.backends.utils:PAD_SLOT_ID") == -1


def test_skip_compiled_is_asked_for_at_each_call():
    # set by our pre-hook inside the forward context, before the compiled call is chosen
    source = inspect.getsource(load("vllm.compilation.decorators"))
    call = source[source.index("def __call__(self") :]
    skip = call.index("get_forward_context().skip_compiled")
    assert skip < call.index("aot_compiled_fn"), "compiled code runs before skip_compiled is read"
    assert not load("vllm.forward_context:ForwardContext").__dataclass_params__.frozen


def test_an_input_batch_can_be_copied_with_changes():
    batch = load("vllm.v1.worker.gpu.input_batch:InputBatch")
    assert all(field.init for field in dataclasses.fields(batch))


# decoders whose layers we hook

MODELS = "vllm.model_executor.models"
DECODERS = [("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")]


def forward_source(path):
    """Source of `forward`, of the class that defines it."""
    return inspect.getsource(load(f"{path}.forward"))


@pytest.mark.parametrize(("module", "name"), DECODERS)
def test_a_decoder_layer_takes_positions_hidden_states_and_residual(module, name):
    found = parameters(f"{MODELS}.{module}:{name}DecoderLayer", "forward")
    assert found[:4] == ["self", "positions", "hidden_states", "residual"]
    model = forward_source(f"{MODELS}.{module}:{name}Model")
    assert re.search(r"\blayer\(\s*positions, hidden_states, residual", model) or (
        "super().forward(" in model
    )
    norm = r"self\.norm\(hidden_states, residual\)"
    assert re.search(norm, model) or "super().forward(" in model


@pytest.mark.parametrize(("module", "name"), DECODERS)
def test_a_decoder_layer_calls_attention_and_mlp_as_we_read_them(module, name):
    layer = forward_source(f"{MODELS}.{module}:{name}DecoderLayer")
    assert re.search(r"self\.self_attn\(\s*positions=positions,\s*hidden_states=", layer)
    assert re.search(r"self\.mlp\(hidden_states\)", layer)
    assert re.search(r"self\.input_layernorm\(hidden_states, residual\)", layer)
    attention = forward_source(f"{MODELS}.{module}:{name}Attention")
    assert "self.attn(q, k, v)" in attention


@pytest.mark.parametrize(
    "path",
    [
        f"{MODELS}.llava:LlavaForConditionalGeneration",
        f"{MODELS}.llava_next:LlavaNextForConditionalGeneration",
        f"{MODELS}.llava_onevision:LlavaOnevisionForConditionalGeneration",
    ],
)
def test_a_vision_language_model_gives_its_language_model(path):
    assert callable(load(f"{path}.get_language_model"))


def test_a_layer_name_gives_its_index():
    index = load(f"{MODELS}.utils:extract_layer_index")
    assert index("language_model.model.layers.17.self_attn.attn") == 17


# the doors of the plugin


def test_registry_functions_are_where_we_call_them():
    assert parameters("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry", "register") == [
        "kvcache_spec_cls",
        "manager_class",
        "uniform_type_base_spec",
    ]
    every = load("vllm.v1.core.single_type_kv_cache_manager:register_all_kvcache_specs")
    assert len(inspect.signature(every).parameters) == 1


def test_logits_processors_validate_a_request_before_the_engine_sees_it():
    for path in (
        "vllm.v1.sample.logits_processor:LogitsProcessor",
        "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor",
    ):
        assert "validate_params" in dir(load(path)), path
