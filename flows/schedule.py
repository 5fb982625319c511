"""A recipe on a schedule: a served Prefect deployment whose every run is a new release that measures only new rows.

OUT/20250131T020000Z/ is one release; OUT/cache holds the measures and new models that all releases share.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.types.entrypoint import EntrypointType

from ..curation.folder import HouseError
from .flow import as_task
from .progress import Done, Silent, duration
from .recipe import Recipe, dump, load_text
from .run import run
from .server import prefect_server


class Logged(Silent):
    """Shows each finished job in the flow run's log."""

    def finish(self, name: str, done: Done, seconds: float) -> None:
        super().finish(name, done, seconds)
        get_run_logger().info("%s: %s (%s)", name, done.text, "cached" if done.cached else duration(seconds))


@flow(name="gristmill release", persist_result=False)
def release(recipe: str, out: str) -> State[None]:
    """One release: `recipe` (resolved YAML) into a new folder of `out`."""
    home = Path(out) / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    before = sorted(path.parent.name for path in Path(out).glob("[!.]*/run.json"))
    previous = before[-1] if before else None
    run(load_text(recipe), home, cache=Path(out) / "cache", previous=previous, show=Logged(), each=as_task)
    return Completed(message=str(home))


def serve(recipe: Recipe, cron: str, out: Path) -> None:
    """Serves the deployment until interrupted. A second run waits until the one before has ended."""
    _check_cron(cron)
    with prefect_server(services=True) as url:
        os.environ["PREFECT_API_URL"] = url  # for the processes of the runs
        print(f"Prefect's UI: {url.removesuffix('/api')}", flush=True)
        print(f"{recipe.name} runs at {cron!r} (UTC) into {out.resolve()}. Ctrl-C ends the schedule.", flush=True)
        release.serve(
            name=recipe.name,
            cron=cron,
            parameters={"recipe": dump(recipe), "out": str(out.resolve())},
            limit=1,
            print_starting_message=False,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )


def _check_cron(cron: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise HouseError(
            f"{cron!r} is no cron expression: five fields, such as '0 2 * * *' for two at night"
        ) from error
