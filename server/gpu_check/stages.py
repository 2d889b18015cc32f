"""The stages, in the order of their value."""

from dataclasses import replace
from functools import partial
from math import inf

from slipstream.server.gpu_check import attention, drafting, equality, kernels, machine, peers, real, steps, throughput
from slipstream.server.gpu_check.context import Stage

STAGES = (
    Stage("machine", "what is checked", machine.parts, 0, 60),
    Stage("kernels", "kernels against the reference", kernels.correctness, 10, 110, 40),
    Stage("equality", "the same tokens however they are computed", equality.parts, 15, 120, 60),
    Stage("speed", "kernels against what the device can do", kernels.speed, 10, 60, 40),
    Stage("attention", "backends of attention beside each other", attention.parts, 10, 60, 40),
    Stage("8B", "tokens per second, 8B shape", partial(throughput.of_shape, "8B"), 25, 110),
    Stage("steps", "what a step costs besides computing", steps.parts, 20, 60),
    Stage("memory", "memory, graphs included", steps.memory, 15, 40),
    Stage("deterministic", "what deterministic results cost", throughput.deterministic, 20, 50),
    Stage("model", "a real model, and its head", real.parts, 15, 70),
    Stage("drafter", "a head trained and swapped under load", drafting.parts, 30, 90),
    Stage("few bits", "what weights and caches of few bits bring", throughput.few_bits, 15, 60),
    Stage("peers", "other programs", peers.parts, 30, 120),
    Stage("1B", "tokens per second, 1B shape", partial(throughput.of_shape, "1B"), 15, 40),
    Stage("32B", "tokens per second, 32B shape", partial(throughput.of_shape, "32B"), 40, 90),
)
"""The first one says on what; without it there is nothing to do."""


def unhurried(stage: Stage) -> Stage:
    """Without limits of its own: those are what it takes on a GPU, and say nothing of how busy another machine is."""
    return replace(stage, least_s=0, most_s=inf, part_s=inf)
