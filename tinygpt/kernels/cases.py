"""Cases of every operation, and how an implementation runs on them: for the tests and
`tinygpt.check`."""

import numpy as np
from tinygrad import Device, Tensor, dtypes

from tinygpt import kernels
from tinygpt.kernels.options import AdamWOptions, LionOptions, MuonOptions, thirds
from tinygpt.kernels.random import make_key
from tinygpt.kernels.workgroup import renderer_of

# largest error, as a share of the largest number that is right
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
# five steps that multiply by up to 3.4 each make the rounding of the first one larger
TOLERANCE_OF_MUON = 2e-4
# share of numbers kept in a byte whose code may differ, since two codes can be as near
TOLERANCE_OF_CODES = 1e-2
WEIGHTS = ("weight", "bias")  # float32 whatever the activations are
IN_PLACE = ("keys", "values")  # what cached_attention writes into


def ids(shape: tuple[int, ...], high: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(5).integers(low, high, shape).astype(np.int32)


def heads(B: int, H: int, G: int, T: int, S: int, D: int) -> dict[str, tuple[int, ...]]:
    return {"q": (B, H, T, D), "k": (B, G, S, D), "v": (B, G, S, D)}


def cache(B: int, H: int, G: int, T: int, S: int, D: int) -> dict[str, tuple[int, ...]]:
    return heads(B, H, G, T, T, D) | {"keys": (B, G, S, D), "values": (B, G, S, D)}


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).random(shape, dtype=np.float32)


ANGLES = np.outer(np.arange(3), 1 / np.arange(1, 6)).astype(np.float32)
KEY = make_key(1, 2)
GROUPED = heads(2, 4, 2, 5, 5, 8)
CACHED = heads(1, 5, 1, 3, 13, 6)
SQUARE = heads(1, 4, 2, 7, 7, 7)
ADAMW = AdamWOptions(learning_rate=0.1, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.2,
                     bias_correction1=3.0, bias_correction2=5.0, grad_scale=0.5, apply=1.0)
LION = LionOptions(learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.2, grad_scale=0.5,
                   apply=1.0)
MUON = MuonOptions(learning_rate=0.1, momentum=0.95, weight_decay=0.2, grad_scale=0.5, apply=1.0)

# operation: (shapes of the inputs that have a gradient, other arguments), ...; in 16 bits the
# first of each only
CASES = {
    "linear": [
        (dict(x=(3, 27, 40), weight=(50, 40), bias=(50,), residual=(3, 27, 50)), {}),
        (dict(x=(3, 7, 10), weight=(6, 10), bias=(6,), residual=(3, 7, 6)), {}),
        (dict(x=(17, 5), weight=(1, 5)), {}),
        (dict(x=(1, 1, 80), weight=(13, 80), bias=(13,)), {}),
        (dict(x=(2, 32, 64), weight=(192, 64), bias=(192,)), {}),
    ],
    "embedding": [
        (dict(weight=(509, 12)), dict(idx=ids((3, 7), 509))),
        (dict(weight=(1, 5)), dict(idx=ids((1, 3), 1))),
    ],
    "layer_norm": [
        (dict(x=(17, 10), weight=(10,), bias=(10,)), dict(eps=0.1)),
        (dict(x=(2, 3, 7, 13), weight=(13,)), {}),
        (dict(x=(1, 1, 80), weight=(80,), bias=(80,)), {}),
    ],
    "rms_norm": [
        (dict(x=(17, 10), weight=(10,)), dict(eps=0.1)),
        (dict(x=(2, 3, 7, 13), weight=(13,)), {}),
    ],
    "gelu": [(dict(x=(17, 10)), dict(tanh=True)), (dict(x=(17, 10)), {}), (dict(x=(1, 3, 1)), {})],
    "swiglu": [(dict(gate=(17, 10), up=(17, 10)), {}), (dict(gate=(1, 3, 1), up=(1, 3, 1)), {})],
    "rope": [
        (dict(x=(2, 5, 3, 10)), dict(cos=np.cos(ANGLES), sin=np.sin(ANGLES))),
        (dict(x=(1, 1, 1, 2)), dict(cos=np.cos(ANGLES[2:, :1]), sin=np.sin(ANGLES[2:, :1]))),
    ],
    "dropout": [(dict(x=(17, 10)), dict(p=0.3, key=KEY))],
    "attention": [
        (GROUPED, {}),
        (heads(1, 1, 1, 65, 65, 80), dict(window=17)),
        (CACHED, dict(offset=7, window=4)),
        (heads(2, 2, 2, 1, 9, 4), dict(offset=8)),
        (SQUARE, dict(dropout_p=0.3, dropout_key=KEY)),
        (heads(1, 2, 2, 64, 64, 32), {}),
    ],
    "cross_entropy": [
        (dict(logits=(17, 509)), dict(targets=ids((17,), 509, -1), label_smoothing=0.1,
                                      z_loss=0.01)),
        (dict(logits=(17, 509)), dict(targets=ids((17,), 509))),
        (dict(logits=(3, 7)), dict(targets=np.array([6, -100, 0], np.int32))),
        (dict(logits=(1, 1)), dict(targets=np.array([0], np.int32), z_loss=0.5)),
    ],
}

