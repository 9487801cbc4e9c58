"""A server at its address: which addresses need a secret, where that is, and listening until it is asked to end."""

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from cogview.errors import ConfigError
from pipelines.serving.gate import is_loopback

MIN_TOKEN = 16  # characters
GRACE_SECONDS = 5.0  # for answers under way when the server ends


def check_address(*, host: str, port: int, token_file: Path | None) -> None:
    """ConfigError for a port that is none, and for an address that others can reach without a token."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"port={port}: give one from 0 (any that is free) to 65535")
    if not is_loopback(host) and token_file is None:
        raise ConfigError(
            f"host={host}: others can reach that address; give --token-file FILE with a secret for them, or "
            "keep 127.0.0.1"
        )


def read_token(path: Path | None) -> str:
    """The secret in a file, or none. ConfigError when there is none to read, or a short one."""
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file={path} cannot be read ({type(error).__name__}); write ASCII into it") from error
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(f"token_file={path}: give {MIN_TOKEN} characters or more, without blanks")
    return token


async def listen(
    app: web.Application, *, host: str, port: int, greet: Callable[[str], str], close: Callable[[], None]
) -> None:
    """Answer requests until the process is asked to end.

    greet: what is said when it listens, given the address; close: ends what answers are waiting for.
    """
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=GRACE_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(f"host={host}, port={port}: {error.strerror}; give others") from error
        name = f"[{host}]" if ":" in host else host
        say(greet(f"http://{name}:{runner.addresses[0][1]}"))
        await ended.wait()
        await asyncio.to_thread(close)
    finally:
        await runner.cleanup()


def say(line: str) -> None:
    """A line for who has started the server, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
