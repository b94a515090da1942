"""What tells one depth codec from another: codes mean something only together with the codec that wrote them."""

import hashlib

from .modeling_depth_vqvae import DepthVQVAE

_DIGITS = 16
_OF_TRAINING = ("ema_count", "ema_sum")  # neither encodes nor decodes


def codec_fingerprint(codec: DepthVQVAE) -> str:
    """The first 16 digits of a SHA-256 over a codec's weights; the same wherever these weights are loaded.

    Two codecs with one fingerprint write and read the same codes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        if not name.endswith(_OF_TRAINING):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:_DIGITS]
