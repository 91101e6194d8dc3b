"""Places of workers whose controller has died are freed, on a Ray without a state API: the cleaner asks its own cluster."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group

from voco.train.elastic import CleanerCallback, OwnClusterCleaner, answers

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Controller:
    """Does what Ray Train's controller does in the job of a sweep: a cleaner, then places for workers."""

    def start(self) -> str:
        self.callback = CleanerCallback()
        self.callback.after_controller_start(None)
        group = placement_group([{"CPU": 1}] * 2)
        ray.get(group.ready())
        ray.get(self.callback._cleaner.register_placement_group.remote(group))
        return str(group.id.hex())

    def stop(self) -> None:
        self.callback.before_controller_abort()


def state(group: str) -> str:
    return str(ray.util.placement_group_table()[group]["state"])


def cleaners() -> list[str]:
    actors = ray._private.state.actors().values()
    return [
        actor["ActorID"] for actor in actors if actor["ActorClassName"] == OwnClusterCleaner.__name__ and actor["State"] != "DEAD"
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_killed_controller_loses_its_places_and_a_running_one_keeps_them(ray_local: str) -> None:
    healthy, killed = Controller.remote(), Controller.remote()
    kept, freed = ray.get([healthy.start.remote(), killed.start.remote()])
    assert (state(kept), state(freed), len(cleaners())) == ("CREATED", "CREATED", 2)
    ray.kill(killed)
    wait_until(lambda: state(freed) == "REMOVED")
    wait_until(lambda: len(cleaners()) == 1)  # it ends with its work
    time.sleep(3)  # the cleaner looks once a second
    assert state(kept) == "CREATED"
    ray.get(healthy.stop.remote())
    wait_until(lambda: not cleaners())
    assert state(kept) == "CREATED"  # the places of a training that ends are the controller's to free
    ray.kill(healthy)
    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(kept))))


def test_a_living_node_answers(ray_local: str) -> None:
    (node,) = ray.nodes()
    assert answers(node["NodeManagerAddress"], node["NodeManagerPort"])
