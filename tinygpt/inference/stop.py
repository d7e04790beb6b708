"""Text from tokens as they are drawn, up to a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from tinygpt.data.tokenizer import StreamDecoder, Tokenizer, up_to_end


def pieces_of(tokenizer: Tokenizer, tokens: Iterable[int], stop: Sequence[str]) -> Iterator[str]:
    """Yields the text of each token until a stop string or end-of-text, and then text held back."""
    text, until = StreamDecoder(tokenizer), StopFilter(stop)
    for token in up_to_end(tokenizer, tokens):
        yield until.push(text.push(token))
        if until.stopped:
            break
    yield "" if until.stopped else until.push(text.finish()) + until.finish()


class StopFilter:
    """Passes text through until one of the stop strings is complete, without that string."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.stopped = stops, False
        self._held = ""  # may be the beginning of a stop string

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)[1]]
        kept = max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1))
                    if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept:]
        return text[:len(text) - kept]

    def finish(self) -> str:
        return self._held
