"""The command line of the load tests: ``slipstream bench …`` or ``python -m slipstream.loadtest …``.

Every command prints tables for people and ends with one JSON line on stdout. The exit status is 1 when a request
failed or a check did not hold, 2 when the test could not be run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slipstream.loadtest.options import (
    ApiKey,
    Dataset,
    Extra,
    IgnoreEos,
    InputTokens,
    Model,
    OutputTokens,
    Seed,
    Temperature,
    Timeout,
    Url,
    WorkloadOption,
    need_aiohttp,
    server_options,
    start,
    workload_options,
)
from slipstream.loadtest.rollout_cli import rollout
from slipstream.loadtest.tenants_cli import tenants

app = typer.Typer(
    help="Load tests and side-by-side comparisons against OpenAI-compatible servers.",
    no_args_is_help=True,
    add_completion=False,  # it would be installed for "bench" alone
    pretty_exceptions_enable=False,
)
app.command()(rollout)
app.command()(tenants)


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
            server_options(url, model, api_key, extra, timeout),
            workload_options(workload, input_tokens, output_tokens, ignore_eos, temperature, seed, dataset),
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
            server_options(a, a_model, a_api_key, a_extra, timeout),
            server_options(b, b_model, b_api_key, b_extra, timeout),
            workload_options(workload, input_tokens, output_tokens, ignore_eos, temperature, seed, dataset),
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
            server_options(url, model, api_key, extra, timeout),
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
            server_options(url, model, api_key, extra, timeout),
            server_options(whole_url, model, api_key, extra, timeout) if whole_url else None,
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
    start(lambda: run_abuse(server_options(url, model, api_key, extra, timeout), options))


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
            server_options(url, model, api_key, extra, timeout),
            PrefixOptions(prefix_tokens=prefix_tokens, rounds=rounds, seed=seed, dataset=dataset),
        )
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def peer(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="vllm, llama or openvino.")],
    model: Annotated[
        Path, typer.Option(help="A Hugging Face folder (vllm), GGUF file (llama), exported folder (openvino).")
    ],
    venv: Annotated[Path, typer.Option(help="Virtual environment of the peer; scripts/install-peers.sh makes one.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8001,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt plus output.")] = 4096,
    dtype: Annotated[str, typer.Option(help="vllm: type of weights and cache.")] = "bfloat16",
    ngram: Annotated[int, typer.Option(min=0, help="vllm: n-gram speculation with this many tokens.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="llama: requests that run at the same time.")] = 8,
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
                slots=slots,
                arguments=tuple(context.args),
            ),
            ready_timeout,
        )
    )
