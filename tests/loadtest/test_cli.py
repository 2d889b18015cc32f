import asyncio
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner


async def bench(*arguments):
    """Run the command; its exit status, the lines of its stdout and its stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "slipstream.loadtest", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 300)
    return process.returncode, out.decode().splitlines(), err.decode()


@pytest.mark.usefixtures("sharegpt")
async def test_run_ends_with_one_json_line_and_writes_records(serve, tmp_path):
    records = tmp_path / "records.jsonl"
    async with serve(special_tokens=1) as server:
        status, lines, _ = await bench(
            *("run", "--url", server.url, "--workload", "fixed", "--input-tokens", "40", "--num-prompts", "6"),
            *("--rate", "inf", "--output-tokens", "5", "--warmup", "2", "--records", str(records)),
        )
    assert status == 0
    result = json.loads(lines[-1])
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 30
    assert result["total_input_tokens"] == 240
    assert result["arrivals"] == "all at once"
    assert result["workload"]["lengths"] == "exact"
    assert not any(line.startswith("{") for line in lines[:-1])
    assert len(server.bodies) == 1 + 2 + 6
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(rows) == 6
    assert all(len(row["chunk_times"]) == 5 and row["finish_reasons"] == ["length"] for row in rows)
    assert min(row["start"] for row in rows) == 0


@pytest.mark.usefixtures("sharegpt")
async def test_failed_requests_set_the_exit_status(serve):
    async with serve() as server:
        server.on_request = lambda: setattr(server, "fault", "error" if len(server.bodies) == 3 else "")
        status, lines, _ = await bench("run", "--url", server.url, "--num-prompts", "4", "--output-tokens", "3")
    assert status == 1
    assert json.loads(lines[-1])["failed"] == 1


@pytest.mark.usefixtures("sharegpt")
async def test_compare_soak_stall_and_prefix_end_with_a_json_line(serve):
    async with serve(pace=0.003) as server, serve(pace=0.003) as other:
        commands = [
            (
                *("compare", "--a", server.url, "--b", other.url, "--concurrency", "2", "--rounds", "1"),
                *("--warmup-rounds", "0", "--output-tokens", "4", "--a-extra", '{"top_p": 0.5}'),
            ),
            ("soak", "--url", server.url, "--requests", "20", "--concurrency", "4", "--max-output-tokens", "8"),
            ("stall", "--url", server.url, "--rounds", "1", "--streams", "2", "--long-tokens", "50", "--window", "0.2"),
            ("prefix", "--url", server.url, "--rounds", "2", "--prefix-tokens", "50"),
        ]
        results = [await bench(*command) for command in commands]
    assert [status for status, _, _ in results] == [0, 0, 0, 0]
    comparison, soaked, stalled, prefixed = (json.loads(lines[-1]) for _, lines, _ in results)
    assert comparison["results"][0]["completed_a"] == 4
    assert comparison["a"]["extra"] == {"top_p": 0.5}
    assert {body.get("top_p") for body in server.bodies[1:5]} == {0.5}
    assert {body.get("top_p") for body in other.bodies} == {None}
    assert soaked["problems"] == []
    assert stalled["long_tokens"] >= 50
    assert prefixed["ratio"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--workload", "shakespeare"], "unknown workload"),
        (["run", "--rate", "0"], "rate must be above 0"),
        (["run", "--rate", "2", "--concurrency", "2"], "not both"),
        (["run", "--extra", "[1]"], "JSON object"),
        (["run", "--input-tokens", "9"], "no meaning"),
        (["compare", "--a", "x", "--b", "y", "--concurrency", "1,two"], "separated by commas"),
        (["compare", "--a", "x", "--b", "y", "--rounds", "0"], "at least 1"),
        (["soak", "--pid", "9999999"], "no process"),
        (["peer", "vllm", "--model", "nowhere", "--venv", "nowhere"], "no such model"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_sent(arguments, message):
    from slipstream.loadtest.cli import app

    result = CliRunner().invoke(app, arguments, terminal_width=200)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["run", "--dataset", "nowhere.json"], "nowhere.json"),
    ],
)
async def test_what_the_user_can_mend_is_told_without_a_traceback(serve, arguments, message):
    async with serve() as server:
        url = [] if "--url" in arguments else ["--url", server.url]
        status, _, err = await bench(*arguments, *url)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_no_completion_is_offered_of_a_part_of_a_command():
    from slipstream.loadtest.cli import app

    assert "completion" not in CliRunner().invoke(app, ["--help"]).output


def test_the_command_line_starts_without_heavy_modules():
    heavy = ("aiohttp", "numpy", "torch", "locust")
    code = f"import sys, slipstream.loadtest.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "[]"
