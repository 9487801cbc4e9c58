"""A trained model with its two tokenizers: captions in, pictures out.

In: the output folders of training. Out: codes and images. The checkpoint records the fingerprints of the tokenizers
that it was trained with; with any others its ids would mean something else, so loading them together raises.
"""

# B batch, C channels, H height, W width, h w grid

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from cogview.errors import CheckpointError, VocabularyError
from cogview.models.gpt import GPT
from cogview.models.published import load_model, read_settings
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig
from cogview.sequences.layout import TASKS
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary

LAYOUT = TASKS["text_to_image"]
PROMPT_COMMANDS = sum(len(segment.before) for segment in LAYOUT.segments)  # ROI1, BASE and BOI1 are not text


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """Model, tokenizers and vocabulary that belong together.

    grid: image codes along one side; length: tokens of a full row in training; is_image_fixed: whether image tokens
    have the same positions after any text.
    """

    model: GPT
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: Vocabulary
    grid: int
    length: int
    is_image_fixed: bool = False

    @classmethod
    def load(cls, checkpoint: Path, *, text_tokenizer: Path, image_tokenizer: Path, device: str = "cpu") -> Self:
        """Load the published weights and both tokenizers, ready to sample.

        Raises VocabularyError if the tokenizers are not those of the checkpoint, CheckpointError for a damaged file or
        a model that was finetuned for something else.
        """
        task = read_settings(checkpoint).get("task", "text_to_image")
        if task != "text_to_image":
            other = "; a CogLM draws with generate_coglm" if task == "coglm" else ""
            raise CheckpointError(
                f"{checkpoint} was trained for {task}, not to draw as CogView does; give the output of pretrain{other}"
            )
        trained = load_trained(
            checkpoint, text_tokenizer=text_tokenizer, image_tokenizer=image_tokenizer, device=device
        )
        settings = trained.settings
        return cls(
            model=trained.model,
            text_tokenizer=trained.text_tokenizer,
            image_tokenizer=trained.image_tokenizer,
            vocabulary=trained.vocabulary,
            grid=int(settings["grid"]),
            length=int(settings["length"]),
            is_image_fixed=bool(settings.get("is_image_fixed", False)),
        )

    @property
    def image_size(self) -> int:
        """Pixels along one side of a picture."""
        return self.grid * self.image_tokenizer.stride

    def codes(
        self,
        captions: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        progress: Callable[[int, int], None] | None = None,
        watch: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> Tensor:
        """Image codes int64 [B, h, w], one image for each caption; long captions are cut to the text budget.

        progress, watch: called after each token, see `generate_codes`.
        """
        budget = LAYOUT.text_budget(length=self.length, num_image_tokens=self.grid**2)
        prompts = [
            LAYOUT.prompt_ids(self.text_tokenizer.encode(caption), vocabulary=self.vocabulary, max_text=budget)
            for caption in captions
        ]
        positions = [
            LAYOUT.positions(
                num_text=len(prompt) - PROMPT_COMMANDS,
                num_image_tokens=self.grid**2,
                budget=budget,
                is_image_fixed=self.is_image_fixed,
            )[: len(prompt)].tolist()
            for prompt in prompts
        ]
        return generate_codes(
            self.model,
            prompts,
            prompts_positions=positions,
            vocabulary=self.vocabulary,
            grid=self.grid,
            sampling=sampling,
            seeds=list(seeds),
            progress=progress,
            watch=watch,
        )

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Pictures float [B, 3, H, W] in [0, 1]."""
        return self.image_tokenizer.decode(codes_Bhw)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model in evaluation mode with the tokenizers that it was trained with; settings: its `model.json`."""

    model: GPT
    settings: Mapping[str, Any]
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: Vocabulary


def load_trained(checkpoint: Path, *, text_tokenizer: Path, image_tokenizer: Path, device: str) -> Trained:
    """Load published weights, whatever they were trained for, and both tokenizers (errors: see `TextToImage.load`)."""
    text, image = TextTokenizer.load(text_tokenizer), load_image_tokenizer(image_tokenizer)
    vocabulary = Vocabulary(image.num_codes, text.num_pieces)
    model, settings = load_model(checkpoint)
    found = {
        "text_tokenizer": text.fingerprint,
        "image_tokenizer": image.fingerprint,
        "vocabulary": vocabulary.fingerprint,
    }
    require_fingerprints(settings["fingerprints"], found=found, where=checkpoint)
    return Trained(
        model=model.to(device).eval(),
        settings=settings,
        text_tokenizer=text,
        image_tokenizer=image.to(device).eval(),
        vocabulary=vocabulary,
    )


def require_fingerprints(recorded: Mapping[str, str], *, found: Mapping[str, str], where: Path) -> None:
    """VocabularyError unless every fingerprint found is the one recorded in the checkpoint."""
    for name, fingerprint in found.items():
        if recorded.get(name) != fingerprint:
            raise VocabularyError(
                f"{where} was trained with {name} {str(recorded.get(name))[:12]}, but the one given is "
                f"{fingerprint[:12]}; give the {name.replace('_', ' ')} that it was trained with"
            )
