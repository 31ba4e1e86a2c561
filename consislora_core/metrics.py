"""Scores a picture for content, style and leakage, beside the pictures they were taken from or the right answer.

Pictures are tensors b 3 h w, 0 to 1. Features are rows b d of whichever network, such as DINO's or CLIP's pooled
ones; the functions only compare them. All scores are without a unit, one for each picture of the batch.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = list[dict[str, float]]  # of every picture, by the score's name

SCALES = (1, 2, 4)  # pixels a step, so that both fine lines and whole shapes count
PATCH, PROJECTIONS = 3, 64
WINDOW, SIGMA = 11, 1.5  # pixels; with the next line SSIM's constants, from its paper
STABLE = (0.01**2, 0.03**2)
BACKGROUND = 0.1  # how far a colour channel of the background may be from its usual value
COARSE = 128


def structure_scores(pictures: Tensor, content: Tensor) -> dict[str, Tensor]:
    """Edge and silhouette overlap of pictures (b 3 h w, 0 to 1) with a content image (1 3 h w): 1 is exactly.

    At about COARSE pixels, so that they are the same for a picture and its enlargement.
    """
    small, small_content = (
        F.avg_pool2d(image, max(1, min(image.shape[-2:]) // COARSE)) for image in (pictures, content)
    )
    return {"edges": content_score(small, small_content), "silhouette": silhouette_overlap(small, small_content)}


def feature_scores(features: Tensor, content: Tensor, style: Tensor) -> dict[str, Tensor]:
    """Content, style and leakage of pictures by their features (b d), beside those of both images (n d, m d).

    Leakage counts from the content image, which holds nothing of the style image's thing.
    """
    return {
        "content": content_similarity(features, content),
        "style": style_similarity(features, style),
        "leakage": leakage(features, style, F.normalize(content, dim=1).mean(0, keepdim=True)),
    }


def misses(scores: Mapping[str, float], least: Mapping[str, float], most: Mapping[str, float]) -> list[str]:
    """In words, which bounds (by the score's name) a picture with these scores misses."""
    below = [f"{name} {scores[name]:.2f} is below {bound:g}" for name, bound in least.items() if scores[name] < bound]
    above = [f"{name} {scores[name]:.2f} is above {bound:g}" for name, bound in most.items() if scores[name] > bound]
    return below + above


def content_score(picture: Tensor, content: Tensor) -> Tensor:
    """How well the outlines of pictures (b 3 h w, 0 to 1) lie on those of a content image (1 3 h w): 1 is exactly.

    Cosine of the strengths of their edges, which knows no colour, averaged over scales.
    """
    return torch.stack([F.cosine_similarity(_edges(picture, s), _edges(content, s)) for s in SCALES]).mean(0)


def style_distance(picture: Tensor, style: Tensor) -> Tensor:
    """How far the colours and strokes of pictures (b 3 h w, 0 to 1) are from those of a style image (1 3 h w).

    Sliced Wasserstein distance of their small patches, wherever they lie (Rabin et al. 2011), averaged over scales.
    """
    return torch.stack([_patch_distance(picture, style, s) for s in SCALES]).mean(0)


def ssim(picture: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of pictures to the right answer (1 or b 3 h w, of their size): 1 is equal, -1 the least.

    Wang et al. 2004, with their gaussian window and constants, averaged over channels and over the places where the
    whole window fits.
    """
    axis = torch.arange(WINDOW, dtype=picture.dtype, device=picture.device) - WINDOW // 2
    weights = torch.softmax(-(axis**2) / (2 * SIGMA**2), 0)
    window = weights.outer(weights).expand(3, 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    x, y = torch.broadcast_tensors(picture, truth)
    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c_1, c_2 = STABLE
    similar = (2 * mu_x * mu_y + c_1) * (2 * cov + c_2) / ((mu_x**2 + mu_y**2 + c_1) * (var_x + var_y + c_2))
    return similar.mean((1, 2, 3))


def silhouette_overlap(picture: Tensor, truth: Tensor) -> Tensor:
    """How well the silhouettes of pictures and of the right answer (1 or b 3 h w) cover each other: 0 to 1.

    Intersection over union (Jaccard 1901) of all that the background does not reach from the border, holes filled.
    """
    ours, theirs = torch.broadcast_tensors(_silhouette(picture), _silhouette(truth))
    union = (ours | theirs).sum((1, 2, 3))
    return torch.where(union > 0, (ours & theirs).sum((1, 2, 3)) / union.clamp(min=1), 1.0)


def content_similarity(features: Tensor, content: Tensor) -> Tensor:
    """Whether pictures show the content image's thing: mean cosine of their features (b d) with its (n d), -1 to 1.

    With DINO's features the content score of ConsisLoRA's Table 1 (arXiv 2503.10614). Features that know things and
    forget looks make it a score of content; n is 1, or more images of the one thing.
    """
    return _cosines(features, content).mean(1)


def style_similarity(features: Tensor, style: Tensor) -> Tensor:
    """Whether pictures look like the style images: mean cosine of their features (b d) with theirs (n d), -1 to 1.

    With CLIP's features the style score of ConsisLoRA's Table 1 (arXiv 2503.10614). Features that know looks and
    forget things make it a score of style; then the style image's thing in the picture does not raise it.
    """
    return _cosines(features, style).mean(1)


def leakage(features: Tensor, style: Tensor, clean: Tensor) -> Tensor:
    """How much of the style images' things is in pictures: 0 as much as in a clean picture, 1 they are the style image.

    All in features of content: of the pictures (b d), the style images (n d), and a picture without leakage (1 d),
    which is the right answer if there is one, else the content image. With s the cosine to a style image,

        leakage = (s - s_clean) / (1 - s_clean)

    averaged over the n; below 0 a picture has even less of it. Our own: the paper names content leakage, unmeasured.
    """
    s, s_clean = _cosines(features, style), _cosines(clean, style)  # b n, 1 n
    return ((s - s_clean) / (1 - s_clean).clamp(min=1e-6)).mean(1)


def perceptual_distance(maps: list[Tensor], truth: list[Tensor]) -> Tensor:
    """How far pictures are from the right answer as a network sees them: 0 to 2 for maps that are nowhere negative.

    LPIPS (Zhang et al. 2018) without its learned weights: at each place of each layer's feature maps (b c h w, the
    truth's 1 or b c h w) the squared distance between their directions, averaged over places, then over layers.
    """
    distances = [
        (F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1).mean((1, 2))
        for ours, theirs in zip(maps, truth, strict=True)
    ]
    return torch.stack(distances).mean(0)


def _cosines(features: Tensor, others: Tensor) -> Tensor:
    """b n"""
    return F.normalize(features, dim=1) @ F.normalize(others, dim=1).T


def _silhouette(picture: Tensor) -> Tensor:
    """b 1 h w, true inside; large pictures at about COARSE pixels."""
    picture = F.avg_pool2d(picture, max(1, min(picture.shape[-2:]) // COARSE))
    frame = [picture[..., 0], picture[..., -1], picture[..., 0, :], picture[..., -1, :]]
    usual = torch.cat(frame, -1).median(-1).values  # b 3
    open_to = ((picture - usual[..., None, None]).abs() < BACKGROUND).all(1, keepdim=True).to(picture.dtype)
    reached = F.pad(torch.zeros_like(open_to), (1, 1, 1, 1), value=1.0)  # from all around the picture
    open_to = F.pad(open_to, (1, 1, 1, 1), value=1.0)
    while True:
        up_and_down = F.max_pool2d(reached, (3, 1), 1, (1, 0))
        spread = torch.maximum(up_and_down, F.max_pool2d(reached, (1, 3), 1, (0, 1))) * open_to
        if torch.equal(spread, reached):
            return spread[..., 1:-1, 1:-1] == 0
        reached = spread


def _edges(picture: Tensor, scale: int) -> Tensor:
    """Edge strengths (b n), softened so that a near miss counts."""
    small = F.avg_pool2d(picture, scale)
    across, down = small.diff(dim=-1)[..., 1:, :], small.diff(dim=-2)[..., 1:]
    strength = (across**2 + down**2).sum(1, keepdim=True).sqrt()  # b 1 h w
    return F.avg_pool2d(strength, 3, 1, 1).flatten(1)


def _patch_distance(picture: Tensor, style: Tensor, scale: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(PROJECTIONS, 3 * PATCH**2, generator=generator), dim=1).to(picture)
    ours, theirs = (
        (directions @ F.unfold(F.avg_pool2d(image, scale), PATCH)).sort(-1).values for image in (picture, style)
    )
    if theirs.shape[-1] != ours.shape[-1]:
        theirs = F.interpolate(theirs, ours.shape[-1], mode="linear")
    return (ours - theirs).abs().mean((1, 2))
