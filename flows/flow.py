"""A run as a Prefect flow: one task per job, and a job whose work stood already ends as Cached.

Our markers are the only cache; Prefect shows what they say.
"""

from collections.abc import Callable
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.states import Completed

from .progress import Done, Silent
from .run import Job, Result, plainly


def as_task(job: Job, show: Silent) -> Done:
    """Does `job` inside a Prefect task of its name."""
    ended: list[Done] = []

    @task(name=job.name, task_run_name=job.name.replace("{", "{{").replace("}", "}}"), persist_result=False)
    def step() -> State[Any]:
        done = plainly(job, show)
        ended.append(done)
        return Completed(name="Cached" if done.cached else "Completed", message=done.text)

    step()
    return ended[0]


def as_flow(name: str, out: str, call: Callable[[Callable[[Job, Silent], Done]], Result]) -> Result:
    """Runs `call(as_task)` as a flow run."""
    ended: list[Result] = []

    @flow(name="gristmill", flow_run_name=f"{name} -> {out}".replace("{", "").replace("}", ""), persist_result=False)
    def grind(recipe: str, out: str) -> State[Any]:
        ended.append(call(as_task))
        return Completed(message=str(ended[0].folder.root))

    grind(recipe=name, out=out)
    EventsWorker.drain_all(timeout=10)  # the tasks' states reach the server as events; it may end after this
    return ended[0]
