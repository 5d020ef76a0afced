"""Models of the papers, written for stagewise: chains of cells, with skips where they jump.

Under `torch.device("meta")` each builds without memory.

1. `amoebanet` and `transformer` are GPipe's two models; `language` is a decoder alone.
2. `attention` is what both Transformers are made of.
3. `resnet` and `unet` are the other two that torchgpipe measures.
"""

from stagewise.models.amoebanet import amoebanet_d
from stagewise.models.language import decoder_lm, transformer_l
from stagewise.models.resnet import resnet
from stagewise.models.transformer import transformer
from stagewise.models.unet import unet

__all__ = ["amoebanet_d", "decoder_lm", "resnet", "transformer", "transformer_l", "unet"]