# the same of the operations without a gradient; an array stands for itself
WITHOUT_GRADIENT = {
    "quantized_linear": [
        (dict(x=(3, 1, 80), bias=(13,), residual=(3, 1, 13)),
         dict(weight=ids((13, 80), 128, -127).astype(np.int8), scale=positive(13))),
        (dict(x=(7, 5)), dict(weight=ids((3, 5), 9, -9).astype(np.float16))),
        (dict(x=(5, 80), bias=(13,)), dict(weight=ids((13, 48), 256).astype(np.uint8),
                                           scale=positive(13, 3).astype(np.float16))),
        (dict(x=(37, 100)), dict(weight=ids((5, 100), 128, -127).astype(np.int8),
                                 scale=positive(5))),
        (dict(x=(37, 100), bias=(21,)), dict(weight=ids((21, 64), 256).astype(np.uint8),
                                             scale=positive(21, 4).astype(np.float16))),
        (dict(x=(11, 900)), dict(weight=ids((35, 900), 128, -127).astype(np.int8),
                                 scale=positive(35))),
    ],
    "quantized_embedding": [
        ({}, dict(idx=ids((3, 7), 61), weight=ids((61, 13), 128, -127).astype(np.int8),
                  scale=positive(61))),
        ({}, dict(idx=ids((1, 3), 5), weight=ids((5, 8), 9, -9).astype(np.float16))),
        ({}, dict(idx=ids((2, 3), 7), weight=ids((7, 32), 256).astype(np.uint8),
                  scale=positive(7, 2).astype(np.float16))),
    ],
    "cached_attention": [
        (cache(2, 4, 2, 1, 9, 8), dict(offset=8)),
        (cache(1, 5, 1, 1, 70, 33), dict(offset=64, window=17)),
        (cache(2, 4, 2, 5, 13, 6), dict(offset=7, window=4)),
        (cache(2, 2, 1, 1, 70, 16), dict(offset=66, start=np.array([0, 65], np.int32))),
        (cache(2, 2, 1, 3, 13, 6), dict(offset=7, start=np.array([6, 0], np.int32))),
    ],
    "draw": [
        (dict(logits=(3, 509)), dict(key=KEY, temperature=numbers(0.7))),
        (dict(logits=(5, 37)), {}),
    ],
    "adamw": [(dict(p=s, m=s, v=positive(*s), grad=s), dict(options=numbers(*ADAMW)))
              for s in ((16, 32), (17, 31), (1,))],
    "adamw8bit": [
        (dict(p=(512,), m=ids((2, 256), 256).astype(np.uint8), m_tops=positive(2, 1),
              v=ids((2, 256), 256).astype(np.uint8), v_tops=positive(2, 1), grad=(512,)),
         dict(options=numbers(*ADAMW))),
    ],
    "lion": [(dict(p=s, m=s, grad=s), dict(options=numbers(*LION)))
             for s in ((16, 32), (17, 31), (1,))],
    "square_sum": [(dict(a=(17, 31), b=(1,), c=(3, 5, 7), d=(5000,)), {})],
    "muon": [({f"{name}{i}": shape for name in ("p", "m", "grad")
               for i, shape in enumerate(((16, 48), (37, 16), (1, 7)))},
              dict(options=numbers(*MUON)))],
}
IN_16_BITS = (*CASES, "quantized_linear", "cached_attention")  # operations that take such numbers


