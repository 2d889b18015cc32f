"""What holds for every test: how properties are drawn, how many threads torch takes, and which files go first."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# Before torch is imported. The models of tests are not worth a second thread, and on a busy machine two that wait for
# each other are far slower than one. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/proc/driver/nvidia").exists():  # kernels for GPUs run on the CPU then, in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests start hundreds of processes, and every one would compile the same modules again, for a third of a second each.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# No property judges the machine: an example may take as long as it takes, also to draw. Always the same examples, so
# that what was green is green again; `make test-slow` draws new ones, as does --hypothesis-profile=anew.
settings.register_profile(
    "fixed", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=True
)
settings.register_profile("anew", settings.get_profile("fixed"), derandomize=False)
settings.load_profile("fixed")
constants_of_modules = providers._get_local_constants


def constants() -> providers.Constants:
    """Some examples are made of constants of our modules: of those that are imported by then, which is another matter
    in each order of files. So only new examples are.
    """
    return providers.Constants() if settings.default.derandomize else constants_of_modules()  # type: ignore[union-attr]


providers._get_local_constants = constants


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Engines in this process compute with one thread, too, unless they are told how many, as servers in processes of
    their own are not: torch's threads spin while they wait for each other, and there are as many processes as cores.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slipstream.engine.models.loader.usable_cores", lambda: 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def _little_to_look_through() -> None:
    """What is there when a file's tests begin stays to the end, as what was there before all of them.

    An engine that sleeps or takes other weights collects garbage, which took half a second each time.
    """
    gc.collect()
    gc.freeze()


LONG_FILES = (
    "drafter/training/test_worker.py",
    "server/gpu_check/test_dry_run.py",
    "kernels/triton/test_compiled.py",
    "server/rollout/test_control.py",
    "server/rollout/test_pauses.py",
    "server/batch/test_batches.py",
    "server/batch/test_kills.py",
    "engine/speculation/test_every_form.py",
    "server/test_lifecycle.py",
    "engine/test_triton_engine.py",
    "server/gpu_check/test_run.py",
    "engine/test_greedy.py",
    "server/test_structured.py",
    "server/preparing/test_text_work.py",
    "engine/speculation/test_law.py",
    "server/commands/test_cli.py",
    "kernels/triton/test_attention.py",
    "kernels/triton/test_stack.py",
    "server/evolution/test_trials.py",
    "server/text/test_tokenizer.py",
    "engine/test_quantize.py",
    "drafter/test_swap.py",
    "engine/speculation/test_lossless.py",
    "server/rollout/test_dead_trainers.py",
    "kernels/triton/test_stack_adapters.py",
    "server/vllm/test_weights.py",
    "engine/test_quantised_models.py",
    "drafter/training/test_device.py",
    "server/sglang/test_slime.py",
    "server/tools/test_families.py",
    "server/admin/test_admin_api.py",
    "server/rollout/test_lost_parts.py",
    "server/test_traffic.py",
    "server/test_adapters.py",
    "drafter/training/test_trainer.py",
    "engine/target/test_update.py",
    "server/evolution/test_engine_deaths.py",
    "server/admin/test_dashboard.py",
    "engine/speculation/test_pipeline.py",
    "drafter/training/test_curriculum.py",
    "server/vllm/test_control.py",
    "server/commands/test_training.py",
    "loadtest/test_tenants.py",
    "server/test_swap.py",
)
"""Files that take ten seconds of a processor and more, or wait for long. One that began last would keep one process
busy while the others have ended.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in that order; it counts with ``--dist loadfile --no-loadscope-reorder``."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """What is there by now stays to the end, so no collection of garbage has to look through it."""
    gc.collect()
    gc.freeze()
