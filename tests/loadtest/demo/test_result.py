import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from slipstream.loadtest.demo.heldout import Answer, Answers
from slipstream.loadtest.demo.plan import DemoOptions
from slipstream.loadtest.demo.result import Glance, Measured, Result, plot_result, print_result
from slipstream.loadtest.demo.watch import Watch

SVG = "{http://www.w3.org/2000/svg}"


def answers(rate, accepted, text="same"):
    return Answers([Answer(101 / rate, 101, accepted, text)] * 2)


class Admin:
    """Says one status after the other."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)

    async def status(self):
        return self.statuses.pop(0)


ROUNDS = {"published": 1, "refused": 1}


def status(live, state="live", *, route="", swaps=1, worker="training", trial=None, rounds=ROUNDS):
    version = {"version": live, "route": route, "state": state, "metrics": {}, "manifest": {"gate": {}}}
    if state == "live":
        version["metrics"] = {"trial": 1.0}
        version["manifest"] = {"gate": {"accept_length": 1.9}}
    return {
        "traffic": {"store_tokens": 5},
        "evolution": {
            "machine": {"step_seconds": {"1": 0.02, "4": 0.03}, "draft_seconds": {"1": [0.0, 0.0, 0.0]}},
            "worker": {"report": {"state": worker}, "tokens": 7, "rounds": rounds},
            "versions": [version] if live else [],
            "routes": {"": live or 1},
            "swaps": swaps,
            "trial": trial,
        },
    }


async def watched(*statuses):
    minutes = iter(range(1, 100))
    watch = Watch(Admin(*statuses), lambda: float(next(minutes)), lambda: None)
    for _ in statuses:
        await watch.look()
    return watch


async def test_a_version_is_live_once_it_serves():
    # The cold head is number 1 for the engine, and so is the first version for the registry.
    watch = await watched(status(0, swaps=0), status(1, swaps=0), status(1), status(1), status(3))
    assert [swap.version for swap in watch.swaps] == [1, 3]
    assert (watch.live, watch.kept, watch.learned, watch.rounds) == (3, 5, 7, 2)


async def test_a_trial_begins_with_the_candidate_and_ends_with_the_verdict():
    assert (await watched(status(2, "candidate"))).on_trial
    assert (await watched(status(2, "canary"))).on_trial
    assert (await watched(status(2, trial={"version": 2}))).on_trial
    assert not (await watched(status(2))).on_trial
    assert not (await watched(status(2, "rolled-back"))).on_trial
    assert not (await watched(status(0))).on_trial


async def result(tmp_path, **changes):
    fields = {
        "options": DemoOptions(folder=tmp_path, plot=tmp_path / "demo.svg", port=1),
        "minutes": 3.0,
        "before": Measured(answers(50, 0), answers(45, 0), answers(40, 0)),
        "after": Measured(answers(50, 0), answers(60, 50), answers(60, 50)),
        "offline_accept_length": 1.98,
        "watch": await watched(status(2)),
        "glances": [Glance(0.5, 1.0, 45.0), Glance(2.0, 2.0, 60.0)],
        "sent": 10,
        "failed": 0,
        "replayed_tokens": 1000,
    }
    return Result(**(fields | changes))


async def test_before_and_after_are_in_the_table(tmp_path):
    found = await result(tmp_path)
    assert found.ok
    out = io.StringIO()
    print_result(found, Console(file=out, width=120))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines()]
    assert ["accept length, chains of 3", "1.00", "2.00"] in lines
    assert ["ratio", "0.90×", "1.20×"] in lines
    assert ["live against offline", "", "+1.0%"] in lines
    assert ["live versions", "cold → 2"] in lines
    assert ["failed requests", "0 of 10"] in lines
    assert found.fields()["after"]["ratio"] == pytest.approx(1.2)
    assert found.fields()["break_even_accept_length"] == pytest.approx(1.5)
    assert "It pays here: 1.20 times" in out.getvalue()


async def test_what_went_wrong_is_no_success(tmp_path):
    assert not (await result(tmp_path, failed=1)).ok
    assert not (await result(tmp_path, watch=await watched(status(0)), offline_accept_length=None)).ok
    changed = Measured(answers(50, 0), answers(60, 50, "another"), answers(60, 50))
    other = await result(tmp_path, after=changed)
    assert (other.differing, other.ok) == (2, False)


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ({"refused": 2}, "No version passed the gate in this time: give it more --minutes."),
        ({}, "No round of training"),
    ],
)
async def test_why_no_version_is_live_is_told(tmp_path, rounds, said):
    found = await result(tmp_path, watch=await watched(status(0, rounds=rounds)), offline_accept_length=None)
    out = io.StringIO()
    print_result(found, Console(file=out, width=300))
    assert out.getvalue().splitlines()[-1].startswith(said)


async def test_the_plot_has_a_mark_for_every_swap(tmp_path):
    found = await result(tmp_path, watch=await watched(status(2), status(4)))
    plot_result(found)
    root = ElementTree.parse(found.options.plot).getroot()
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    for expected in ("accept length", "tokens per second", "minutes", "speculation off"):
        assert expected in texts
    # A version of each swap above each of the two panels, besides what the axes say.
    assert texts.count("4") >= 2