def draw(shapes: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers that bfloat16 holds exactly; arrays among the shapes as they are."""
    rng = np.random.default_rng(seed)
    arrays = {name: s if isinstance(s, np.ndarray) else rng.standard_normal(s, dtype=np.float32)
              for name, s in shapes.items()}
    return {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32)
            if a.dtype == np.float32 else a for name, a in arrays.items()}


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the output's gradient is."""
    return np.random.default_rng(9).standard_normal(shape, dtype=np.float32)


def tensors(arrays: dict, dtype: str = "float32", device: str | None = None) -> dict:
    """The float arrays in that dtype, weights in float32 at least, on a device, else the default
    one."""
    def put(name: str, array: np.ndarray) -> Tensor:
        x = Tensor(array, device=device)
        if array.dtype == np.float32 and (dtype == "float64" or name not in WEIGHTS):
            x = x.cast(getattr(dtypes, dtype))
        return x.contiguous().realize()
    return {name: put(name, array) for name, array in arrays.items()}


def constants(options: dict, device: str | None = None) -> dict:
    return {name: Tensor(a, device=device).realize() if isinstance(a, np.ndarray) else a
            for name, a in options.items()}


def implementations(operation: str, but: str = "") -> list[str]:
    return [name for name, module in kernels.IMPLEMENTATIONS.items()
            if name != but and hasattr(module, operation)]


def can_run(implementation: str, dtype: str = "float32", operation: str | None = None) -> bool:
    """Whether the implementation is for the default device and for that dtype there."""
    device = Device.DEFAULT.split(":")[0]
    if (device != "CPU" and getattr(dtypes, dtype) not in
            renderer_of(Device.DEFAULT).supported_dtypes()):
        return False
    if (implementation, operation, dtype) == ("cuda", "linear", "float32"):
        return False
    return {"cpu": device == "CPU", "cuda": device == "CUDA", "flash": device != "CPU"
            }.get(implementation, True)


def differentiate(operation: str, implementation: str, inputs: dict[str, Tensor], options: dict,
                  dy: np.ndarray | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of each input, where the output's gradient is dy."""
    y = getattr(kernels, operation)(**inputs, **options, implementation=implementation)
    dy = Tensor(cotangent(y.shape) if dy is None else dy, device=y.device)
    product = y.cast(dtypes.float64 if y.dtype == dtypes.float64 else dtypes.float32) * dy
    return y, dict(zip(inputs, product.sum().gradient(*inputs.values()), strict=True))


def apply(operation: str, implementation: str, inputs: dict[str, Tensor], options: dict
          ) -> dict[str, Tensor]:
    """What an operation without a gradient gives and what it changes, by the input's name."""
    given, named = (), inputs
    if operation == "square_sum":
        given, named = tuple(inputs.values()), {}
    elif operation == "muon":
        given, named = thirds(list(inputs.values())), {}
    made = getattr(kernels, operation)(*given, **named, **options, implementation=implementation)
    results = {"y": made} if isinstance(made, Tensor) else dict(zip(inputs, made, strict=False))
    Tensor.realize(*results.values())
    return results | {name: inputs[name] for name in IN_PLACE if name in inputs}


def run(operation: str, implementation: str, arrays: dict[str, np.ndarray], options: dict,
        dtype: str = "float32", dy: np.ndarray | None = None, device: str | None = None
        ) -> dict[str, np.ndarray]:
    """Output ("y") and gradients, or what `apply` gives, as arrays of float32 or of its dtype."""
    inputs, options = tensors(arrays, dtype, device), constants(options, device)
    if operation in WITHOUT_GRADIENT:
        made = apply(operation, implementation, inputs, options)
    else:
        y, grads = differentiate(operation, implementation, inputs, options, dy)
        made = {"y": y, **grads}
        Tensor.realize(*made.values())
        for name, g in grads.items():
            wanted = inputs[name].shape, inputs[name].dtype
            assert (g.shape, g.dtype) == wanted, f"{name}: {g.shape} {g.dtype}, not {wanted}"
        small = operation not in ("embedding", "cross_entropy") or dtype == "float64"
        assert y.dtype == getattr(dtypes, dtype if small else "float32"), y.dtype
    return {name: (t.cast(dtypes.float32) if t.dtype in (dtypes.bfloat16, dtypes.float16) else t
                   ).numpy() for name, t in made.items()}


def error(ours: np.ndarray, right: np.ndarray) -> float:
    """The largest error as a share of the largest number that is right; of integers the share of
    those that differ."""
    if np.issubdtype(right.dtype, np.integer):
        return float((ours != right).mean())
    return float(np.abs(ours - right).max() / max(np.abs(right).max(), 0.01))


def tolerance(operation: str, dtype: str, right: np.ndarray) -> float:
    """What `error` may be where an operation ran in that dtype."""
    if np.issubdtype(right.dtype, np.integer):
        return TOLERANCE_OF_CODES if right.dtype == np.uint8 else 0.0
    return TOLERANCE_OF_MUON if operation == "muon" else TOLERANCE[dtype]
