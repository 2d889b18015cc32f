import pytest

from slipstream.loadtest.demo.plan import EPOCHS, DemoOptions


@pytest.fixture
def given(tmp_path):
    return {"folder": tmp_path, "plot": tmp_path / "demo.svg", "port": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workload": "long"}, "--workload long"),
        ({"evolve": "off"}, "--evolve off"),
        ({"minutes": 0.5}, "--minutes 0.5"),
        ({"minutes": float("nan")}, "--minutes nan"),
        ({"minutes": float("inf")}, "--minutes inf"),
        ({"plot": "demo.pdf"}, "SVG or a PNG"),
        ({"plot": "nowhere/demo.svg"}, "no such folder"),
    ],
)
def test_impossible_options_are_refused(given, tmp_path, change, message):
    if "plot" in change:
        change = {"plot": tmp_path / change["plot"]}
    with pytest.raises(ValueError, match=message):
        DemoOptions(**(given | change))


def test_an_earlier_demo_is_not_gone_on_with(given, tmp_path):
    (tmp_path / "registry").mkdir()
    with pytest.raises(ValueError, match="would not begin anew"):
        DemoOptions(**given)


def test_both_servers_begin_with_the_head_that_was_asked_for(given, tmp_path):
    options = DemoOptions(**given, drafter="warm")
    for command in (options.serve(), options.probe(options.drafter, tmp_path)):
        assert command[command.index("--drafter") + 1] == "warm"


def test_more_time_means_more_of_everything_up_to_a_limit(given):
    plans = [DemoOptions(**given, minutes=minutes) for minutes in (1, 3, 10, 30, 100)]
    for name in ("heldout", "glance", "first_tokens", "round_tokens"):
        values = [getattr(plan, name) for plan in plans]
        assert values == sorted(values)
        assert values[0] > 0
    assert plans[-1].first_tokens == 10_000
    assert plans[-1].round_tokens == 200_000
    assert all(plan.glance <= plan.heldout for plan in plans)


def test_answers_come_early_and_are_learned_more_often_in_the_end(given):
    options = DemoOptions(**given, minutes=30)
    assert options.wanted_tokens(0) >= options.first_tokens / 0.9  # one question in ten is held out

    def epochs(learned: int) -> float:
        whole = options.round_tokens
        return (learned + min(max(learned, whole // 4), whole)) / options.wanted_tokens(learned)

    assert epochs(0) == pytest.approx(1)
    assert 1 < epochs(100_000) < epochs(300_000) < EPOCHS
    assert epochs(800_000) == epochs(2_000_000) == pytest.approx(EPOCHS)
    wanted = [options.wanted_tokens(learned) for learned in range(0, 2_000_000, 10_000)]
    assert wanted == sorted(wanted)  # what was sent is never more than what is wanted later


def test_the_server_takes_the_options(given):
    from typer.testing import CliRunner

    from slipstream.server.commands.cli import app

    options = DemoOptions(**given)
    for command in (options.serve(), options.probe("cold", given["folder"] / "probe")):
        arguments = command[command.index("serve") :]
        known = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["serve", "--help"]).output
        assert [name for name in arguments if name.startswith("--") and name not in known] == []


def test_time_is_kept_for_measuring_but_learning_gets_its_share(given):
    options = DemoOptions(**given, minutes=10)
    assert options.learning_ends(100.0, 160.0) == pytest.approx(100 + 570 - 66)
    assert options.learning_ends(100.0, 500.0) == pytest.approx(500 + 240)
