"""Images as a page shows them: what the network sees, turned back into colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

LARGEST = 128  # pixels of the longer side
SMALL = 64  # up to here PNG, which keeps every pixel; above JPEG, which is a tenth of it


@dataclass(frozen=True)
class Normalisation:
    """Mean and std of each channel, by which values from 0 to 1 were normalised; empty where they were not."""

    mean: Sequence[float] = ()
    std: Sequence[float] = ()


def data_address(image: Tensor, normalisation: Normalisation) -> str | None:
    """Return an image [channels, height, width] as the address of an `<img>`; None where it is no image.

    Of another number of channels than one and three the first is shown.
    """
    if image.ndim != 3 or min(image.shape[1:]) < 2:
        return None
    values = image.detach().float().cpu()
    if normalisation.mean and normalisation.std:
        mean, std = (torch.tensor(tuple(part)).view(-1, 1, 1) for part in (normalisation.mean, normalisation.std))
        values = values * std + mean
    if values.shape[0] != 3:
        values = values[:1]
    pixels = (values.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    shown = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
    shown.thumbnail((LARGEST, LARGEST))
    form = "PNG" if max(shown.size) <= SMALL else "JPEG"
    written = io.BytesIO()
    shown.save(written, form, **({"quality": 85} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"
