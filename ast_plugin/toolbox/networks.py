"""Repairs of BasicSR's networks. See `toolbox`."""

import functools


def build_msrresnet_at_scale_1() -> bool:
    """Let `MSRResNet` be built with `upscale: 1`, for restoration, as EDSR, RCAN and SwinIR can be.

    Fault: its constructor sets the first weights of `upconv1`, which it makes for scales 2, 3 and 4 only, and raises
    AttributeError; its `forward` knows what to do at scale 1. No upstream issue known.
    """
    from basicsr.archs.srresnet_arch import MSRResNet

    try:
        MSRResNet(num_feat=1, num_block=1, upscale=1)
        return False
    except AttributeError:
        original = MSRResNet.__init__

    @functools.wraps(original)
    def __init__(self, num_in_ch=3, num_out_ch=3, num_feat=64, num_block=16, upscale=4):
        original(self, num_in_ch, num_out_ch, num_feat, num_block, 2 if upscale == 1 else upscale)
        if upscale == 1:
            self.upscale = 1
            del self.upconv1, self.pixel_shuffle

    MSRResNet.__init__ = __init__
    return True


REPAIRS = (build_msrresnet_at_scale_1,)
