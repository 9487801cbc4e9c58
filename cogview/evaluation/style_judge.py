"""A small classifier of styles: names the style that a picture shows, to judge pictures that a model drew.

In: real pictures with their styles. Out: a net that names the style of any picture of that size. It is trained on real
pictures alone, and says on held-out ones how far it can be believed.
"""

# B batch, C channels, H height, W width, S styles

import torch
from torch import Tensor, nn

WIDTHS = (24, 48, 96)
MEAN, SCALE = 0.8, 0.3  # roughly those of pictures on white; batch norm does the rest
BATCH = 64
LEARNING_RATE = 5e-3


class StyleJudge(nn.Module):
    """Three convolutions, each seeing twice as far as the one before, and a mean over the picture.

    Style is in edges, shading and palette, wherever in the picture they are.
    """

    def __init__(self, num_styles: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_styles))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Scores [B, S] of pictures float [B, 3, H, W] in [0, 1]."""
        scores_BS: Tensor = self.layers((images_BCHW - MEAN) / SCALE)
        return scores_BS

    @torch.no_grad()
    def name(self, images_BCHW: Tensor) -> Tensor:
        """The style of each picture, int64 [B]."""
        return torch.cat([self(part).argmax(dim=1) for part in torch.split(images_BCHW, 256)])

    def accuracy(self, images_BCHW: Tensor, styles_B: Tensor) -> float:
        """The share of pictures whose style is named right."""
        return float((self.name(images_BCHW) == styles_B).float().mean())


def train_judge(images_BCHW: Tensor, styles_B: Tensor, *, num_styles: int, epochs: int, seed: int) -> StyleJudge:
    """A judge that has seen these pictures so many times, in evaluation mode. styles_B: int64 in [0, num_styles)."""
    torch.manual_seed(seed)
    judge = StyleJudge(num_styles).train()
    steps = max(1, len(images_BCHW) // BATCH) * epochs
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(images_BCHW), (min(BATCH, len(images_BCHW)),), generator=generator)
        batch_BCHW = images_BCHW[chosen]
        mirrored = torch.rand(len(batch_BCHW), generator=generator) < 0.5
        batch_BCHW = torch.where(mirrored[:, None, None, None], batch_BCHW.flip(3), batch_BCHW)
        loss = nn.functional.cross_entropy(judge(batch_BCHW), styles_B[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return judge.eval()
