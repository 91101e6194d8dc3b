"""A training that is interrupted in every way a cluster can, on really started nodes, equals one that nothing interrupts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import elastic_world
import pytest
from elastic_world import RANGE, SAVE_EVERY, World

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with elastic_world.elastic_cluster(tmp_path_factory.mktemp("elastic")) as elastic:
        elastic.add_node()
        elastic.add_node()
        elastic.wait_for_nodes(2)
        yield elastic


@pytest.fixture(scope="module")
def interrupted(elastic: World) -> tuple[World, dict[str, tuple[float, int]]]:
    """A run through every interruption: of each, when it happened and the newest saved step then."""
    driver = elastic.start("interrupted", RANGE)
    elastic.wait_for_step("interrupted", SAVE_EVERY, driver)
    events = {}
    for how in elastic_world.INTERRUPTIONS:
        saved, attempt = elastic.saved_step("interrupted"), elastic.attempt("interrupted")
        happened, driver = elastic_world.interrupt(elastic, "interrupted", how, driver)
        events[how] = (happened, saved)
        elastic.wait_for_restart("interrupted", attempt, driver)
    elastic.stop("interrupted", driver)
    return elastic, events


def test_the_loss_of_every_step_is_that_of_an_unbroken_run(interrupted: tuple[World, dict[str, tuple[float, int]]]) -> None:
    elastic, _ = interrupted
    rows = elastic.metrics("interrupted")
    driver = elastic.start("whole", 1)
    elastic.wait_for_step("whole", len(rows), driver)
    elastic.stop("whole", driver)
    expected = elastic.metrics("whole")[: len(rows)]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert [row["sample_ids_sha256"] for row in rows] == [row["sample_ids_sha256"] for row in expected]
    assert max(abs(row["loss"] - other["loss"]) for row, other in zip(rows, expected, strict=True)) < 1e-5
    assert max(row["attempt"] for row in rows) >= len(elastic_world.INTERRUPTIONS)


def test_a_drained_node_and_a_resize_lose_no_step(interrupted: tuple[World, dict[str, tuple[float, int]]]) -> None:
    """Workers that hear of it save in the same step, so the step that they continue at is the one that they saved."""
    elastic, _ = interrupted
    log = elastic.log("interrupted")
    for reason in (r"node \w+ is drained and leaves in \d+ s", "the number of workers changes"):
        match = re.search(rf"{reason}; step (\d+) is saved after .*?continues at step (\d+)/", log, re.DOTALL)
        assert match, log[-6000:]
        assert match[1] == match[2]


def test_nobody_waits_for_a_killed_driver(interrupted: tuple[World, dict[str, tuple[float, int]]]) -> None:
    """What it had reserved is free for the next driver of the run at once; Ray's own elastic policy waits for 180 s."""
    elastic, events = interrupted
    seconds, _ = elastic_world.lost_seconds(elastic.metrics("interrupted"), events["driver killed"][0])
    assert seconds < 170
