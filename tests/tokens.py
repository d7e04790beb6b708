"""The tokens and texts of both splits of loaded data."""

from tinygpt.data.load import TokenData


def ids_of(data: TokenData) -> list[int]:
    return [*data.train.tolist(), *data.val.tolist()]


def text_of(data: TokenData) -> str:
    return data.tokenizer.decode(ids_of(data))


def texts_of(data: TokenData) -> tuple[str, str]:
    """The training text and the validation text."""
    return data.tokenizer.decode(data.train.tolist()), data.tokenizer.decode(data.val.tolist())


def split_as_nanogpt(text: str) -> tuple[str, str]:
    n = len(text)
    return text[:int(n * 0.9)], text[int(n * 0.9):]
