"""Addresses and numbers that lead to a person: found in captions, and cut out of them or the caption with them.

E-mail addresses, phone numbers (Chinese mobile and landline, international with `+`, American), Chinese identity
numbers, and names on QQ, WeChat and the like where a caption announces them. Names of people and faces are not looked
for. A number is only taken for one where it stands alone, so article numbers and sizes stay.
"""

import re

_ALONE, _END = r"(?<![\w.+-])", r"(?![\w-])"
_PATTERNS = {
    "email": re.compile(r"(?:mailto:)?[\w.+-]{1,64}(?:@|\s?[\[(]at[\])]\s?)(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}\b", re.I),
    "id_number": re.compile(
        r"(?<![0-9A-Za-z])[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[0-9X](?![0-9A-Za-z])",
        re.I,
    ),
    "account": re.compile(
        r"(?:(?:QQ|扣扣)群?号?\s?[:：]?\s?[1-9]\d{4,10}"
        r"|(?:微信号?|薇信|WeChat|WhatsApp|VX)\s?(?:id)?\s?[:：]\s?\+?[a-z0-9][\w-]{4,19})(?!\w)",
        re.I | re.A,
    ),
    "phone": re.compile(
        _ALONE + r"(?:(?:\+|00)86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}" + _END  # Chinese mobile
        + "|" + _ALONE + r"(?:0\d{2,3}-\d{7,8}|\(0\d{2,3}\)\s?\d{7,8}|[48]00-\d{3,4}-\d{3,4})" + _END  # landline, 400
        + "|" + _ALONE + r"\+[1-9]\d{0,2}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}" + _END  # international
        + "|" + _ALONE + r"(?:1[ .-])?(?:\(\d{3}\)\s?|\d{3}[.-])\d{3}[.-]\d{4}" + _END,  # American
        re.A,
    ),
}  # fmt: skip
_SUSPICIOUS = re.compile(r"@|at[\])]|\d{3}|微信|薇信|wechat|whatsapp|vx", re.I)
_LEFTOVERS = re.compile(
    r"\s*[(（\[【<《]\s*[)）\]】>》]|\s+(?=[,.;，。；])"
    r"|(?:[:：|,，;；\s-]+|(?:(?<!\w)(?:tel|phone|call|mail|e-?mail|contact)|电话|邮箱|手机|联系方式)[:：.\s]*)$",
    re.I,
)


def find_personal_data(caption: str) -> tuple[str, ...]:
    """The kinds of personal data in a caption: `email`, `id_number`, `account`, `phone`."""
    if not _SUSPICIOUS.search(caption):
        return ()
    return tuple(kind for kind, pattern in _PATTERNS.items() if pattern.search(caption))


def redact_personal_data(caption: str) -> str:
    """The caption without its personal data, and without the empty brackets and colons that it leaves behind."""
    if not find_personal_data(caption):
        return caption
    for pattern in _PATTERNS.values():
        caption = pattern.sub(" ", caption)
    caption = " ".join(caption.split())
    while (shorter := _LEFTOVERS.sub("", caption)) != caption:
        caption = shorter
    return caption.strip()
