"""How far a made clip is from the real one: pure functions on uint8 clips, one value per clip.

All take Clips `made` and `real`, uint8 [batch, time, height, width, 3], and return float64 [batch]. PSNR and SSIM
look at the frames between only: the two given frames would flatter every method.
"""

from __future__ import annotations

import torch

from giffy_ray.shapes import Clips, PerClip, to_floats


def l2_report(made: Clips, real: Clips) -> PerClip:
    """The unit of the report's Table 2: Euclidean distance over all pixels of the clip in 0..255, over 100.

    The table's caption says pixels in 0..1; its published figures are reproduced only by 0..255.
    """
    return _differences(made, real).square().sum(1).sqrt() / 100


def psnr(made: Clips, real: Clips) -> PerClip:
    """Peak signal-to-noise ratio of the frames between, in dB: 10 log10(255^2 / MSE); infinite when equal."""
    mean_squared = _differences(made[:, 1:-1], real[:, 1:-1]).square().mean(1)
    return 10 * torch.log10(255.0**2 / mean_squared)


def ssim(made: Clips, real: Clips) -> PerClip:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian window, reflected edges) of the frames between.

    In float32, as torchmetrics is slow otherwise: off by up to 3e-4 where frames are flat.
    """
    # Imported here: two seconds that a training worker, which does not ask for it, need not wait.
    from torchmetrics.functional.image import structural_similarity_index_measure

    batch, time = made.shape[0], made.shape[1] - 2
    ours, theirs = (to_floats(clips[:, 1:-1].flatten(0, 1)) for clips in (made, real))
    each = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(each, torch.Tensor)
    return each.view(batch, time).mean(1).double()


METRICS = {"l2_report": l2_report, "psnr": psnr, "ssim": ssim}


def _differences(made: Clips, real: Clips) -> torch.Tensor:
    return (made.double() - real.double()).flatten(1)
