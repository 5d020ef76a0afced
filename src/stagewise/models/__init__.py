"""Models of the papers, written for stagewise: chains of cells, with skips where they jump.

Under `torch.device("meta")` each builds without memory.
"""

from stagewise.models.amoebanet import amoebanet_d
from stagewise.models.language import decoder_lm, transformer_l
from stagewise.models.resnet import resnet
from stagewise.models.transformer import transformer
from stagewise.models.unet import unet

__all__ = ["amoebanet_d", "decoder_lm", "resnet", "transformer", "transformer_l", "unet"]
