import csv
import gzip
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cogview.filters.personal_data import find_personal_data, redact_personal_data


@pytest.mark.parametrize(
    ("caption", "kinds", "redacted"),
    [
        ("a red car, mail jane.doe+x@mail.example.org", ("email",), "a red car"),
        ("红色的车，电话：13912345678", ("phone",), "红色的车"),
        ("a red car (+86 139-1234-5678) for sale", ("phone",), "a red car for sale"),
        ("Computer Repair Bellevue Ne 402-505-6600", ("phone",), "Computer Repair Bellevue Ne"),
        ("call (402) 505-6600 now", ("phone",), "call now"),
        ("服务热线 400-820-8820 欢迎", ("phone",), "服务热线 欢迎"),
        ("公司 010-62345678 地址", ("phone",), "公司 地址"),
        ("reserve: +30 697 435 0179", ("phone",), "reserve"),
        ("身份证 11010519491231002X 复印件", ("id_number",), "身份证 复印件"),
        ("加微信：abc_12345 看图", ("account",), "加 看图"),
        ("手机壳 QQ:123456789", ("account",), "手机壳"),
        ("jane(at)example.org", ("email",), ""),
    ],
)
def test_personal_data_is_found_and_cut_out(caption: str, kinds: tuple[str, ...], redacted: str) -> None:
    assert find_personal_data(caption) == kinds
    assert redact_personal_data(caption) == redacted


@pytest.mark.parametrize(
    "caption",
    [
        "a dog @ the beach",
        "photo by @jane on 2021-03-04",
        "1920x1080 wallpaper 123456789",
        "ISBN 978-3-16-148410-0",
        "article 139123456789012",
        "boeing 747-400, 1997-2003",
        "价格 12800 元, 2021年3月4日",
        "WeChat app store icon",
        "at 10:30, 25.50 dollars",
        "IP 192.168.100.200",
    ],
)
def test_other_numbers_and_signs_stay(caption: str) -> None:
    assert redact_personal_data(caption) == caption


def test_real_captions_hold_next_to_none(shared_data: Path) -> None:
    packed = [(shared_data / f"captions_{name}.txt.gz").read_bytes() for name in ("en", "zh")]
    human = [caption for data in packed for caption in gzip.decompress(data).decode().splitlines()]
    folder = shared_data / "url_lists"
    table = (folder / "conceptual_captions_validation.tsv").read_text(encoding="utf-8")
    conceptual = [line.split("\t")[0] for line in table.split("\n")]
    photos = [row[1] for row in csv.reader((folder / "unsplash_lite_manifest.csv").read_text().splitlines())]
    assert not [caption for caption in [*human, *conceptual, *photos] if find_personal_data(caption)]
    web = pq.read_table(folder / "img2dataset_test_10000.parquet")["TEXT"].to_pylist()
    assert 2 <= sum(bool(find_personal_data(text)) for text in web) <= 5
