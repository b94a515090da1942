"""Training of the depth codec: where its maps come from, the steps of its codebook, and the loop.

A plain VQ-VAE ends with a handful of its codes in use. Three things prevent it: the encoder and decoder first learn
without quantisation, the codebook then starts from k-means over encoder outputs, and codes that stay unused move to
encoder outputs that are served badly. At the end the codes are numbered by the depth they stand for, farthest first.
"""

from .book import code_depths, kmeans, reorder_codes_, restart_unused_, start_codebook_, update_codebook_
from .loop import train_codebook
from .maps import DepthBank, DepthSource, FileMaps, TeacherMaps, WorldMaps
from .options import CodebookOptions

__all__ = [
    "CodebookOptions",
    "DepthBank",
    "DepthSource",
    "FileMaps",
    "TeacherMaps",
    "WorldMaps",
    "code_depths",
    "kmeans",
    "reorder_codes_",
    "restart_unused_",
    "start_codebook_",
    "train_codebook",
    "update_codebook_",
]
