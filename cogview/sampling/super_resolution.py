"""Small pictures to large ones with a GPT that was finetuned for it (CogView, section 3.1 and figure 5).

In: captions and the codes of pictures, h x w. Out: codes of the same pictures, 2h x 2w. The model knows how to turn a
square of codes into one of twice the side; `cogview.sampling.windows` says in which order squares make a picture.
Many pictures go through their windows together.
"""

# B batch, h w grid of the small pictures, T codes of a window, N codes to draw

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT
from cogview.sampling.choice import SamplingConfig, uniform_draws
from cogview.sampling.filling import fill_codes
from cogview.sampling.text_to_image import load_trained
from cogview.sampling.windows import SCALE, Window, WindowOrder, new_codes, plan_windows
from cogview.sequences.layout import TASKS, SequenceLayout
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary

SAMPLING = SamplingConfig(temperature=1.02)  # the release's, with its 200 likeliest codes
LAYOUTS = tuple(name for name in TASKS if name.startswith("super_resolution"))


@dataclass(frozen=True, kw_only=True)
class Magnifier:
    """A super-resolution model with its tokenizers.

    layout: of its training; side: codes along the squares that it reads; text_budget: text tokens that it takes;
    is_image_fixed: whether the small picture has the same positions after any text. keeps_position: the release's
    sampler starts positions anew *behind* ROI2, which keeps its place in the whole sequence; its training starts them
    anew *at* ROI2.
    """

    model: GPT
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: Vocabulary
    layout: SequenceLayout
    side: int
    text_budget: int
    is_image_fixed: bool = False
    keeps_position: bool = False

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        text_tokenizer: Path,
        image_tokenizer: Path,
        device: str = "cpu",
        layout: str = "",
        keeps_position: bool = False,
    ) -> Self:
        """Load published weights and both tokenizers.

        layout: of LAYOUTS, for weights whose `model.json` does not say it, such as imported ones. Raises
        CheckpointError for weights of something else, VocabularyError for tokenizers that are not theirs.
        """
        trained = load_trained(
            checkpoint, text_tokenizer=text_tokenizer, image_tokenizer=image_tokenizer, device=device
        )
        settings = trained.settings
        task = settings.get("task", "text_to_image")
        name = layout or task
        if name not in LAYOUTS or task not in (name, "text_to_image"):
            raise CheckpointError(
                f"{checkpoint} was trained for {task}, not for super-resolution"
                f"{f' in the layout {layout}' if layout else ''}; give the output of finetune_super_resolution, or for "
                f"imported weights a layout of {', '.join(LAYOUTS)}"
            )
        grid, trained_as = int(settings["grid"]), TASKS[task]
        tokens = grid**2 if task == "text_to_image" else ((grid // SCALE) ** 2, grid**2)
        return cls(
            model=trained.model,
            text_tokenizer=trained.text_tokenizer,
            image_tokenizer=trained.image_tokenizer,
            vocabulary=trained.vocabulary,
            layout=TASKS[name],
            side=grid // SCALE,
            text_budget=trained_as.text_budget(length=int(settings["length"]), num_image_tokens=tokens),
            is_image_fixed=bool(settings.get("is_image_fixed", False)),
            keeps_position=keeps_position,
        )

    def magnify(
        self,
        captions: Sequence[str],
        codes_Bhw: Tensor,
        *,
        seeds: Sequence[int],
        sampling: SamplingConfig = SAMPLING,
        order: WindowOrder = "centre",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Codes int64 [B, 2h, 2w] of the pictures with codes [B, h, w], drawn with a seed for each.

        progress: called with (windows done, windows). Raises ConfigError for pictures smaller than the squares that the
        model reads, or for other numbers of captions or seeds than pictures.
        """
        batch, height, width = codes_Bhw.shape
        if not len(captions) == len(seeds) == batch:
            raise ConfigError(f"{len(captions)} captions and {len(seeds)} seeds for {batch} pictures; give one of each")
        windows = plan_windows(height, width, side=self.side, order=order)
        device = self.model.word_embeddings.weight.device
        small_Bhw = codes_Bhw.to(device)
        large_Bhw = torch.zeros(batch, SCALE * height, SCALE * width, dtype=torch.int64, device=device)
        draws_BN = uniform_draws(list(seeds), length=large_Bhw[0].numel(), device=device)
        texts, drawn = [self.text_tokenizer.encode(caption) for caption in captions], 0
        masks = new_codes(windows, height=height, width=width)
        for number, (window, is_new) in enumerate(zip(windows, masks, strict=True), start=1):
            num_new = int(is_new.sum())
            rows, columns = window.drawn
            prompts, positions = self.prompts(texts, small_Bhw, window=window)
            filled_BT = fill_codes(
                self.model,
                prompts,
                large_Bhw[:, rows, columns].flatten(1),
                is_new_T=is_new.ravel(),
                prompts_positions=positions,
                draws_BN=draws_BN[:, drawn : drawn + num_new],
                vocabulary=self.vocabulary,
                sampling=sampling,
            )
            large_Bhw[:, rows, columns] = filled_BT.view(batch, *is_new.shape)
            drawn += num_new
            if progress is not None:
                progress(number, len(windows))
        return large_Bhw

    def prompts(
        self, texts: Sequence[Sequence[int]], small_Bhw: Tensor, *, window: Window
    ) -> tuple[list[list[int]], list[list[int]]]:
        """For each picture what stands before the codes of a window, up to BOI2, and the position ids."""
        squares_Bs = small_Bhw[:, *window.read].flatten(1).cpu().numpy().astype(np.uint16)
        prompts = [
            self.layout.prompt_ids(text, [square], vocabulary=self.vocabulary, max_text=self.text_budget)
            for text, square in zip(texts, squares_Bs, strict=True)
        ]
        return prompts, [self._positions(len(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Pictures float [B, 3, H, W] in [0, 1]."""
        return self.image_tokenizer.decode(codes_Bhw)

    def _positions(self, length: int, text: Sequence[int]) -> list[int]:
        places: list[int] = self.layout.positions(
            num_text=min(len(text), self.text_budget),
            num_image_tokens=(self.side**2, (SCALE * self.side) ** 2),
            budget=self.text_budget,
            is_image_fixed=self.is_image_fixed,
        )[:length].tolist()
        if self.keeps_position:
            restart = length - len(self.layout.segments[-1].before)
            places[restart] = restart
        return places
