"""Measures of restored images: functions in the definitions that papers use, and the same for BasicSR's validator."""

from ast_plugin.metrics.psnr_ssim import psnr_rgb, psnr_y_float, psnr_y_matlab, ssim_rgb, ssim_y_matlab

__all__ = ['psnr_rgb', 'psnr_y_float', 'psnr_y_matlab', 'ssim_rgb', 'ssim_y_matlab']
