"""Chinese answers in the words that the English rules know: "答案是B" is "the answer is B", "选项B" is "option B".

InternVL's models answer Chinese questions in Chinese. Only what states a choice is put into English; the rest stays as
it is, and has no part in the rules.
"""

import re

_HAN = "\u3400-\u9fff"
_WORDS = {  # from top to bottom: longer ones first, negations before what they deny
    "我(?:会)?选择?": "I choose",
    "我(?:认为|觉得|猜|想)": "I think",
    "因为|由于": "because",
    "(?:最终|正确|最佳)?(?:的)?答案|正确(?:的)?选项": "the answer",
    "(?:既)?不是|并非|不应该?是|不为|不选": "is not",
    "无法|不能|不确定|难以|不清楚|没有": "cannot",
    "如果|是否": "if",
    "(?:应该?|应当|可能|就|也|都|即)?(?:是|为)(?!什么)": "is",
    "(?:应该?)?选择?项?|选项": "option",
    "(?:正确|对)的?": "correct",
    "(?:离|距离?)(?:相机|摄像机|镜头|观察者|我们?)": "",
    "(?:最接近|最靠近|最近)的?": "closest",
    "(?:更接近|更靠近|更近|较近)的?": "closer",
    "和|与|及|以及": "and",
    "或者?|还是": "or",
    "因此|所以|综上(?:所述)?": "so",
    "但是?|而": "but",
    "比": "than",
    "点": "point",
    "不": "not",
}
_FORMS = [(re.compile(words), f" {english} ") for words, english in _WORDS.items()]


def in_english(text: str) -> str:
    """`text` with the Chinese words that state a choice put into English; any other text stays as it is."""
    if not re.search(f"[{_HAN}]", text):
        return text
    text = text.replace("。", ". ").replace("、", ", ")
    for words, english in _FORMS:
        text = words.sub(english, text)
    text = re.sub(f"(?<=[{_HAN}])(?=[A-Za-z])|(?<=[A-Za-z])(?=[{_HAN}])", " ", text)
    text = re.sub(r"(?<![A-Za-z])([A-H]) +option(?![A-Za-z])", r"option \1", text)
    return re.sub(r"[ \t]+", " ", text).strip()
