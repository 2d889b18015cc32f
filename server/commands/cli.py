"""The command line. Options come from the fields of the configuration classes: one source of defaults and help."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from slipstream.drafter.registry.states import RegistryError
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.engine.early import EarlyProcess
from slipstream.engine.errors import ConfigError, EngineLostError, ModelError, SlipstreamError
from slipstream.server import ENGINE_PROCESS
from slipstream.server.commands.chat import chat
from slipstream.server.commands.doctor import doctor
from slipstream.server.commands.drafter import drafter_app
from slipstream.server.commands.keys import app as keys_app
from slipstream.server.commands.traffic import app as traffic_app
from slipstream.server.commands.training import evaluate_head, train
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.gpu_check.cli import gpu_check
from slipstream.server.version import described

USER_ERROR = 2
ENGINE_LOST = 3
"""Status of a server whose engine died and could not be replaced."""
UsageError: Any = typer.BadParameter.__base__
"""What wrong options raise; typer exports only this subclass."""

app = typer.Typer(
    help="An LLM inference server that gets faster on the traffic it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(drafter_app, name="drafter")
app.add_typer(traffic_app, name="traffic")
app.add_typer(keys_app, name="keys")
drafter_app.command()(train)
drafter_app.command("eval")(evaluate_head)
app.command()(gpu_check)
app.command()(chat)
app.command()(doctor)
ConfigType = TypeVar("ConfigType")


def with_options(*configs: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every field of the configuration classes, and an environment variable."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.kind is not each.VAR_KEYWORD]
        parameters += [parameter(config, field) for config in configs for field in dataclasses.fields(config)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def number(value: float) -> float:
    """Checks an option: NaN is neither more nor less than anything, so it would be within any bounds."""
    if math.isnan(value):
        raise typer.BadParameter("it is no number")
    return value


def text(value: str | None) -> str | None:
    """Checks an option: a folder without a name would be the one in which the server was started."""
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty; leave the option out")
    return value


def parameter(config: type[Any], field: dataclasses.Field[Any]) -> inspect.Parameter:
    kind = typing.get_type_hints(config)[field.name]
    default: Any = field.default
    if typing.get_origin(kind) is tuple:
        kind, default = list[str], list(default)
    checks: dict[Any, Any] = {float: number, str: text, str | None: text}
    flag = field.name.replace("_", "-")
    names = (f"--{flag}/--no-{flag}",) if kind is bool else (f"--{flag}",)
    panel = config.__name__.removesuffix("Config")
    option = typer.Option(
        *names,
        callback=checks.get(kind) if default != "" else None,
        help=field.metadata["help"],
        envvar=f"SLIPSTREAM_{field.name.upper()}",
        show_envvar=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def build(config: type[ConfigType], values: dict[str, Any]) -> ConfigType:
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    chosen = {name: values[name] for name in names}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


@app.command()
@with_options(ServerConfig, EngineConfig, TrafficConfig, EvolutionConfig)
def serve(context: typer.Context, **values: Any) -> None:
    """Serve a model over HTTP, with the OpenAI API.

    Every option can also be set in the environment: --max-running as SLIPSTREAM_MAX_RUNNING.
    """
    check_doors()
    server, engine = build(ServerConfig, values), build(EngineConfig, values)
    traffic, evolution = build(TrafficConfig, values), build(EvolutionConfig, values)
    with context.obj or EarlyProcess(ENGINE_PROCESS) as early:  # both processes import at the same time what they need
        from slipstream.server.launch import run  # not needed, and slow, for the other commands

        run(server, engine, traffic, evolution, early)


@app.command()
def version() -> None:
    """Show the version, and the commit it was built of."""
    print(described())


def show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None: ...


OF_ANOTHER_ROOM: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""Settings of commands whose options only the module knows that is imported to run them."""


@app.command(**OF_ANOTHER_ROOM)
def demo(context: typer.Context) -> Any:
    """Watch a server learn: starts one, by default with a cold drafter, replays prompts, measures before and after."""
    from slipstream.loadtest.demo.cli import app as demo_app

    return demo_app(args=context.args, prog_name="slipstream demo", standalone_mode=False)


@app.command(**OF_ANOTHER_ROOM)
def bench(context: typer.Context) -> None:
    """Load a server and compare servers; 'slipstream bench --help' shows how."""
    try:
        from slipstream.loadtest.cli import app as loadtest_app
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the load test needs {error.name}, which is not installed: pip install 'slipstream[bench]'"
        ) from None
    loadtest_app(args=context.args, prog_name="slipstream bench")


def main(early: EarlyProcess | None = None) -> None:
    """Errors of the user are one line and exit code 2; others are a traceback, or one line if their cause is known.

    ``early`` is for the engine of a server, if it was started already.
    """
    try:
        check_texts()
        forget_service_links()
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="slipstream", standalone_mode=False, obj=early))
    except UsageError as error:
        said = error.format_message().replace("Value error, ", "")  # pydantic's word, not the user's
        # As other servers have it: serve MODEL.
        serving = error.ctx is not None and error.ctx.info_name == "serve"
        hint = "; the model is an option here: --model" if serving and "unexpected extra argument" in said else ""
        fail(said + hint, USER_ERROR)
    except (ConfigError, ModelError, RegistryError) as error:
        fail(str(error), USER_ERROR)
    except EngineLostError as error:
        fail(str(error), ENGINE_LOST)
    except SlipstreamError as error:
        fail(str(error), 1)
    except OSError as error:
        # Paths come from options only, so what the operating system will not have of one is the user's to mend.
        if error.filename is None:
            fail(str(error), 1)
        fail(f"{os.fsdecode(error.filename)}: {error.strerror}", USER_ERROR)


def check_texts() -> None:
    """Raises ConfigError for an option that is no text: what it names could not be shown, sent or kept."""
    options = {f"argument {number}": value for number, value in enumerate(sys.argv[1:], 1)}
    options |= {name: value for name, value in os.environ.items() if name.startswith("SLIPSTREAM_")}
    for name, value in options.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{name}: {value!a} is not UTF-8") from None


def check_doors() -> None:
    """Raises ConfigError for a variable that is to name keys and is empty, as a secret may be that was not filled in.

    Elsewhere that means the default; here it would open the server to everybody without a word.
    """
    for name in ("SLIPSTREAM_API_KEY", "SLIPSTREAM_ADMIN_KEY", "SLIPSTREAM_KEYS_FILE"):
        if name in os.environ and not os.environ[name].strip():
            raise ConfigError(f"{name} is set and empty: put in what it is to name, or take the variable away")


def forget_service_links() -> None:
    """Kubernetes tells a pod of a service named slipstream in SLIPSTREAM_PORT, which is no option then."""
    if os.environ.get("SLIPSTREAM_PORT", "").startswith(("tcp://", "udp://", "sctp://")):
        del os.environ["SLIPSTREAM_PORT"]


def fail(message: str, code: int) -> NoReturn:
    """One line, whatever the names in it are."""
    print(f"slipstream: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)
