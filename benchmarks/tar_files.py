"""Files for tars that benchmarks make."""

import io
import tarfile

from cogview.records.tars import plain_header


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add bytes to a tar under a name."""
    tar.addfile(plain_header(name, size=len(data)), io.BytesIO(data))
