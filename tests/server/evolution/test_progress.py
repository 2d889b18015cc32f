from slipstream.server.evolution.progress import LOSSES, Progress


def told(*reports: dict) -> Progress:
    progress = Progress()
    for report in reports:
        progress.take({"state": "training"} | report)
    return progress


def test_tokens_of_several_routes_are_counted_once() -> None:
    # Each line carries the sum over all routes.
    progress = told(
        {"tokens": 100}, {"tokens": 150, "route": "tenant:a"}, {"tokens": 180}, {"tokens": 180, "state": "waiting"}
    )
    assert progress.tokens == 180


def test_what_a_restarted_worker_learns_is_added() -> None:
    progress = told({"tokens": 100}, {"state": "failed"}, {"state": "waiting"}, {"tokens": 30}, {"tokens": 140})
    assert progress.tokens == 240


def test_rounds_are_of_training_here() -> None:
    verdict = {"tokens": 100, "version": 3, "gate": {"least_ratio": 1.2}}
    progress = told(
        verdict | {"state": "published"},
        verdict | {"state": "refused"},
        verdict | {"state": "refused", "foreign": True},
    )
    assert progress.rounds == {"published": 1, "refused": 1}
    assert progress.verdict["foreign"]


def test_few_losses_are_kept_of_the_whole_time() -> None:
    progress = told(*({"loss": float(i)} for i in range(10 * LOSSES)))
    losses = [loss for _, loss in progress.losses]
    assert LOSSES / 2 <= len(losses) <= LOSSES
    assert losses == sorted(losses)
    assert losses[0] < LOSSES < 9 * LOSSES < losses[-1]
