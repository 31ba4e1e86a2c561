"""Scores pictures for content, style and content leakage, by their shapes or by the features of an image encoder.

Pictures are tensors b 3 h w, 0 to 1. Features are tensors b d of any network, such as the pooled ones of DINO or CLIP;
the functions only compare them. All scores are without a unit, one for each picture of the batch.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = list[dict[str, float]]  # for each picture, by the score's name

SCALES = (1, 2, 4)  # downsampling factors: both fine lines and whole shapes count
BACKGROUND = 0.1  # how far a colour channel of the background may be from the border's median
COARSE = 128  # pixels of the shorter side at which shapes are compared


def structure_scores(pictures: Tensor, content: Tensor) -> dict[str, Tensor]:
    """Edge and silhouette overlap of pictures (b 3 h w, 0 to 1) with a content image (1 3 h w): 1 is a perfect match.

    Compared at about COARSE pixels, so that a picture and its enlargement score the same.
    """
    small, small_content = (
        F.avg_pool2d(image, max(1, min(image.shape[-2:]) // COARSE)) for image in (pictures, content)
    )
    return {"edges": content_score(small, small_content), "silhouette": silhouette_overlap(small, small_content)}


def feature_scores(features: Tensor, content: Tensor, style: Tensor) -> dict[str, Tensor]:
    """Content score, style score and content leakage of pictures by their features (b d).

    content, style: features (n d, m d) of the content images and the style images. Leakage is measured from the content
    image, which shows nothing of the style image's subject.
    """
    return {
        "content": content_similarity(features, content),
        "style": style_similarity(features, style),
        "leakage": leakage(features, style, F.normalize(content, dim=1).mean(0, keepdim=True)),
    }


def misses(scores: Mapping[str, float], least: Mapping[str, float], most: Mapping[str, float]) -> list[str]:
    """Which bounds (by the score's name) a picture with these scores misses, as sentences.

    A score that is no number misses, whether it has a bound or not.
    """
    unknown = [f"{name} is {score}" for name, score in scores.items() if not math.isfinite(score)]
    below = [f"{name} {scores[name]:.2f} is below {bound:g}" for name, bound in least.items() if scores[name] < bound]
    above = [f"{name} {scores[name]:.2f} is above {bound:g}" for name, bound in most.items() if scores[name] > bound]
    return unknown + below + above


def content_score(picture: Tensor, content: Tensor) -> Tensor:
    """How well the outlines of pictures (b 3 h w, 0 to 1) match those of a content image (1 3 h w): 1 is perfect.

    Cosine of their edge strengths, which does not depend on colour, averaged over scales.
    """
    return torch.stack([F.cosine_similarity(_edges(picture, s), _edges(content, s)) for s in SCALES]).mean(0)


def silhouette_overlap(picture: Tensor, truth: Tensor) -> Tensor:
    """How well the silhouettes of pictures and of the ground truth (1 or b 3 h w) cover each other: 0 to 1.

    Intersection over union (Jaccard 1901) of all that the background does not reach from the border, holes filled.
    """
    ours, theirs = torch.broadcast_tensors(silhouette(picture), silhouette(truth))
    union = (ours | theirs).sum((1, 2, 3))
    return torch.where(union > 0, (ours & theirs).sum((1, 2, 3)) / union.clamp(min=1), 1.0)


def content_similarity(features: Tensor, content: Tensor) -> Tensor:
    """Content score: mean cosine of pictures' features (b d) with those of n images of the subject (n d), -1 to 1.

    With DINO's features it is the content score of ConsisLoRA's Table 1 (arXiv 2503.10614). The features should depend
    on the subject and not on the style.
    """
    return _cosines(features, content).mean(1)


def style_similarity(features: Tensor, style: Tensor) -> Tensor:
    """Style score: mean cosine of pictures' features (b d) with those of n style images (n d), -1 to 1.

    With CLIP's features it is the style score of ConsisLoRA's Table 1 (arXiv 2503.10614). The features should depend on
    the style and not on the subject; then the style image's subject in the picture does not raise it.
    """
    return _cosines(features, style).mean(1)


def leakage(features: Tensor, style: Tensor, clean: Tensor) -> Tensor:
    """Content leakage: how much of the style images' subjects is in pictures: 0 is none, 1 the style image itself.

    features, style, clean: content features of the pictures (b d), the style images (n d), and a picture without
    leakage (1 d): the ground truth if there is one, else the content image. With s the cosine to a style image,

        leakage = (s - s_clean) / (1 - s_clean)

    averaged over the n; below 0 a picture shows even less of them. Our own measure: the paper names content leakage
    without measuring it.
    """
    s, s_clean = _cosines(features, style), _cosines(clean, style)  # b n, 1 n
    return ((s - s_clean) / (1 - s_clean).clamp(min=1e-6)).mean(1)


def _cosines(features: Tensor, others: Tensor) -> Tensor:
    """Cosines (b n) of features (b d) and others (n d)."""
    return F.normalize(features, dim=1) @ F.normalize(others, dim=1).T


def silhouette(picture: Tensor) -> Tensor:
    """Of pictures b 3 h w a mask b 1 h w, true inside the silhouette; of large pictures at about COARSE pixels."""
    picture = F.avg_pool2d(picture, max(1, min(picture.shape[-2:]) // COARSE))
    frame = [picture[..., 0], picture[..., -1], picture[..., 0, :], picture[..., -1, :]]
    median = torch.cat(frame, -1).median(-1).values  # b 3
    is_background = ((picture - median[..., None, None]).abs() < BACKGROUND).all(1, keepdim=True)
    passable = F.pad(is_background.to(picture.dtype), (1, 1, 1, 1), value=1.0)
    reached = F.pad(torch.zeros_like(passable[..., 1:-1, 1:-1]), (1, 1, 1, 1), value=1.0)  # from the border on
    while True:
        up_and_down = F.max_pool2d(reached, (3, 1), 1, (1, 0))
        spread = torch.maximum(up_and_down, F.max_pool2d(reached, (1, 3), 1, (0, 1))) * passable
        if torch.equal(spread, reached):
            return spread[..., 1:-1, 1:-1] == 0
        reached = spread


def _edges(picture: Tensor, scale: int) -> Tensor:
    """Edge strengths (b n), blurred so that a near miss counts."""
    small = F.avg_pool2d(picture, scale)
    across, down = small.diff(dim=-1)[..., 1:, :], small.diff(dim=-2)[..., 1:]
    strength = (across**2 + down**2).sum(1, keepdim=True).sqrt()  # b 1 h w
    return F.avg_pool2d(strength, 3, 1, 1).flatten(1)
