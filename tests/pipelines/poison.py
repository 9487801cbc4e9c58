"""Pictures that kill or hang Pillow's GIF reader, for real, in processes that are told to."""

from pathlib import Path

# Python imports `sitecustomize` when it starts, in Ray's workers and their children as well.
SITECUSTOMIZE = """
import ctypes, os, signal
from PIL import GifImagePlugin
import cogview.records.containment

cogview.records.containment.LIMIT_S = 4.0
is_whole = GifImagePlugin.GifImageFile._open

def _open(self):
    what = self.fp.read()[6:]
    self.fp.seek(0)
    if what.startswith(b"EXIT"):
        os._exit(7)
    if what.startswith(b"CRASH"):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(0)
    if what.startswith(b"HANG"):
        ctypes.PyDLL(None).pause()  # in C, with Python's lock held: no other thread of the process runs again
    is_whole(self)

GifImagePlugin.GifImageFile._open = _open
"""
EXIT, CRASH, HANG = (b"GIF89a" + word + bytes(100) for word in (b"EXIT", b"CRASH", b"HANG"))


def plant(folder: Path) -> None:
    """Make Python processes with this folder in their path decode as above."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
