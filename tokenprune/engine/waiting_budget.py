"""Which prompts may begin, where rows of a prompt wait in the worker until it is complete.

A request takes room for its whole prompt when it begins, so no two half-done prompts can block each
other: whoever has room ends its prompt, or is preempted and gives the room back. Who finds none is
passed over and keeps its place; everybody else goes past. The worker counts nothing: it follows the
steps that are scheduled here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm.v1.request import Request

from tokenprune.plan import RequestPlan


class WaitingBudget:
    """Room of the worker's pool of waiting rows, over the calls of one `schedule()`.

    Args:
        plans: Plans of the pruned requests by id; the scheduler's own mapping.
        max_num_waiting_tokens: Rows of the pool.
        max_step: Rows that may come back in one step besides those of one request.
    """

    def __init__(
        self, plans: Mapping[str, RequestPlan], max_num_waiting_tokens: int, max_step: int
    ) -> None:
        self._plans = plans
        self._room = max_num_waiting_tokens
        self._max_step = max_step
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what was scheduled in the last step."""
        self._is_full = False
        self._returning = 0
        self._ending: set[str] = set()

    def admits(self, request: Request, running: Iterable[Request]) -> bool:
        """Return whether a request may begin beside those that run; in order of arrival."""
        own = self._rows(request)
        if own == 0:
            return True
        if not self._is_full:
            held = sum(self._rows(r) for r in running if r.request_id not in self._ending)
            self._is_full = held + own > self._room
        return not self._is_full

    def chunk(self, request: Request, num_computed: int, num_new: int) -> int:
        """Return how many of `num_new` tokens of a request a step may take.

        A prompt that waited brings its rows to the step that ends it. Where others bring theirs
        already, and all of them would be more than a step's tokens, its last one is left.
        """
        left = request.num_prompt_tokens - num_computed
        if 0 < left <= num_new and self._returning > 0:
            waiting = self._plan_rows(request, num_computed)
            if waiting > 0 and self._returning + waiting > self._max_step:
                return left - 1
        return num_new

    def count(self, request: Request, num_computed: int, num_new: int) -> None:
        """Count a chunk that was scheduled."""
        if num_computed < request.num_prompt_tokens <= num_computed + num_new:
            self._ending.add(request.request_id)
            self._returning += self._plan_rows(request, num_computed)

    def _rows(self, request: Request) -> int:
        """Return the rows that a request may come to hold until its prompt is complete."""
        if request.num_computed_tokens >= request.num_prompt_tokens:
            return 0
        return self._plan_rows(request, request.num_prompt_tokens)

    def _plan_rows(self, request: Request, num_computed: int) -> int:
        plan = self._plans.get(request.request_id)
        return 0 if plan is None else plan.waiting_rows(num_computed)
