"""Repairs of BasicSR's networks. See `toolbox`."""

import functools
import warnings


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


def build_swinir_without_warning() -> bool:
    """Let SwinIR be built without a warning of torch's about `torch.meshgrid`.

    Fault: its `WindowAttention` does not say which indexing it wants, which torch 1.10 began to ask for; what it gets
    is what it means. No upstream issue known.
    """
    from basicsr.archs.swinir_arch import WindowAttention

    original = WindowAttention.__init__
    if hasattr(original, '__wrapped__') or 'indexing' in str(original.__code__.co_consts):
        return False

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'torch.meshgrid: in an upcoming release', UserWarning)
            original(self, *args, **kwargs)

    WindowAttention.__init__ = __init__
    return True


REPAIRS = (build_msrresnet_at_scale_1, build_swinir_without_warning)
