"""The load process: reads a LoadPlan from standard input, writes one RequestSample a line as requests finish.

Locust replaces the blocking calls of the process that imports it, so it gets a process of its own.
"""

import locust.env  # isort: skip  # first: patches the standard library

import logging
import sys
import time
from collections import deque
from typing import Any, ClassVar

from benchmarks.load.locust_user import CompletionUser
from benchmarks.load.measurements import LoadPlan, RequestSample

WARMUP_TOKENS = 4
IDLE_S = 1.0
"""Before each level: an idle server gives memory back, so that a level's memory is what that level needs."""


def run_level(plan: LoadPlan, users: int, requests: int, tokens: int, *, recorded: bool) -> None:
    """Let `users` concurrent users send `requests` requests in all, and return when the last one is answered."""

    class LevelUser(CompletionUser):
        prompts: ClassVar[deque[list[int]]] = deque(plan.prompts[i % len(plan.prompts)] for i in range(requests))
        concurrency = users
        output_tokens = tokens

    LevelUser.plan = plan

    def write(sample: RequestSample, **_: Any) -> None:
        print(sample.model_dump_json(), flush=True)

    environment = locust.env.Environment(user_classes=[LevelUser])
    if recorded:
        environment.events.request.add_listener(write)
    runner = environment.create_local_runner()
    runner.start(users, spawn_rate=users)
    if runner.spawning_greenlet is not None:
        runner.spawning_greenlet.join()
    runner.user_greenlets.join()
    runner.quit()


def main() -> None:
    logging.getLogger("locust").setLevel(logging.ERROR)
    plan = LoadPlan.model_validate_json(sys.stdin.read())
    run_level(plan, plan.warmup_users, plan.warmup_users, min(WARMUP_TOKENS, plan.output_tokens), recorded=False)
    for users, requests in plan.requests.items():
        time.sleep(IDLE_S)
        run_level(plan, users, requests, plan.output_tokens, recorded=True)


if __name__ == "__main__":
    main()
