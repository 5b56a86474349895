"""Degradations made on clean photographs: rain, raindrops, haze, snow, shadows, moiré; and files of such pairs."""
