"""The settings of a training run, and the presets."""

from dataclasses import InitVar, dataclass

from tinygpt.config import MachineConfig, check, setting
from tinygpt.data.tokenizer import TOKENIZERS
from tinygpt.training.optim import OPTIMIZERS
from tinygpt.training.recipe import BATCH_SIZE, LEARNING_RATE, SHAKESPEARE, recipe
from tinygpt.training.schedule import SCHEDULES

DECAYS = ("--schedule other than constant", lambda c: c.schedule != "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MachineConfig):
    """How a model is trained. The names are nanoGPT's where nanoGPT has one.

    `warmup_steps` is another name for `warmup_iters`.
    """

    data: str = setting("shakespeare",
        "a text or .jsonl file, of texts or conversations, a folder or glob of them, a folder with "
        "train.bin and val.bin, or 'shakespeare'", empty=True, section="data")
    text_field: str = setting("text", "where the text is in each object of a .jsonl file")
    tokenizer: str = setting("bpe", "bpe is trained on the data", fixed=True, choices=TOKENIZERS)
    batch_size: int = setting(12,
        "sequences in a micro-batch; auto: the same as --auto_batch_size", low=1,
        auto="auto_batch_size")
    auto_batch_size: bool = setting(False,
        "use the largest micro-batch that fits into memory, and as many as make up batch_size "
        "times gradient_accumulation_steps sequences")
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step", low=1)
    curriculum: bool = setting(False,
        "train on short contexts first: lengths that double up to block_size over the first half "
        "of the steps, with as many tokens a step")
    curriculum_start_block_size: int = setting(32,
        "the first length of --curriculum: a half, a quarter, an eighth ... of block_size", low=1,
        needs=("--curriculum", lambda c: c.curriculum))

    model: str = setting("gpt", "bigram is a table of what follows each token, to compare with",
        choices=("gpt", "bigram"), fixed=True, section="model")
    init_from: str = setting("scratch",
        "initial weights: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in Hugging "
        "Face's layout, or a .safetensors file; without --preset, any but scratch implies the "
        "preset finetune_shakespeare", fixed=True)
    freeze: str | None = setting(None,
        "weights that are not trained: patterns of their names, comma-separated, such as "
        "'wte*,wpe*,h.[0-5].*'", fixed=True)
    lora_rank: int = setting(0,
        "train low-rank adapters of that rank and nothing else (LoRA); 0: all weights", low=0,
        fixed=True)
    lora_alpha: float = setting(16.0, "the adapters are multiplied by lora_alpha / lora_rank",
        above=0, fixed=True, needs=("--lora_rank", lambda c: c.lora_rank))
    lora_targets: str = setting("h.*.attn.c_attn",
        "linear layers that get an adapter: patterns of their names, comma-separated", fixed=True,
        needs=("--lora_rank", lambda c: c.lora_rank))

    out_dir: str = setting("checkpoints", "where the run is saved", section="run")
    resume: bool = setting(False, "continue the newest checkpoint in out_dir")
    eval_only: bool = setting(False,
        "evaluate the best checkpoint in out_dir, or the newest if there is no best, and exit; "
        "writes nothing")
    max_iters: int = setting(2000, "training steps", low=1)
    max_minutes: float | None = setting(None,
        "stop after so many minutes as if max_iters were reached; the schedule still follows the "
        "steps", above=0)
    minutes: float | None = setting(None,
        "choose the model and the steps of the default run so that it takes so many minutes on "
        "this machine, and is as good as it can be by then", low=1)
    patience: int = setting(0,
        "stop after so many evaluations in a row without a new best; 0: never", low=0)
    keep: int = setting(2, "newest checkpoints to keep besides the best", low=1)
    seed: int = setting(1337, "random seed of weights, batches, dropout and samples", low=0)

    optimizer: str = setting("adamw", "muon uses AdamW for all but the matrices of the blocks",
        choices=OPTIMIZERS, fixed=True, section="optimizer")
    weight_decay: float = setting(0.1, "decay of matrices; vectors have none", low=0)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", low=0, below=1)
    beta2: float = setting(0.99, "AdamW's decay of the second moment", low=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: unlimited", low=0)
    skip_spikes: float = setting(0.0,
        "skip a step whose gradient norm is above so many times the median of the last 100; 0: "
        "never", low=0)
    ema: bool = setting(False,
        "also keep a moving average of the weights, and evaluate and sample from it")
    ema_decay: float = setting(0.999,
        "share of the average that a step keeps; less in the first steps", low=0, below=1,
        needs=("--ema", lambda c: c.ema))
    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary", low=0,
        below=1)
    z_loss: float = setting(0.0, "weight of log(Z)^2 in the loss, which keeps logits small", low=0)

    learning_rate: float = setting(1e-3, "peak learning rate", above=0, section="schedule")
    schedule: str = setting("cosine",
        "how the learning rate decays; wsd: late and linearly, constant: not at all",
        choices=SCHEDULES)
    decay_fraction: float = setting(0.2, "share of the steps, the last ones, in which wsd decays",
        above=0, high=1, needs=("--schedule wsd", lambda c: c.schedule == "wsd"))
    warmup_iters: int = setting(100, "steps over which the learning rate rises", low=0)
    lr_decay_iters: int | None = setting(None,
        "step at which min_lr is reached; unset: max_iters", low=1,
        needs=(DECAYS[0], lambda c: DECAYS[1](c) or c.curriculum))
    min_lr: float | None = setting(None,
        "lowest learning rate; unset: a tenth of learning_rate", low=0, needs=DECAYS)

    eval_interval: int = setting(250,
        "steps between evaluations, each of which saves a checkpoint", low=1, section="logging")
    eval_iters: int = setting(20, "batches in an evaluation of a split", low=1)
    log_interval: int = setting(10, "steps between log lines", low=1)
    sample_interval: int = setting(0, "steps between samples; 0: only at the end", low=0)
    tensorboard: bool = setting(False,
        "also log to TensorBoard, in out_dir/tensorboard; needs tensorboardX")
    wandb: bool = setting(False, "also log to Weights & Biases; needs wandb")

    dtype: str = setting("float32",
        "dtype of activations; weights stay in float32, and with float16 the loss is scaled so "
        "that gradients do not underflow", choices=("float32", "bfloat16", "float16"),
        section="machine")
    grad_checkpoint: bool = setting(False,
        "keep only the inputs of the blocks and recompute the rest in the backward pass: slower, "
        "with the memory of one block instead of all")
    devices: int = setting(1,
        "number of devices of that kind, cuda:0, cuda:1, ..., each with the weights and its part "
        "of every micro-batch", low=1)
    shard_optimizer: bool = setting(False,
        "each of several devices keeps its part of the optimizer's state instead of all (ZeRO-1)",
        needs=("--devices 2 or more", lambda c: c.devices > 1))

    warmup_steps: InitVar[int | None] = None

    def __post_init__(self, warmup_steps: int | None):
        if warmup_steps is not None:
            if self.warmup_iters not in (TrainConfig.warmup_iters, warmup_steps):
                raise ValueError(f"warmup_steps={warmup_steps}, but warmup_iters="
                                 f"{self.warmup_iters}, which is the same: choose one of them")
            object.__setattr__(self, "warmup_iters", warmup_steps)
        check(self)
        if 0 < self.skip_spikes < 1:
            raise ValueError(f"skip_spikes={self.skip_spikes} is out of range: choose 0 or a value "
                             "at least 1")
        if self.model == "bigram":
            for flag, given in (("grad_checkpoint", self.grad_checkpoint),
                                ("lora_rank", self.lora_rank),
                                ("init_from", self.init_from != "scratch")):
                if given:
                    raise ValueError("a bigram model is a table without blocks, made from scratch: "
                                     f"leave out --{flag}")
        if self.devices > 1:
            self._check_devices()
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: "
                             "choose a lower one")

    def _check_devices(self) -> None:
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size={self.batch_size} cannot be split among devices="
                             f"{self.devices}: choose a multiple of {self.devices}")
        if self.auto_batch_size:
            raise ValueError(f"--batch_size auto is for one device, not devices={self.devices}: "
                             "choose a number")
        if self.kernels in ("cpu", "cuda", "flash"):
            raise ValueError(f"kernels={self.kernels!r} run on one device, not devices="
                             f"{self.devices}: choose auto, portable or reference")
        if self.shard_optimizer and self.optimizer == "adamw8bit":
            raise ValueError("the blocks of adamw8bit's state cannot be split among devices: "
                             "choose another optimizer, or leave out --shard_optimizer")


