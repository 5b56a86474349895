"""Image quality metrics as defined in papers, as functions and as metrics in BasicSR's registry."""

from ast_plugin.metrics.psnr_ssim import psnr_rgb, psnr_y_float, psnr_y_matlab, ssim_rgb, ssim_y_matlab

__all__ = ['psnr_rgb', 'psnr_y_float', 'psnr_y_matlab', 'ssim_rgb', 'ssim_y_matlab']
