"""What is known of the GPUs that a plan is made for, from the flags that all plans take."""

from dataclasses import dataclass

from cogview.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GPUs:
    """memory: GiB of each, which the model has to fit; tflops: what one sustains in training; price: of an hour of one.

    Each is None where nobody has said it.
    """

    memory: float | None = None
    tflops: float | None = None
    price: float | None = None

    @property
    def named(self) -> str:
        """The first flag that was given, or nothing."""
        return next((f"--gpu-{name}" for name in FLAGS if getattr(self, name) is not None), "")


FLAGS = {
    "memory": "the GiB of one GPU, such as --gpu-memory 32",
    "tflops": "what one GPU sustains in training, such as --gpu-tflops 60",
    "price": "what an hour of one GPU costs, such as --gpu-price 2.5",
}
UNKNOWN = GPUs()


def read_number(name: str, text: str) -> float:
    """The value of `--gpu-NAME`. ConfigError if it is no number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--gpu-{name} {text}: give {FLAGS[name]}")
    return value