# Flags of train.py under one name. Without --preset it is the first, with --init_from the first
# that sets it.
PRESETS: dict[str, dict] = {
    "shakespeare": dict(
        vocab_size=1024, bias=False, position="rope", norm="rmsnorm", activation="swiglu",
        qk_norm=True, data="shakespeare", tokenizer="bpe", batch_size=BATCH_SIZE, eval_iters=40,
        optimizer="muon", beta2=0.99, ema=True, ema_decay=0.99, **recipe(SHAKESPEARE)),
    # nanoGPT's config/train_shakespeare_char.py
    "shakespeare_char": dict(
        block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False,
        data="shakespeare", tokenizer="char", batch_size=64, learning_rate=1e-3, min_lr=1e-4,
        max_iters=5000, lr_decay_iters=5000, warmup_iters=100, beta1=0.9, beta2=0.99,
        weight_decay=0.1, grad_clip=1.0, eval_interval=250, eval_iters=200, log_interval=10),
    # and the variant for a CPU that its README gives
    "shakespeare_char_cpu": dict(
        block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False,
        data="shakespeare", tokenizer="char", batch_size=12, learning_rate=1e-3, min_lr=1e-4,
        max_iters=2000, lr_decay_iters=2000, warmup_iters=100, beta1=0.9, beta2=0.99,
        weight_decay=0.1, grad_clip=1.0, eval_interval=250, eval_iters=20, log_interval=1),
    "gpt2": dict(
        block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
        bias=True, activation="gelu_tanh", tokenizer="gpt2", batch_size=12,
        gradient_accumulation_steps=40, learning_rate=6e-4, min_lr=6e-5, max_iters=600000,
        lr_decay_iters=600000, warmup_iters=2000, beta1=0.9, beta2=0.95, weight_decay=0.1,
        grad_clip=1.0, eval_interval=1000, eval_iters=200, log_interval=10, dtype="bfloat16"),
    # nanoGPT's config/finetune_shakespeare.py, of the smallest model
    "finetune_shakespeare": dict(
        init_from="gpt2", data="shakespeare", tokenizer="gpt2", batch_size=1,
        gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, schedule="constant",
        warmup_iters=0, beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0, eval_interval=5,
        eval_iters=40, log_interval=1),
    # to fine-tune the default model on conversations (bench/chat.py)
    "chat": dict(
        batch_size=BATCH_SIZE, optimizer="muon", learning_rate=LEARNING_RATE, ema=True,
        ema_decay=0.99, max_iters=2000, eval_interval=200, eval_iters=40),
}
