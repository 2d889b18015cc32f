import json
from random import Random

from slipstream.loadtest.abuse import AbuseOptions, AbuseResult, Growth, Stops, make_bodies, random_body


def test_bodies_are_as_large_as_asked_for_and_the_same_every_time():
    options = AbuseOptions(megabytes=0.05, bodies=10, seed=4)
    bodies = make_bodies(options)
    assert bodies == make_bodies(options)
    assert len(bodies) == 12 + 10
    assert all(35_000 < len(body.data) <= 0.05 * 2**20 for body in bodies[:12])
    parsed = {body.kind: json.loads(body.data) for body in bodies[:10]}  # what follows is no JSON, or too much for it
    assert set(parsed["unknown null fields"].values()) == {"x", 1, None}
    assert set(parsed["ids"]["prompt"]) == {0}


def test_random_bodies_have_many_sizes():
    sizes = [len(random_body(Random(seed), 1 << 20).data) for seed in range(60)]
    assert min(sizes) < 1 << 14 and (1 << 18) < max(sizes) <= (1 << 20) + 100  # and the frame


def test_what_is_worse_than_the_bounds_is_named():
    calm, body = Stops("nothing", health_ms=500), Stops("ids", health_ms=20, stream_ms=101)
    result = AbuseResult([calm, body], [Growth("idle", 100, 180, 151)], ["refused"])
    assert result.failures(AbuseOptions()) == [
        "the stream: refused",
        "ids: others waited 101 ms",
        "idle: 51 MiB more than before",
    ]
    assert not AbuseResult([calm, Stops("ids", stream_ms=99)], [Growth("idle", 100, 180, 149)]).failures(AbuseOptions())
