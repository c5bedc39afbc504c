"""`freight serve`: every role on this machine under one supervisor, with Valkey embedded."""

import contextlib
import dataclasses
import http.client
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from cli.console import say
from cli.errors import StartError
from cli.model import find_model
from cli.options import (
    ComputeIn,
    DiskSpace,
    GpuMemory,
    HostMemory,
    ModelOption,
    PolicyFile,
    SpillDir,
    Trace,
    overridden,
)
from cli.supervisor import POLL_S, Role, Supervisor
from jobs.settings import Settings

_ANY_HOST: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
_WORKER_STOP_LIMIT_S: Final = 30.0  # the sweep under way ends first, then its rows are given back


def serve(
    model: ModelOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    *,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    disk_space: DiskSpace = None,
    spill_dir: SpillDir = None,
    compute_dtype: ComputeIn = None,
    policy: PolicyFile = None,
    trace: Trace = None,
) -> None:
    """Run everything on this machine: server, intake, worker and, unless one is set, Valkey."""
    settings = overridden(
        Settings.from_environment(),
        model=model,
        host=host,
        port=port,
        gpu_memory_bytes=gpu_memory,
        host_memory_bytes=host_memory,
        disk_space_bytes=disk_space,
        spill_dir=spill_dir,
        compute_dtype=compute_dtype,
        policy=policy,
        trace_file=trace,
    )
    with contextlib.suppress(KeyboardInterrupt), running(settings) as freight:
        say(_ready_text(freight.url, has_keys=freight.has_keys))
        while True:
            freight.check()
            time.sleep(POLL_S)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Freight at work; `check` is to be called now and then, it restarts what died."""

    url: str
    has_keys: bool
    check: Callable[[], None]


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Running]:
    """Start every role and wait until all work; stop them, in order, at the end.

    SIGTERM and SIGHUP become KeyboardInterrupt, as SIGINT is, and unwind the same way. A second
    one cuts the stop short: the children are tethered and die with this process.
    """
    from cli.presence import require_redis  # noqa: PLC0415 (redis is slow to import)
    from cli.valkey import embedded_valkey  # noqa: PLC0415

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    settings = dataclasses.replace(settings, model=str(find_model(settings)))
    has_keys = _has_keys(settings)
    _check_address(settings)
    with contextlib.ExitStack() as stack:
        beside: list[Callable[[], str | None]] = []
        if settings.redis_url is None:
            say(f"starting Valkey in {settings.state_dir / 'valkey'}")
            valkey = stack.enter_context(embedded_valkey(settings.state_dir))
            beside.append(valkey.check)
            settings = dataclasses.replace(settings, redis_url=valkey.url)
        else:
            require_redis(settings.redis_url)
        supervisor = Supervisor(
            roles(settings),
            environment=_child_environment(settings),
            logs_dir=settings.state_dir / "logs",
            report=say,
            beside=beside,
        )
        stack.callback(say, "stopped")
        stack.callback(supervisor.stop)
        say(f"starting server, intake and worker; logs in {settings.state_dir / 'logs'}")
        say(f"loading {settings.model}")
        supervisor.start()
        supervisor.await_ready()
        yield Running(url=_url(settings), has_keys=has_keys, check=supervisor.check)
        say("stopping")


def _child_environment(settings: Settings) -> dict[str, str]:
    """Passed on, not read: children need PATH, HOME and the like, and `settings` as they are."""
    passed = os.environ.items()  # noqa: TID251
    others = {name: value for name, value in passed if not name.startswith("FREIGHT_")}
    return {**others, **dataclasses.replace(settings, api_key=None).to_environment()}


def roles(settings: Settings) -> tuple[Role, ...]:
    """The children, in the order in which they are stopped."""
    from cli.presence import process_is_present  # noqa: PLC0415 (rq is slow to import)

    assert settings.redis_url is not None
    is_listening = process_is_present(settings.redis_url)
    return (
        Role(name="server", command=_command("server"), is_ready=_server_probe(settings)),
        Role(name="intake", command=_command("intake"), is_ready=is_listening),
        Role(
            name="worker",
            command=_command("worker"),
            is_ready=is_listening,
            stop_limit_s=_WORKER_STOP_LIMIT_S,
        ),
    )


def _command(role: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "cli.main", role)


def _server_probe(settings: Settings) -> Callable[[int], bool]:
    host = _ANY_HOST.get(settings.host, settings.host)

    def answers(process_id: int) -> bool:
        connection = http.client.HTTPConnection(host, settings.port, timeout=2.0)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/healthz")
                return connection.getresponse().status == http.HTTPStatus.OK
            except (OSError, http.client.HTTPException):
                return False

    return answers


def _has_keys(settings: Settings) -> bool:
    """Raises SettingsError where anybody could use the server: said before anything is started."""
    from jobs.ledger.ledger import Ledger  # noqa: PLC0415 (sqlalchemy is slow to import)
    from server.exposure import check_exposure  # noqa: PLC0415

    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        return check_exposure(settings, ledger.keys)


def _check_address(settings: Settings) -> None:
    """Refuse a taken port at once; the server would only say so after some restarts."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise StartError(
                f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
                "choose another with --host and --port"
            ) from error


def _url(settings: Settings) -> str:
    host = _ANY_HOST.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _ready_text(url: str, *, has_keys: bool) -> str:
    submit = shlex.join([*_own_command(), "submit", "requests.jsonl", "--url", url])
    told = f'python: OpenAI(base_url="{url}/v1", api_key="none"); no API key is asked for'
    if has_keys:
        told = f'python: OpenAI(base_url="{url}/v1", api_key=...); submit takes FREIGHT_API_KEY'
    return f"\nFreight is ready at {url}/v1 (Ctrl-C stops it)\n  {submit}\n  {told}\n"


def _own_command() -> tuple[str, ...]:
    """What starts Freight from any shell, whether or not its environment is active there."""
    installed = Path(sys.executable).with_name("freight")
    return (str(installed),) if installed.exists() else (sys.executable, "-m", "cli.main")
