"""A photo site on the loopback address for benchmarks: real photos under as many names as wanted, over HTTP or HTTPS.

Command: python -m benchmarks.photo_server FOLDER [--certificate FILE --key FILE], in a process of its own
Any path `/00042.jpg` answers with photo 42 of the folder's tars, counted round and round; `/robots.txt` allows that and
forbids `/private/`. The server keeps connections alive for clients who want it, and does as little as it can: whatever
it costs is taken from those who are measured. It writes its port to standard output, and ends when its input is closed.
"""

import argparse
import asyncio
import io
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from PIL import Image

from benchmarks.harness import REPOSITORY, UnmeasuredError

LOOPBACK = "127.0.0.1"
MAX_ENLARGED = 250  # enlarging takes time, and they take memory
ROBOTS = b"User-agent: *\nDisallow: /private/\n"
_END = b"\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Files in PEM: an authority to trust, and the server's certificate with its key."""

    authority: Path
    chain: Path
    key: Path


@contextmanager
def photo_server(photos: Path, *, certificate: Certificate | None = None, enlarge: int = 1) -> Iterator[int]:
    """Run a server in a process of its own; yields its port."""
    command = [sys.executable, "-m", "benchmarks.photo_server", str(photos), "--enlarge", str(enlarge)]
    if certificate is not None:
        command += ["--certificate", str(certificate.chain), "--key", str(certificate.key)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline()
            if not port:
                raise UnmeasuredError("the photo server did not start; its words stand above")
            yield int(port)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(timeout=30)


def read_photos(folder: Path, *, min_side: int = 0) -> list[bytes]:
    """The JPEG members of a folder's tars whose shorter side is above `min_side`, in order."""
    photos = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            photos += [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    return [photo for photo in photos if min(Image.open(io.BytesIO(photo)).size) > min_side]


def enlarged(photos: Sequence[bytes], *, factor: int) -> list[bytes]:
    """The first of the photos, each side `factor` times as long, as JPEG q90."""
    large = []
    for photo in photos[:MAX_ENLARGED]:
        picture = Image.open(io.BytesIO(photo)).convert("RGB")
        file = io.BytesIO()
        whole = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.BICUBIC)
        whole.save(file, format="JPEG", quality=90)
        large.append(file.getvalue())
    return large


def write_certificate(folder: Path, *, names: Sequence[str]) -> Certificate:
    """An authority made now, and a certificate (P-256) of its own for these names and the loopback address."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name_of(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        now = datetime.now(UTC)
        dated = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        return (
            dated.issuer_name(name_of("photos")).serial_number(x509.random_serial_number()).sign(key, hashes.SHA256())
        )

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = x509.CertificateBuilder().subject_name(name_of("photos")).public_key(root_key.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    alternatives = [*map(x509.DNSName, names), x509.IPAddress(IPv4Address(LOOPBACK))]
    leaf = x509.CertificateBuilder().subject_name(name_of(LOOPBACK)).public_key(key.public_key())
    leaf = leaf.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    files = Certificate(authority=folder / "authority.pem", chain=folder / "server.pem", key=folder / "server.key")
    files.authority.write_bytes(signed(root, root_key).public_bytes(serialization.Encoding.PEM))
    files.chain.write_bytes(signed(leaf, root_key).public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return files


class PhotoProtocol(asyncio.Protocol):
    """One connection. Requests are read up to their empty line; nothing of them counts but path and `Connection`."""

    def __init__(self, answers: Sequence[bytes], robots: bytes, missing: bytes) -> None:
        self._answers, self._robots, self._missing = answers, robots, missing
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(_END)) >= 0:
            head, self._buffer = self._buffer[:end], self._buffer[end + len(_END) :]
            self._transport.write(self._answer(head.split(b" ", 2)[1]))
            if b"connection: close" in head.lower():
                self._transport.close()

    def _answer(self, path: bytes) -> bytes:
        number = path[1:-4]
        if path == b"/robots.txt":
            return self._robots
        if not number.isdigit() or not path.endswith(b".jpg"):
            return self._missing
        return self._answers[int(number) % len(self._answers)]


async def serve(photos: Sequence[bytes], *, context: ssl.SSLContext | None) -> None:
    """Serve until standard input ends."""
    answers = [_reply(photo, kind="image/jpeg") for photo in photos]
    robots, missing = _reply(ROBOTS, kind="text/plain"), _reply(b"", kind="text/plain", status="404 Not Found")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: PhotoProtocol(answers, robots, missing), LOOPBACK, 0, ssl=context, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


def _reply(body: bytes, *, kind: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of tars with .jpg members")
    parser.add_argument("--min-side", type=int, default=0, help="leave out photos with a shorter side (default: 0)")
    parser.add_argument("--enlarge", type=int, default=1, help="times that each side is longer (default: 1)")
    parser.add_argument("--certificate", type=Path, help="serve HTTPS with this certificate chain (default: HTTP)")
    parser.add_argument("--key", type=Path, help="the certificate's key")
    flags = parser.parse_args()
    context = None
    if flags.certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(flags.certificate, flags.key)
    photos = read_photos(flags.photos, min_side=flags.min_side)
    asyncio.run(serve(photos if flags.enlarge == 1 else enlarged(photos, factor=flags.enlarge), context=context))


if __name__ == "__main__":
    main()
