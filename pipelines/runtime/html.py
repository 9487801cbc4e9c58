"""HTML files that hold everything and need no network: the template engine, pictures as data, numbers for people.

In: a template of this folder and its values. Out: one file. Texts come from captions and the web, so every one of them
is escaped, and the templates' content security policy forbids scripts.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from cogview.shards.manifest import atomic_file


def write_html(output: Path, *, template: str, values: Mapping[str, Any]) -> None:
    """Fill in a template of this folder and write it to `output`. A name that is missing is an error, not a blank."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(duration=format_duration, number=format_number)
    html = environment.get_template(template).render(values)
    with atomic_file(output) as file:
        file.write(html.encode())


def image_url(data: bytes) -> str:
    """A PNG or JPEG inside a URL."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def format_duration(seconds: float) -> str:
    """`75.2` is `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_number(value: Any) -> str:
    """Whole numbers with thousands apart, others with four significant digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10_000 else f"{value:.4g}"
