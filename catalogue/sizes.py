"""How large the latent of a result is."""

STEP = 8  # pixels a side of a latent's pixel
SHORTEST, LONGEST = 64, 16384  # of a side: SDXL's UNet needs some pixels, and ComfyUI takes no more


def latent_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Width and height, in pixels, of a picture with the proportions of `size` and the area of a square.

    resolution: the square's side. Both are multiples of 8, so that the proportions differ by half of that; of pictures
    hundreds of times as long as high they differ more, where a side would leave its limits.
    """
    width, height = size
    stretch = (width / height) ** 0.5
    return _side(resolution * stretch), _side(resolution / stretch)


def _side(length: float) -> int:
    return min(max(STEP * round(length / STEP), SHORTEST), LONGEST)
