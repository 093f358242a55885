"""The scheduler: plans requests, keeps images whole, and says which lengths it expects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from tokenprune.engine.kv_cache import StagedManager, shape_of_cache
from tokenprune.engine.private_rows import MOVED_ROWS, PrivateRows
from tokenprune.engine.prompts import plan_request, prompt_layout, visual_ranges
from tokenprune.engine.reporting import Relay
from tokenprune.engine.request_table import EXPECTED_LENGTHS, Expected
from tokenprune.engine.shape import engine_shape
from tokenprune.engine.startup import check_supported, stock_scheduler, why_stock
from tokenprune.engine.waiting_budget import WaitingBudget
from tokenprune.errors import PolicyError
from tokenprune.plan import RequestPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class PruningScheduler(AsyncScheduler):
    """vLLM's scheduler with block accounting by physical length."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        """Make vLLM's own scheduler where nothing can be pruned."""
        check_supported(vllm_config)
        if why_stock(vllm_config) is not None:
            return stock_scheduler(vllm_config)(vllm_config, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shape = engine_shape(self.vllm_config)
        self._plans: dict[str, RequestPlan] = {}
        self._relay = Relay(self.vllm_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._managers = [m for m in managers if isinstance(m, StagedManager)]
        for manager in self._managers:
            manager.plans = self._plans
            manager.num_computed = self._num_computed
            manager.max_step = self.vllm_config.scheduler_config.max_num_batched_tokens
        self._private_rows = PrivateRows(self._managers, self._plans, lambda: len(self.running))
        if self.kv_cache_manager.enable_caching:
            for manager in self._managers:
                manager.private_rows = self._private_rows
        shape = self._shape = shape_of_cache(self._shape, [m.kv_cache_spec for m in managers])
        assert shape.max_num_waiting_tokens is not None
        self._waiting_budget = WaitingBudget(
            self._plans, shape.max_num_waiting_tokens, shape.max_num_batched_tokens
        )
        unsupported = shape.unsupported
        if "kv" in unsupported:
            logger.warning("KV tokens will not be evicted: %s", unsupported["kv"])
        if shape.allow_channel_pruning and "channels" in unsupported:
            logger.warning("KV channels will not be pruned: %s", unsupported["channels"])

    def _num_computed(self, request_id: str) -> int:
        return int(self.requests[request_id].num_computed_tokens)

    def add_request(self, request: Request) -> None:
        """Plan the request before vLLM queues it."""
        # a session that grows by streaming has no fixed prompt to plan for
        if request.request_id not in self.requests and not request.resumable:
            plan = self._plan(request)
            if plan is not None and plan.is_pruned:
                self._plans[request.request_id] = plan
        super().add_request(request)

    def _plan(self, request: Request) -> RequestPlan | None:
        params = request.sampling_params
        if params is None:
            return None
        layout = prompt_layout(request.num_prompt_tokens, visual_ranges(request.mm_features))
        try:
            return plan_request(params, layout, self._shape)
        except PolicyError as error:
            # the API refused this already; offline callers can still get here, and an
            # exception would take the engine and every other request down
            logger.warning("request %s is served unpruned: %s", request.request_id, error)
            return None

    def _handle_blocked_waiting_request(self, request: Request, *args: Any, **kwargs: Any) -> bool:
        """Pass over prompts that the worker has no room for."""
        is_ready = super()._handle_blocked_waiting_request(request, *args, **kwargs)
        return bool(is_ready and self._waiting_budget.admits(request, self.running))

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Look the prompt up, and take no more of a hit than leaves all choices the same."""
        hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        plan = self._plans.get(request.request_id)
        if plan is None:
            return hit
        blocks, num_computed, *rest = hit
        # physical lengths know whole blocks of a hit only
        longest = plan.longest_hit // self.block_size * self.block_size
        if plan.waiting_rows(request.num_prompt_tokens):
            longest = min(longest, self._num_written(blocks.blocks[0]))
        if num_computed <= longest and num_computed % self.block_size == 0:
            return hit
        longest = min(longest, num_computed // self.block_size * self.block_size)
        return self.kv_cache_manager.truncate_computed_blocks(blocks, longest), longest, *rest

    def _num_written(self, hit: Sequence[KVCacheBlock]) -> int:
        """Return the tokens of a hit whose keys are there before the coming step."""
        hashed = self._managers[0].hashed_in_step or ()
        written = takewhile(lambda block: block.block_id not in hashed, hit)
        return sum(1 for _ in written) * self.block_size

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        plan = self._plans.get(request.request_id)
        if plan is not None and plan.visual is not None:
            end = plan.visual.chunk_end(num_computed_tokens + num_new_tokens)
            # none is left where an image comes next that must wait for a step with more room
            num_new_tokens = end - num_computed_tokens
            num_new_tokens = self._waiting_budget.chunk(
                request, num_computed_tokens, num_new_tokens
            )
        result = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )
        self._waiting_budget.count(request, num_computed_tokens, result[1])
        return result

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Free what the last step emptied, schedule a step, and say which lengths are expected."""
        self._waiting_budget.begin_step()
        self._private_rows.begin_step()
        if self._managers:
            self._managers[0].hashed_in_step = set()
        for request in self.running:
            plan = self._plans.get(request.request_id)
            if plan is not None and plan.lengths.frees_blocks:
                self._private_rows.settle(request.request_id, request.num_computed_tokens)
        output = super().schedule(*args, **kwargs)
        if self._plans:
            expected = {}
            for request_id in output.num_scheduled_tokens:
                plan = self._plans.get(request_id)
                if plan is not None:
                    computed = self.requests[request_id].num_computed_tokens
                    expected[request_id] = Expected(
                        computed,
                        self._private_rows.lengths(request_id, computed),
                        tuple(len(m.req_to_blocks[request_id]) for m in self._managers),
                        self._private_rows.take_checksum(request_id),
                    )
            setattr(output, EXPECTED_LENGTHS, expected)
            setattr(output, MOVED_ROWS, self._private_rows.of_step())
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, output: Any) -> Any:
        """Take the step's result, and hand the worker's figures on."""
        outputs = super().update_from_output(scheduler_output, output)
        self._relay.hand_on(output, outputs)
        return outputs

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._plans.pop(request.request_id, None)
        self._private_rows.forget(request.request_id)
