"""Labels and a codec for tests of losses."""

import torch
from hypothesis import strategies as st

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.tokens import SpatialVocabulary

# Codes neither in order nor side by side: nothing may rely on that.
WORDS = SpatialVocabulary(seg=3, depth_start=4, depth_end=10, codes=(12, 5, 9, 7, 6), num_depth_tokens=4, image=11)
VOCABULARY, SIZE = 17, 16  # words; pixels of the codec's side
SPAN = [4, 12, 9, 9, 6, 10]


def loss_codec() -> DepthVQVAE:
    """A random codec for spans of `WORDS`: a 2 x 2 grid of 5 codes."""
    torch.manual_seed(0)
    config = DepthVQVAEConfig(image_size=SIZE, downsample=8, num_codes=5, code_dim=8, base_channels=4)
    codec = DepthVQVAE(config).eval()
    codec.depth_codebook.vectors.mul_(20)  # so that codes look different
    return codec


def padded(rows: list[list[int]], side: str = "right") -> torch.Tensor:
    length = max(map(len, rows))
    pads = [[-100] * (length - len(row)) for row in rows]
    return torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])


@st.composite
def label_batches(draw) -> torch.Tensor:
    """Rows of any number of responses, with words, [SEG] and at most one span each, padded on either side."""
    word = st.sampled_from([0, 1, 2, 3, 16])
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = [-100]
        for _ in range(draw(st.integers(0, 3))):
            before, after = (draw(st.lists(word, max_size=4)) for _ in range(2))
            codes = draw(st.lists(st.sampled_from(WORDS.codes), min_size=4, max_size=4))
            span = [4, *codes, 10] if draw(st.booleans()) else []
            row += [*before, *span, *after, *([-100] * draw(st.integers(1, 3)))]
        rows.append(row)
    return padded(rows, draw(st.sampled_from(["left", "right"])))
