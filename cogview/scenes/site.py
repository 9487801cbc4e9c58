"""The demo site: a gallery served over real HTTP on the loopback address.

In: a `SiteConfig`. Out: a web site to scrape, with robots.txt, a sitemap, pages of captioned images and a known amount
of dirt (`expected_outcomes`), and a log of what was asked of it.

    with DemoSite(SiteConfig(num_scenes=200)) as site:
        scrape(site.url)
"""

import argparse
import logging
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from cogview.errors import ConfigError
from cogview.scenes.gallery import DIRT, Gallery, SiteConfig, expected_outcomes

__all__ = ["DIRT", "DemoSite", "RequestLog", "SiteConfig", "expected_outcomes"]

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
IDLE_SECONDS = 30  # after which a silent keep-alive connection is closed


class RequestLog:
    """Counts requests by path, from all connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paths: Counter[str] = Counter()

    def add(self, path: str) -> int:
        """Count one request; return how many the path has had, this one included."""
        with self._lock:
            self._paths[path] += 1
            return self._paths[path]

    @property
    def total(self) -> int:
        """Requests so far."""
        with self._lock:
            return self._paths.total()

    @property
    def paths(self) -> dict[str, int]:
        """Requests so far by path."""
        with self._lock:
            return dict(self._paths)


class DemoSite:
    """Serves a gallery while its `with` block runs; the address is `url`, the requests so far are in `requests`.

    `port=0` takes any free port. A given port keeps the URLs the same from run to run; if it is taken, entering the
    block raises ConfigError.
    """

    def __init__(self, config: SiteConfig, *, port: int = 0) -> None:
        self.config = config
        self.requests = RequestLog()
        self.url = ""
        self._port = port

    def __enter__(self) -> "DemoSite":
        try:
            self._server = _Server(self._port, gallery=Gallery(self.config), requests=self.requests)
        except OSError as error:
            raise ConfigError(
                f"port={self._port} of {LOOPBACK} cannot be served ({error}); use 0 for a free one"
            ) from error
        self.url = self._server.url
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="demo-site", daemon=True)
        self._thread.start()
        logger.info("demo site at %s: %d scenes, %d links", self.url, self.config.num_scenes, self.config.num_links)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.close_connections()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, *, gallery: Gallery, requests: RequestLog) -> None:
        self.gallery = gallery
        self.requests = requests
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__((LOOPBACK, port), _Handler)
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End the keep-alive connections, whose threads would otherwise outlive the site."""
        with self._connections_lock:
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up in the middle of an answer is everyday life, not an error of the site.
        logger.debug("connection from %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    # One packet for head and body: two small ones wait for each other's acknowledgement, 40 ms a request.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        visit = self.server.requests.add(path)
        response = self.server.gallery.respond(path, visit=visit, root=self.server.url)
        if response.delay:
            time.sleep(response.delay)
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        if response.location:
            self.send_header("Location", response.location)
        self.end_headers()
        if with_body:
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def main() -> None:
    """Serve the site until interrupted, to look at it in a browser."""
    parser = argparse.ArgumentParser(prog="python -m cogview.scenes.site", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-scenes", type=int, default=1000)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with DemoSite(SiteConfig(seed=options.seed, num_scenes=options.num_scenes), port=options.port):
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("stopped")


if __name__ == "__main__":
    main()
