"""Drawing the next token: repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw.

Everything happens on the device, inside the decode step. Top-k and top-p keep the logits above a
threshold, which is found by a search over the bits of a float: nothing is sorted.
"""

from tinygrad import Tensor, dtypes

from tinygpt import device, kernels
from tinygpt.config import SampleConfig

OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def enabled_options(config: SampleConfig) -> tuple[str, ...]:
    """The names of the parameters that change a draw."""
    on = {"temperature": config.temperature > 0, "top_k": config.top_k is not None,
          "top_p": config.top_p is not None and config.top_p < 1,
          "min_p": bool(config.min_p), "repetition_penalty": config.repetition_penalty != 1}
    if not on["temperature"]:  # greedy: the filters keep the likeliest token anyway
        on |= {"top_k": False, "top_p": False, "min_p": False}
    return tuple(name for name in OPTIONS if on[name])


class SamplingParameters:
    """Sampling parameters as one float32 tensor, so that new values need no new compilation.

    `enabled` names those that the compiled step contains; the others cost nothing.
    """

    def __init__(self, enabled: tuple[str, ...]):
        self.enabled = enabled
        self.values = Tensor.zeros(len(OPTIONS)).contiguous().realize()

    @classmethod
    def of(cls, config: SampleConfig) -> "SamplingParameters":
        """The parameters of a configuration."""
        parameters = cls(enabled_options(config))
        parameters.set(config)
        return parameters

    def set(self, config: SampleConfig) -> None:
        device.write(self.values, [float(getattr(config, name) or 0) for name in OPTIONS])

    def has(self, name: str) -> bool:
        return name in self.enabled

    def __getitem__(self, name: str) -> Tensor:
        i = OPTIONS.index(name)
        return self.values[i:i + 1]  # (1,)


def sample(logits: Tensor, seen: Tensor, key: Tensor, parameters: SamplingParameters) -> Tensor:
    """One token id for each row of logits (B, V) float32: (B,) int32.

    seen (B, V) bool marks the tokens of the text so far and gains the drawn ones; key (1,) uint32,
    or one for each row (B,), decides the draw. Without a temperature the likeliest token is taken.
    """
    temperature = parameters["temperature"] if parameters.has("temperature") else None
    key = None if temperature is None else key
    if parameters.has("repetition_penalty"):
        logits = penalize(logits, seen, parameters["repetition_penalty"])
    if any(parameters.has(cut) for cut in ("top_k", "top_p", "min_p")):
        logits, temperature = (logits / temperature).contiguous(), None
    if parameters.has("top_k"):
        logits = keep_top_k(logits, parameters["top_k"])
    if parameters.has("top_p"):
        logits = keep_top_p(logits, parameters["top_p"])
    if parameters.has("min_p"):
        logits = keep_min_p(logits, parameters["min_p"])
    token = kernels.stored(kernels.draw(logits, key, temperature))  # (B,)
    if parameters.has("repetition_penalty"):
        drawn = Tensor.arange(logits.shape[1]) == token.unsqueeze(-1)
        Tensor.realize(token, seen.assign(seen | drawn))
    return token


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divides the positive logits of seen tokens by penalty and multiplies the negative ones
    (CTRL, arXiv:1909.05858)."""
    return seen.where((logits > 0).where(logits / penalty, logits * penalty), logits).contiguous()


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """The k largest logits, and those equal to the k-th; -inf for the rest."""
    return _keep_heaviest(logits, logits.ones_like(), k)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """The likeliest tokens that together reach probability p (nucleus, arXiv:1904.09751), and
    those as likely as the last of them; -inf for the rest."""
    return _keep_heaviest(logits, logits.softmax(-1).contiguous(), p)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """The tokens at least p times as likely as the likeliest (arXiv:2407.01082); -inf for the
    rest."""
    return (logits >= logits.max(-1, keepdim=True) + p.log()).where(logits, -float("inf"))


def _keep_heaviest(logits: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Keeps logits >= the largest threshold above which weight (B, V) sums to target (1,)."""
    order = _ordered_bits(logits).contiguous()  # (B, V)
    threshold = Tensor.zeros(logits.shape[0], 1, dtype=dtypes.uint32)
    threshold = threshold.contiguous()
    step = Tensor.full((1,), 1 << 30, dtype=dtypes.uint32).contiguous()
    guess = (Tensor.arange(3) + 1).cast(dtypes.uint32).reshape(1, 3, 1)
    for _ in range(16):  # two bits a round: 0..3 is how many guesses hold
        above = order.unsqueeze(1) >= threshold.unsqueeze(1) + guess * step  # (B, 3, V)
        sums = above.where(weight.unsqueeze(1), 0).sum(-1)  # (B, 3)
        holds = (sums >= target).cast(dtypes.uint32).sum(-1, keepdim=True)  # (B, 1)
        threshold = (threshold + holds * step).contiguous()
        step = (step >> 2).contiguous()
    return (order >= threshold).where(logits, -float("inf")).contiguous()


def _ordered_bits(x: Tensor) -> Tensor:
    """uint32 words that compare as the float32 numbers x do."""
    bits = x.bitcast(dtypes.uint32)
    return (bits >> 31 == 1).where(bits ^ 0xFFFFFFFF, bits | 0x80000000)
