"""Members for tars that benchmarks make."""

import io
import tarfile


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add bytes to a tar under a name, with nothing of this machine or this moment."""
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names are empty
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
