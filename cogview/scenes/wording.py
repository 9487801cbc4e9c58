"""The words of the captions: names and templates in English and Chinese.

In: nothing. Out: tables that `scene.captions` fills in. `{a}` is the first shape ("small red circle", "小红色圆形"),
`{b}` the second, `{background}` the colour of the background, `{position}` where the only shape is.
"""

ENGLISH: dict[str, str] = {"centre": "in the middle of"} | {
    side: f"at the {side} of" for side in ("left", "right", "top", "bottom")
}

CHINESE: dict[str, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
    "ring": "圆环",
    "star": "五角星",
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "brown": "棕色",
    "white": "白色",
    "black": "黑色",
    "gray": "灰色",
    "small": "小",
    "large": "大",
    "centre": "中央",
    "left": "左侧",
    "right": "右侧",
    "top": "上方",
    "bottom": "下方",
}

ENGLISH_ONE = (
    "a {a} on a {background} background",
    "{background} background with a {a}",
    "a picture of a {a} on a {background} background",
    "one {a}, {background} background",
    "a {a} {position} a {background} background",
    "there is a {a} {position} the {background} background",
)
CHINESE_ONE = (
    "{background}背景上的一个{a}",
    "一个{a}，{background}背景",
    "{background}背景上有一个{a}",
    "画着一个{a}的{background}背景图",
    "{background}背景{position}有一个{a}",
    "一个{a}位于{background}背景的{position}",
)
ENGLISH_BESIDE = (
    "a {a} to the left of a {b} on a {background} background",
    "a {b} to the right of a {a} on a {background} background",
    "{background} background with a {a} left of a {b}",
    "{background} background, a {a} on the left, a {b} on the right",
)
CHINESE_BESIDE = (
    "{background}背景上，一个{a}在一个{b}的左边",
    "{background}背景上，一个{b}在一个{a}的右边",
    "{background}背景，左边是{a}，右边是{b}",
    "左边一个{a}，右边一个{b}，{background}背景",
)
ENGLISH_ABOVE = (
    "a {a} above a {b} on a {background} background",
    "a {b} below a {a} on a {background} background",
    "{background} background with a {a} above a {b}",
    "{background} background, a {a} at the top, a {b} at the bottom",
)
CHINESE_ABOVE = (
    "{background}背景上，一个{a}在一个{b}的上边",
    "{background}背景上，一个{b}在一个{a}的下边",
    "{background}背景，上边是{a}，下边是{b}",
    "上边一个{a}，下边一个{b}，{background}背景",
)

# Each position phrase above holds one of these, and no other template does.
POSITION_WORDS = (
    *("in the middle", "at the ", "to the ", "on the left", "left of", "above", "below"),
    *("中央", "左侧", "右侧", "上方", "下方", "左边", "右边", "上边", "下边"),
)
